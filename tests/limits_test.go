package tests

import (
	"context"
	"io"
	"net"
	"net/http"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/testkit"
)

const limitedPipeline = `
input:
  label: clients
  cryo_server:
    address: 127.0.0.1:0
    tokens: [ '${CRYO_TOKEN}' ]
    trusted_proxies: [ 127.0.0.1 ]
    proxy_protocol: true
    max_connects_per_second: 1
    max_messages_per_second: 20
output:
  drop: {}
`

func TestLimitsApplyToClientsBehindATCPProxy(t *testing.T) {
	p, service := runServing(t, limitedPipeline)
	address := p.Listening()
	dial := func() (*cryo.Session, error) {
		return cryo.Dial(t.Context(), "ws://"+address, &cryo.DialOptions{Token: token, NetDial: func(ctx context.Context, network, address string) (net.Conn, error) {
			c, err := (&net.Dialer{}).DialContext(ctx, network, address)
			if err == nil {
				_, err = io.WriteString(c, "PROXY TCP4 203.0.113.7 192.0.2.2 4711 80\r\n")
			}
			return c, err
		}})
	}
	s, err := dial()
	require.NoError(t, err)

	begin := time.Now()
	require.NoError(t, s.SendBatch(t.Context(), slices.Repeat([]cryo.OutMessage{cryo.Text("hello")}, 60)))
	require.GreaterOrEqual(t, time.Since(begin), 2*time.Second, "20 at most since its start, and 40 more")
	p.WantLog("Reads are paused: the peer sends faster than its limit", "max_messages_per_second=20")
	testkit.Eventually(t, func(c *assert.CollectT) {
		assert.NotEmpty(c, scrape(t, service)[`cryo_throttled_ns{label="clients",path="root.input"}`])
	})

	var dials []<-chan error
	for range 20 {
		dials = append(dials, testkit.Go(func() error {
			_, err := dial()
			return err
		}))
	}
	denied := 0
	for _, done := range dials {
		if err := testkit.Next(t, done); err != nil {
			var denial *cryo.HandshakeError
			require.ErrorAs(t, err, &denial)
			require.Equal(t, http.StatusServiceUnavailable, denial.StatusCode)
			require.GreaterOrEqual(t, denial.RetryAfter, 3*time.Second)
			require.LessOrEqual(t, denial.RetryAfter, 9*time.Second)
			denied++
		}
	}
	require.Positive(t, denied)
	p.WantLog("Denied a client", `remote="203.0.113.7:4711"`, "Too many clients are connecting at the same time.")

	_, err = cryo.Dial(t.Context(), "ws://"+address, &cryo.DialOptions{Token: token})
	require.Error(t, err, "without a header")
	p.WantLog("Closing a connection from a trusted proxy: it sent no valid PROXY protocol header", `remote="127.0.0.1:`)
	require.NoError(t, s.Err())
	p.Interrupt()
}
