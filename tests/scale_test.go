package tests

import (
	"bytes"
	"context"
	"crypto/tls"
	"fmt"
	"net/http"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// What many sessions cost. The server is the binary, a process of its own, so
// that its memory is none of the clients'.

// What an idle session may take of the process: resident, with all that its
// collector has not given back.
const (
	mostMemoryASession = 32 << 10
	moreWithTLS        = 16 << 10
	garbage            = 8 << 20 // of the process, however many they are: that much was seen, and some more
)

// crowdConfig takes what clients send, and sends what is posted to all of them.
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

// idleness is a number of sessions that have little to do.
type idleness struct {
	sessions   int
	heartbeat  time.Duration
	secure     bool
	broadcasts int
}

func TestIdleSessionsAreCheapAndABroadcastReachesThemAll(t *testing.T) {
	(&idleness{sessions: 1000, heartbeat: time.Second, broadcasts: 1}).measure(t)
}

// BenchmarkTenThousandIdleSessions is the same with ten times the sessions,
// which are too many for the race detector, and says how long it takes. After 25
// broadcasts their memory hardly grows any more.
func BenchmarkTenThousandIdleSessions(b *testing.B) {
	for _, secure := range []bool{false, true} {
		b.Run(fmt.Sprintf("TLS=%v", secure), func(b *testing.B) {
			for range b.N {
				(&idleness{sessions: 10_000, heartbeat: 3 * time.Second, secure: secure, broadcasts: 25}).measure(b)
			}
		})
	}
}

func (i *idleness) measure(tb testing.TB) {
	n := i.sessions
	allowFiles(tb, uint64(n)+500)
	httpAddress := freeAddress(tb)
	env := []string{"HTTP_ADDRESS=" + httpAddress, "HEARTBEAT=" + i.heartbeat.String()}
	most := mostMemoryASession + garbage/float64(n)
	var trusted *tls.Config
	if i.secure {
		dir := tb.TempDir()
		certFile, keyFile := filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
		trusted = certify(tb, certFile, keyFile)
		env = append(env, "CERT_FILE="+certFile, "KEY_FILE="+keyFile)
		most += moreWithTLS
	}
	p := runConfig(tb, crowdConfig, env...)
	address := p.wantLogged("Listening for Cryo clients on ")
	message := bytes.Repeat([]byte("x"), 1<<10)
	join(tb, address, trusted, 1, message)
	broadcast(tb, httpAddress, message)
	before := p.memory("VmRSS")
	perSession := func() float64 { return float64(p.memory("VmRSS")-before) / float64(n) }

	begin := time.Now()
	c := join(tb, address, trusted, n, message)
	connecting := time.Since(begin)
	c.send(message) // none of them has always been idle
	c.wantHeartbeats(2, 10*i.heartbeat+patience)
	idle := perSession()

	begin = time.Now()
	broadcast(tb, httpAddress, message)
	broadcasting := time.Since(begin)
	for range i.broadcasts - 1 {
		broadcast(tb, httpAddress, message)
	}
	after := perSession()
	require.EqualValues(tb, i.broadcasts*n, c.got.Load(), "all clients have each when it counts as delivered")
	c.wantAlive()

	if b, ok := tb.(*testing.B); ok {
		b.ReportMetric(0, "ns/op") // hides it: most of it is waiting for heartbeats
		b.ReportMetric(idle, "B/session")
		b.ReportMetric(after, "B/session-after-broadcasts")
		b.ReportMetric(connecting.Seconds(), "s-to-connect")
		b.ReportMetric(broadcasting.Seconds(), "s-to-broadcast")
	}
	tb.Logf("%d sessions connected in %v; %.0f bytes each; a broadcast in %v; %.0f bytes each after %d", n, connecting, idle, broadcasting, after, i.broadcasts)
	require.Less(tb, idle, most)
	require.Less(tb, after, most)
}

// broadcast sends to all clients, and returns when all have acknowledged.
func broadcast(tb testing.TB, httpAddress string, message []byte) {
	tb.Helper()
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	require.EventuallyWithT(tb, func(c *assertT) {
		// Repeated only until the output listens: nothing has been sent before.
		req, err := http.NewRequestWithContext(context.Background(), http.MethodPost, "http://"+httpAddress+"/broadcast", bytes.NewReader(message))
		require.NoError(c, err)
		resp, err := client.Do(req)
		require.NoError(c, err)
		require.NoError(c, resp.Body.Close())
		require.Equal(c, http.StatusOK, resp.StatusCode)
	}, 5*time.Minute, 10*time.Millisecond)
}

// allowFiles raises the limit on open files, of this process and of those that
// it starts. Go by itself raises it as far as it may.
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
