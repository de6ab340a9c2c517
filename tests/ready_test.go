package tests

import (
	"context"
	"io"
	"net"
	"net/http"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestReadyTellsWhetherTheSessionOfAnInputIsUp(t *testing.T) {
	address := freeAddress(t)
	_, at := runServing(t, `
input: { label: feed, cryo: { url: "ws://${ADDRESS}", token: "${CRYO_TOKEN}" } }
output: { drop: {} }
`, "ADDRESS="+address)

	wantReady(t, at, http.StatusServiceUnavailable, `"label":"feed","path":"input","connected":false,"error":"`)
	server := serveAt(t, listenAt(t, address))
	wantReady(t, at, http.StatusOK, `"label":"feed","path":"input","connected":true`)
	server.stop()
	wantReady(t, at, http.StatusServiceUnavailable, `"connected":false,"error":"`)
	serveAt(t, listenAt(t, address))
	wantReady(t, at, http.StatusOK, `"connected":true`)
}

// The engine asks an output only when there is something to write.
func TestReadyTellsWhetherTheSessionOfAnOutputThatWritesIsUp(t *testing.T) {
	address := freeAddress(t)
	_, at := runServing(t, `
input: { generate: { interval: 20ms, mapping: root = "tick" } }
output: { label: feed, cryo: { url: "ws://${ADDRESS}", token: "${CRYO_TOKEN}" } }
`, "ADDRESS="+address)

	wantReady(t, at, http.StatusServiceUnavailable, `"label":"feed","path":"output","connected":false,"error":"`)
	server := serveAt(t, listenAt(t, address))
	acknowledging := start(func() error { return server.acknowledge(t.Context()) })
	wantReady(t, at, http.StatusOK, `"label":"feed","path":"output","connected":true`)
	server.stop()
	require.Error(t, next(t, acknowledging))
	wantReady(t, at, http.StatusServiceUnavailable, `"connected":false,"error":"`)
}

func TestReadyTellsWhetherAServerListens(t *testing.T) {
	for name, config := range map[string]string{
		"input":  "input: { cryo_server: { address: \"${ADDRESS}\", tokens: [ \"${CRYO_TOKEN}\" ] } }\noutput: { drop: {} }",
		"output": "input: { generate: { interval: 1h, mapping: root = 1 } }\noutput: { cryo_server: { address: \"${ADDRESS}\", tokens: [ \"${CRYO_TOKEN}\" ] } }",
	} {
		t.Run(name, func(t *testing.T) {
			taken := listen(t)
			defer taken.Close()
			_, at := runServing(t, config, "ADDRESS="+taken.Addr().String())
			wantReady(t, at, http.StatusServiceUnavailable, "address already in use")
			require.NoError(t, taken.Close())
			wantReady(t, at, http.StatusOK, `"path":"`+name+`","connected":true`)
		})
	}
}

// wantReady waits until /ready answers so, and wants it never to tell the token.
func wantReady(t *testing.T, address string, status int, words string) {
	t.Helper()
	require.EventuallyWithT(t, func(c *assertT) {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+address+"/ready", nil)
		require.NoError(c, err)
		resp, err := http.DefaultClient.Do(req)
		require.NoError(c, err)
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		require.NoError(c, err)
		require.NotContains(t, string(body), token)
		assert.Equal(c, status, resp.StatusCode, string(body))
		assert.Contains(c, string(body), words)
	}, patience, 50*time.Millisecond)
}

// acknowledge acknowledges all that the next session sends, until it ends.
func (s *server) acknowledge(ctx context.Context) error {
	session := <-s.sessions
	for {
		m, err := session.Receive(ctx)
		if err != nil {
			return err
		}
		_ = m.Ack() // Receive tells the end of the session
	}
}

// listenAt listens on an address that was in use a moment ago.
func listenAt(t *testing.T, address string) net.Listener {
	t.Helper()
	socket, err := net.Listen("tcp", address)
	require.NoError(t, err)
	return socket
}
