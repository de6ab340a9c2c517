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
	require.False(t, (&transport{Conn: announcing{near, nil}}).canTryFlush())
}

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

// announcing is a connection that has read a header from its socket. A nil socket is none.
type announcing struct {
	net.Conn
	socket *net.TCPConn
}

func (c announcing) TCPConn() (*net.TCPConn, bool) { return c.socket, c.socket != nil }

func TestSocketBelowAProxiedConnectionIsWrittenWithoutBlocking(t *testing.T) {
	near, far := socketPair(t)
	tr := &transport{Conn: announcing{near, near.(*net.TCPConn)}}
	require.True(t, tr.canTryFlush())
	b, err := tr.reserve(5)
	require.NoError(t, err)
	tr.gathered(append(b, "hello"...))
	require.True(t, tr.tryFlush())
	got := make([]byte, 5)
	_, err = io.ReadFull(far, got)
	require.NoError(t, err)
	require.Equal(t, "hello", string(got))
}
