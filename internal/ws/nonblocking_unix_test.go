//go:build unix

package ws

import (
	"io"
	"net"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

// What a socket doesn't take at once is left for the next flush, in order.
func TestRestOfANonblockingWriteIsLeftForFlush(t *testing.T) {
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	require.NoError(t, err)
	defer func() { _ = l.Close() }()
	conn, err := net.Dial("unix", l.Addr().String())
	require.NoError(t, err)
	far, err := l.Accept()
	require.NoError(t, err)
	defer func() { _ = far.Close() }()

	tr := &transport{Conn: conn}
	require.True(t, tr.canTryFlush())
	var want []byte
	for taken := true; taken; {
		b, err := tr.reserve(1000)
		require.NoError(t, err)
		for i := range 1000 {
			b = append(b, byte(i+len(want)/1000))
		}
		want = append(want, b...)
		tr.gathered(b)
		taken = tr.tryFlush()
		require.Less(t, len(want), 64<<20, "a socket that nobody reads is full at some time")
	}

	got := make(chan []byte, 1)
	go func() {
		all, _ := io.ReadAll(far)
		got <- all
	}()
	require.NoError(t, tr.flush())
	require.NoError(t, conn.Close())
	require.Equal(t, want, <-got)
	require.NoError(t, far.Close())

	b, err := tr.reserve(1)
	require.NoError(t, err)
	tr.gathered(append(b, 'x'))
	require.False(t, tr.tryFlush(), "it is closed")
	require.Error(t, tr.flush())
}

// A connection around a socket may do more than that in its Write.
func TestOnlySocketsAreWrittenWithoutBlocking(t *testing.T) {
	near, far := net.Pipe()
	defer func() { _, _ = near.Close(), far.Close() }()
	require.False(t, (&transport{Conn: near}).canTryFlush())
	require.False(t, (&transport{Conn: struct{ *net.TCPConn }{&net.TCPConn{}}}).canTryFlush())
}
