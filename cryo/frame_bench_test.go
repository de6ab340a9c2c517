package cryo_test

import (
	"strings"
	"testing"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// benchmarkFrames are the frames that a busy session is full of.
var benchmarkFrames = []struct {
	name  string
	frame cryo.Frame
}{
	{"ACK", cryo.Frame{Type: cryo.TypeAck, Ack: 1}},
	{"UTF8/1KiB", cryo.Frame{Type: cryo.TypeUTF8, Ack: 1, Payload: []byte(strings.Repeat("x", 1<<10))}},
	{"TX_CHUNK/64KiB", cryo.Frame{Type: cryo.TypeTxChunk, Tx: 1, Payload: make([]byte, 64<<10)}},
}

func BenchmarkParseFrame(b *testing.B) {
	for _, bench := range benchmarkFrames {
		b.Run(bench.name, func(b *testing.B) {
			wire := appendFrame(b, nil, bench.frame)
			b.SetBytes(int64(len(wire)))
			b.ReportAllocs()
			for b.Loop() {
				if _, err := cryo.ParseFrame(wire); err != nil {
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
				if _, err := cryo.AppendFrame(buffer[:0], &bench.frame); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
