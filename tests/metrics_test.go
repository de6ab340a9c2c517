package tests

import (
	"encoding/binary"
	"encoding/json"
	"io"
	"maps"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/cryotest"
	"github.com/cryo-connect/cryo-connect/internal/testkit"
)

// A pipeline from clients to a server, in which every metric changes.
const metricsPipeline = `
input:
  label: clients
  cryo_server:
    address: "${CLIENTS}"
    tokens: [ "${CRYO_TOKEN}" ]
    session_expires: root = if this.query.brief == "1" { now().ts_unix() + 3 }
    message_types: [ utf8, stream ]
    auto_replay_nacks: false
    max_bytes_per_second: 1000
output:
  label: server
  cryo: { url: "${SERVER}", token: "${CRYO_TOKEN}", ack_timeout: 5s }
`

func TestEveryMetricIsExportedDocumentedAndCounted(t *testing.T) {
	server := testkit.Serve(t)
	p, service := runServing(t, metricsPipeline, "CLIENTS=127.0.0.1:0", "SERVER="+server.URL())
	clients := p.Listening()
	session := server.Session(t)
	client := testkit.Dial(t, clients)

	// One of each: delivered, rejected, filtered and throttled, late, a stream.
	done := testkit.Send(client, "delivered")
	require.NoError(t, testkit.Receive(t, session).Ack())
	require.NoError(t, testkit.Next(t, done))
	done = testkit.Send(client, "rejected")
	require.NoError(t, testkit.Receive(t, session).Reject("no"))
	require.Error(t, testkit.Next(t, done))
	require.NoError(t, client.SendBinary(t.Context(), make([]byte, 3000))) // filtered
	done = testkit.Send(client, "late")
	late := testkit.Receive(t, session)
	require.Error(t, testkit.Next(t, done))
	require.NoError(t, late.Ack())
	done = testkit.Go(func() error { return client.SendStream(t.Context(), strings.NewReader("a stream"), nil) })
	stream, err := session.AcceptStream(t.Context())
	require.NoError(t, err)
	content, err := io.ReadAll(stream)
	require.NoError(t, err)
	require.Equal(t, "a stream", string(content))
	require.NoError(t, stream.Ack())
	require.NoError(t, testkit.Next(t, done))
	// Data for a session that only sends, a client without the token, a session that
	// expires, a frame of an unknown type, and a connection that is lost.
	require.Error(t, testkit.Next(t, testkit.Send(session, "rejected")))
	_, err = cryo.Dial(t.Context(), "ws://"+clients, &cryo.DialOptions{Token: "wrong"})
	require.ErrorIs(t, err, cryo.ErrUnauthorized)
	brief, err := cryo.Dial(t.Context(), "ws://"+clients, &cryo.DialOptions{Token: testkit.Token, Query: url.Values{"brief": {"1"}}})
	require.NoError(t, err)
	testkit.Next(t, brief.Done())
	peer := cryotest.DialPeer(t, websocket.DefaultDialer, "ws://"+clients, token, 78)
	peer.ClientHandshake()
	peer.WriteBytes(append(binary.BigEndian.AppendUint64(nil, peer.SID), 77))
	peer.WriteFrames(cryotest.Bye(1, ""))
	peer.WantFrame("the frame before is ignored by now", cryotest.Acked(1))
	require.NoError(t, peer.WS.Close())
	require.NoError(t, session.Close(t.Context(), ""))
	done = testkit.Send(client, "again")
	session = server.Session(t)
	require.NoError(t, testkit.Receive(t, session).Ack())
	require.NoError(t, testkit.Next(t, done))

	var exported map[string]string
	testkit.Eventually(t, func(c *assert.CollectT) {
		exported = scrape(t, service)
		for series, want := range map[string]string{
			`cryo_sessions{label="clients",path="root.input"}`:                                "1",
			`cryo_sessions{label="server",path="root.output"}`:                                "1",
			`cryo_sessions_denied{label="clients",path="root.input",status="401"}`:            "1",
			`cryo_sessions_expired{label="clients",path="root.input"}`:                        "1",
			`cryo_sessions_opened{label="clients",path="root.input"}`:                         "3",
			`cryo_sessions_taken_over{label="clients",path="root.input"}`:                     "0",
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
			`cryo_frames_ignored{label="clients",path="root.input"}`:                          "1",
			`cryo_ack_latency_ns_count{label="server",path="root.output"}`:                    "3",
			`cryo_streams_open{label="clients",path="root.input"}`:                            "0",
			`cryo_streams_open{label="server",path="root.output"}`:                            "0",
			`input_connection_up{label="clients",path="root.input"}`:                          "1",
			`output_connection_up{label="server",path="root.output"}`:                         "2",
		} {
			assert.Equal(c, want, exported[series], series)
		}
		assert.NotEmpty(c, exported[`cryo_throttled_ns{label="clients",path="root.input"}`])
	})

	maps.Copy(exported, scrapeBroadcast(t))
	var ours, all []string
	labels := make(map[string][]string) // of each name, those of all its series
	for series := range exported {
		name, _, _ := strings.Cut(series, "{")
		labels[name] = append(labels[name], find(series, labelName)...)
		name = timerName(name)
		all = append(all, name)
		if strings.HasPrefix(name, "cryo_") {
			ours = append(ours, name)
		}
	}
	slices.Sort(ours)
	assert.Equal(t, slices.Compact(ours), metricNames(t, "../docs/operations/metrics.md", "(?m)^\\| `(cryo_[a-z_]+)` \\|"), "docs/operations/metrics.md lists every metric")
	assert.Subset(t, all, metricNames(t, "../docs/operations/metrics.md", "`((?:input|output)_[a-z_]+)`"), "docs/operations/metrics.md names existing metrics of the engine")
	for _, query := range dashboardQueries(t) {
		assert.Subset(t, all, metricsOf(query), "the dashboard uses exported metrics: %s", query)
	}
	for _, rule := range alertRules(t) {
		assert.NotEmpty(t, metricsOf(rule.Expr))
		assert.Subset(t, all, metricsOf(rule.Expr), "alerts use exported metrics: %s", rule.Alert)
	}
	for _, test := range alertTests(t) {
		for _, input := range test.Input {
			name, _, _ := strings.Cut(input.Series, "{")
			assert.Subset(t, append(labels[name], "job", "instance"), find(input.Series, labelName), "tests of alerts use exported series: %s", input.Series)
		}
	}
}

// scrapeBroadcast returns the metrics of an output whose two clients acknowledge and reject a
// message. Its timers are histograms.
func scrapeBroadcast(t *testing.T) (exported map[string]string) {
	t.Helper()
	p, service := runServing(t, `
input: { http_server: { path: /hello } }
output: { label: chat, cryo_server: { address: "127.0.0.1:0", tokens: [ "${CRYO_TOKEN}" ], send_to: all, no_session: drop } }
metrics: { prometheus: { use_histogram_timing: true } }
`)
	address := p.Listening()
	a, b := testkit.Dial(t, address), testkit.Dial(t, address)
	testkit.Eventually(t, func(c *assert.CollectT) { // the output has both sessions
		assert.Equal(c, "2", scrape(t, service)[`cryo_sessions{label="chat",path="root.output"}`])
	})
	posted := testkit.Go(func() error {
		_, err := testkit.HTTP(http.MethodPost, service+"/hello", "hello")
		return err
	})
	require.NoError(t, testkit.Receive(t, a).Ack())
	require.NoError(t, testkit.Receive(t, b).Reject("no"))
	require.NoError(t, testkit.Next(t, posted))
	testkit.Eventually(t, func(c *assert.CollectT) {
		exported = scrape(t, service)
		for series, want := range map[string]string{
			`cryo_sessions{label="chat",path="root.output"}`:                           "2",
			`cryo_sessions_opened{label="chat",path="root.output"}`:                    "2",
			`cryo_sessions_closed_late{label="chat",path="root.output"}`:               "0",
			`cryo_messages_missed{label="chat",path="root.output"}`:                    "1",
			`cryo_ack_latency_ns_bucket{label="chat",path="root.output",le="2.5"}`:     "1",
			`cryo_ack_latency_ns_bucket{label="chat",path="root.output",le="+Inf"}`:    "1",
			`cryo_sends_rejected{label="chat",message_type="utf8",path="root.output"}`: "1",
		} {
			assert.Equal(c, want, exported[series], series)
		}
	})
	return exported
}

// labelName matches the names of a series's labels.
const labelName = `[{,](\w+)="`

// timerName returns the name of the timer that a series of a summary or a histogram is part of.
func timerName(name string) string {
	for _, suffix := range []string{"_count", "_sum", "_bucket"} {
		name = strings.TrimSuffix(name, suffix)
	}
	return name
}

// metricsOf returns the names of the metrics in a query.
func metricsOf(query string) []string {
	names := find(query, `\b((?:cryo|input|output)_[a-z_]+)`)
	for i := range names {
		names[i] = timerName(names[i])
	}
	return names
}

// scrape returns the metrics that a process exports, by series.
func scrape(t *testing.T, url string) map[string]string {
	t.Helper()
	resp, err := testkit.HTTP(http.MethodGet, url+"/metrics", "")
	require.NoError(t, err)
	series := make(map[string]string)
	for line := range strings.Lines(resp.Body) {
		if at := strings.LastIndexByte(line, ' '); at > 0 && line[0] != '#' {
			series[line[:at]] = strings.TrimSpace(line[at:])
		}
	}
	return series
}

// metricNames returns the names in a file that match a pattern.
func metricNames(t *testing.T, file, pattern string) []string {
	t.Helper()
	return find(testkit.ReadFile(t, file), pattern)
}

// find returns the first groups of all matches, sorted and without duplicates.
func find(text, pattern string) []string {
	var names []string
	for _, match := range regexp.MustCompile(pattern).FindAllStringSubmatch(text, -1) {
		names = append(names, match[1])
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// dashboardQueries returns the dashboard's queries.
func dashboardQueries(t *testing.T) (queries []string) {
	t.Helper()
	var dashboard struct {
		Panels []struct {
			ID      int
			Type    string
			Title   string
			Targets []struct{ Expr string }
		}
	}
	require.NoError(t, json.Unmarshal([]byte(testkit.ReadFile(t, "../config/grafana/cryo-connect.json")), &dashboard))
	ids := make(map[int]bool)
	for _, p := range dashboard.Panels {
		require.False(t, ids[p.ID], "two panels have the id %d", p.ID)
		ids[p.ID] = true
		require.NotEmpty(t, p.Title)
		require.True(t, p.Type == "row" || len(p.Targets) > 0, "panel %q has no query", p.Title)
		for _, target := range p.Targets {
			queries = append(queries, target.Expr)
		}
	}
	require.NotEmpty(t, queries)
	return queries
}
