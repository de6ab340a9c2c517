package cryo_test

import (
	"io"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/cryotest"
)

// A chunk, or a message before it, may take a slow line longer than a stream may be idle.
func TestStreamIsNotIdleWhileALargeFrameIsReceived(t *testing.T) {
	for name, before := range map[string]bool{"its own chunk": false, "a message before it": true} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s, peer := accepted(t, cryo.ServerOptions{})
				peer.AnswerPings()
				st := incoming(t, s, peer, 1, 0)
				read := start(func() error {
					_, err := io.Copy(io.Discard, st)
					return err
				})
				peer.Conn().StopReading()
				b := bytesOf(t, peer, txChunk(0, 1, strings.Repeat("x", 1_000_000)))
				if before {
					b = append(bytesOf(t, peer, cryotest.Binary(1000, string(make([]byte, 1_000_000)))), bytesOf(t, peer, txChunk(0, 1, "x"))...)
				}
				b = append(b, bytesOf(t, peer, txFinish(2, 0))...)
				for len(b) > 0 { // 5 kB/s
					n := min(5_000, len(b))
					sends(t, peer, b[:n])
					b = b[n:]
					time.Sleep(time.Second)
				}
				read.wantSuccess(t)
				require.NoError(t, st.Ack())
			})
		})
	}
}
