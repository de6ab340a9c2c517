package plugin

import (
	"context"
	"encoding/csv"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/redpanda-data/benthos/v4/public/service"
)

const (
	scannerCSV = "csv"

	fieldCustomDelimiter = "custom_delimiter"
	fieldParseHeaderRow  = "parse_header_row"
	fieldLazyQuotes      = "lazy_quotes"
	fieldContinueOnError = "continue_on_error"
)

// csvSpec returns the fields of the engine's csv scanner.
func csvSpec() *service.ConfigSpec {
	return service.NewConfigSpec().Fields(
		service.NewStringField(fieldCustomDelimiter).Default(""),
		service.NewBoolField(fieldParseHeaderRow).Default(true),
		service.NewBoolField(fieldLazyQuotes).Default(false),
		service.NewBoolField(fieldContinueOnError).Default(false),
	)
}

// csvScanners replaces the engine's csv scanner, which drops data without an error: the earlier
// values of columns with the same name, and all rows of a file whose lines end with CR, because
// it reads them as one header. Such a stream fails instead.
type csvScanners struct {
	delimiter       rune // 0 for the comma
	parseHeaderRow  bool
	lazyQuotes      bool
	continueOnError bool
}

func csvScannersFromParsed(conf *service.ParsedConfig) (*csvScanners, error) {
	c := &csvScanners{}
	delimiter, err := conf.FieldString(fieldCustomDelimiter)
	for _, r := range delimiter {
		c.delimiter = r
		break // as the engine, which ignores other characters
	}
	if err == nil {
		c.parseHeaderRow, err = conf.FieldBool(fieldParseHeaderRow)
	}
	if err == nil {
		c.lazyQuotes, err = conf.FieldBool(fieldLazyQuotes)
	}
	if err == nil {
		c.continueOnError, err = conf.FieldBool(fieldContinueOnError)
	}
	return c, err
}

func (c *csvScanners) Create(stream io.ReadCloser, ack service.AckFunc, _ *service.ScannerSourceDetails) (service.BatchScanner, error) {
	rows := csv.NewReader(stream)
	rows.LazyQuotes = c.lazyQuotes
	if c.delimiter != 0 {
		rows.Comma = c.delimiter
	}
	s := &csvScan{stream: stream, rows: rows, continueOnError: c.continueOnError}
	if c.parseHeaderRow {
		var err error
		if s.header, err = rows.Read(); err == nil {
			err = checkHeader(s.header)
		}
		if err != nil {
			return nil, err
		}
	}
	return service.AutoAggregateBatchScannerAcks(s, ack), nil
}

func (c *csvScanners) Close(context.Context) error { return nil }

// checkHeader returns an error if rows would lose data under these names. Columns without a name
// may be several, because spreadsheets append empty ones; csvScan.object checks their values.
func checkHeader(header []string) error {
	seen := make(map[string]bool, len(header))
	for _, name := range header {
		switch {
		case strings.Contains(name, "\r"):
			return errors.New("the lines of the CSV end with CR: convert them to LF or CRLF")
		case name != "" && seen[name]:
			return fmt.Errorf("the CSV has several columns named %.100q: rename them, or set %s of the %s scanner to false", name, fieldParseHeaderRow, scannerCSV)
		}
		seen[name] = true
	}
	return nil
}

type csvScan struct {
	stream          io.ReadCloser
	rows            *csv.Reader
	header          []string // nil without a header
	continueOnError bool
	row             int
}

// NextBatch returns the next row. With continueOnError, an invalid row is a message with an error.
func (s *csvScan) NextBatch(context.Context) (service.MessageBatch, error) {
	fields, err := s.rows.Read()
	if err != nil && (errors.Is(err, io.EOF) || !s.continueOnError) {
		return nil, err
	}
	m := service.NewMessage(nil)
	m.MetaSetMut("csv_row", s.row)
	s.row++
	if err != nil {
		m.SetError(err)
	}
	if s.header == nil {
		values := make([]any, len(fields))
		for i, value := range fields {
			values[i] = value
		}
		m.SetStructuredMut(values)
		return service.MessageBatch{m}, nil
	}
	object, err := s.object(fields)
	if err != nil {
		return nil, err
	}
	m.SetStructuredMut(object)
	return service.MessageBatch{m}, nil
}

// object returns the fields of a row by their names. A row with more fields than the header has
// an error already.
func (s *csvScan) object(fields []string) (map[string]any, error) {
	object := make(map[string]any, len(fields))
	for i, value := range fields[:min(len(fields), len(s.header))] {
		name := s.header[i]
		if other, ok := object[name]; ok && other != value {
			return nil, fmt.Errorf("row %d of the CSV has several values in columns without a name: name the columns, or set %s of the %s scanner to false", s.row, fieldParseHeaderRow, scannerCSV)
		}
		object[name] = value
	}
	return object, nil
}

func (s *csvScan) Close(context.Context) error { return s.stream.Close() }
