package tests

import (
	"net"
	"net/http"
	"os"
	"strings"
	"syscall"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/testkit"
)

const drainingPipeline = `
input:
  cryo_server:
    address: 127.0.0.1:0
    tokens: [ '${CRYO_TOKEN}' ]
    drain_period: 3s
output:
  drop: {}
shutdown_delay: ${DELAY}
`

func TestStoppingProcessClosesItsSessionsOneByOne(t *testing.T) {
	p, service := runServing(t, drainingPipeline, "DELAY=7s")
	address := p.Listening()
	sessions := make([]*cryo.Session, 6)
	for i := range sessions {
		sessions[i] = testkit.Dial(t, address)
	}
	wantReady(t, service, http.StatusOK, "")
	p.AwaitStopHandling() // a stop that follows the start at once drains nothing
	p.Signal(syscall.SIGTERM)
	wantReady(t, service, http.StatusServiceUnavailable, "stopping")
	testkit.WantDelivered(t, testkit.Dial(t, address), "before the drain begins, also of a new client")

	p.WantLog("Draining: no client can connect", "sessions=7", "period=3s")
	_, err := net.Dial("tcp", address)
	require.ErrorIs(t, err, syscall.ECONNREFUSED)
	testkit.Eventually(t, func(c *assert.CollectT) {
		assert.Equal(c, "0", scrape(t, service)[`cryo_listening{label="",path="root.input"}`])
	})
	ends, delivered := 0, 0
	for open := sessions; len(open) > 0; ends++ {
		var left []*cryo.Session
		for _, s := range open {
			if s.SendText(t.Context(), "as before") == nil {
				delivered++
				left = append(left, s)
			} else {
				var closed *cryo.PeerClosedError
				require.ErrorAs(t, s.Err(), &closed)
				require.Equal(t, 1012, closed.Code)
			}
		}
		if len(left) == len(open) {
			ends--
		}
		open = left
	}
	require.Greater(t, ends, 1, "they do not end together")
	require.Positive(t, delivered)
	p.WantExit(0)
}

func TestDrainPeriodThatExceedsShutdownDelayIsRejected(t *testing.T) {
	p := runConfig(t, drainingPipeline, "DELAY=2s")
	p.WantLog("field drain_period is 3s, but shutdown_delay of the configuration is 2s")
	p.WantExit(1)
}

func TestNegativeShutdownDelayIsRejected(t *testing.T) {
	p := runConfig(t, drainingPipeline, "DELAY=-1s")
	p.WantLog("field shutdown_delay must not be negative, got -1s")
	p.WantExit(1)
}

// A pipeline that replaced another one now would not drain, and would be ready.
func TestStoppingProcessAcceptsNoOtherConfiguration(t *testing.T) {
	api := testkit.ReserveAddress(t)
	config := strings.ReplaceAll(drainingPipeline, "${DELAY}", "7s")
	path := testkit.WriteFile(t, "pipeline.yaml", config)
	p := launch(t, []string{"CRYO_TOKEN=" + token, "CRYO_CONNECT_HTTP_ADDRESS=" + api}, "run", "-w", path)
	p.Listening()
	p.AwaitStopHandling() // a stop that follows the start at once drains nothing
	p.Signal(syscall.SIGTERM)
	wantReady(t, "http://"+api, http.StatusServiceUnavailable, "stopping")
	require.NoError(t, os.WriteFile(path, []byte(strings.Replace(config, "drop: {}", "drop: {} # changed", 1)), 0o600))
	p.WantLog("the process is stopping: no further configuration is accepted")
	wantReady(t, "http://"+api, http.StatusServiceUnavailable, "stopping")
	p.WantExit(0)
}
