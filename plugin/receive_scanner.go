package plugin

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"regexp"
	"strings"

	"github.com/redpanda-data/benthos/v4/public/service"
	"gopkg.in/yaml.v3"
)

// Scanners cut streams into messages. They are the engine's, with two bounds that
// keep a client from ending the process: a panic of a scanner is an error of the
// stream, and no message of a stream is larger than max_bytes. Without the second a
// few kilobytes, compressed or in a sparse file of an archive, become a message
// that exhausts the memory.

// scanner is that of a configuration.
type scanner struct {
	name    string // its type, such as lines
	creator *service.OwnedScannerCreator
}

func scannerFromParsed(conf *service.ParsedConfig, maxBytes int64) (*scanner, error) {
	config, err := conf.FieldAny(fieldScanner)
	if err != nil {
		return nil, err
	}
	if node, ok := config.(*yaml.Node); ok {
		if err := node.Decode(&config); err != nil {
			return nil, fmt.Errorf("field %s: %w", fieldScanner, err)
		}
	}
	s, err := newScanner(config, maxBytes)
	if err != nil && isUnknown(err) {
		// The scanner may be one that only the environment of this pipeline has: then it
		// is not bounded.
		if creator, unknown := conf.FieldScanner(fieldScanner); unknown == nil {
			return &scanner{scannerType(config), creator}, nil
		}
	}
	return s, err
}

// newScanner makes a scanner of its configuration. Its error has no position in a file: the
// engine's is that in a text that the user does not know.
func newScanner(config any, maxBytes int64) (*scanner, error) {
	if err := checkChunks(config); err != nil {
		return nil, err
	}
	creator, err := boundedScanner(config, maxBytes)
	if err != nil {
		return nil, fmt.Errorf("field %s.%s: %s", fieldStreams, fieldScanner, positions.ReplaceAllString(err.Error(), ""))
	}
	return &scanner{scannerType(config), creator}, nil
}

var positions = regexp.MustCompile(`\(\d+,\d+\) `)

// isUnknown reports whether the engine has no scanner of the configured type.
func isUnknown(err error) bool { return strings.Contains(err.Error(), "unable to infer scanner type") }

// lintScanner is the lint rule of the field scanner.
func lintScanner(config any) error {
	s, err := newScanner(config, 0)
	switch {
	case err == nil:
		return s.creator.Close(context.Background())
	case isUnknown(err):
		return nil // the engine's lint reports it
	default:
		return err
	}
}

// scannerType returns the type in a scanner's configuration: the field type, or
// the only key.
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

	maxChunk = 1 << 30 // bytes, which the scanner allocates for each stream
)

// scannerRule is the name of the lint rule of the field scanner.
const scannerRule = fieldStreams + "." + fieldScanner

func init() { lintRules[scannerRule] = lintScanner }

// checkChunks finds chunks of a size that the scanner chunker panics at, or of which
// it makes no message.
func checkChunks(config any) error {
	switch c := config.(type) {
	case map[string]any:
		for key, value := range c {
			chunker, _ := value.(map[string]any)
			if size, ok := toInt(chunker["size"]); key == scannerChunker && ok && (size < 1 || size > maxChunk) {
				return fmt.Errorf("field size of the scanner %s must be at least 1 and at most 1 GiB (%d), got %v", scannerChunker, maxChunk, chunker["size"])
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

// open starts to scan a stream. The scanner acknowledges nothing by itself: it does
// not know whether the stream went on behind what it read.
func (s *scanner) open(stream io.ReadCloser, name string) (opened *openScanner, err error) {
	defer catchPanic(&err)
	details := service.NewScannerSourceDetails()
	details.SetName(name)
	engines, err := s.creator.Create(stream, func(context.Context, error) error { return nil }, details)
	if err != nil {
		return nil, err
	}
	return &openScanner{engines}, nil
}

// close is called once, when no stream is scanned any more.
func (s *scanner) close(ctx context.Context) (err error) {
	defer catchPanic(&err)
	return s.creator.Close(ctx)
}

// openScanner is the scanner of one stream.
type openScanner struct{ engines *service.OwnedScanner }

func (s *openScanner) NextBatch(ctx context.Context) (batch service.MessageBatch, ack service.AckFunc, err error) {
	defer catchPanic(&err)
	return s.engines.NextBatch(ctx)
}

func (s *openScanner) Close(ctx context.Context) (err error) {
	defer catchPanic(&err)
	return s.engines.Close(ctx)
}

// boundedScanner makes a scanner in an environment where decompress and tar,
// wherever they are in it, make no message that is much larger than maxBytes; 0 is
// any.
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

// decompressSpec is that of the engine's scanner.
func decompressSpec() *service.ConfigSpec {
	return service.NewConfigSpec().Fields(
		service.NewStringField(fieldAlgorithm),
		service.NewScannerField(fieldInto).Default(map[string]any{"to_the_end": map[string]any{}}),
	)
}

// boundedDecompress makes the engine's scanner with a bound between it and the one
// that it feeds.
func boundedDecompress(conf *service.ParsedConfig, maxBytes int64) (service.BatchScannerCreator, error) {
	algorithm, err := conf.FieldString(fieldAlgorithm)
	if err != nil {
		return nil, err
	}
	if algorithm == "pgzip" {
		// It reads the same format on a goroutine of its own, which nobody can
		// protect from a panic, and which stays for ever, with 4 MiB, when the
		// scanner behind it does not like the beginning of what it gets.
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

// boundedScanners are scanners that read no more than maxBytes for a message.
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

// NextBatch returns the reader's error in place of a message: some scanners make a
// last one of what came before it.
func (s *boundedScan) NextBatch(ctx context.Context) (service.MessageBatch, service.AckFunc, error) {
	s.reader.read = 0
	batch, ack, err := s.OwnedScanner.NextBatch(ctx)
	if s.reader.err != nil {
		return nil, nil, s.reader.err
	}
	return batch, ack, err
}

// readAhead is what a scanner may read beyond a message: buffers, and the padding of
// archives.
const readAhead = 64 << 10

// boundedReader reads what a scanner makes messages of, and fails where one of them
// takes more than maxBytes and readAhead.
type boundedReader struct {
	io.ReadCloser
	maxBytes int64
	read     int64 // for the message
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
	return fmt.Errorf("%w: a message of more than %d bytes", errTooLong, maxBytes)
}

// tarScanners are the engine's scanners for archives, which bound no file: a sparse
// one can have any size.
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
