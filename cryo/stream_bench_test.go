package cryo_test

import (
	"io"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// One long stream over the loopback interface, a chunk an operation. "out" is
// sent by a client, which masks, and "in" is received by it.
func BenchmarkStream(b *testing.B) {
	for _, way := range []string{"out", "in"} {
		b.Run(way, func(b *testing.B) {
			from, to := overTCP(b)
			if way == "in" {
				from, to = to, from
			}
			done := make(chan error, 1)
			go func() {
				st, err := to.AcceptStream(b.Context())
				if err == nil {
					_, err = io.CopyBuffer(io.Discard, struct{ io.Reader }{st}, make([]byte, 64<<10))
				}
				if err == nil {
					err = st.Ack()
				}
				done <- err
			}()
			b.SetBytes(cryo.DefaultChunkBytes)
			b.ReportAllocs()
			b.ResetTimer()
			size := int64(b.N) * cryo.DefaultChunkBytes
			require.NoError(b, from.SendStream(b.Context(), vast{size: size}.limited(), nil))
			require.NoError(b, <-done)
		})
	}
}
