package plugin

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync/atomic"
	"testing"
	"testing/iotest"
	"testing/synctest"
	"time"

	"github.com/redpanda-data/benthos/v4/public/service"
	"github.com/stretchr/testify/require"
	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"
)

// Guards: faults of the engine that this package works around. Each test fails when
// the engine is mended, and names what may be relaxed then.

// process runs a batch through a processor of the engine's.
func process(t *testing.T, processor string, batch service.MessageBatch) []service.MessageBatch {
	t.Helper()
	spec := service.NewConfigSpec().Field(service.NewProcessorField("processor"))
	parsed, err := spec.ParseYAML("processor: { "+processor+" }", nil)
	require.NoError(t, err)
	p, err := parsed.FieldProcessor("processor")
	require.NoError(t, err)
	defer func() { require.NoError(t, p.Close(context.Background())) }()
	batches, err := p.ProcessBatch(context.Background(), batch)
	require.NoError(t, err)
	return batches
}

type nameKey struct{}

// named is a batch of messages whose contexts have their texts.
func named(texts ...string) service.MessageBatch {
	batch := batchOf(texts...)
	for i, text := range texts {
		batch[i] = batch[i].WithContext(context.WithValue(context.Background(), nameKey{}, text))
	}
	return batch
}

func TestEngineMixesUpContexts(t *testing.T) {
	batches := process(t, `mapping: 'root = if content() == "drop" { deleted() }'`, named("drop", "keep"))
	require.Len(t, batches, 1)
	require.Len(t, batches[0], 1)
	content, err := batches[0][0].AsBytes()
	require.NoError(t, err)
	require.Equal(t, "keep", string(content))
	require.Equal(t, "drop", batches[0][0].Context().Value(nameKey{}),
		"The engine is fixed: after a filter a message has its own context. So inputs could trust a BatchError again and redeliver "+
			"only what it names, outputs could return one, and the limits that the reference and docs/guarantees.md name could go. "+
			"Check split, group_by, archive and select_parts too, and the exceptions of the property test")
}

// The effect of TestEngineMixesUpContexts where no component of ours has a say: an
// output's batching merges three deliveries, and the error goes to the one whose message
// was filtered.
func TestEngineWithBatchingFailsTheWrongDeliveryAfterAFilter(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(fromOnce, "probe: { batching: { count: 3, processors: [ "+dropsDrop+" ] } }")
		drop, a, b := e.produce("drop"), e.produce("A"), e.produce("B")
		arrived := e.arrival()
		require.Len(t, arrived.batch, 2)
		arrived.failSome(errOutput, arrived.texts()[0])
		verdicts := []error{next(t, drop.verdict), next(t, a.verdict), next(t, b.verdict)}
		require.NotEqual(t, []error{nil, errOutput, nil}, verdicts,
			"the engine is mended: the exception batchingMisplaces of the property test, and what the reference says of it, can go")
		require.NoError(t, verdicts[1], "it was not delivered, and yet")
	})
}

// The batcher looks for the messages of a delivery only until it has found a part of
// each that is delivered.
func TestEngineWithBatchingCountsAMessageAsDeliveredAfterItsFirstPart(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(fromOnce, "probe: { batching: { count: 1, processors: [ unarchive: { format: lines } ] } }")
		f := e.produce("a\nb")
		arrived := e.arrival()
		require.Equal(t, []string{"a", "b"}, arrived.texts())
		arrived.failSome(errOutput, "b")
		require.NoError(t, next(t, f.verdict),
			"the engine is mended: the exception batchingExpands of the property test, and what the reference says of it, can go")
	})
}

func TestEngineForwardsEmptyBatches(t *testing.T) {
	for _, processor := range []string{
		"parallel: { processors: [ mapping: root = deleted() ] }",
		"retry: { processors: [ mapping: root = deleted() ] }",
	} {
		batches := process(t, processor, batchOf("drop"))
		require.Len(t, batches, 1, "the engine is mended for %s: outputs need not expect a batch without messages", processor)
		require.Empty(t, batches[0])
	}
}

// late is an input that reads a batch just as the engine stops.
type late struct{ acknowledged chan error }

func (l *late) Connect(context.Context) error { return nil }
func (l *late) Close(context.Context) error   { return nil }

func (l *late) ReadBatch(ctx context.Context) (service.MessageBatch, service.AckFunc, error) {
	<-ctx.Done()
	return batchOf("late"), func(_ context.Context, err error) error { l.acknowledged <- err; return nil }, nil
}

func TestEngineDropsABatchReadDuringAStop(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		in := &late{make(chan error, 1)}
		require.NoError(t, e.env.RegisterBatchInput("late", service.NewConfigSpec(), func(*service.ParsedConfig, *service.Resources) (service.BatchInput, error) {
			return in, nil
		}))
		p := e.run("late: {}", toProbe)
		p.stop()
		const mended = "the engine is mended: what was handed over at the stop has a verdict, and inputs need not keep it as abandoned"
		require.Empty(t, e.probe.arrivals, mended)
		require.Empty(t, in.acknowledged, mended)
	})
}

func TestEngineScannersLoseDataWithoutAnError(t *testing.T) {
	for _, tt := range []struct {
		scanner, stream string
		want            []string
		mended          string
	}{
		{"json_array", "[1,2", []string{"1", "2"}, "the scan of a stream may accept an error that wraps io.EOF as its end"},
		{"csv", "a,b\r1,2\r", nil, "checkHeader need not look for CR"},
		{"csv", "a,a\n1,2\n", []string{`{"a":"2"}`}, "checkHeader need not look for names that occur twice"},
	} {
		creator, err := makeScanner(service.GlobalEnvironment().Clone(), map[string]any{tt.scanner: map[string]any{}})
		require.NoError(t, err)
		mended := "the engine is mended: " + tt.mended
		s, err := creator.Create(io.NopCloser(strings.NewReader(tt.stream)), func(context.Context, error) error { return nil }, service.NewScannerSourceDetails())
		require.NoError(t, err, mended)
		var texts []string
		for {
			batch, _, err := s.NextBatch(t.Context())
			if err != nil {
				require.ErrorIs(t, err, io.EOF, mended)
				break
			}
			text, err := batch[0].AsBytes()
			require.NoError(t, err)
			texts = append(texts, string(text))
		}
		require.Equal(t, tt.want, texts, mended)
		require.NoError(t, s.Close(t.Context()))
		require.NoError(t, creator.Close(t.Context()))
	}
}

func TestEngineScannersReturnPartialRecordsBeforeTheError(t *testing.T) {
	for scanner, fields := range map[string]map[string]any{
		"lines":    {},
		"skip_bom": {"into": map[string]any{"lines": map[string]any{}}},
	} {
		creator, err := makeScanner(service.GlobalEnvironment().Clone(), map[string]any{scanner: fields})
		require.NoError(t, err)
		source := io.MultiReader(strings.NewReader("one\ntwo\nthr"), iotest.ErrReader(io.ErrUnexpectedEOF))
		s, err := creator.Create(io.NopCloser(source), func(context.Context, error) error { return nil }, service.NewScannerSourceDetails())
		require.NoError(t, err)
		var texts []string
		for {
			batch, _, err := s.NextBatch(t.Context())
			if err != nil {
				require.ErrorIs(t, err, io.ErrUnexpectedEOF)
				break
			}
			text, err := batch[0].AsBytes()
			require.NoError(t, err)
			texts = append(texts, strings.TrimSpace(string(text)))
		}
		require.Equal(t, []string{"one", "two", "thr"}, texts, "the engine is mended: the scan of a truncated stream need not drop a record, with "+scanner)
		require.NoError(t, s.Close(t.Context()))
		require.NoError(t, creator.Close(t.Context()))
	}
}

func TestEnginePanicsWhenATracingMapDeletesRoot(t *testing.T) {
	spec := service.NewConfigSpec().Field(service.NewExtractTracingSpanMappingField())
	parsed, err := spec.ParseYAML("extract_tracing_map: root = deleted()", nil)
	require.NoError(t, err)
	feed := &feed{make(chan *produced, 1)}
	in, err := parsed.WrapBatchInputExtractTracingSpanMapping("feed", feed)
	require.NoError(t, err)
	feed.batches <- &produced{batchOf("message"), make(chan error, 1)}
	require.Panics(t, func() { _, _, _ = in.ReadBatch(context.Background()) },
		"the engine is mended: inputs and outputs need not guard extract_tracing_map and inject_tracing_map against a deleted root")
}

func TestEngineGivesABatchTheSpanOfItsFirstMessage(t *testing.T) {
	previous := otel.GetTextMapPropagator()
	otel.SetTextMapPropagator(propagation.TraceContext{})
	defer otel.SetTextMapPropagator(previous)
	spec := service.NewConfigSpec().Field(service.NewExtractTracingSpanMappingField())
	parsed, err := spec.ParseYAML("extract_tracing_map: root = this", nil)
	require.NoError(t, err)
	feed := &feed{make(chan *produced, 1)}
	in, err := parsed.WrapBatchInputExtractTracingSpanMapping("feed", feed)
	require.NoError(t, err)
	var texts []string
	for n := range 2 {
		texts = append(texts, fmt.Sprintf(`{"traceparent":"00-%032d-0000000000000001-01"}`, n+1))
	}
	feed.batches <- &produced{batchOf(texts...), make(chan error, 1)}
	batch, _, err := in.ReadBatch(t.Context())
	require.NoError(t, err)
	first, second := trace.SpanContextFromContext(batch[0].Context()), trace.SpanContextFromContext(batch[1].Context())
	require.True(t, first.IsValid())
	require.Equal(t, first.TraceID(), second.TraceID(), "the engine is mended: inputs need not extract the span of each message by itself")
}

func TestEngineCountsGaugesFromZero(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(fromOnce, toProbe)
		gauge := e.feeds.Metrics().NewGauge("engine_fault")
		gauge.Incr(1)
		gauge.Incr(1)
		require.Equal(t, int64(1), e.metrics.value("engine_fault"), "the engine is mended: gauges need not only use Set")
	})
}

// lossyOutput is an output that loses its connection once, with three messages in flight.
type lossyOutput struct {
	connected, lost, writing, concurrent atomic.Int64

	allLost chan struct{} // closed when all three have lost their connection
}

func (o *lossyOutput) Connect(context.Context) error { o.connected.Add(1); return nil }
func (o *lossyOutput) Close(context.Context) error   { return nil }

func (o *lossyOutput) Write(context.Context, *service.Message) error {
	if o.connected.Load() < 2 {
		if o.lost.Add(1) == 3 {
			close(o.allLost)
		}
		<-o.allLost
		return service.ErrNotConnected
	}
	o.concurrent.Store(max(o.concurrent.Load(), o.writing.Add(1)))
	time.Sleep(100 * time.Millisecond)
	o.writing.Add(-1)
	return nil
}

// In real time: batches wait for a mutex, which stops virtual time.
func TestEngineSendsBatchesThatWaitedForAConnectionOneByOne(t *testing.T) {
	defer checkLeaks(t)
	e := newEngine(t)
	out := &lossyOutput{allLost: make(chan struct{})}
	require.NoError(t, e.env.RegisterOutput("lossy", service.NewConfigSpec(), func(*service.ParsedConfig, *service.Resources) (service.Output, int, error) {
		return out, 3, nil
	}))
	defer e.start(fromOnce, "lossy: {}").stop()
	e.produceEach(batchOf("1", "2", "3")).wantFailed(t, map[int]string{})
	require.Equal(t, int64(1), out.concurrent.Load(), "the engine is mended: docs/development/engine-faults.md need not recommend batching")
}

func TestEngineSequentialFailFastBrokerForgetsTheRestOfABatch(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(fromOnce, "broker: { pattern: fan_out_sequential_fail_fast, outputs: [ probe: {}, probe: {} ] }")
		f := e.produce("a", "b")
		e.arrival().failSome(errOutput, "a")
		err := next(t, f.verdict)
		partial, ok := errors.AsType[*service.BatchError](err)
		require.True(t, ok, "the engine is mended: the error is one of the whole batch")
		require.Equal(t, 1, partial.IndexedErrors(), "only a")
		e.wantNoArrival("the second output never has b")
	})
}

// The next three are exceptions of the property test, and for docs/development/engine-faults.md.

func TestEngineDropOnAttributesAnErrorToTheWrongBatch(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(fromOnce, "drop_on: { back_pressure: 1s, output: { probe: {} } }")
		slow := e.produce("slow")
		a := e.arrival()
		require.Error(t, next(t, slow.verdict), "after a second")
		synctest.Wait() // until drop_on waits for the first one's verdict in the background
		failing := e.produce("failing")
		b := e.arrival()
		b.fail(errOutput) // this verdict is taken for the first one's
		failing.wantPending(t, "the engine is mended: drop_on with back_pressure need not be an exception")
		a.deliver()
		require.NoError(t, next(t, failing.verdict), "it was not delivered, and yet")
	})
}

func TestEngineFailFastBrokerAttributesAnErrorToTheNextBatch(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(fromOnce, "drop_on: { error: false, error_patterns: [ never ], output: { broker: { pattern: fan_out_fail_fast, outputs: [ probe: {}, probe: {} ] } } }")
		first := e.produce("first")
		e.arrival().fail(errOutput)
		e.arrival().fail(errOutput)
		require.Error(t, next(t, first.verdict))
		second := e.produce("second")
		require.Error(t, next(t, second.verdict), "before any output has it; "+
			"the engine is mended: fan_out_fail_fast under retry, drop_on, fallback or batching need not be an exception")
		e.arrival().deliver()
		e.arrival().deliver()
	})
}

func TestEngineFailFastBrokerBlocksTheThirdFailingOutput(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(fromOnce, "broker: { pattern: fan_out_fail_fast, outputs: [ serial: {}, serial: {}, serial: {} ] }")
		first := e.produce("first")
		for range 3 {
			e.arrival().fail(errOutput)
		}
		require.Error(t, next(t, first.verdict))
		second := e.produce("second")
		delivered := e.deliverAll()
		time.Sleep(time.Hour)
		require.Less(t, len(delivered()), 3, "the engine is mended: fan_out_fail_fast with more than two outputs need not be an exception")
		second.wantPending(t, "one of the outputs still waits to be rid of its verdict on the first batch")
	})
}

func TestEngineReadUntilChecksTheFirstMessageOfABatch(t *testing.T) {
	for fields, want := range map[string]int{"": 10, "max_batch_count: 1": 6} {
		inEngine(t, func(t *testing.T, e *engine) {
			e.run(fromFeed, listenOutput) // while only an output listens, messages wait for an input
			sendAll(e.dial(), numbered("m%d", 10)...)
			texts := e.deliverAll()
			p := e.run(`read_until: { check: 'content() == "m5"', input: { `+with(listenInput, fields)+" } }", toSerial)
			time.Sleep(time.Minute)
			require.Len(t, texts(), want, "the engine is mended: docs/development/engine-faults.md and the reference need no max_batch_count: 1 for read_until")
			select {
			case <-p.ended:
				require.Equal(t, 6, want, "it ends at m5")
			default:
				require.Equal(t, 10, want, "it never ends")
			}
		})
	}
}

func TestEngineFallbackWaitsForAnOutputThatIsNotConnected(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(fromOnce, "fallback: [ "+dialOutput+", probe: {} ]")
		f := e.produce("m")
		time.Sleep(time.Hour)
		f.wantPending(t, "the engine is mended: docs/guides/bridges.md need not wrap the output cryo in drop_on")
		e.wantNoArrival("not to be connected is no error")
	})
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(fromOnce, "fallback: [ drop_on: { back_pressure: 35s, output: { "+with(dialOutput, "max_in_flight: 1")+" } }, probe: {} ]")
		f := e.produce("m")
		begin := time.Now()
		e.arrival().deliver()
		require.Equal(t, 35*time.Second, time.Since(begin), "as in docs/guides/bridges.md")
		f.wantDelivered(t, "by the second output")
	})
}
