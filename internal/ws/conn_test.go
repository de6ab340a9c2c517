package ws

import (
	"bufio"
	"errors"
	"io"
	"net"
	"testing"
	"time"

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

func TestEOFIsReadAfterTheData(t *testing.T) {
	for _, size := range []int{1, readSmall - 1, readSmall, readSmall + 1, 2 * ReadDirect, 2 * readBytes} {
		conn := &transport{Conn: &scriptedConn{data: make([]byte, size)}}
		for read := 0; read < size; {
			n := min(100, size-read)
			_, err := conn.readFull(make([]byte, n))
			require.NoError(t, err)
			read += n
		}
		for range 2 {
			_, err := conn.readFull(make([]byte, 100))
			require.Equal(t, io.ErrUnexpectedEOF, err)
			_, err = conn.peek(1)
			require.Equal(t, io.ErrUnexpectedEOF, err)
		}
	}
}

func TestHandshakeConsumesNoBytesOfTheFirstMessage(t *testing.T) {
	conn := &transport{Conn: &scriptedConn{data: []byte("handshake, frame")}}
	answer, err := bufio.NewReader(conn).ReadString(',')
	require.NoError(t, err)
	require.Equal(t, "handshake,", answer)
	rest := make([]byte, len(" frame"))
	_, err = conn.readFull(rest)
	require.NoError(t, err)
	require.Equal(t, " frame", string(rest))
}

// offeredConn returns received data, and records the size of the last read buffer.
type offeredConn struct {
	net.Conn
	arrived int
	offered int
}

func (c *offeredConn) Read(p []byte) (int, error) {
	c.offered = len(p)
	if c.arrived == 0 {
		return 0, io.EOF
	}
	n := min(len(p), c.arrived)
	c.arrived -= n
	return n, nil
}

func TestLargeBufferIsHeldOnlyWhileDataFlows(t *testing.T) {
	for _, size := range []int{1, readSmall - 1, readSmall + 1, 2 * readSmall, 1100, 4 * readSmall, readBytes, 3 * readBytes} {
		c := &offeredConn{arrived: size}
		conn := &transport{Conn: c}
		largest := 0
		for conn.fill() == nil {
			conn.skip(len(conn.ahead))
			largest = max(largest, c.offered)
		}
		require.LessOrEqual(t, c.offered, readSmall, "waiting for more than %d bytes", size)
		require.Nil(t, conn.large)
		require.Equal(t, size > readSmall, largest == readBytes, "%d bytes at once", size)
	}
}

func TestDiscardIncludesTheReadBuffer(t *testing.T) {
	for _, size := range []int{1, readSmall - 1, readSmall, readSmall + 1, 2 * readBytes} {
		for peeked := range 3 {
			c := &offeredConn{arrived: size}
			conn := &Conn{t: &transport{Conn: c}}
			_, err := conn.t.peek(min(peeked, size))
			require.NoError(t, err)
			conn.DiscardAll()
			require.Zero(t, c.arrived, "of %d bytes, %d of them seen", size, peeked)
			require.Zero(t, conn.Buffered())
		}
	}
}

// brokenConn takes some bytes and breaks then.
type brokenConn struct {
	net.Conn
	capacity int
}

var errBroken = errors.New("broken")

func (c *brokenConn) Write(p []byte) (int, error) {
	n := min(len(p), c.capacity)
	if c.capacity -= n; n < len(p) {
		return n, errBroken
	}
	return n, nil
}

func TestPartialWriteReturnsItsLength(t *testing.T) {
	conn := &transport{Conn: &brokenConn{capacity: GatherBytes + 10}}
	n, err := conn.Write(make([]byte, 3*GatherBytes))
	require.Equal(t, errBroken, err)
	require.Equal(t, GatherBytes+10, n)
	require.EqualValues(t, n, conn.accepted.Load())
	require.Zero(t, conn.unaccepted.Load())

	conn = &transport{Conn: &brokenConn{capacity: 10}}
	b, err := conn.reserve(100)
	require.NoError(t, err)
	conn.gathered(append(b, make([]byte, 100)...))
	require.Equal(t, errBroken, conn.flush())
	require.NoError(t, conn.flush(), "nothing is left to write")
}

// stuckConn accepts nothing until the test allows it.
type stuckConn struct {
	net.Conn
	accept chan struct{}
}

func (c *stuckConn) Write(p []byte) (int, error) {
	<-c.accept
	return len(p), nil
}

func TestWriteInProgressCountsAsBacklogWithoutKernelCounts(t *testing.T) {
	conn := &stuckConn{accept: make(chan struct{})}
	c := New(conn, false)
	writing := make(chan error, 1)
	go func() { writing <- c.Write(2, nil, make([]byte, WriteDirect)) }()
	conn.accept <- struct{}{} // the head
	conn.accept <- struct{}{}
	require.Eventually(t, func() bool {
		delivered, backlog := c.Progress()
		return delivered > pieceBytes && backlog == WriteDirect-pieceBytes
	}, 10*time.Second, time.Millisecond)
	close(conn.accept)
	require.NoError(t, <-writing)
	delivered, backlog := c.Progress()
	require.Greater(t, delivered, int64(WriteDirect))
	require.Zero(t, backlog)
}
