package interop_test

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/internal/testkit"
)

// pipeline is a running cryo-connect.
type pipeline struct {
	*testkit.Process
	t       *testing.T
	crashed bool // as the test wants it
}

const common = `
http:
  enabled: false
logger:
  level: DEBUG
shutdown_timeout: 10s
`

// run starts cryo-connect with a configuration. The test's end terminates it, and wants
// exit code 0.
func run(t *testing.T, config string) *pipeline {
	t.Helper()
	nodeModules(t)
	cmd := exec.Command(binary(t), "run", testkit.WriteFile(t, "pipeline.yaml", common+config))
	cmd.Env = append(os.Environ(), "CRYO_TOKEN="+token, "GORACE=halt_on_error=1 exitcode=66")
	p := &pipeline{Process: testkit.Start(t, cmd), t: t}
	t.Cleanup(p.stop)
	return p
}

// stop terminates the pipeline, unless it has ended, and wants exit code 0.
func (p *pipeline) stop() {
	p.t.Helper()
	if p.crashed {
		return
	}
	if p.Running() {
		p.AwaitLaunch()
		_ = p.Cmd.Process.Signal(syscall.SIGTERM) // it may end by itself at this moment
	}
	p.WantExit(0)
}

// received is what a pipeline with the output toLines writes about a message.
type received struct {
	Type    string
	Session string
	Name    string
	Text    string
	Bytes   int
	SHA256  string
	Size    int // of the stream, as announced
}

// toLines is the second half of a pipeline, which writes a line about each message.
const toLines = `
pipeline:
  processors:
    - mapping: |
        root.type = @cryo_message_type
        root.session = @cryo_session_id.string()
        root.name = @cryo_stream_name.or("")
        root.size = @cryo_stream_size.or(0)
        root.text = content().string().slice(0, 100).catch("")
        root.bytes = content().length()
        root.sha256 = content().hash("sha256").encode("hex")
output:
  stdout: {}
`

// parseReceived parses a line of toLines; other lines are not ok.
func parseReceived(line string) (r received, ok bool) {
	return r, strings.HasPrefix(line, "{") && json.Unmarshal([]byte(line), &r) == nil
}

// wantMessage waits for a message with exactly this data.
func (p *pipeline) wantMessage(what string, data []byte) received {
	p.t.Helper()
	want := sum(data)
	line := p.Take(what, func(line string) bool {
		r, ok := parseReceived(line)
		return ok && r.SHA256 == want && r.Bytes == len(data)
	})
	r, _ := parseReceived(line)
	return r
}

// wantNoMessage wants no further message to have been delivered.
func (p *pipeline) wantNoMessage() {
	p.t.Helper()
	require.Zero(p.t, p.Count(func(line string) bool { _, ok := parseReceived(line); return ok }), "unexpected messages")
}

// toService is a pipeline's output to a web service, which decides over each message.
func toService(s *testkit.WebService) string {
	return fmt.Sprintf(`
output:
  http_client:
    url: %s
    verb: POST
    retries: 0
    timeout: 120s
    max_in_flight: 2000
    headers:
      Type: ${! @cryo_message_type }
`, s.URL)
}

// source is an input for the test: a posted message is delivered when the response is a
// success.
type source struct {
	t   *testing.T
	url string
}

// newSource returns a source and its configuration.
func newSource(t *testing.T) (*source, string) {
	t.Helper()
	address := testkit.ReserveAddress(t)
	return &source{t, "http://" + address + "/"}, fmt.Sprintf(`
input:
  http_server:
    address: %s
    path: /
    timeout: 120s
`, address)
}

// ready waits until the pipeline listens for requests.
func (s *source) ready(p *pipeline) { p.WantLog("Receiving HTTP messages at") }

// posted is a message in flight.
type posted struct {
	t      *testing.T
	status chan int
}

// post sends a message. Its parameters are metadata: type, name.
func (s *source) post(data []byte, parameters ...string) *posted {
	s.t.Helper()
	query := url.Values{}
	for _, p := range parameters {
		key, value, _ := strings.Cut(p, "=")
		query.Set(key, value)
	}
	result := &posted{s.t, make(chan int, 1)}
	go func() {
		defer close(result.status)
		resp, err := testkit.HTTP(http.MethodPost, s.url+"?"+query.Encode(), string(data))
		if err == nil {
			result.status <- resp.Status
		}
	}()
	return result
}

// wantDelivered waits for the message to be delivered.
func (m *posted) wantDelivered(what string) {
	m.t.Helper()
	require.Equal(m.t, http.StatusOK, <-m.status, "%s", what)
}

// wantRejected waits for the message to be rejected.
func (m *posted) wantRejected(what string) {
	m.t.Helper()
	require.Equal(m.t, http.StatusBadGateway, <-m.status, "%s", what)
}

// wantOpen wants the message to be unacknowledged. The caller has awaited everything that
// could have ended it.
func (m *posted) wantOpen(what string) {
	m.t.Helper()
	select {
	case status := <-m.status:
		require.FailNow(m.t, "ended early", "status %d: %s", status, what)
	default:
	}
}

// deliver posts a message and waits until it is delivered.
func (s *source) deliver(data []byte, parameters ...string) {
	s.t.Helper()
	s.post(data, parameters...).wantDelivered("a message")
}
