package tests

import (
	"encoding/json"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// A pipeline from clients to a server, whose every metric moves.
const metricsPipeline = `
input:
  label: clients
  cryo_server:
    address: "${CLIENTS}"
    tokens: [ "${CRYO_TOKEN}" ]
    message_types: [ utf8, stream ]
    auto_replay_nacks: false
output:
  label: server
  cryo: { url: "${SERVER}", token: "${CRYO_TOKEN}", ack_timeout: 2s }
`

func TestTheBinaryExportsItsMetricsAsTheyAreDocumentedAndDrawn(t *testing.T) {
	server := serve(t)
	clients := freeAddress(t)
	_, service := runServing(t, metricsPipeline, "CLIENTS="+clients, "SERVER="+server.url())
	session := server.session(t)
	client := dial(t, clients)

	// One of each: delivered, rejected, filtered, late, a stream.
	done := send(client, "delivered")
	require.NoError(t, receive(t, session).Ack())
	require.NoError(t, next(t, done))
	done = send(client, "rejected")
	require.NoError(t, receive(t, session).Reject("no"))
	require.Error(t, next(t, done))
	require.NoError(t, client.SendBinary(t.Context(), []byte("filtered")))
	done = send(client, "late")
	late := receive(t, session)
	require.Error(t, next(t, done))
	require.NoError(t, late.Ack())
	done = start(func() error { return client.SendStream(t.Context(), strings.NewReader("a stream"), nil) })
	stream, err := session.AcceptStream(t.Context())
	require.NoError(t, err)
	content, err := io.ReadAll(stream)
	require.NoError(t, err)
	require.Equal(t, "a stream", string(content))
	require.NoError(t, stream.Ack())
	require.NoError(t, next(t, done))
	// Data for a session that only sends, a client without the token, and a
	// connection that is lost.
	require.Error(t, next(t, send(session, "refused")))
	_, err = cryo.Dial(t.Context(), "ws://"+clients, &cryo.DialOptions{Token: "wrong"})
	require.ErrorIs(t, err, cryo.ErrUnauthorized)
	require.NoError(t, session.Close(t.Context(), ""))
	done = send(client, "again")
	session = server.session(t)
	require.NoError(t, receive(t, session).Ack())
	require.NoError(t, next(t, done))

	var exported map[string]string
	require.EventuallyWithT(t, func(c *assertT) {
		exported = scrape(t, service)
		for series, want := range map[string]string{
			`cryo_sessions{label="clients",path="root.input"}`:                                "1",
			`cryo_sessions{label="server",path="root.output"}`:                                "1",
			`cryo_sessions_denied{label="clients",path="root.input",status="401"}`:            "1",
			`cryo_reconnections{label="server",path="root.output"}`:                           "1",
			`cryo_messages_received{label="clients",message_type="utf8",path="root.input"}`:   "4",
			`cryo_messages_received{label="clients",message_type="stream",path="root.input"}`: "1",
			`cryo_bytes_received{label="clients",message_type="stream",path="root.input"}`:    "8",
			`cryo_messages_filtered{label="clients",message_type="binary",path="root.input"}`: "1",
			`cryo_messages_rejected{label="clients",message_type="utf8",path="root.input"}`:   "2",
			`cryo_messages_unacknowledged{label="clients",path="root.input"}`:                 "0",
			`cryo_ack_latency_ns_count{label="clients",path="root.input"}`:                    "2",
			`cryo_messages_sent{label="server",message_type="utf8",path="root.output"}`:       "2",
			`cryo_bytes_sent{label="server",message_type="stream",path="root.output"}`:        "8",
			`cryo_sends_rejected{label="server",message_type="utf8",path="root.output"}`:      "1",
			`cryo_session_rejections{label="server",message_type="utf8",path="root.output"}`:  "1",
			`cryo_late_acks{label="server",path="root.output"}`:                               "1",
			`cryo_ack_latency_ns_count{label="server",path="root.output"}`:                    "3",
			`cryo_streams_open{label="clients",path="root.input"}`:                            "0",
			`cryo_streams_open{label="server",path="root.output"}`:                            "0",
			`input_connection_up{label="clients",path="root.input"}`:                          "1",
			`output_connection_up{label="server",path="root.output"}`:                         "2",
		} {
			assert.Equal(c, want, exported[series], series)
		}
	}, patience, 100*time.Millisecond)

	var ours, all []string
	for series := range exported {
		name, _, _ := strings.Cut(series, "{")
		name = strings.TrimSuffix(strings.TrimSuffix(name, "_count"), "_sum")
		all = append(all, name)
		if strings.HasPrefix(name, "cryo_") {
			ours = append(ours, name)
		}
	}
	slices.Sort(ours)
	assert.Equal(t, slices.Compact(ours), metricNames(t, "../docs/metrics.md", "(?m)^\\| `(cryo_[a-z_]+)` \\|"), "docs/metrics.md has what is exported")
	assert.Subset(t, all, metricNames(t, "../docs/metrics.md", "`((?:input|output)_[a-z_]+)`"), "docs/metrics.md names metrics of the engine that there are")
	for _, name := range dashboardMetrics(t) {
		assert.Contains(t, all, name, "the dashboard draws what is exported")
	}
}

// runServing runs a configuration, and gives the address of its metrics and /ready.
func runServing(t *testing.T, config string, env ...string) (p *process, address string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "config.yaml")
	require.NoError(t, os.WriteFile(path, []byte(config), 0o600))
	address = freeAddress(t)
	return launch(t, nil, append(env, "CRYO_TOKEN="+token), "run", "--set", "http.address="+address, path), address
}

// scrape gives what a process exports, by series.
func scrape(t *testing.T, address string) map[string]string {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+address+"/metrics", nil)
	require.NoError(t, err)
	resp, err := http.DefaultClient.Do(req)
	require.NoError(t, err)
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	series := make(map[string]string)
	for line := range strings.Lines(string(body)) {
		if at := strings.LastIndexByte(line, ' '); at > 0 && line[0] != '#' {
			series[line[:at]] = strings.TrimSpace(line[at:])
		}
	}
	return series
}

// metricNames finds names in a text.
func metricNames(t *testing.T, file, pattern string) []string {
	t.Helper()
	content, err := os.ReadFile(file)
	require.NoError(t, err)
	return find(string(content), pattern)
}

func find(text, pattern string) []string {
	var names []string
	for _, match := range regexp.MustCompile(pattern).FindAllStringSubmatch(text, -1) {
		names = append(names, match[1])
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// dashboardMetrics are the names in the dashboard's queries.
func dashboardMetrics(t *testing.T) []string {
	t.Helper()
	content, err := os.ReadFile("../config/grafana/cryo-connect.json")
	require.NoError(t, err)
	var dashboard struct {
		Panels []struct {
			ID      int
			Type    string
			Title   string
			Targets []struct{ Expr string }
		}
	}
	require.NoError(t, json.Unmarshal(content, &dashboard))
	ids := make(map[int]bool)
	var queries strings.Builder
	for _, p := range dashboard.Panels {
		require.False(t, ids[p.ID], "panel %d is there once", p.ID)
		ids[p.ID] = true
		require.NotEmpty(t, p.Title)
		require.True(t, p.Type == "row" || len(p.Targets) > 0, "panel %q shows something", p.Title)
		for _, target := range p.Targets {
			queries.WriteString(target.Expr + "\n")
		}
	}
	names := find(queries.String(), `\b((?:cryo|input|output)_[a-z_]+)\{`)
	require.NotEmpty(t, names)
	return names
}
