package testkit

import (
	"io"
	"net"
	"testing"

	"github.com/stretchr/testify/require"
)

// dial connects, and returns both ends of the connection.
func dial(t *testing.T, address string, accepting net.Listener) (client, server net.Conn) {
	t.Helper()
	client, err := net.Dial("tcp", address)
	require.NoError(t, err)
	t.Cleanup(func() { _ = client.Close() })
	server, err = accepting.Accept()
	require.NoError(t, err)
	t.Cleanup(func() { _ = server.Close() })
	return client, server
}

func wantByte(t *testing.T, from, to net.Conn) {
	t.Helper()
	_, err := from.Write([]byte{1})
	require.NoError(t, err)
	_, err = to.Read(make([]byte, 1))
	require.NoError(t, err)
}

func TestProxySkipsABackendThatDoesNotListen(t *testing.T) {
	backend := Listen(t)
	defer backend.Close()
	proxy := NewProxy(t, ReserveAddress(t), backend.Addr().String())
	for range 2 {
		client, server := dial(t, proxy.Address(), backend)
		wantByte(t, client, server)
		wantByte(t, server, client)
		require.NoError(t, client.Close())
		_, err := server.Read(make([]byte, 1))
		require.ErrorIs(t, err, io.EOF)
	}
}

func TestBackendStaysConnectedWhenClientsAreDisconnected(t *testing.T) {
	backend := Listen(t)
	defer backend.Close()
	proxy := NewProxy(t, backend.Addr().String())
	client, server := dial(t, proxy.Address(), backend)
	wantByte(t, client, server)
	proxy.CutClients()
	_, err := client.Read(make([]byte, 1))
	require.ErrorIs(t, err, io.EOF)
	ended := Go(func() error { _, err := server.Read(make([]byte, 1)); return err })
	_, err = server.Write([]byte{1})
	require.NoError(t, err)
	other, otherServer := dial(t, proxy.Address(), backend)
	wantByte(t, other, otherServer)
	WantPending(t, ended, "the connection to the backend is open")
	proxy.CutBackends()
	require.Error(t, Next(t, ended))
}

func TestListenerClosesConnectionsWhileDown(t *testing.T) {
	listener := NewListener(Listen(t))
	defer listener.Close()
	client, server := dial(t, listener.Addr().String(), listener)
	wantByte(t, client, server)
	listener.SetDown(true)
	_, err := client.Read(make([]byte, 1))
	require.ErrorIs(t, err, io.EOF)

	accepted := make(chan net.Conn)
	go func() {
		conn, err := listener.Accept()
		if err == nil {
			accepted <- conn
		}
	}()
	early, err := net.Dial("tcp", listener.Addr().String())
	require.NoError(t, err)
	defer early.Close()
	listener.WantAttempt(t)
	_, err = early.Read(make([]byte, 1))
	require.Error(t, err)
	listener.SetDown(false)
	late, err := net.Dial("tcp", listener.Addr().String())
	require.NoError(t, err)
	defer late.Close()
	wantByte(t, late, Next(t, accepted))
}
