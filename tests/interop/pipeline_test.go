package interop_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
)

// pipeline is a running cryo-connect.
type pipeline struct {
	*process
}

const common = `
http:
  enabled: false
logger:
  level: DEBUG
shutdown_timeout: 10s
`

// run starts cryo-connect with a configuration. At the test's end it is asked to
// end, and has to do so with code 0.
func run(t *testing.T, config string) *pipeline {
	t.Helper()
	nodeModules(t)
	file := filepath.Join(t.TempDir(), "pipeline.yaml")
	require.NoError(t, os.WriteFile(file, []byte(common+config), 0o600))
	cmd := exec.Command(binary(t), "run", file)
	cmd.Env = append(os.Environ(), "CRYO_TOKEN="+token, "GORACE=halt_on_error=1 exitcode=66")
	p := &pipeline{start(t, "cryo-connect", cmd)}
	t.Cleanup(p.stop)
	return p
}

// stop asks the pipeline to end, as a service manager does.
func (p *pipeline) stop() {
	p.t.Helper()
	p.interrupt()
	p.wantExit(0)
}

func (p *pipeline) interrupt() {
	if p.running() {
		_ = p.cmd.Process.Signal(syscall.SIGTERM)
	}
}

// wantLog waits for a line of the log that has all of the words.
func (p *pipeline) wantLog(words ...string) string {
	p.t.Helper()
	return p.take(fmt.Sprintf("a line with %q", words), func(line string) bool {
		for _, w := range words {
			if !strings.Contains(line, w) {
				return false
			}
		}
		return true
	})
}

var listeningPattern = regexp.MustCompile(`Listening for Cryo clients on ([0-9.]+:[0-9]+)`)

// wantListening waits for the listener, and gives its address.
func (p *pipeline) wantListening() string {
	p.t.Helper()
	line := p.take("the listener", listeningPattern.MatchString)
	return listeningPattern.FindStringSubmatch(line)[1]
}

// received is what a pipeline with the output toLines tells of a message.
type received struct {
	Type    string
	Session string
	Name    string
	Text    string
	Bytes   int
	SHA256  string
	Size    int // of the stream, as announced
}

// toLines is a pipeline's second half that describes each message in a line.
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

func parseReceived(line string) (r received, ok bool) {
	return r, strings.HasPrefix(line, "{") && json.Unmarshal([]byte(line), &r) == nil
}

// wantMessage waits for a message with exactly this data.
func (p *pipeline) wantMessage(what string, data []byte) received {
	p.t.Helper()
	want := sum(data)
	line := p.take(what, func(line string) bool {
		r, ok := parseReceived(line)
		return ok && r.SHA256 == want && r.Bytes == len(data)
	})
	r, _ := parseReceived(line)
	return r
}

// wantNoMessage wants nothing more to have been delivered.
func (p *pipeline) wantNoMessage() {
	p.t.Helper()
	require.Zero(p.t, p.count(func(line string) bool { _, ok := parseReceived(line); return ok }), "messages that nobody expected")
}

// gate is an output under the test's control: what arrives waits until the test
// lets it through or turns it away.
type gate struct {
	t       *testing.T
	url     string
	arrived chan *delivery
}

type delivery struct {
	data   []byte
	header http.Header
	status chan int
}

func newGate(t *testing.T) *gate {
	t.Helper()
	g := &gate{t: t, arrived: make(chan *delivery, 10_000)}
	ended := make(chan struct{})
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		data, _ := io.ReadAll(r.Body)
		d := &delivery{data, r.Header, make(chan int, 1)}
		g.arrived <- d
		select {
		case status := <-d.status:
			w.WriteHeader(status)
		case <-ended:
		case <-r.Context().Done():
		}
	}))
	t.Cleanup(func() {
		close(ended)
		srv.Close()
	})
	g.url = srv.URL
	return g
}

// output is the gate in a configuration.
func (g *gate) output() string {
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
`, g.url)
}

// next waits for the next message at the gate.
func (g *gate) next() *delivery {
	g.t.Helper()
	ctx, cancel := context.WithTimeout(g.t.Context(), patience)
	defer cancel()
	select {
	case d := <-g.arrived:
		return d
	case <-ctx.Done():
		require.FailNow(g.t, "nothing came to the output")
		return nil
	}
}

// pass lets a message through.
func (d *delivery) pass() { d.status <- http.StatusOK }

// turnAway rejects it.
func (d *delivery) turnAway() { d.status <- http.StatusInternalServerError }

// open lets all through from now on.
func (g *gate) open() {
	ctx := g.t.Context()
	go func() {
		for {
			select {
			case d := <-g.arrived:
				d.pass()
			case <-ctx.Done():
				return
			}
		}
	}()
}

// source is an input under the test's control: what is posted has been delivered
// when it is answered with success.
type source struct {
	t   *testing.T
	url string
}

// newSource gives a source and its configuration.
func newSource(t *testing.T) (*source, string) {
	t.Helper()
	address := freeAddress(t)
	return &source{t, "http://" + address + "/"}, fmt.Sprintf(`
input:
  http_server:
    address: %s
    path: /
    timeout: 120s
`, address)
}

// freeAddress is one that nobody listens on.
func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer l.Close()
	return l.Addr().String()
}

// ready waits until the pipeline listens for what is posted.
func (s *source) ready(p *pipeline) { p.wantLog("Receiving HTTP messages at") }

// posted is a message on its way.
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
		ctx, cancel := context.WithTimeout(context.Background(), 2*patience)
		defer cancel()
		req, err := http.NewRequestWithContext(ctx, http.MethodPost, s.url+"?"+query.Encode(), bytes.NewReader(data))
		if err != nil {
			return
		}
		req.Header.Set("Content-Type", "application/octet-stream")
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			return
		}
		_ = resp.Body.Close()
		result.status <- resp.StatusCode
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

// wantOpen wants it to be neither; whoever calls has made sure that it would be
// known.
func (m *posted) wantOpen(what string) {
	m.t.Helper()
	select {
	case status := <-m.status:
		require.FailNow(m.t, "answered", "with %d: %s", status, what)
	default:
	}
}

// deliver posts a message and waits until it is delivered.
func (s *source) deliver(data []byte, parameters ...string) {
	s.t.Helper()
	s.post(data, parameters...).wantDelivered("a message")
}
