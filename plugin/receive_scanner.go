package plugin

import (
	"archive/tar"
	"bufio"
	"bytes"
	"compress/gzip"
	"compress/zlib"
	"context"
	"encoding/csv"
	"errors"
	"fmt"
	"io"
	"math"
	"regexp"
	"slices"
	"strings"

	"github.com/redpanda-data/benthos/v4/public/service"
	"gopkg.in/yaml.v3"
)

// Scanners split streams into messages. They are those of the engine, with two safeguards that
// prevent a client from crashing the process: a panic of a scanner becomes an error of the
// stream, and a message of a stream is limited to max_bytes. Without that limit, a few kilobytes
// of compressed data, a sparse file in an archive, or a row of CSV with a quote that is never
// closed, could become a message that exhausts the memory. The csv scanner is replaced, because the
// engine's loses data without an error.

// scanner is the scanner that is configured for the streams of an input.
type scanner struct {
	name    string // type of the scanner, such as lines
	creator *service.OwnedScannerCreator
	// maxRead limits the bytes that are read for one message of a stream without max_bytes. 0: no
	// limit, because max_bytes has one or the scanner's messages are as large as the stream or its
	// files.
	maxRead int64
}

// maxRecord is the maximum size of a record, such as a row of CSV, in a stream without max_bytes,
// in bytes.
const maxRecord = 64 << 20

func scannerFromParsed(conf *service.ParsedConfig, maxBytes int64) (*scanner, error) {
	config, err := conf.FieldAny(fieldScanner)
	if err != nil {
		return nil, err
	}
	if node, ok := config.(*yaml.Node); ok {
		if err := node.Decode(&config); err != nil {
			return nil, fmt.Errorf("field %s.%s: %w", fieldStreams, fieldScanner, err)
		}
	}
	s, err := newScanner(config, maxBytes)
	if err != nil && isUnknownScanner(err) {
		// The scanner may exist only in the environment of this pipeline. In that case its messages
		// are not limited.
		if creator, unknown := conf.FieldScanner(fieldScanner); unknown == nil {
			return &scanner{name: scannerType(config), creator: creator}, nil
		}
	}
	return s, err
}

// newScanner returns the scanner of a configuration. It removes lines and columns from the
// engine's errors, because they refer to generated YAML.
func newScanner(config any, maxBytes int64) (*scanner, error) {
	if err := checkChunks(config); err != nil {
		return nil, err
	}
	s := &scanner{name: scannerType(config)}
	if maxBytes == 0 && !readsWhole(config) {
		maxBytes, s.maxRead = maxRecord, maxRecord
	}
	var err error
	if s.creator, err = boundedScanner(config, maxBytes); err != nil {
		return nil, fmt.Errorf("field %s.%s: %s", fieldStreams, fieldScanner, positions.ReplaceAllString(err.Error(), ""))
	}
	return s, nil
}

// readsWhole reports whether a scanner returns whole streams or files as messages, at any depth of
// its configuration.
func readsWhole(config any) bool {
	switch c := config.(type) {
	case map[string]any:
		for key, value := range c {
			fields, _ := value.(map[string]any)
			switch {
			case key == scannerToTheEnd, key == scannerTar, key == scannerChunker:
				return true
			case key == "type" && (value == scannerToTheEnd || value == scannerTar || value == scannerChunker):
				return true
			case key == scannerDecompress && fields[fieldInto] == nil, readsWhole(value):
				return true
			}
		}
	case []any:
		return slices.ContainsFunc(c, readsWhole)
	}
	return false
}

var positions = regexp.MustCompile(`\(\d+,\d+\) |yaml: unmarshal errors:\n +line \d+: `)

// isUnknownScanner reports whether an error means that the engine has no scanner of the
// configured type.
func isUnknownScanner(err error) bool {
	return strings.Contains(err.Error(), "unable to infer scanner type")
}

// lintScanner is the lint rule of the field scanner.
func lintScanner(config any) error {
	s, err := newScanner(config, 0)
	switch {
	case err == nil:
		return s.creator.Close(context.Background())
	case isUnknownScanner(err):
		return nil // the engine's lint reports the unknown type
	default:
		return err
	}
}

// scannerType returns the type of the scanner in a configuration: the field type, or the only
// key.
func scannerType(config any) string {
	fields, _ := config.(map[string]any)
	if name, ok := fields["type"].(string); ok {
		return name
	}
	for name := range fields {
		return name
	}
	return ""
}

const (
	scannerChunker    = "chunker"
	scannerDecompress = "decompress"
	scannerTar        = "tar"
	scannerToTheEnd   = "to_the_end"

	maxChunk = 1 << 30 // bytes; the scanner allocates a chunk for each stream
)

// scannerRule is the name of the lint rule of the field scanner.
const scannerRule = fieldStreams + "." + fieldScanner

func init() { lintRules[scannerRule] = lintScanner }

// checkChunks rejects chunk sizes for which the chunker scanner would panic, return no message
// or use too much memory.
func checkChunks(config any) error {
	switch c := config.(type) {
	case map[string]any:
		for key, value := range c {
			chunker, _ := value.(map[string]any)
			if size, ok := toInt(chunker["size"]); key == scannerChunker && ok && (size < 1 || size > maxChunk) {
				return fmt.Errorf("field size of the %s scanner must be at least 1 and at most 1 GiB (%d), got %v", scannerChunker, maxChunk, chunker["size"])
			}
			if err := checkChunks(value); err != nil {
				return err
			}
		}
	case []any:
		for _, value := range c {
			if err := checkChunks(value); err != nil {
				return err
			}
		}
	}
	return nil
}

// open opens the scanner for a stream. name is the name of the stream. The scanner's own
// acknowledgement has no effect, because the scanner may end before the stream.
func (s *scanner) open(stream io.ReadCloser, name string) (opened *openScanner, err error) {
	defer catchPanic(&err)
	details := service.NewScannerSourceDetails()
	details.SetName(name)
	ack := func(context.Context, error) error { return nil }
	var inner service.BatchScanner
	if s.maxRead > 0 {
		inner, err = boundedScanners{s.creator, s.maxRead}.Create(stream, ack, details)
	} else {
		inner, err = s.creator.Create(stream, ack, details)
	}
	if err != nil {
		return nil, err
	}
	return &openScanner{inner}, nil
}

// scannerHint returns advice about the fields of a scanner whose error is err, or "".
func scannerHint(err error) string {
	switch {
	case errors.Is(err, bufio.ErrTooLong):
		return " (raise max_buffer_size of the scanner)"
	case errors.Is(err, csv.ErrBareQuote), errors.Is(err, csv.ErrQuote):
		return " (if the stream begins with a byte order mark, wrap the csv scanner in skip_bom; if fields contain quotes that are not doubled, set its lazy_quotes)"
	case errors.Is(err, csv.ErrFieldCount):
		return " (check custom_delimiter of the csv scanner; with continue_on_error, such a row becomes a message with an error)"
	case errors.Is(err, gzip.ErrHeader), errors.Is(err, zlib.ErrHeader):
		return " (check algorithm of the decompress scanner)"
	}
	return ""
}

// close closes the scanner. Call it once, after all streams have been scanned.
func (s *scanner) close(ctx context.Context) (err error) {
	defer catchPanic(&err)
	return s.creator.Close(ctx)
}

// openScanner is the scanner of one stream. It converts panics to errors.
type openScanner struct{ inner service.BatchScanner }

func (s *openScanner) NextBatch(ctx context.Context) (batch service.MessageBatch, ack service.AckFunc, err error) {
	defer catchPanic(&err)
	return s.inner.NextBatch(ctx)
}

func (s *openScanner) Close(ctx context.Context) (err error) {
	defer catchPanic(&err)
	return s.inner.Close(ctx)
}

// boundedScanner creates a scanner in an environment in which decompress and tar, at any depth
// of the configuration, return no message that is much larger than maxBytes, and csv loses no
// data. If maxBytes is 0, there is no limit.
func boundedScanner(config any, maxBytes int64) (*service.OwnedScannerCreator, error) {
	if maxBytes == 0 {
		maxBytes = math.MaxInt64
	}
	env := service.GlobalEnvironment().Clone()
	if err := env.RegisterBatchScannerCreator(scannerTar, service.NewConfigSpec(), func(*service.ParsedConfig, *service.Resources) (service.BatchScannerCreator, error) {
		return tarScanners{maxBytes}, nil
	}); err != nil {
		return nil, err
	}
	if err := env.RegisterBatchScannerCreator(scannerCSV, csvSpec(), func(conf *service.ParsedConfig, _ *service.Resources) (service.BatchScannerCreator, error) {
		return csvScannersFromParsed(conf)
	}); err != nil {
		return nil, err
	}
	if err := env.RegisterBatchScannerCreator(scannerDecompress, decompressSpec(), func(conf *service.ParsedConfig, _ *service.Resources) (service.BatchScannerCreator, error) {
		return boundedDecompress(conf, maxBytes)
	}); err != nil {
		return nil, err
	}
	return makeScanner(env, config)
}

func makeScanner(env *service.Environment, config any) (*service.OwnedScannerCreator, error) {
	text, err := yaml.Marshal(map[string]any{fieldScanner: config})
	if err != nil {
		return nil, err
	}
	conf, err := service.NewConfigSpec().Field(service.NewScannerField(fieldScanner)).ParseYAML(string(text), env)
	if err != nil {
		return nil, err
	}
	return conf.FieldScanner(fieldScanner)
}

const (
	fieldAlgorithm = "algorithm"
	fieldInto      = "into"
)

// decompressSpec returns the fields of the engine's decompress scanner.
func decompressSpec() *service.ConfigSpec {
	return service.NewConfigSpec().Fields(
		service.NewStringField(fieldAlgorithm),
		service.NewScannerField(fieldInto).Default(map[string]any{"to_the_end": map[string]any{}}),
	)
}

// boundedDecompress creates the engine's decompress scanner, with limits on how many bytes it and
// its inner scanner read for a message.
func boundedDecompress(conf *service.ParsedConfig, maxBytes int64) (service.BatchScannerCreator, error) {
	algorithm, err := conf.FieldString(fieldAlgorithm)
	if err != nil {
		return nil, err
	}
	if algorithm == "pgzip" {
		// pgzip reads the same format on its own goroutine. A panic there cannot be
		// recovered, and the goroutine and its 4 MiB leak if the inner scanner fails early.
		algorithm = "gzip"
	}
	into, err := conf.FieldScanner(fieldInto)
	if err != nil {
		return nil, err
	}
	const bounded = "bounded"
	env := service.GlobalEnvironment().Clone()
	if err := env.RegisterBatchScannerCreator(bounded, service.NewConfigSpec(), func(*service.ParsedConfig, *service.Resources) (service.BatchScannerCreator, error) {
		return boundedScanners{into, maxBytes}, nil
	}); err != nil {
		return nil, err
	}
	decompress, err := makeScanner(env, map[string]any{scannerDecompress: map[string]any{
		fieldAlgorithm: algorithm,
		fieldInto:      map[string]any{bounded: map[string]any{}},
	}})
	return boundedScanners{decompress, maxBytes}, err
}

// boundedScanners creates scanners that read little more than maxBytes for a message.
type boundedScanners struct {
	*service.OwnedScannerCreator
	maxBytes int64
}

func (b boundedScanners) Create(stream io.ReadCloser, ack service.AckFunc, details *service.ScannerSourceDetails) (service.BatchScanner, error) {
	reader := &boundedReader{ReadCloser: stream, maxBytes: b.maxBytes}
	s, err := b.OwnedScannerCreator.Create(reader, ack, details)
	if err != nil {
		return nil, err
	}
	return &boundedScan{s, reader}, nil
}

type boundedScan struct {
	*service.OwnedScanner
	reader *boundedReader
}

// NextBatch returns the reader's error, if there is one, instead of a batch: some scanners
// return the bytes before an error as a last message.
func (s *boundedScan) NextBatch(ctx context.Context) (service.MessageBatch, service.AckFunc, error) {
	s.reader.read = 0
	batch, ack, err := s.OwnedScanner.NextBatch(ctx)
	if s.reader.err != nil {
		return nil, nil, s.reader.err
	}
	return batch, ack, err
}

// readAhead is the number of bytes that a scanner may read beyond a message, because of buffers
// and the padding of archives.
const readAhead = 64 << 10

// boundedReader fails when a scanner reads more than maxBytes plus readAhead for a message.
type boundedReader struct {
	io.ReadCloser
	maxBytes int64
	read     int64 // bytes read for the current message
	err      error // never io.EOF
}

func (r *boundedReader) Read(p []byte) (n int, err error) {
	if r.err == nil && r.read-readAhead > r.maxBytes {
		r.err = tooLarge(r.maxBytes)
	}
	if r.err != nil {
		return 0, r.err
	}
	n, err = r.ReadCloser.Read(p)
	r.read += int64(n)
	if err != nil && !errors.Is(err, io.EOF) {
		r.err = err
	}
	return n, err
}

func tooLarge(maxBytes int64) error {
	return fmt.Errorf("%w: one of its messages is longer than %d bytes", errTooLong, maxBytes)
}

// tarScanners replaces the engine's tar scanner, which does not limit the size of a file: a sparse
// file can have any size.
type tarScanners struct{ maxBytes int64 }

func (t tarScanners) Create(stream io.ReadCloser, ack service.AckFunc, _ *service.ScannerSourceDetails) (service.BatchScanner, error) {
	return service.AutoAggregateBatchScannerAcks(&tarScan{stream, tar.NewReader(stream), t.maxBytes}, ack), nil
}

func (t tarScanners) Close(context.Context) error { return nil }

type tarScan struct {
	stream   io.ReadCloser
	files    *tar.Reader
	maxBytes int64
}

func (t *tarScan) NextBatch(context.Context) (service.MessageBatch, error) {
	header, err := t.files.Next()
	if err != nil {
		return nil, err
	}
	if header.Size > t.maxBytes {
		return nil, tooLarge(t.maxBytes)
	}
	var content bytes.Buffer
	if _, err := io.Copy(&content, t.files); err != nil {
		return nil, err
	}
	m := service.NewMessage(content.Bytes())
	m.MetaSetMut("tar_name", header.Name)
	return service.MessageBatch{m}, nil
}

func (t *tarScan) Close(context.Context) error { return t.stream.Close() }
