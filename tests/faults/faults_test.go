package faults

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/redpanda-data/benthos/v4/public/service"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	_ "github.com/redpanda-data/benthos/v4/public/components/pure"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/testkit"
	_ "github.com/cryo-connect/cryo-connect/plugin"
)

// fault is a fault of the network.
type fault struct {
	toxics []string // of toxiproxy, in both directions, all the time
	breaks *breaks  // of connections, now and then; nil is none
	down   bool     // the server cannot be reached now and then
	silent bool     // an end is not notified of a break, only heartbeats detect it
	slow   bool     // less is sent
}

// faults returns new faults for each test.
func faults() map[string]fault {
	times := 4
	if long {
		times = 20
	}
	breaks := func(up, down after, reset bool) *breaks {
		return &breaks{times: times, up: up, down: down, reset: reset}
	}
	return map[string]fault{
		"latency":       {toxics: []string{`"type": "latency", "attributes": { "latency": 20 }`}},
		"jitter":        {toxics: []string{`"type": "latency", "attributes": { "latency": 20, "jitter": 20 }`}},
		"tiny slices":   {toxics: []string{`"type": "slicer", "attributes": { "average_size": 11, "size_variation": 10 }`}, slow: true},
		"low bandwidth": {toxics: []string{`"type": "bandwidth", "attributes": { "rate": 100 }`}, slow: true},

		"disconnects at random bytes":            {breaks: breaks(closed, closed, false)},
		"resets":                                 {breaks: breaks(closed, closed, true)},
		"black holes":                            {breaks: breaks(swallowed, swallowed, false), silent: true},
		"half-open, only the server is notified": {breaks: breaks(closed, swallowed, false), silent: true},
		"half-open, only the client is notified": {breaks: breaks(swallowed, closed, false), silent: true},
		"data from the client is lost":           {breaks: breaks(swallowed, passed, false), silent: true},
		"data from the server is lost":           {breaks: breaks(passed, swallowed, false), silent: true},
		"disconnects on a slow line with slices": {
			toxics: []string{
				`"type": "latency", "attributes": { "latency": 5, "jitter": 5 }`,
				`"type": "slicer", "attributes": { "average_size": 500, "size_variation": 499 }`,
			},
			breaks: breaks(closed, closed, false),
		},
		"a server that is down": {down: true},
	}
}

// component is one of the components.
type component struct {
	sends   bool // an output
	listens bool
}

var components = map[string]component{
	"input cryo":         {},
	"input cryo_server":  {listens: true},
	"output cryo":        {sends: true},
	"output cryo_server": {sends: true, listens: true},
}

// timing is that of both ends.
type timing struct{ heartbeat, connect time.Duration }

// quick is for faults that only heartbeats detect.
var quick = timing{heartbeat: 500 * time.Millisecond, connect: time.Second}

// config returns the component's configuration.
func (c component) config(server string, timing timing, streams bool) string {
	role := fmt.Sprintf(`url: "ws://%s", token: %q, connect_timeout: %v`, server, testkit.Token, timing.connect)
	name := "cryo"
	if c.listens {
		role = fmt.Sprintf(`address: "127.0.0.1:0", tokens: [ %q ]`, testkit.Token)
		name = "cryo_server"
	}
	half := "max_in_flight: 64, max_buffer_bytes: 200000, streams: { scanner: { lines: {} } }" // a leak would soon stop it
	switch {
	case c.sends && streams:
		half = "message_type: stream, stream: { chunk_bytes: 1000 }, max_in_flight: 1"
	case c.sends:
		half = "message_type: utf8, max_in_flight: 1"
	}
	if c.sends && c.listens {
		half += fmt.Sprintf(`, send_to: session, session_id: "%d"`, clientID)
	}
	return fmt.Sprintf("%s: { %s, heartbeat_interval: %v, %s }", name, role, timing.heartbeat, half)
}

// Each component sends or receives over a line with each of the faults. An acknowledged
// unit must be delivered, the first deliveries must be in the order of sending, the client
// must reconnect, and no goroutine and no file may be left.
func TestNothingIsLostOverABadConnection(t *testing.T) {
	files := openFiles(t)
	t.Run("with", func(t *testing.T) {
		for componentName, c := range components {
			for _, kind := range []string{"messages", "streams"} {
				for faultName, f := range faults() {
					t.Run(componentName+"/"+kind+"/"+faultName, func(t *testing.T) {
						t.Parallel()
						test := &test{T: t, component: c, fault: f, streams: kind == "streams"}
						test.run(testkit.Random(t))
					})
				}
			}
		}
	})
	goleak.VerifyNone(t, leaksOfTheProxy...)
	testkit.Eventually(t, func(c *assert.CollectT) {
		require.LessOrEqual(c, openFiles(c), files, "file descriptors are left open")
	})
}

// test is one component with one fault.
type test struct {
	*testing.T
	component
	fault
	streams bool
}

// run sends until the faults have happened, and checks the ledger.
func (t *test) run(random *rand.Rand) {
	timing := timing{heartbeat: 15 * time.Second, connect: 2 * testkit.Patience}
	if t.silent {
		timing = quick
	}
	b := t.breaks
	if b == nil {
		b = &breaks{}
	}
	b.start(rand.New(rand.NewPCG(random.Uint64(), 0)))
	l := &ledger{t: t.T, random: random, lines: 1}
	if t.streams && !t.sends {
		l.lines = 20
	}
	least := 300
	if t.slow || t.streams {
		least = 50
	}

	ctx, cancel := context.WithCancel(context.Background())
	var working sync.WaitGroup
	t.Cleanup(working.Wait)
	t.Cleanup(cancel)
	var opened <-chan *cryo.Session // by the application
	sessions := make(chan *cryo.Session, 10_000)
	connected, again := 0, make(chan struct{}, 10_000)
	// The line is between the pipeline and the application.
	var line *line
	var p *pipeline
	if t.listens {
		p = t.runPipeline(l, random, "", timing)
		line = newLine(t.T, p.log.Listening(), t.toxics, b)
		opened = testkit.Redial(t, line.Listen, cryo.DialOptions{SessionOptions: sessionOptions(timing), SessionID: clientID, ConnectTimeout: timing.connect})
	} else {
		server := testkit.ServeOn(t, testkit.Listen(t), sessionOptions(timing))
		opened = server.Sessions
		line = newLine(t.T, server.Address, t.toxics, b)
		p = t.runPipeline(l, random, line.Listen, timing)
	}
	working.Go(func() {
		for {
			select {
			case s := <-opened:
				connected++
				sessions <- s
				again <- struct{}{}
			case <-ctx.Done():
				return
			}
		}
	})

	q := &queue{ledger: l, least: least, more: func() bool { return !b.enough() }}
	if t.down {
		over := interrupt(ctx, line, rand.New(rand.NewPCG(random.Uint64(), 1)), again, &working)
		q.more = func() bool {
			select {
			case <-over:
				return false
			default:
				return true
			}
		}
	}
	limit := 2 * testkit.Patience
	if long {
		limit = time.Hour
	}
	limited, stop := context.WithTimeout(ctx, limit)
	defer stop()
	if t.sends {
		working.Go(func() { l.receiveFrom(ctx, sessions, t.streams) })
		q.produce(limited, p.produce)
	} else {
		q.sendTo(limited, sessions, t.streams)
	}
	p.stop(t.T)
	cancel()
	working.Wait()
	l.wantInOrder()
	// After the last break the client has reconnected, or not everything would be delivered.
	if t.breaks == nil && !t.down {
		assert.Equal(t, 1, connected, "this fault must not end the session")
	}
	if long || t.Failed() {
		t.Logf("%d units on %d sessions, %d texts delivered more than once", l.accepted, connected, l.again)
	}
}

// interrupt takes the line down now and then, each time after the client has reconnected.
// The channel is closed when that is over.
func interrupt(ctx context.Context, line *line, random *rand.Rand, connected <-chan struct{}, working *sync.WaitGroup) <-chan struct{} {
	over := make(chan struct{})
	times := 2
	if long {
		times = 15
	}
	working.Go(func() {
		defer close(over)
		for range times {
			select {
			case <-connected:
			case <-ctx.Done():
				return
			}
			time.Sleep(time.Duration(random.IntN(100)) * time.Millisecond) // a random moment, not a wait
			line.Stop()
			time.Sleep(time.Duration(random.IntN(1000)) * time.Millisecond)
			if err := line.Start(); err != nil {
				panic(err) // the address is reserved
			}
		}
	})
	return over
}

// produce is an application that writes its messages to a pipeline, and writes the
// rejected ones again.
func (q *queue) produce(ctx context.Context, produce service.MessageBatchHandlerFunc) {
	for {
		sent, more := q.next(1 + q.random.IntN(40))
		if !more {
			return
		}
		var batch service.MessageBatch
		for _, i := range sent {
			batch = append(batch, service.NewMessage([]byte(q.units[i][0])))
		}
		err := produce(ctx, batch)
		if ctx.Err() != nil {
			assert.Fail(q.t, "timed out writing to the pipeline", "%d units left: %v", len(q.queued), err)
			return
		}
		if err == nil {
			q.remove(sent, nil)
		}
	}
}

// pipeline has a component of ours, and the application's code at its other end.
type pipeline struct {
	stream  *service.Stream
	ended   chan error
	produce service.MessageBatchHandlerFunc
	log     *testkit.Lines
}

// runPipeline runs a pipeline with the component, in the test's process. server is the
// address for a component that dials.
func (t *test) runPipeline(l *ledger, random *rand.Rand, server string, timing timing) *pipeline {
	t.Helper()
	p := &pipeline{ended: make(chan error, 1), log: testkit.NewLines(t, "the pipeline")}
	b := service.NewStreamBuilder()
	b.SetLogger(testkit.Logger(t, p.log))
	require.NoError(t, b.SetMetricsYAML("none: {}"))
	config := t.config(server, timing, t.streams)
	if t.sends {
		var err error
		p.produce, err = b.AddBatchProducerFunc()
		require.NoError(t, err)
		require.NoError(t, b.AddOutputYAML(config))
	} else {
		slow := rand.New(rand.NewPCG(random.Uint64(), 2))
		require.NoError(t, b.AddInputYAML(config))
		require.NoError(t, b.AddConsumerFunc(func(_ context.Context, m *service.Message) error {
			text, err := m.AsBytes()
			if err == nil {
				time.Sleep(time.Duration(slow.IntN(1000)) * time.Microsecond) // an output takes time
				l.deliver(string(text))
			}
			return err
		}))
	}
	stream, err := b.Build()
	require.NoError(t, err)
	p.stream = stream
	go func() { p.ended <- stream.Run(context.Background()) }()
	t.Cleanup(func() { p.stop(t.T) })
	return p
}

// stop stops the pipeline in good order. It can be called again.
func (p *pipeline) stop(t *testing.T) {
	t.Helper()
	if p.stream == nil {
		return
	}
	assert.NoError(t, p.stream.StopWithin(2*testkit.Patience))
	assert.NoError(t, <-p.ended)
	p.stream = nil
}
