package cryo_test

import (
	"io"
	"runtime"
	"testing"
	"testing/synctest"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// Of two that acknowledge a stream at the same time, neither returns that it is
// acknowledged when nobody is any more.
func TestConcurrentAcksAfterTheEndReturnTheCause(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, peer := accepted(t, cryo.ServerOptions{SessionOptions: quiet})
		var streams []*cryo.IncomingStream
		for tx := range uint32(200) {
			st := incoming(t, s, peer, 100+tx, tx)
			peer.WriteFrames(txFinish(1000+tx, tx))
			_, err := io.ReadAll(st)
			require.NoError(t, err)
			streams = append(streams, st)
		}
		cut(s)
		for _, st := range streams {
			var acks [2]*call
			for i := range acks {
				acks[i] = start(func() error {
					runtime.Gosched()
					return st.Ack()
				})
			}
			for _, c := range acks {
				require.ErrorIs(t, c.result(t), cryo.ErrClosed)
			}
		}
	})
}
