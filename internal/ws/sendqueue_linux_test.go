package ws

import (
	"crypto/tls"
	"io"
	"net"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// socketPair returns two ends of a TCP connection, of which the first has received a byte.
func socketPair(t *testing.T) (near, far net.Conn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer func() { _ = l.Close() }()
	near, err = net.Dial("tcp", l.Addr().String())
	require.NoError(t, err)
	far, err = l.Accept()
	require.NoError(t, err)
	t.Cleanup(func() { _, _ = near.Close(), far.Close() })
	_, err = far.Write([]byte("x"))
	require.NoError(t, err)
	_, err = io.ReadFull(near, make([]byte, 1))
	require.NoError(t, err)
	return near, far
}

func TestUnacknowledgedBytesCountAsBacklog(t *testing.T) {
	near, far := socketPair(t)
	require.NoError(t, far.(*net.TCPConn).SetReadBuffer(16<<10))
	c := New(near, true)
	_, backlog := c.Progress()
	require.Zero(t, backlog)

	const size = 16 << 20 // more than both kernels hold
	writing := make(chan error, 1)
	go func() { writing <- c.Write(2, nil, make([]byte, size)) }()
	require.Eventually(t, func() bool {
		delivered, backlog := c.Progress()
		return delivered > 0 && backlog > 0
	}, 10*time.Second, time.Millisecond)

	go func() { _, _ = io.Copy(io.Discard, far) }()
	require.NoError(t, <-writing)
	require.NoError(t, c.Flush())
	require.Eventually(t, func() bool {
		delivered, backlog := c.Progress()
		return delivered >= size && backlog == 0
	}, 10*time.Second, time.Millisecond)

	require.NoError(t, c.Close())
	delivered, backlog := c.Progress()
	require.Zero(t, delivered)
	require.Zero(t, backlog)
}

func TestKernelCountsAreUsedOnlyForUnwrappedSockets(t *testing.T) {
	near, _ := socketPair(t)
	overTLS := tls.Client(tls.Client(near, &tls.Config{}), &tls.Config{})
	wrapped := struct{ net.Conn }{near}
	pipe, _ := net.Pipe()
	require.NotNil(t, sendQueueOf(near))
	require.NotNil(t, sendQueueOf(overTLS), "as through a proxy with TLS")
	require.Nil(t, sendQueueOf(wrapped))
	require.Nil(t, sendQueueOf(tls.Client(wrapped, &tls.Config{})))
	require.Nil(t, sendQueueOf(pipe))
}
