package ws

import (
	"crypto/tls"
	"io"
	"net"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

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

func TestKernelCountsAreUsedOnlyForKnownSockets(t *testing.T) {
	near, _ := socketPair(t)
	overTLS := tls.Client(tls.Client(near, &tls.Config{}), &tls.Config{})
	wrapped := struct{ net.Conn }{near}
	pipe, _ := net.Pipe()
	require.NotNil(t, sendQueueOf(near))
	require.NotNil(t, sendQueueOf(overTLS), "as through a proxy with TLS")
	require.NotNil(t, sendQueueOf(announcing{wrapped, near.(*net.TCPConn)}))
	require.NotNil(t, sendQueueOf(tls.Client(announcing{wrapped, near.(*net.TCPConn)}, &tls.Config{})))
	require.Nil(t, sendQueueOf(wrapped))
	require.Nil(t, sendQueueOf(tls.Client(wrapped, &tls.Config{})))
	require.Nil(t, sendQueueOf(pipe))
}
