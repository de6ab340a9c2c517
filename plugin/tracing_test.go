package plugin

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"

	"github.com/redpanda-data/benthos/v4/public/service"
	"github.com/stretchr/testify/require"
	"go.opentelemetry.io/otel/trace"
	"go.opentelemetry.io/otel/trace/embedded"
	"go.opentelemetry.io/otel/trace/noop"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// spanBook is a tracer that keeps which spans were begun, in which trace.
type spanBook struct {
	embedded.TracerProvider
	mu    sync.Mutex
	spans []bookedSpan
}

type bookedSpan struct {
	name  string
	trace string
}

func (b *spanBook) Tracer(string, ...trace.TracerOption) trace.Tracer {
	return spanTracer{book: b}
}

// traces are those of the spans with a name, in order: the engine begins several
// for a message.
func (b *spanBook) traces(name string) []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	var traces []string
	for _, s := range b.spans {
		if s.name == name {
			traces = append(traces, s.trace)
		}
	}
	return slices.Compact(traces)
}

type spanTracer struct {
	embedded.Tracer
	book *spanBook
}

func (t spanTracer) Start(ctx context.Context, name string, _ ...trace.SpanStartOption) (context.Context, trace.Span) {
	t.book.mu.Lock()
	defer t.book.mu.Unlock()
	n := uint64(len(t.book.spans) + 1)
	config := trace.SpanContextConfig{TraceID: trace.SpanContextFromContext(ctx).TraceID(), TraceFlags: trace.FlagsSampled}
	if !config.TraceID.IsValid() {
		binary.BigEndian.PutUint64(config.TraceID[:], n)
	}
	binary.BigEndian.PutUint64(config.SpanID[:], n)
	t.book.spans = append(t.book.spans, bookedSpan{name, config.TraceID.String()})
	span := bookSpan{context: trace.NewSpanContext(config)}
	return trace.ContextWithSpan(ctx, span), span
}

type bookSpan struct {
	noop.Span
	context trace.SpanContext
}

func (s bookSpan) SpanContext() trace.SpanContext { return s.context }

const (
	traceA = "0af7651916cd43dd8448eb211c80319c"
	traceB = "4bf92f3577b34da6a3ce929d0e0e4736"
)

func traced(id string) string {
	return `{"trace":{"traceparent":"00-` + id + `-00f067aa0ba902b7-01"}}`
}

// inTracedEngine is inEngine with spans.
func inTracedEngine(t *testing.T, test func(t *testing.T, e *engine)) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.spans = &spanBook{}
		test(t, e)
	})
}

func TestSenderSpansContinueInThePipeline(t *testing.T) {
	const fields = "extract_tracing_map: '" + extractTrace + "', auto_replay_nacks: false"
	for name, connect := range map[string]func(e *engine) *cryo.Session{
		"cryo": func(e *engine) *cryo.Session {
			server := e.serve()
			e.run(with(dialInput, fields), toProbe)
			return server.session()
		},
		"cryo_server": func(e *engine) *cryo.Session {
			e.run(with(listenInput, fields), toProbe)
			return e.dial()
		},
	} {
		t.Run(name, func(t *testing.T) {
			inTracedEngine(t, func(t *testing.T, e *engine) {
				peer := connect(e)
				without := []string{`{}`, `{"trace":5}`, `{"trace":[{}]}`, `5`, `no JSON`}
				for _, text := range append([]string{traced(traceA), traced(traceB)}, without...) {
					m := send(peer, text)
					e.want(text)[0].deliver()
					m.wantAcked(t, "delivered")
				}
				got := e.spans.traces("input_" + name)
				require.Len(t, got, 2+len(without), "each of the others has its own trace")
				require.Equal(t, []string{traceA, traceB}, got[:2])
				require.NotContains(t, got[2:], traceA)
				require.NotContains(t, got[2:], traceB)
				require.Zero(t, e.log.count("Mapping failed"))
			})
		})
	}
}

func TestEachMessageOfABatchHasItsOwnSpanAndResult(t *testing.T) {
	inTracedEngine(t, func(t *testing.T, e *engine) {
		texts := []string{traced(traceA), traced(traceB), `{"no":"trace"}`}
		s, sent := e.runWithBatch("extract_tracing_map: '"+extractTrace+"', auto_replay_nacks: false", texts)
		a := e.arrival()
		require.Equal(t, texts, a.texts())
		require.Equal(t, []string{traceA, traceB}, e.spans.traces("input_cryo_server")[:2])
		a.failSome(errOutput, texts[1])
		for text, again := range e.arrivalsOf(texts...) {
			if text == texts[1] {
				again.fail(errOutput)
			} else {
				again.deliver()
			}
		}
		sent[0].wantAcked(t, "delivered")
		sent[1].wantRejected(t, rejection)
		sent[2].wantAcked(t, "delivered")
		require.NoError(t, s.Err())
	})
}

func TestPipelineSpansAreSentWithMessages(t *testing.T) {
	for name, connect := range map[string]func(e *engine, fields string) *cryo.Session{
		"cryo": func(e *engine, fields string) *cryo.Session {
			server := e.serve()
			e.run(fromOnce, with(dialOutput, fields))
			return server.session()
		},
		"cryo_server": func(e *engine, fields string) *cryo.Session {
			e.run(fromOnce, with(listenOutput, fields))
			return e.dial()
		},
	} {
		t.Run(name, func(t *testing.T) {
			inTracedEngine(t, func(t *testing.T, e *engine) {
				peer := connect(e, `inject_tracing_map: 'root.trace = if root.type() == "object" { this }', ack_timeout: 1s, batching: { count: 3 }`)
				synctest.Wait()
				batch := batchOf(`{"id":1}`, `{"id":2}`, `no JSON`)
				f := e.produceEach(batch)
				for i := range 2 {
					m := receive(t, peer)
					var content struct {
						ID    int
						Trace struct{ Traceparent string }
					}
					require.NoError(t, json.Unmarshal(m.Payload, &content))
					require.Equal(t, i+1, content.ID)
					trace := content.Trace.Traceparent
					require.Len(t, trace, 55, trace)
					require.True(t, slices.Contains(e.spans.traces("output_"+name), trace[3:35]), "%s is a trace of the output's", trace)
					if i == 0 {
						require.NoError(t, m.Ack())
					} else {
						require.NoError(t, m.Reject("no"))
					}
				}
				m := receive(t, peer)
				require.Equal(t, "no JSON", string(m.Payload), "it is sent all the same")
				require.NoError(t, m.Ack())
				f.wantFailed(t, map[int]string{1: `rejected by the peer: "no"`})
			})
		})
	}
}

func TestTracingPreservesTheConnectionTest(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.serve()
		conf, err := specs()["input cryo"].ParseYAML("{ url: ws://"+somewhere+", token: "+token+", extract_tracing_map: 'root = {}' }", e.env)
		require.NoError(t, err)
		in, err := newInput(conf, service.MockResources(), cryo.DialOptions{NetDial: e.dialer})
		require.NoError(t, err)
		tracedIn, err := withExtraction(conf, "cryo", in)
		require.NoError(t, err)
		require.NotEqual(t, service.BatchInput(in), tracedIn)
		require.Equal(t, service.ConnectionTestSucceeded().AsList(), tracedIn.(service.ConnectionTestable).ConnectionTest(t.Context()))

		conf, err = specs()["output cryo"].ParseYAML("{ url: ws://"+somewhere+", token: "+token+", inject_tracing_map: 'root = this' }", e.env)
		require.NoError(t, err)
		out, _, _, err := newOutput(conf, service.MockResources(), cryo.DialOptions{NetDial: e.dialer})
		require.NoError(t, err)
		tracedOut, err := withInjection(conf, out)
		require.NoError(t, err)
		require.NotEqual(t, service.BatchOutput(out), tracedOut)
		require.Equal(t, service.ConnectionTestSucceeded().AsList(), tracedOut.(service.ConnectionTestable).ConnectionTest(t.Context()))
	})
}

func TestErrorOfATracingMappingIsTruncated(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(with(listenInput, "extract_tracing_map: 'root = this.trace.keys()'"), toProbe)
		e.deliverAll()
		send(e.dial(), `{"trace":"`+strings.Repeat("x", 1<<20)+`"}`).wantAcked(t, "delivered")
		e.log.want(t, "WARN Message has no span: the tracing mapping failed", "expected object value, got string")
		for _, line := range e.log.all() {
			require.Less(t, len(line), 2000)
		}
	})
}
