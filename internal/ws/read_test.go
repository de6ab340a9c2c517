package ws

import (
	"bytes"
	"io"
	"net"
	"runtime"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/require"
)

// tapeConn returns recorded bytes in pieces, and records what is written.
type tapeConn struct {
	net.Conn
	tape  []byte
	piece func() int // size of the next read; nil is all
	taken []byte
}

func (c *tapeConn) Read(p []byte) (int, error) {
	if len(c.tape) == 0 {
		return 0, io.EOF
	}
	if c.piece != nil {
		p = p[:min(len(p), c.piece())]
	}
	n := copy(p, c.tape)
	c.tape = c.tape[n:]
	return n, nil
}

func (c *tapeConn) Write(p []byte) (int, error) {
	c.taken = append(c.taken, p...)
	return len(p), nil
}

func (c *tapeConn) SetDeadline(time.Time) error      { return nil }
func (c *tapeConn) SetWriteDeadline(time.Time) error { return nil }
func (c *tapeConn) Close() error                     { return nil }

// inPiecesOf cuts a tape evenly.
func inPiecesOf(n int) func() int { return func() int { return n } }

func connOf(c net.Conn, masks bool) *Conn {
	conn := New(c, masks)
	conn.Start(func([]byte) {}, func() {})
	return conn
}

func TestWhatIsWrittenIsRead(t *testing.T) {
	sizes := []int{0, 1, 125, 126, 65535, 65536, GatherBytes - maxFrameHead, GatherBytes, 3*GatherBytes + 1}
	for _, masks := range []bool{false, true} {
		conn := &tapeConn{}
		ws := connOf(conn, masks)
		for _, size := range sizes {
			require.NoError(t, ws.Write(websocket.BinaryMessage, []byte("head"), bytes.Repeat([]byte{1, 2, 3}, size)[:size]))
		}
		require.NoError(t, ws.Flush())

		for _, piece := range []int{7, 1000, 1 << 20} {
			reader := connOf(&tapeConn{tape: conn.taken, piece: inPiecesOf(piece)}, !masks)
			for _, size := range sizes {
				require.NoError(t, reader.Next())
				message, err := reader.ReadRest(make([]byte, 0, min(reader.left, 4096)))
				require.NoError(t, err)
				require.Equal(t, "head", string(message[:4]))
				require.True(t, bytes.Equal(bytes.Repeat([]byte{1, 2, 3}, size)[:size], message[4:]), "%d bytes", size)
			}
			require.Equal(t, io.ErrUnexpectedEOF, reader.Next())
		}
	}
}

// A length is the peer's word: a session may not be made to allocate by it.
func TestMemoryIsGivenForWhatHasCome(t *testing.T) {
	conn := &tapeConn{}
	writer := connOf(conn, true)
	require.NoError(t, writer.Write(websocket.BinaryMessage, nil, make([]byte, (16<<20))))
	require.NoError(t, writer.Flush())
	for _, come := range []int{100, 1 << 20} {
		ws := connOf(&tapeConn{tape: conn.taken[:come], piece: inPiecesOf(1 << 20)}, false)
		require.NoError(t, ws.Next())
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		_, err := ws.ReadRest(make([]byte, 0, min(ws.left, 4096)))
		runtime.ReadMemStats(&after)
		require.Equal(t, io.ErrUnexpectedEOF, err)
		require.Less(t, after.TotalAlloc-before.TotalAlloc, uint64(trustFactor*come+4*minGrowth+4096), "%d bytes have come of %d", come, (16 << 20))
	}
}
