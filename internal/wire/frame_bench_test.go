package wire_test

import (
	"strings"
	"testing"

	"github.com/cryo-connect/cryo-connect/internal/wire"
)

// benchmarkFrames are the frames that a busy session is full of.
var benchmarkFrames = []struct {
	name  string
	frame wire.Frame
}{
	{"ACK", wire.Frame{Type: wire.Ack, Ack: 1}},
	{"UTF8/1KiB", wire.Frame{Type: wire.UTF8, Ack: 1, Payload: []byte(strings.Repeat("x", 1<<10))}},
	{"TX_CHUNK/64KiB", wire.Frame{Type: wire.TxChunk, Tx: 1, Payload: make([]byte, 64<<10)}},
}

func BenchmarkParseFrame(b *testing.B) {
	for _, bench := range benchmarkFrames {
		b.Run(bench.name, func(b *testing.B) {
			encoded := appendFrame(b, nil, bench.frame)
			b.SetBytes(int64(len(encoded)))
			b.ReportAllocs()
			for b.Loop() {
				if _, err := wire.Parse(encoded); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkAppendFrame(b *testing.B) {
	for _, bench := range benchmarkFrames {
		b.Run(bench.name, func(b *testing.B) {
			buffer := appendFrame(b, nil, bench.frame)
			b.SetBytes(int64(len(buffer)))
			b.ReportAllocs()
			for b.Loop() {
				if _, err := wire.Append(buffer[:0], &bench.frame); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
