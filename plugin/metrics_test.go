package plugin

import (
	"context"
	"fmt"
	"maps"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"

	"github.com/redpanda-data/benthos/v4/public/service"
	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// metricsBook is an exporter of metrics that keeps them, by name and labels.
type metricsBook struct {
	mu     sync.Mutex
	values map[string]int64 // "name{key=value}"
}

// names gives all metrics there are.
func (b *metricsBook) names() []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.Collect(maps.Keys(b.values))
}

func (b *metricsBook) value(name string) int64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.values[name]
}

type metric struct {
	book *metricsBook
	name string
}

func (m metric) change(f func(int64) int64) {
	m.book.mu.Lock()
	defer m.book.mu.Unlock()
	m.book.values[m.name] = f(m.book.values[m.name])
}

func (m metric) Incr(n int64)   { m.change(func(v int64) int64 { return v + n }) }
func (m metric) Set(n int64)    { m.change(func(int64) int64 { return n }) }
func (m metric) Timing(n int64) { m.change(func(v int64) int64 { return v + n }) }

func (b *metricsBook) metric(name string, keys, values []string) metric {
	labels := ""
	for i := range keys {
		if keys[i] != "path" && values[i] != "" {
			labels += fmt.Sprintf("{%s=%s}", keys[i], values[i])
		}
	}
	return metric{b, name + labels}
}

func (b *metricsBook) NewCounterCtor(name string, keys ...string) service.MetricsExporterCounterCtor {
	return func(values ...string) service.MetricsExporterCounter { return b.metric(name, keys, values) }
}

func (b *metricsBook) NewTimerCtor(name string, keys ...string) service.MetricsExporterTimerCtor {
	return func(values ...string) service.MetricsExporterTimer { return b.metric(name, keys, values) }
}

func (b *metricsBook) NewGaugeCtor(name string, keys ...string) service.MetricsExporterGaugeCtor {
	return func(values ...string) service.MetricsExporterGauge { return b.metric(name, keys, values) }
}

func (b *metricsBook) Close(context.Context) error { return nil }

// namesIn finds the names of metrics in a file of the repository.
func namesIn(t *testing.T, file, pattern string) []string {
	t.Helper()
	content, err := os.ReadFile(file)
	require.NoError(t, err)
	var names []string
	for _, match := range regexp.MustCompile(pattern).FindAllSubmatch(content, -1) {
		names = append(names, string(match[1]))
	}
	slices.Sort(names)
	return slices.Compact(names)
}

func TestEveryMetricIsDocumentedAndDrawn(t *testing.T) {
	names := namesIn(t, "metrics.go", `"(cryo_[a-z_]+)"`)
	require.NotEmpty(t, names)
	require.Equal(t, names, namesIn(t, "../docs/metrics.md", "(?m)^\\| `(cryo_[a-z_]+)` \\|"), "in the table of docs/metrics.md")
	require.Equal(t, names, namesIn(t, "../config/grafana/cryo-connect.json", `\b(cryo_[a-z_]+)`), "in the dashboard")
}

func TestGaugesOfCopiesAddUp(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		server := e.serve()
		e.run(fromFeed, "broker: { pattern: round_robin, copies: 4, outputs: [ "+dialOutput+" ] }")
		var sessions []*cryo.Session
		for range 4 {
			sessions = append(sessions, server.session())
		}
		synctest.Wait()
		require.Equal(t, int64(4), e.metrics.value("cryo_sessions"))
		for i := range sessions {
			e.give(fmt.Sprint(i))
		}
		var received []*cryo.Message
		for i := range sessions {
			received = append(received, receive(t, sessions[i]))
		}
		require.Equal(t, int64(4), e.metrics.value("cryo_messages_unacknowledged"))
		for _, m := range received {
			require.NoError(t, m.Ack())
		}
		synctest.Wait()
		require.Zero(t, e.metrics.value("cryo_messages_unacknowledged"))
		end(sessions[0])
		synctest.Wait()
		require.Equal(t, int64(3), e.metrics.value("cryo_sessions"))
	})
}

func TestGaugesReturnToZeroAtAHardStop(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		in := e.run(with(listenInput, "streams: { scanner: { lines: {} } }"), toProbe)
		client := e.dial()
		sendAll(client, "a", "b", "c")
		_ = sendAny(func() error {
			return client.SendStream(context.Background(), strings.NewReader("d\ne\n"), nil)
		})
		synctest.Wait()
		require.Positive(t, e.metrics.value("cryo_messages_unacknowledged"))
		require.Equal(t, int64(1), e.metrics.value("cryo_streams_open"))
		in.kill()
		require.Zero(t, e.metrics.value("cryo_messages_unacknowledged"))
		require.Zero(t, e.metrics.value("cryo_streams_open"))
		require.Zero(t, e.metrics.value("cryo_sessions"))
	})
}

func TestTheMetricsOfAListenerAreReportedByAComponentThatStays(t *testing.T) {
	for name, stop := range map[string]func(*pipeline){"graceful stop": (*pipeline).stop, "hard stop": (*pipeline).kill} {
		t.Run(name, func(t *testing.T) {
			inEngine(t, func(t *testing.T, e *engine) {
				sessions := func(label string) int64 { return e.metrics.value("cryo_sessions{label=" + label + "}") }
				first := e.run("label: first\n"+listenInput, toProbe)
				second := e.run(fromFeed, "label: second\n"+listenOutput)
				third := e.run("label: third\n"+listenInput, toProbe)
				clients := []*cryo.Session{e.dial(), e.dial()}
				synctest.Wait()
				require.Equal(t, []int64{2, 0, 0}, []int64{sessions("first"), sessions("second"), sessions("third")})

				stop(third)
				require.Equal(t, int64(2), sessions("first"), "it stays")
				stop(first)
				require.Equal(t, []int64{0, 2}, []int64{sessions("first"), sessions("second")})

				e.dial()
				end(clients[0])
				end(clients[1])
				synctest.Wait()
				require.Equal(t, []int64{0, 1}, []int64{sessions("first"), sessions("second")})
				_, err := e.tryDial(cryo.DialOptions{Token: "wrong"})
				require.Error(t, err)
				require.Equal(t, int64(1), e.metrics.value("cryo_sessions_denied{label=second}{status=401}"))
				require.Zero(t, e.metrics.value("cryo_sessions_denied{label=first}{status=401}"))

				stop(second)
				require.Zero(t, sessions("second"))
			})
		})
	}
}
