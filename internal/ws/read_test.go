package ws

import (
	"bytes"
	"io"
	"net"
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
	conn.Start(func([]byte) {}, func(int, bool) {})
	return conn
}

func TestWrittenMessagesAreRead(t *testing.T) {
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
				message, err := readRest(reader, make([]byte, 0, min(reader.left, 4096)))
				require.NoError(t, err)
				require.Equal(t, "head", string(message[:4]))
				require.True(t, bytes.Equal(bytes.Repeat([]byte{1, 2, 3}, size)[:size], message[4:]), "%d bytes", size)
			}
			require.Equal(t, io.ErrUnexpectedEOF, reader.Next())
		}
	}
}
