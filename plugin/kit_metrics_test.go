package plugin

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"

	"github.com/redpanda-data/benthos/v4/public/service"
	"github.com/stretchr/testify/require"
)

// metricsBook is a metrics exporter that records the values of all pipelines of a test. A timer
// counts nanoseconds.
type metricsBook struct {
	settle func() // set before use: is called before a value is read; nil: none

	mu     sync.Mutex
	values map[string]int64 // "name{key=value}"
}

// names returns the names of all metrics.
func (b *metricsBook) names() []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.Collect(maps.Keys(b.values))
}

// value returns the value of a metric, such as "cryo_sessions" or
// "cryo_messages_sent{message_type=utf8}"; 0 if there is none. It waits for what must happen immediately:
// in virtual time, only the test's own goroutine may call it.
func (b *metricsBook) value(name string) int64 {
	if b.settle != nil {
		b.settle()
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.values[name]
}

// metric is a counter, gauge or timer of the book.
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

// wantMetrics requires metrics to have these values by now.
func (e *engine) wantMetrics(why string, want map[string]int64) {
	e.t.Helper()
	for name, value := range want {
		require.Equal(e.t, value, e.metrics.value(name), "%s: %s", why, name)
	}
}
