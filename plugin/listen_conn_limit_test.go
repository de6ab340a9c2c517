package plugin

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	"github.com/redpanda-data/benthos/v4/public/service"
	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// answers tells whether a connection on which nothing was said still has an
// answer to a request, in clear text too where TLS is spoken.
func answers(t *testing.T, c net.Conn) bool {
	t.Helper()
	require.NoError(t, c.SetDeadline(time.Now().Add(time.Minute)))
	_, _ = io.WriteString(c, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
	words := make([]byte, len("HTTP/1."))
	_, err := io.ReadFull(c, words)
	return err == nil && string(words) == "HTTP/1."
}

func TestClientCanConnectDespiteManyIdleConnections(t *testing.T) {
	ca := newAuthority(t, "ca")
	dir := t.TempDir()
	certFile, keyFile := filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	ca.issue(t, "server", certFile, keyFile)
	for scheme, settings := range map[string]string{"ws": "", "wss": ", tls: { cert_file: " + certFile + ", key_file: " + keyFile + " }"} {
		t.Run(scheme, func(t *testing.T) {
			t.Cleanup(func() { checkLeaks(t) })
			e := newEngine(t)
			address := onSocket(t, e, "max_sessions: 1, handshake_timeout: 10m"+settings)
			const over = 50
			var silent [minConnections + over]net.Conn
			for i := range silent {
				c, err := (&net.Dialer{}).DialContext(t.Context(), "tcp", address)
				require.NoError(t, err)
				t.Cleanup(func() { _ = c.Close() })
				silent[i] = c
			}

			s, err := cryo.Dial(t.Context(), scheme+"://"+address, &cryo.DialOptions{Token: token, TLS: ca.trusting()})
			require.NoError(t, err)
			e.wantReceives(t, s, "delivered")

			for i, c := range silent {
				require.Equal(t, i > over, answers(t, c), "the client and %d silent ones were too many, so the first %d are closed", over, over+1)
			}
			e.log.want(t, "WARN Too many connections without a session: closed the oldest one from the busiest address", "limit=1024")
			require.NoError(t, s.Close(t.Context(), ""))
		})
	}
}

func TestMaxSessionsClientsCanConnectAtOnce(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(with(listenInput, "max_sessions: 1100"), toProbe)
		var connecting [1100]net.Conn
		for i := range connecting {
			c, err := e.net.Dial(t.Context(), "tcp", somewhere)
			require.NoError(t, err)
			connecting[i] = c
		}
		synctest.Wait()
		for _, c := range connecting {
			require.True(t, answers(t, c))
			require.NoError(t, c.Close())
		}
	})
}

// addressedConn is a connection of a peer with an address.
type addressedConn struct {
	net.Conn
	address string
	closed  bool
}

func (c *addressedConn) RemoteAddr() net.Addr {
	return net.TCPAddrFromAddrPort(netip.MustParseAddrPort(c.address))
}

func (c *addressedConn) Close() error {
	c.closed = true
	return nil
}

func TestFloodOfConnectionsClosesOnlyThoseOfItsAddress(t *testing.T) {
	for name, flood := range map[string]string{"IPv4": "192.0.2.1:%d", "IPv6 network": "[2001:db8::%x]:1"} {
		t.Run(name, func(t *testing.T) {
			limit := newConnLimit(1, service.MockResources().Logger())
			open := func(address string) *addressedConn {
				c := &addressedConn{address: address}
				limit.changed(c, http.StateNew)
				return c
			}
			var clients []*addressedConn
			for i := range 3 * minConnections {
				if i%100 == 0 { // on slow lines
					clients = append(clients, open(fmt.Sprintf("198.51.100.%d:1", i/100)))
				}
				open(fmt.Sprintf(flood, 1+i))
			}
			require.Len(t, limit.conns, minConnections)
			for _, c := range clients {
				require.False(t, c.closed, "a flood has closed the connection of %s", c.address)
				limit.changed(c, http.StateHijacked)
			}
			require.Len(t, limit.peers, 1)
			require.Len(t, limit.ranked, 1)
		})
	}
}

func TestOldestConnectionIsClosedIfAddressesHaveEquallyMany(t *testing.T) {
	limit := newConnLimit(1, service.MockResources().Logger())
	var conns [minConnections + 10]*addressedConn
	for i := range conns {
		conns[i] = &addressedConn{address: fmt.Sprintf("192.0.%d.%d:1", i/256, i%256)}
		limit.changed(conns[i], http.StateNew)
	}
	for i, c := range conns {
		require.Equal(t, i < 10, c.closed, "connection %d", i)
		limit.changed(c, http.StateClosed)
	}
	require.Empty(t, limit.conns)
	require.Empty(t, limit.peers)
	require.Empty(t, limit.ranked)
}
