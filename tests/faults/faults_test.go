package faults

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/redpanda-data/benthos/v4/public/service"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	_ "github.com/redpanda-data/benthos/v4/public/components/pure"

	"github.com/cryo-connect/cryo-connect/cryo"
	_ "github.com/cryo-connect/cryo-connect/plugin"
)

// fault is what is wrong with a line.
type fault struct {
	toxics []string // of toxiproxy, in both directions, all the time
	breaks *breaks  // of connections, now and then; nil: none
	away   bool     // now and then the server can't be reached
	silent bool     // nobody is told of a break: only heartbeats tell
	small  bool     // the line is so slow that less is sent
}

// faults are made anew for each test.
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
		"tiny slices":   {toxics: []string{`"type": "slicer", "attributes": { "average_size": 11, "size_variation": 10 }`}, small: true},
		"low bandwidth": {toxics: []string{`"type": "bandwidth", "attributes": { "rate": 100 }`}, small: true},

		"cuts at random bytes":              {breaks: breaks(closed, closed, false)},
		"resets":                            {breaks: breaks(closed, closed, true)},
		"black holes":                       {breaks: breaks(swallowed, swallowed, false), silent: true},
		"half-open, only the server learns": {breaks: breaks(closed, swallowed, false), silent: true},
		"half-open, only the client learns": {breaks: breaks(swallowed, closed, false), silent: true},
		"what the client sends gets lost":   {breaks: breaks(swallowed, passed, false), silent: true},
		"what the server sends gets lost":   {breaks: breaks(passed, swallowed, false), silent: true},
		"cuts on a slow line with slices": {
			toxics: []string{
				`"type": "latency", "attributes": { "latency": 5, "jitter": 5 }`,
				`"type": "slicer", "attributes": { "average_size": 500, "size_variation": 499 }`,
			},
			breaks: breaks(closed, closed, false),
		},
		"a server that is away": {away: true},
	}
}

// component is one of ours, with the other end of its line.
type component struct {
	sends   bool // it is an output
	listens bool
}

var components = map[string]component{
	"input cryo":         {},
	"input cryo_server":  {listens: true},
	"output cryo":        {sends: true},
	"output cryo_server": {sends: true, listens: true},
}

// timing is both ends'.
type timing struct{ heartbeat, connect time.Duration }

// quick is for lines on which silence is all that tells of a break.
var quick = timing{heartbeat: 500 * time.Millisecond, connect: time.Second}

// config is the component's, in a pipeline.
func (c component) config(server string, timing timing, streams bool) string {
	role := fmt.Sprintf(`url: "ws://%s", token: %q, connect_timeout: %v`, server, token, timing.connect)
	name := "cryo"
	if c.listens {
		role = fmt.Sprintf(`address: "127.0.0.1:0", tokens: [ %q ]`, token)
		name = "cryo_server"
	}
	half := "max_in_flight: 64, max_buffer_bytes: 200000, streams: { scanner: { lines: {} } }" // what leaked would stop it soon
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

// TestNothingIsLostOnABadLine sends through each of the components over a line
// with each of the faults. What the sender saw accepted has to be delivered by
// then, in the order of sending the first time; the connection has to come back
// by itself; and nothing may be left behind.
func TestNothingIsLostOnABadLine(t *testing.T) {
	seed := newSeed(t)
	files := openFiles(t)
	t.Run("with", func(t *testing.T) {
		for componentName, c := range components {
			for _, kind := range []string{"messages", "streams"} {
				for faultName, f := range faults() {
					t.Run(componentName+"/"+kind+"/"+faultName, func(t *testing.T) {
						t.Parallel()
						test := &test{T: t, component: c, fault: f, streams: kind == "streams"}
						test.run(seeded(t, seed))
					})
				}
			}
		}
	})
	goleak.VerifyNone(t, proxysOwn...)
	require.EventuallyWithT(t, func(t *assert.CollectT) { require.LessOrEqual(t, openFiles(t), files) }, patience, 10*time.Millisecond,
		"file descriptors are left open")
}

// test is one component with one fault.
type test struct {
	*testing.T
	component
	fault
	streams bool
}

func (t *test) run(random *rand.Rand) {
	timing := timing{heartbeat: 15 * time.Second, connect: patience}
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
	if t.small || t.streams {
		least = 50
	}

	ctx, cancel := context.WithCancel(context.Background())
	var working sync.WaitGroup
	t.Cleanup(working.Wait)
	t.Cleanup(cancel)
	came, sessions := make(chan *cryo.Session), make(chan *cryo.Session, 10_000)
	connected, again := 0, make(chan struct{}, 10_000)
	working.Go(func() {
		for {
			select {
			case s := <-came:
				connected++
				sessions <- s
				again <- struct{}{}
			case <-ctx.Done():
				return
			}
		}
	})

	// The line is between the pipeline and the application.
	var line *line
	var p *pipeline
	if t.listens {
		p = t.runPipeline(l, random, "", timing)
		line = newLine(t.T, p.listening.address(t.T), t.toxics, b)
		working.Go(func() { redial(ctx, line.Listen, timing, came) })
	} else {
		line = newLine(t.T, serve(t.T, timing, came), t.toxics, b)
		p = t.runPipeline(l, random, line.Listen, timing)
	}

	q := &queue{ledger: l, least: least, more: func() bool { return !b.enough() }}
	if t.away {
		away := disappear(ctx, line, rand.New(rand.NewPCG(random.Uint64(), 1)), again, &working)
		q.more = func() bool {
			select {
			case <-away:
				return false
			default:
				return true
			}
		}
	}
	limit := patience
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
	// Behind the breaks, which all have happened by now, it has connected again,
	// or not everything would be delivered.
	if t.breaks == nil && !t.away {
		assert.Equal(t, 1, connected, "a bad line is no reason to lose the session")
	}
	if long || t.Failed() {
		t.Logf("%d units on %d sessions, %d texts delivered more than once", l.accepted, connected, l.again)
	}
}

// disappear lets the server be out of reach now and then, each time after the
// client has come back. The channel is closed when that is over.
func disappear(ctx context.Context, line *line, random *rand.Rand, connected <-chan struct{}, working *sync.WaitGroup) <-chan struct{} {
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
			time.Sleep(time.Duration(random.IntN(100)) * time.Millisecond) // a moment's chance, not a wait for anything
			line.Stop()
			time.Sleep(time.Duration(random.IntN(1000)) * time.Millisecond)
			for line.Start() != nil { // somebody else has the port
				time.Sleep(50 * time.Millisecond)
			}
		}
	})
	return over
}

// produce is an application that gives its messages to a pipeline, and again
// what it didn't accept.
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
			assert.Fail(q.t, "the pipeline does not accept what it is given", "%d units left: %v", len(q.queued), err)
			return
		}
		if err == nil {
			q.settle(sent, nil)
		}
	}
}

// pipeline is one with a component of ours, and the application's own code at
// its other end.
type pipeline struct {
	stream    *service.Stream
	ended     chan error
	produce   service.MessageBatchHandlerFunc
	listening listening
}

func (t *test) runPipeline(l *ledger, random *rand.Rand, server string, timing timing) *pipeline {
	t.Helper()
	p := &pipeline{ended: make(chan error, 1), listening: make(listening, 1)}
	b := service.NewStreamBuilder()
	b.SetLogger(slog.New(slog.NewTextHandler(io.MultiWriter(p.listening, testLog{t.T}), nil)))
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
				time.Sleep(time.Duration(slow.IntN(1000)) * time.Microsecond) // an output is no memory
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

// stop stops the pipeline in good order. It may be called again.
func (p *pipeline) stop(t *testing.T) {
	t.Helper()
	if p.stream == nil {
		return
	}
	assert.NoError(t, p.stream.StopWithin(patience))
	assert.NoError(t, <-p.ended)
	p.stream = nil
}

// testLog shows a pipeline's log when the test fails.
type testLog struct{ *testing.T }

func (t testLog) Write(line []byte) (int, error) {
	t.Log(string(line[:len(line)-1]))
	return len(line), nil
}

func listen(t *testing.T) net.Listener {
	t.Helper()
	socket, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	return socket
}
