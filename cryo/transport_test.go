package cryo

import (
	"errors"
	"io"
	"net"
	"testing"

	"github.com/stretchr/testify/require"
)

// scriptedConn gives data and the end in one, as a TLS connection does.
type scriptedConn struct {
	net.Conn
	data []byte
}

func (c *scriptedConn) Read(p []byte) (int, error) {
	n := copy(p, c.data)
	if c.data = c.data[n:]; len(c.data) == 0 {
		return n, io.EOF
	}
	return n, nil
}

func TestTheEndIsReadAfterTheData(t *testing.T) {
	for _, size := range []int{1, 99, 100, 101, 1000, 2 * readBytes} {
		conn := &transport{Conn: &scriptedConn{data: make([]byte, size)}}
		read := 0
		for read < size {
			n, err := conn.Read(make([]byte, 100))
			require.NoError(t, err)
			require.Positive(t, n)
			read += n
		}
		for range 2 {
			n, err := conn.Read(make([]byte, 100))
			require.Zero(t, n)
			require.Equal(t, io.EOF, err)
		}
		require.Equal(t, io.EOF, conn.ended)
	}
}

// brokenConn takes some bytes and breaks then.
type brokenConn struct {
	net.Conn
	room int
}

var errBroken = errors.New("broken")

func (c *brokenConn) Write(p []byte) (int, error) {
	n := min(len(p), c.room)
	if c.room -= n; n < len(p) {
		return n, errBroken
	}
	return n, nil
}

func TestAWriteInPiecesSaysHowFarItGot(t *testing.T) {
	conn := &transport{Conn: &brokenConn{room: gatherBytes + 10}}
	n, err := conn.Write(make([]byte, 3*gatherBytes))
	require.Equal(t, errBroken, err)
	require.Equal(t, gatherBytes+10, n)
	require.False(t, conn.sending.Load())

	conn = &transport{Conn: &brokenConn{room: 10}}
	conn.gather()
	n, err = conn.Write(make([]byte, 100))
	require.NoError(t, err, "gathered")
	require.Equal(t, 100, n)
	require.Equal(t, errBroken, conn.flush())
	require.NoError(t, conn.flush(), "nothing is left to write")
}
