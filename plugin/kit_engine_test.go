// How a test of this package is written. The files kit_*_test.go are its tools: the engine with
// pipelines in virtual time (this file), the other ends of sessions (kit_peers), ready-made
// pipelines (kit_pipelines), components without an engine (kit_components), and the network in
// memory, log lines and metrics (kit_network, kit_log, kit_metrics).
//
//	func TestFailedMessageIsRedelivered(t *testing.T) { // a sentence about behaviour
//		inEngine(t, func(t *testing.T, e *engine) { // virtual time, a network in memory
//			e.run(with(listenInput, "max_in_flight: 1"), toProbe)
//			client := e.dial()         // a session with the listener
//			m := send(client, "hello") // does not wait for the acknowledgement
//			e.arrival().fail(errOutput)
//			m.wantPending(t, "it is redelivered")
//			e.want("hello")[0].deliver()
//			m.wantAcked(t, "delivered")
//			e.log.want(t, "DEBUG Redelivering a message")
//			e.wantMetrics("delivered", map[string]int64{"cryo_messages_unacknowledged": 0})
//		})
//	}
//
// An output is tested the other way round: e.run(fromOnce, listenOutput), b := e.produce("hello"),
// receive(t, client).Ack(), b.wantDelivered(t, "acknowledged"). A component that dials finds the
// server of e.serve(). What both inputs or both outputs do is tested with atBothInputs or
// atBothOutputs.
//
// Time stands still while a goroutine runs. What must happen immediately has happened after
// synctest.Wait, which run, dial, wantPending and wantNoArrival call, and whatever reads the log or a
// metric. The others, such as wantAcked, return while other goroutines still run: a test that then
// depends on the component's own state calls synctest.Wait. An hour of time.Sleep costs nothing.
// Pipelines, servers and sessions end with the test, and a goroutine that stays fails it. Compare
// errors by errors.Is or their type, log lines by level, constant words and fields, times exactly.

package plugin

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/redpanda-data/benthos/v4/public/service"
	"github.com/stretchr/testify/require"
	"go.opentelemetry.io/otel/trace"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// checkLeaks fails a test that leaves goroutines behind. Tests without inEngine, which checks that
// itself, defer it.
func checkLeaks(t *testing.T) { t.Helper(); goleak.VerifyNone(t) }

// engine runs pipelines with our components over a network in memory.
type engine struct {
	t       testing.TB
	env     *service.Environment
	net     *memoryNet
	log     *logBook
	metrics *metricsBook
	spans   *spanBook // nil: no tracing
	probe   *probe
	feed    chan *produced
	shared  *listeners         // of all pipelines, as in streams mode
	feeds   *service.Resources // those of the last pipeline with an input feed or once

	// dialer is that of the components that dial; by default that of net.
	dialer func(ctx context.Context, network, address string) (net.Conn, error)
}

// inEngine runs a test in virtual time. A test of real sockets uses newEngine, start and checkLeaks.
func inEngine(t *testing.T, test func(t *testing.T, e *engine)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		e := newEngine(t)
		e.log.settle, e.metrics.settle = synctest.Wait, synctest.Wait
		test(t, e)
	})
}

// newEngine makes an engine whose environment has our components, and those of the test: the
// outputs probe and serial, the inputs feed and once.
func newEngine(t testing.TB) *engine {
	e := &engine{
		t: t, env: service.NewEnvironment(),
		net: &memoryNet{listening: make(map[string]*memoryListener)}, log: &logBook{}, metrics: &metricsBook{values: make(map[string]int64)},
		probe: &probe{arrivals: make(chan *arrival, 1000)}, feed: make(chan *produced, 100),
	}
	e.dialer = e.net.Dial
	e.shared = newListeners(e.net.Listen)
	must := func(err error) { require.NoError(t, err) }
	must(register(e.env, dependencies{
		dial: func(ctx context.Context, network, address string) (net.Conn, error) {
			return e.dialer(ctx, network, address)
		},
		listeners: e.shared,
	}))
	for name, maxInFlight := range map[string]int{"probe": 100, "serial": 1} {
		spec := service.NewConfigSpec().Field(service.NewBatchPolicyField("batching"))
		must(e.env.RegisterBatchOutput(name, spec, func(conf *service.ParsedConfig, _ *service.Resources) (service.BatchOutput, service.BatchPolicy, int, error) {
			policy, err := conf.FieldBatchPolicy("batching")
			return e.probe, policy, maxInFlight, err
		}))
	}
	must(e.env.RegisterBatchInput("feed", service.NewConfigSpec(), func(_ *service.ParsedConfig, res *service.Resources) (service.BatchInput, error) {
		e.feeds = res
		return retrying{service.AutoRetryNacksBatched(&feed{e.feed})}, nil
	}))
	must(e.env.RegisterBatchInput("once", service.NewConfigSpec(), func(_ *service.ParsedConfig, res *service.Resources) (service.BatchInput, error) {
		e.feeds = res
		return &feed{e.feed}, nil
	}))
	must(e.env.RegisterMetricsExporter("book", service.NewConfigSpec(), func(*service.ParsedConfig, *service.Logger) (service.MetricsExporter, error) {
		return e.metrics, nil
	}))
	must(e.env.RegisterOtelTracerProvider("spans", service.NewConfigSpec(), func(*service.ParsedConfig) (trace.TracerProvider, error) {
		return e.spans, nil
	}))
	return e
}

// Components for run. with adds fields to ours.
const (
	dialInput    = "cryo: { url: ws://" + somewhere + ", token: " + token + " }"
	dialOutput   = dialInput
	listenInput  = "cryo_server: { address: '" + somewhere + "', tokens: [ " + token + " ] }"
	listenOutput = listenInput
	toProbe      = "probe: {}"  // the test decides about each batch; see arrival
	toSerial     = "serial: {}" // the same, one batch at a time
	fromFeed     = "feed: {}"   // the batches of produce; sends again what fails
	fromOnce     = "once: {}"   // the batches of produce; sends nothing again
)

// with adds fields, such as "max_in_flight: 1, ack_timeout: 3s", to a component.
func with(component, fields string) string {
	if fields == "" {
		return component
	}
	return strings.TrimSuffix(component, " }") + ", " + fields + " }"
}

// pipeline is a running pipeline.
type pipeline struct {
	e      *engine
	stream *service.Stream
	ended  chan struct{}
}

// run starts a pipeline from an input to an output, each in YAML, and waits until it is idle. The
// end of the test kills it.
func (e *engine) run(input, output string, processors ...string) *pipeline {
	e.t.Helper()
	p := e.start(input, output, processors...)
	e.t.Cleanup(p.kill)
	synctest.Wait()
	return p
}

// start is run for real time: it does not wait, and the test must stop the pipeline.
func (e *engine) start(input, output string, processors ...string) *pipeline {
	e.t.Helper()
	b := e.env.NewStreamBuilder()
	b.SetLogger(e.log.logger())
	require.NoError(e.t, b.SetMetricsYAML(`book: {}`))
	if e.spans != nil {
		require.NoError(e.t, b.SetTracerYAML(`spans: {}`))
	}
	require.NoError(e.t, b.AddInputYAML(input))
	for _, p := range processors {
		require.NoError(e.t, b.AddProcessorYAML(p))
	}
	require.NoError(e.t, b.AddOutputYAML(output))
	stream, err := b.Build()
	require.NoError(e.t, err)
	p := &pipeline{e: e, stream: stream, ended: make(chan struct{})}
	go func() {
		defer close(p.ended)
		_ = stream.Run(context.Background())
	}()
	return p
}

// stop stops the pipeline gracefully.
func (p *pipeline) stop() {
	p.e.t.Helper()
	require.NoError(p.e.t, p.stream.StopWithin(time.Hour))
	<-p.ended
}

// kill stops the pipeline immediately, without waiting for acknowledgements: a hard stop.
func (p *pipeline) kill() {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	_ = p.stream.Stop(ctx)
	<-p.ended
}

// stopWhile stops the pipeline gracefully, and calls handle with the batches that reach the probe
// meanwhile.
func (p *pipeline) stopWhile(handle func(a *arrival)) {
	p.e.t.Helper()
	stopped := sendAny(func() error { p.stop(); return nil })
	synctest.Wait()
	for {
		select {
		case a := <-p.e.probe.arrivals:
			handle(a)
		case <-stopped.done:
			return
		}
	}
}

// probe is an output of which the test decides what becomes of each batch.
type probe struct{ arrivals chan *arrival }

func (p *probe) Connect(context.Context) error { return nil }
func (p *probe) Close(context.Context) error   { return nil }

func (p *probe) WriteBatch(ctx context.Context, batch service.MessageBatch) error {
	a := &arrival{batch: batch, verdict: make(chan error, 1)}
	p.arrivals <- a
	select {
	case err := <-a.verdict:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// arrival is a batch at the probe. It waits for deliver, fail or failSome.
type arrival struct {
	batch   service.MessageBatch
	verdict chan error
}

// Errors for fail.
var (
	errOutput = errors.New("the disk is full")   // of an output that does not work for now
	errPoison = errors.New("never that message") // of a message that always fails
)

// arrival waits for the next batch at the probe.
func (e *engine) arrival() *arrival {
	e.t.Helper()
	return next(e.t, e.probe.arrivals)
}

// want waits for messages with these texts, each in its own batch. They may arrive in any
// order; the result is in the order of the texts.
func (e *engine) want(texts ...string) []*arrival {
	e.t.Helper()
	arrivals := make([]*arrival, len(texts))
	for range texts {
		a := e.arrival()
		require.Len(e.t, a.batch, 1)
		i := slices.IndexFunc(texts, func(text string) bool { return text == a.texts()[0] })
		for i >= 0 && arrivals[i] != nil { // the same text again
			i++
			require.Less(e.t, i, len(texts))
		}
		require.GreaterOrEqual(e.t, i, 0, "%q is none of %q", a.texts(), texts)
		arrivals[i] = a
	}
	return arrivals
}

// arrivalsOf is want, by text.
func (e *engine) arrivalsOf(texts ...string) map[string]*arrival {
	e.t.Helper()
	arrivals := make(map[string]*arrival)
	for i, a := range e.want(texts...) {
		arrivals[texts[i]] = a
	}
	return arrivals
}

// dropArrivals discards the batches that have arrived, without a verdict: those of a
// pipeline that was killed.
func (e *engine) dropArrivals() {
	for len(e.probe.arrivals) > 0 {
		<-e.probe.arrivals
	}
}

// wantNoArrival requires that no batch has reached the probe by now.
func (e *engine) wantNoArrival(why string) {
	e.t.Helper()
	synctest.Wait()
	require.Empty(e.t, e.probe.arrivals, why)
}

func (a *arrival) deliver()       { a.verdict <- nil }
func (a *arrival) fail(err error) { a.verdict <- err }

// failSome fails the messages with these texts, and delivers the others.
func (a *arrival) failSome(err error, texts ...string) {
	batchErr := service.NewBatchError(a.batch, err)
	for i, text := range a.texts() {
		if slices.Contains(texts, text) {
			batchErr.Failed(i, err)
		}
	}
	a.verdict <- batchErr
}

func (a *arrival) texts() []string {
	texts := make([]string, len(a.batch))
	for i, m := range a.batch {
		b, _ := m.AsBytes()
		texts[i] = string(b)
	}
	return texts
}

// deliverArrived delivers everything that arrives before the clock moves on, and returns
// its texts.
func (e *engine) deliverArrived() (texts []string) {
	for synctest.Wait(); len(e.probe.arrivals) > 0; synctest.Wait() {
		a := <-e.probe.arrivals
		texts = append(texts, a.texts()...)
		a.deliver()
	}
	return texts
}

// deliverNext delivers what arrives until it is n messages, and returns their texts.
func (e *engine) deliverNext(n int) (texts []string) {
	e.t.Helper()
	for len(texts) < n {
		a := e.arrival()
		texts = append(texts, a.texts()...)
		a.deliver()
		synctest.Wait()
	}
	return texts
}

// deliverFor delivers what arrives during some time, and returns its texts. Batches that begin with
// one of the prefixes fail.
func (e *engine) deliverFor(during time.Duration, failing ...string) (delivered []string) {
	e.t.Helper()
	end := time.After(during)
	for {
		select {
		case a := <-e.probe.arrivals:
			first := a.texts()[0]
			if slices.ContainsFunc(failing, func(prefix string) bool { return strings.HasPrefix(first, prefix) }) {
				a.fail(errPoison)
			} else {
				delivered = append(delivered, a.texts()...)
				a.deliver()
			}
		case <-end:
			return delivered
		}
	}
}

// deliverAll delivers everything that arrives from now on, in the background. The function that it
// returns returns the texts so far.
func (e *engine) deliverAll() (texts func() []string) {
	var (
		mu   sync.Mutex
		got  []string
		stop = make(chan struct{})
		done sync.WaitGroup
	)
	done.Go(func() {
		for {
			select {
			case a := <-e.probe.arrivals:
				mu.Lock()
				got = append(got, a.texts()...)
				mu.Unlock()
				a.deliver()
			case <-stop:
				return
			}
		}
	})
	e.t.Cleanup(func() { close(stop); done.Wait() })
	return func() []string {
		mu.Lock()
		defer mu.Unlock()
		return append([]string(nil), got...)
	}
}

// feed is an input for the batches of produce.
type feed struct{ batches chan *produced }

// produced is a batch that the pipeline gets from the test, and its result.
type produced struct {
	batch   service.MessageBatch
	verdict chan error
}

func (f *feed) Connect(context.Context) error { return nil }
func (f *feed) Close(context.Context) error   { return nil }

func (f *feed) ReadBatch(ctx context.Context) (service.MessageBatch, service.AckFunc, error) {
	select {
	case b := <-f.batches:
		return b.batch, func(_ context.Context, err error) error { b.verdict <- err; return nil }, nil
	case <-ctx.Done():
		return nil, nil, ctx.Err()
	}
}

// retrying is an input that sends again what fails. The engine's ReadBatch can miss the end of its
// context, because it is woken up without the lock under which it checks the context, and would then
// never return. The end of the feed wakes it up reliably.
type retrying struct{ service.BatchInput }

func (r retrying) ReadBatch(ctx context.Context) (service.MessageBatch, service.AckFunc, error) {
	defer context.AfterFunc(ctx, func() { _ = r.Close(ctx) })()
	return r.BatchInput.ReadBatch(ctx)
}

// produce sends a batch of texts into the pipeline.
func (e *engine) produce(texts ...string) *produced { return e.produceBatch(batchOf(texts...)) }

// produceBatch is produce for messages with metadata.
func (e *engine) produceBatch(batch service.MessageBatch) *produced {
	f := &produced{batch, make(chan error, 1)}
	e.feed <- f
	return f
}

// wantPending requires that the batch has no result by now.
func (f *produced) wantPending(t *testing.T, why string) {
	t.Helper()
	synctest.Wait()
	require.Empty(t, f.verdict, why)
}

// wantDelivered waits for the delivery of the batch.
func (f *produced) wantDelivered(t *testing.T, why string) {
	t.Helper()
	require.NoError(t, next(t, f.verdict), why)
}

// wantFailed waits for the failure of the whole batch, with this error.
func (f *produced) wantFailed(t *testing.T, words string) {
	t.Helper()
	err := next(t, f.verdict)
	require.EqualError(t, err, words)
	requirePlain(t, err)
}

// requirePlain requires an error of a whole batch that does not make the engine send it again by
// itself.
func requirePlain(t *testing.T, err error) {
	t.Helper()
	_, partial := errors.AsType[*service.BatchError](err)
	require.False(t, partial, "names messages: %v", err)
	require.NotErrorIs(t, err, service.ErrNotConnected)
}

// singles are messages that were produced one by one.
type singles []*produced

// produceEach sends messages into the pipeline one by one. An output with batching makes one batch
// of them.
func (e *engine) produceEach(batch service.MessageBatch) singles {
	list := make(singles, len(batch))
	for i := range batch {
		list[i] = e.produceBatch(batch[i : i+1])
	}
	return list
}

// wantFailed requires that the messages with these indexes fail with these errors, and the others
// are delivered.
func (s singles) wantFailed(t *testing.T, want map[int]string) {
	t.Helper()
	got := make(map[int]string)
	for i, f := range s {
		if err := next(t, f.verdict); err != nil {
			got[i] = err.Error()
			requirePlain(t, err)
		}
	}
	require.Equal(t, want, got)
}

// batchOf makes a batch of texts.
func batchOf(texts ...string) service.MessageBatch {
	var batch service.MessageBatch
	for _, text := range texts {
		batch = append(batch, service.NewMessage([]byte(text)))
	}
	return batch
}

// numbered returns n texts, each with its index by the format: "m0", "m1" by "m%d".
func numbered(format string, n int) []string {
	list := make([]string, n)
	for i := range list {
		list[i] = fmt.Sprintf(format, i)
	}
	return list
}

// next waits for the next value of a channel, for an hour at most, of virtual time.
func next[T any](t testing.TB, values <-chan T) T {
	t.Helper()
	select {
	case v := <-values:
		return v
	case <-time.After(time.Hour):
		require.FailNow(t, "nothing came")
		panic("unreachable")
	}
}
