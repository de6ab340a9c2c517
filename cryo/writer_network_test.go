package cryo

import (
	"net"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/internal/wire"
	"github.com/cryo-connect/cryo-connect/internal/ws"
)

// networkWriter is a writer on a socket that can be written to without waiting, and the
// peer's end, which is not read. A write fails instead of waiting for too long.
func networkWriter(t *testing.T) (*writer, *ws.Conn) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer listener.Close()
	conn, err := net.Dial("tcp", listener.Addr().String())
	require.NoError(t, err)
	peer, err := listener.Accept()
	require.NoError(t, err)
	require.NoError(t, conn.SetWriteDeadline(time.Now().Add(10*time.Second)))
	w := newWriter(ws.New(conn, false), 1, newAckTable(dialingNumbers, 0), func(error) {})
	t.Cleanup(func() {
		_ = peer.Close()
		_ = conn.Close()
		w.wait()
	})
	if !w.conn.CanTryFlush() {
		t.Skip("every write may wait here")
	}
	return w, ws.New(peer, true)
}

func isActive(w *writer) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.active && !w.closed // no write has failed
}

// binaryCall is a call of one frame that is numbered and not sent.
func binaryCall(w *writer, size int) *call {
	c := newCall(wire.Frame{SID: 1, Type: wire.Binary, Payload: make([]byte, size)})
	w.acks.register(c)
	return c
}

func TestRestOfANonblockingWriteIsWritten(t *testing.T) {
	w, peer := networkWriter(t)
	sent := 0
	for ; !isActive(w); sent++ {
		c := binaryCall(w, nonblockingBytes)
		require.True(t, w.send(c.frames))
		require.True(t, c.frames[0].is(frameWritten), "in place")
	}
	for range sent {
		require.NoError(t, peer.Next())
		require.NoError(t, peer.ReadFull(make([]byte, peer.Left())))
	}
	w.wait()
	require.False(t, w.closed)
}

func TestLargeFrameIsNotWrittenByItsSender(t *testing.T) {
	w, _ := networkWriter(t)
	c := binaryCall(w, MaxPayload)
	require.True(t, w.send(c.frames))
	require.True(t, isActive(w))
	require.False(t, c.frames[0].is(frameWritten))
}
