package plugin

import (
	"io"
	"net"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

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
			e.log.want(t, "WARN Too many connections without a session: closed the oldest", "limit=1024")
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
