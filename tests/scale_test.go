package tests

import (
	"bytes"
	"crypto/tls"
	"fmt"
	"net/http"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/internal/testkit"
)

// What many sessions cost. The server is the binary, a separate process, so that its
// memory is measured without the clients'.

// The limits of the resident memory of an idle session, in bytes, with what the garbage
// collector has not returned.
const (
	maxSessionMemory = 32 << 10
	maxTLSMemory     = 16 << 10 // in addition
	maxGarbage       = 8 << 20  // of the process, with any number of sessions
)

// crowdConfig drops the messages of clients, and broadcasts those of HTTP requests.
const crowdConfig = `
input:
  broker:
    inputs:
      - cryo_server:
          address: 127.0.0.1:0
          tokens: [ "${CRYO_TOKEN}" ]
          tls: { cert_file: "${CERT_FILE:}", key_file: "${KEY_FILE:}" }
          max_sessions: 20000
          heartbeat_interval: ${HEARTBEAT}
      - http_server:
          address: ${HTTP_ADDRESS}
          path: /broadcast
          timeout: 5m
output:
  switch:
    cases:
      - check: '@cryo_session_id != null'
        output: { drop: {} }
      - output:
          cryo_server:
            address: 127.0.0.1:0
            tokens: [ "${CRYO_TOKEN}" ]
            tls: { cert_file: "${CERT_FILE:}", key_file: "${KEY_FILE:}" }
            max_sessions: 20000
            heartbeat_interval: ${HEARTBEAT}
            ack_timeout: 5m
`

// idleness is a number of sessions that are mostly idle.
type idleness struct {
	sessions   int
	heartbeat  time.Duration
	secure     bool
	broadcasts int
}

func TestIdleSessionsNeedLittleMemoryAndReceiveABroadcast(t *testing.T) {
	(&idleness{sessions: 1000, heartbeat: time.Second, broadcasts: 1}).measure(t)
}

// BenchmarkTenThousandIdleSessions has ten times the sessions, which are too many for
// the race detector, and reports times. After 25 broadcasts their memory hardly grows.
func BenchmarkTenThousandIdleSessions(b *testing.B) {
	for _, secure := range []bool{false, true} {
		b.Run(fmt.Sprintf("TLS=%v", secure), func(b *testing.B) {
			for range b.N {
				(&idleness{sessions: 10_000, heartbeat: 3 * time.Second, secure: secure, broadcasts: 25}).measure(b)
			}
		})
	}
}

// measure opens the sessions, broadcasts, and checks the memory of both.
func (i *idleness) measure(tb testing.TB) {
	n := i.sessions
	allowFiles(tb, uint64(n)+500)
	httpAddress := testkit.ReserveAddress(tb)
	env := []string{"HTTP_ADDRESS=" + httpAddress, "HEARTBEAT=" + i.heartbeat.String()}
	most := maxSessionMemory + maxGarbage/float64(n)
	var trusted *tls.Config
	if i.secure {
		dir := tb.TempDir()
		certFile, keyFile := filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
		trusted = certify(tb, certFile, keyFile)
		env = append(env, "CERT_FILE="+certFile, "KEY_FILE="+keyFile)
		most += maxTLSMemory
	}
	p := runConfig(tb, crowdConfig, env...)
	address := p.Listening()
	message := bytes.Repeat([]byte("x"), 1<<10)
	join(tb, address, trusted, 1, message)
	broadcast(tb, httpAddress, message)
	before := memory(tb, p, "VmRSS")
	perSession := func() float64 { return float64(memory(tb, p, "VmRSS")-before) / float64(n) }

	begin := time.Now()
	c := join(tb, address, trusted, n, message)
	connecting := time.Since(begin)
	c.send(message) // no session has been idle since it was opened
	c.wantHeartbeats(2, 10*i.heartbeat+testkit.Patience)
	idle := perSession()

	begin = time.Now()
	broadcast(tb, httpAddress, message)
	broadcasting := time.Since(begin)
	for range i.broadcasts - 1 {
		broadcast(tb, httpAddress, message)
	}
	after := perSession()
	require.EqualValues(tb, i.broadcasts*n, c.got.Load(), "a delivered broadcast reached every client")
	c.wantAlive()

	if b, ok := tb.(*testing.B); ok {
		b.ReportMetric(0, "ns/op") // not reported: most of the time is waiting for heartbeats
		b.ReportMetric(idle, "B/session")
		b.ReportMetric(after, "B/session-after-broadcasts")
		b.ReportMetric(connecting.Seconds(), "s-to-connect")
		b.ReportMetric(broadcasting.Seconds(), "s-to-broadcast")
	}
	tb.Logf("%d sessions connected in %v; %.0f bytes each; a broadcast in %v; %.0f bytes each after %d", n, connecting, idle, broadcasting, after, i.broadcasts)
	require.Less(tb, idle, most)
	require.Less(tb, after, most)
}

// broadcast sends a message to all clients, and returns when all have acknowledged it.
func broadcast(tb testing.TB, httpAddress string, message []byte) {
	tb.Helper()
	testkit.Eventually(tb, func(c *assert.CollectT) { // until the output listens; before, nothing is sent
		resp, err := testkit.HTTP(http.MethodPost, "http://"+httpAddress+"/broadcast", string(message))
		require.NoError(c, err)
		require.Equal(c, http.StatusOK, resp.Status)
	})
}

// allowFiles raises the limit of open files, of this process and of those that it
// starts, beyond the maximum to which Go raises it.
func allowFiles(tb testing.TB, n uint64) {
	tb.Helper()
	var limit syscall.Rlimit
	require.NoError(tb, syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit))
	if limit.Max >= n {
		return
	}
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &syscall.Rlimit{Cur: n, Max: n}); err != nil {
		tb.Skipf("this system lets a process open %d files, %d are needed: %v", limit.Max, n, err)
	}
}
