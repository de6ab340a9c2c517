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

// checkLeaks is for tests without synctest, which looks for itself.
func checkLeaks(t *testing.T) { t.Helper(); goleak.VerifyNone(t) }

// engine runs pipelines with our components over a network in memory. Its tests
// are synctest's: time is virtual, what is said to happen at once does, and a
// test whose pipelines leave a goroutine behind fails.
type engine struct {
	t       testing.TB
	env     *service.Environment
	net     *memoryNet
	log     *logBook
	metrics *metricsBook
	spans   *spanBook // nil: none are made
	probe   *probe
	feed    chan *fed
	shared  *listeners // of all pipelines, as in streams mode
	dialer  func(ctx context.Context, network, address string) (net.Conn, error)
}

// inEngine runs a test in virtual time.
func inEngine(t *testing.T, test func(t *testing.T, e *engine)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) { test(t, newEngine(t)) })
}

func newEngine(t testing.TB) *engine {
	e := &engine{
		t: t, env: service.NewEnvironment(),
		net: &memoryNet{listening: make(map[string]*memoryListener)}, log: &logBook{}, metrics: &metricsBook{values: make(map[string]int64)},
		probe: &probe{arrivals: make(chan *arrival, 1000)}, feed: make(chan *fed, 100),
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
	must(e.env.RegisterBatchInput("feed", service.NewConfigSpec(), func(*service.ParsedConfig, *service.Resources) (service.BatchInput, error) {
		return service.AutoRetryNacksBatched(&feed{e.feed}), nil
	}))
	must(e.env.RegisterBatchInput("once", service.NewConfigSpec(), func(*service.ParsedConfig, *service.Resources) (service.BatchInput, error) {
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

const (
	dialInput    = "cryo: { url: ws://" + somewhere + ", token: " + token + " }"
	dialOutput   = dialInput
	listenInput  = "cryo_server: { address: '" + somewhere + "', tokens: [ " + token + " ] }"
	listenOutput = listenInput
	toProbe      = "probe: {}"
	fromFeed     = "feed: {}" // tries again what fails
	fromOnce     = "once: {}" // and this doesn't
)

// with adds fields to a component.
func with(component, fields string) string {
	if fields == "" {
		return component
	}
	return strings.TrimSuffix(component, " }") + ", " + fields + " }"
}

// pipeline is one that runs.
type pipeline struct {
	e      *engine
	stream *service.Stream
	ended  chan struct{}
}

// run starts a pipeline from an input to an output, each in YAML. The test's end
// stops it, if the test didn't.
func (e *engine) run(input, output string, processors ...string) *pipeline {
	e.t.Helper()
	p := e.start(input, output, processors...)
	e.t.Cleanup(p.kill)
	synctest.Wait()
	return p
}

// start is run without synctest, and without a stop at the end.
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

// kill stops the pipeline at once; acknowledgements are not waited for.
func (p *pipeline) kill() {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	_ = p.stream.Stop(ctx)
	<-p.ended
}

// stopWhile stops a pipeline in good order. What its output gets meanwhile is for
// handle.
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

// probe is an output whose deliveries the test decides.
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

// arrival is a batch that the pipeline wants to deliver.
type arrival struct {
	batch   service.MessageBatch
	verdict chan error
}

// arrival waits for the next batch.
func (e *engine) arrival() *arrival {
	e.t.Helper()
	return next(e.t, e.probe.arrivals)
}

// want waits for messages with these texts, each in a batch of its own, and
// delivers none. They arrive in any order; the result is in this one.
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

// wantNoArrival wants nothing to be delivered by now.
func (e *engine) wantNoArrival(why string) {
	e.t.Helper()
	synctest.Wait()
	require.Empty(e.t, e.probe.arrivals, why)
}

func (a *arrival) deliver()       { a.verdict <- nil }
func (a *arrival) fail(err error) { a.verdict <- err }

// failSome fails messages by their text.
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

// deliverAll delivers what comes from now on, until the test ends.
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

// feed is an input that the test feeds with batches.
type feed struct{ batches chan *fed }

// fed is a batch for the pipeline, and what becomes of it.
type fed struct {
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

// give feeds a batch of texts to the pipeline.
func (e *engine) give(texts ...string) *fed { return e.giveBatch(batchOf(texts...)) }

func (e *engine) giveBatch(batch service.MessageBatch) *fed {
	f := &fed{batch, make(chan error, 1)}
	e.feed <- f
	return f
}

func (f *fed) wantPending(t *testing.T, why string) {
	t.Helper()
	synctest.Wait()
	require.Empty(t, f.verdict, why)
}

func (f *fed) wantDelivered(t *testing.T, why string) {
	t.Helper()
	require.NoError(t, next(t, f.verdict), why)
}

// wantFailed wants a batch to have failed as a whole, with this error.
func (f *fed) wantFailed(t *testing.T, words string) {
	t.Helper()
	err := next(t, f.verdict)
	require.EqualError(t, err, words)
	requirePlain(t, err)
}

// requirePlain wants an error that is a whole batch's, and does not make the engine
// send it again by itself.
func requirePlain(t *testing.T, err error) {
	t.Helper()
	_, partial := errors.AsType[*service.BatchError](err)
	require.False(t, partial, "names messages: %v", err)
	require.NotErrorIs(t, err, service.ErrNotConnected)
}

// singles are messages that were fed one by one.
type singles []*fed

// giveSingly feeds messages one by one to the pipeline. An output with batching
// makes one batch of them.
func (e *engine) giveSingly(batch service.MessageBatch) singles {
	list := make(singles, len(batch))
	for i := range batch {
		list[i] = e.giveBatch(batch[i : i+1])
	}
	return list
}

// wantFailed wants those with these indexes to have failed so, and the others to be
// delivered.
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

func batchOf(texts ...string) service.MessageBatch {
	var batch service.MessageBatch
	for _, text := range texts {
		batch = append(batch, service.NewMessage([]byte(text)))
	}
	return batch
}

// words numbers texts.
func words(format string, n int) []string {
	list := make([]string, n)
	for i := range list {
		list[i] = fmt.Sprintf(format, i)
	}
	return list
}

// next waits for a value.
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
