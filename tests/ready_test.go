package tests

import (
	"context"
	"net"
	"net/http"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/testkit"
)

func TestReadyReportsWhetherAnInputIsConnected(t *testing.T) {
	address := testkit.ReserveAddress(t)
	_, at := runServing(t, `
input: { label: feed, cryo: { url: "ws://${ADDRESS}", token: "${CRYO_TOKEN}" } }
output: { drop: {} }
`, "ADDRESS="+address)

	wantReady(t, at, http.StatusServiceUnavailable, `"label":"feed","path":"input","connected":false,"error":"`)
	server := serveAt(t, address)
	wantReady(t, at, http.StatusOK, `"label":"feed","path":"input","connected":true`)
	server.Stop()
	wantReady(t, at, http.StatusServiceUnavailable, `"connected":false,"error":"`)
	serveAt(t, address)
	wantReady(t, at, http.StatusOK, `"connected":true`)
}

// The engine checks an output only while it writes.
func TestReadyReportsWhetherAWritingOutputIsConnected(t *testing.T) {
	address := testkit.ReserveAddress(t)
	_, at := runServing(t, `
input: { generate: { interval: 20ms, mapping: root = "tick" } }
output: { label: feed, cryo: { url: "ws://${ADDRESS}", token: "${CRYO_TOKEN}" } }
`, "ADDRESS="+address)

	wantReady(t, at, http.StatusServiceUnavailable, `"label":"feed","path":"output","connected":false,"error":"`)
	server := serveAt(t, address)
	acknowledging := testkit.Go(func() error { return acknowledge(t.Context(), server) })
	wantReady(t, at, http.StatusOK, `"label":"feed","path":"output","connected":true`)
	server.Stop()
	require.Error(t, testkit.Next(t, acknowledging))
	wantReady(t, at, http.StatusServiceUnavailable, `"connected":false,"error":"`)
}

func TestReadyReportsWhetherAServerListens(t *testing.T) {
	for name, config := range map[string]string{
		"input":  "input: { cryo_server: { address: \"${ADDRESS}\", tokens: [ \"${CRYO_TOKEN}\" ] } }\noutput: { drop: {} }",
		"output": "input: { generate: { interval: 1h, mapping: root = 1 } }\noutput: { cryo_server: { address: \"${ADDRESS}\", tokens: [ \"${CRYO_TOKEN}\" ] } }",
	} {
		t.Run(name, func(t *testing.T) {
			taken := testkit.Listen(t)
			defer taken.Close()
			_, at := runServing(t, config, "ADDRESS="+taken.Addr().String())
			wantReady(t, at, http.StatusServiceUnavailable, "address already in use")
			require.NoError(t, taken.Close())
			wantReady(t, at, http.StatusOK, `"path":"`+name+`","connected":true`)
		})
	}
}

// wantReady waits until /ready responds so. The token must not be in the body.
func wantReady(t *testing.T, url string, status int, words string) {
	t.Helper()
	testkit.Eventually(t, func(c *assert.CollectT) {
		resp, err := testkit.HTTP(http.MethodGet, url+"/ready", "")
		require.NoError(c, err)
		require.NotContains(t, resp.Body, token)
		assert.Equal(c, status, resp.Status, resp.Body)
		assert.Contains(c, resp.Body, words)
	})
}

// acknowledge acknowledges every message of the next session, until it ends.
func acknowledge(ctx context.Context, server *testkit.Server) error {
	session := <-server.Sessions
	for {
		m, err := session.Receive(ctx)
		if err != nil {
			return err
		}
		_ = m.Ack() // Receive returns the end of the session
	}
}

// serveAt serves at a reserved address.
func serveAt(t *testing.T, address string) *testkit.Server {
	t.Helper()
	socket, err := net.Listen("tcp", address)
	require.NoError(t, err)
	return testkit.ServeOn(t, socket, cryo.SessionOptions{})
}
