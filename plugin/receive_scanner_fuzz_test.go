package plugin

import (
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"hash/crc32"
	"io"
	"strings"
	"testing"

	"github.com/redpanda-data/benthos/v4/public/bloblang"
	"github.com/redpanda-data/benthos/v4/public/service"
	"github.com/stretchr/testify/require"
)

// understood is a scanner of the engine with a stream that it understands.
type understood struct{ scanner, stream string }

// understoodStreams are all kinds of scanners, in an order that never changes: the
// corpora of fuzzing have their indexes. New ones come last.
func understoodStreams(t testing.TB) []understood {
	t.Helper()
	const csv, docs = "a,b\n1,\"2\n2\"\n3,4\n", `{"a":[1,{"b":null}]} [2] "x"`
	list := []understood{
		{"to_the_end: {}", csv},
		{"lines: {}", csv},
		{"lines: { custom_delimiter: ab, omit_empty: true, max_buffer_size: 20 }", "ababcab"},
		{"csv: {}", csv},
		{"csv: { continue_on_error: true, lazy_quotes: true, parse_header_row: false, custom_delimiter: b }", csv},
		{"json_documents: {}", docs},
		{"json_array: {}", `[{"a":1},[2],"x",5e3,null] [1]`},
		{"tar: {}", tarred(t, "one", "two")},
		{"tar: {}", sparse(t, 1<<50)},
		{"chunker: { size: 3 }", csv},
		{"re_match: { pattern: '(?m)^\\d', max_buffer_size: 20 }", csv},
		{"re_match: { pattern: 'a*' }", csv},
		{"skip_bom: { into: { csv: {} } }", "\xEF\xBB\xBF" + csv},
		{"switch: [ { re_match_name: 'x', scanner: { lines: {} } } ]", csv},
	}
	for _, algorithm := range []string{"gzip", "pgzip", "zlib", "flate", "snappy", "lz4"} {
		for _, in := range []understood{
			{"to_the_end: {}", csv},
			{"csv: {}", csv},
			{"tar: {}", tarred(t, "one")},
			{"decompress: { algorithm: " + algorithm + ", into: { lines: {} } }", compressed(t, algorithm, csv)},
		} {
			list = append(list, understood{
				"decompress: { algorithm: " + algorithm + ", into: { " + in.scanner + " } }",
				compressed(t, algorithm, in.stream),
			})
		}
	}
	x, err := hex.DecodeString("425a6839314159265359774bb01400000000800040200021184682ee48a70a120ee9760280")
	require.NoError(t, err)
	return append(list,
		understood{"decompress: { algorithm: bzip2 }", string(x)},
		understood{"decompress: { algorithm: bzip2, into: { csv: {} } }", string(x)},
	)
}

// compressed compresses a text by an algorithm of the engine.
func compressed(t testing.TB, algorithm, text string) string {
	t.Helper()
	if algorithm == "snappy" { // the engine's has no frames; this is one, of what is not compressed
		sum := crc32.Checksum([]byte(text), crc32.MakeTable(crc32.Castagnoli))
		frame := binary.LittleEndian.AppendUint32(nil, uint32(len(text)+4)<<8|1)
		frame = binary.LittleEndian.AppendUint32(frame, (sum>>15|sum<<17)+0xa282ead8)
		return "\xff\x06\x00\x00sNaPpY" + string(frame) + text
	}
	compress, err := bloblang.Parse(`root = this.text.compress(this.algorithm)`)
	require.NoError(t, err)
	result, err := compress.Query(map[string]any{"text": text, "algorithm": algorithm})
	require.NoError(t, err)
	return string(result.([]byte))
}

// FuzzScanners gives a scanner any stream. Whatever it is, the scanner comes to an
// end, without a panic, and makes no message of more than the bound.
func FuzzScanners(f *testing.F) {
	const maxBytes = 10_000
	var scanners []*scanner
	for i, u := range understoodStreams(f) {
		f.Add(uint8(i), []byte(u.stream))
		f.Add(uint8(i), []byte(u.stream[:len(u.stream)/2]))
		f.Add(uint8(i), []byte{})
		conf, err := service.NewConfigSpec().Field(service.NewScannerField(fieldScanner)).ParseYAML("scanner: { "+u.scanner+" }", nil)
		require.NoError(f, err)
		s, err := scannerFromParsed(conf, maxBytes)
		require.NoError(f, err)
		scanners = append(scanners, s)
	}
	f.Fuzz(func(t *testing.T, at uint8, stream []byte) {
		s := scanners[int(at)%len(scanners)]
		reader := strings.NewReader(string(stream[:min(len(stream), maxBytes)]))
		err := scanToTheEnd(t, s, io.NopCloser(reader), maxBytes)
		_, panicked := errors.AsType[*panicError](err)
		require.False(t, panicked, "%s: %v", s.name, err)
	})
}

// scanToTheEnd returns why a scanner ended, if it was not the stream's end.
func scanToTheEnd(t *testing.T, s *scanner, stream io.ReadCloser, maxBytes int) error {
	opened, err := s.open(stream, "x")
	if err != nil {
		return err
	}
	defer func() { _ = opened.Close(t.Context()) }() // what is compressed may be cut off
	for total := 0; ; {
		batch, ack, err := opened.NextBatch(t.Context())
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err == nil {
			err = readerFailed(batch)
		}
		if err != nil {
			return err
		}
		require.NoError(t, ack(context.Background(), nil))
		for _, m := range batch {
			content, err := m.AsBytes()
			require.NoError(t, err)
			// JSON writes some bytes as six.
			require.LessOrEqual(t, len(content), 6*(maxBytes+2*readAhead))
			total += len(content) + 1
		}
		require.LessOrEqual(t, total, 100<<20, "%s does not end", s.name)
	}
}

func TestEachScannerParsesItsStreamWithinMaxBytes(t *testing.T) {
	for _, u := range understoodStreams(t) {
		t.Run(u.scanner, func(t *testing.T) {
			conf, err := service.NewConfigSpec().Field(service.NewScannerField(fieldScanner)).ParseYAML("scanner: { "+u.scanner+" }", nil)
			require.NoError(t, err)
			s, err := scannerFromParsed(conf, 1000)
			require.NoError(t, err)
			err = scanToTheEnd(t, s, io.NopCloser(strings.NewReader(u.stream)), 1000)
			if strings.Contains(u.stream, "GNU.sparse") {
				require.ErrorIs(t, err, errTooLong)
			} else {
				require.NoError(t, err)
			}
		})
	}
}
