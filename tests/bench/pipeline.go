package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gorilla/websocket"
	"github.com/redpanda-data/benthos/v4/public/service"

	_ "github.com/redpanda-data/benthos/v4/public/components/io"
	_ "github.com/redpanda-data/benthos/v4/public/components/pure"

	_ "github.com/cryo-connect/cryo-connect/plugin"

	reserve "github.com/cryo-connect/cryo-connect/internal/testkit/address"
	"github.com/cryo-connect/cryo-connect/internal/wire"
)

// running is a running load: the subject and its peer.
type running struct {
	peer *peer
	// do transfers n messages, and returns when they are delivered and, if the protocol has
	// acknowledgements, acknowledged.
	do  func(n int) error
	end func() // ends the subject
}

// stop ends the peer first: it has no close handshake, for which the subject would wait.
func (r *running) stop() {
	r.peer.stop()
	r.end()
}

// receiving measures an input: the peer sends, and the pipeline drops. ADDRESS in the
// input's YAML is replaced by the peer's address, or by the one on which to listen.
func receiving(spec peerSpec, input string) (*running, error) {
	p, address, err := startPeerFor(spec)
	if err != nil {
		return nil, err
	}
	return dropping(p, nil, fill(input, address))
}

// dropping runs the pipeline that receiving measures.
func dropping(p *peer, own service.BatchInput, input string) (*running, error) {
	count := &counter{reached: make(chan struct{}, 1)}
	stop, err := runPipeline(count, own, input, `drop: {}`)
	if err != nil {
		return nil, err
	}
	do := func(n int) error {
		target := count.total.Load() + int64(n)
		count.target.Store(target)
		if _, err := p.order("send %d", n); err != nil {
			return err
		}
		for count.total.Load() < target {
			<-count.reached
		}
		return nil
	}
	return &running{p, do, stop}, nil
}

// sending measures an output: our own input returns batches, and a message is
// transferred when its batch is acknowledged.
func sending(spec peerSpec, batch int, output string) (*running, error) {
	p, address, err := startPeerFor(spec)
	if err != nil {
		return nil, err
	}
	f := &feed{messages: messagesOf(spec.Size, batch), batches: make(chan int, 16), delivered: make(chan int, 1024)}
	stop, err := runPipeline(&counter{}, f, `own: {}`, fill(output, address))
	if err != nil {
		return nil, err
	}
	do := func(n int) error {
		go func() {
			for left := n; left > 0; left -= batch {
				f.batches <- min(batch, left)
			}
		}()
		for n > 0 {
			n -= <-f.delivered
		}
		return nil
	}
	return &running{p, do, stop}, nil
}

// startPeerFor starts a peer and returns the address of the connection: the peer's, or a
// reserved one on which the subject listens.
func startPeerFor(spec peerSpec) (p *peer, address string, err error) {
	if spec.Sessions == 0 {
		if p, err = startPeer(spec); err != nil {
			return nil, "", err
		}
		return p, p.address, nil
	}
	var reserved io.Closer
	if spec.Dial, reserved, err = reserve.Reserve(); err != nil {
		return nil, "", err
	}
	if p, err = startPeer(spec); err != nil {
		return nil, "", err
	}
	p.reserved = reserved
	return p, spec.Dial, nil
}

// runPipeline runs until stop is called. The input "own" is one of ours, if any.
func runPipeline(count *counter, own service.BatchInput, input, output string) (stop func(), err error) {
	env := service.NewEnvironment()
	err = env.RegisterMetricsExporter("count", service.NewConfigSpec(), func(*service.ParsedConfig, *service.Logger) (service.MetricsExporter, error) {
		return exporter{count}, nil
	})
	if err != nil {
		return nil, err
	}
	err = env.RegisterBatchInput("own", service.NewConfigSpec(), func(*service.ParsedConfig, *service.Resources) (service.BatchInput, error) {
		return own, nil
	})
	if err != nil {
		return nil, err
	}
	b := env.NewStreamBuilder()
	if err := b.SetLoggerYAML(`level: NONE`); err != nil { // or the end of the peer is logged
		return nil, err
	}
	if err := b.SetMetricsYAML(`count: {}`); err != nil {
		return nil, err
	}
	if err := b.AddInputYAML(input); err != nil {
		return nil, fmt.Errorf("%w in\n%s", err, input)
	}
	if err := b.AddOutputYAML(output); err != nil {
		return nil, fmt.Errorf("%w in\n%s", err, output)
	}
	stream, err := b.Build()
	if err != nil {
		return nil, err
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = stream.Run(context.Background()) // only a stop ends it
	}()
	return func() {
		_ = stream.StopWithin(time.Second) // some of the engine's components exceed the timeout
		<-ended
	}, nil
}

// feed is an input that returns the same messages repeatedly, so that only the output
// is measured.
type feed struct {
	messages  service.MessageBatch
	batches   chan int // sizes of the requested batches
	delivered chan int
}

var _ service.BatchInput = (*feed)(nil)

func messagesOf(size, n int) service.MessageBatch {
	batch := make(service.MessageBatch, n)
	for i := range batch {
		batch[i] = service.NewMessage(text(size))
	}
	return batch
}

func (f *feed) Connect(context.Context) error { return nil }
func (f *feed) Close(context.Context) error   { return nil }

func (f *feed) ReadBatch(ctx context.Context) (service.MessageBatch, service.AckFunc, error) {
	select {
	case n := <-f.batches:
		return f.messages[:n], func(_ context.Context, err error) error {
			if err != nil {
				fatal(err)
			}
			f.delivered <- n
			return nil
		}, nil
	case <-ctx.Done():
		return nil, nil, ctx.Err()
	}
}

// minimal is an input that reads and acknowledges messages with the WebSocket library
// alone: the cost of the engine itself with messages one at a time.
type minimal struct {
	address string
	loop    *loop
	writing sync.Mutex
}

var _ service.BatchInput = (*minimal)(nil)

func (m *minimal) Connect(context.Context) error {
	l, err := dialLoop(m.address, false)
	if err != nil {
		return err
	}
	m.loop = l
	return m.write(wire.Frame{Type: wire.EndpointInfo, Version: wire.Version})
}

func (m *minimal) write(f wire.Frame) error {
	m.writing.Lock()
	defer m.writing.Unlock()
	return m.loop.ws.WriteMessage(websocket.BinaryMessage, frame(f))
}

func (m *minimal) Close(context.Context) error { return m.loop.ws.Close() }

func (m *minimal) ReadBatch(ctx context.Context) (service.MessageBatch, service.AckFunc, error) {
	f, err := m.loop.next()
	for err == nil && f.Type != wire.UTF8 {
		f, err = m.loop.next()
	}
	if err != nil { // the peer has ended
		<-ctx.Done()
		return nil, nil, ctx.Err()
	}
	number := f.Ack
	return service.MessageBatch{service.NewMessage(bytes.Clone(f.Payload))}, func(_ context.Context, err error) error {
		if err != nil {
			fatal(err)
		}
		return m.write(wire.Frame{Type: wire.Ack, Ack: number})
	}, nil
}

// counter counts delivered messages: the engine's metric output_sent.
type counter struct {
	total, target atomic.Int64
	reached       chan struct{} // holds a token when target may be reached
}

func (c *counter) Incr(n int64) {
	if c.total.Add(n) >= c.target.Load() {
		select {
		case c.reached <- struct{}{}:
		default:
		}
	}
}

type nothing struct{}

func (nothing) Incr(int64)   {}
func (nothing) Set(int64)    {}
func (nothing) Timing(int64) {}

// exporter exports one metric, to a counter.
type exporter struct{ count *counter }

func (e exporter) NewCounterCtor(name string, _ ...string) service.MetricsExporterCounterCtor {
	return func(...string) service.MetricsExporterCounter {
		if name == "output_sent" {
			return e.count
		}
		return nothing{}
	}
}

func (exporter) NewTimerCtor(string, ...string) service.MetricsExporterTimerCtor {
	return func(...string) service.MetricsExporterTimer { return nothing{} }
}

func (exporter) NewGaugeCtor(string, ...string) service.MetricsExporterGaugeCtor {
	return func(...string) service.MetricsExporterGauge { return nothing{} }
}

func (exporter) Close(context.Context) error { return nil }
