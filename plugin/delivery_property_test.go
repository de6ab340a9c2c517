package plugin

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/redpanda-data/benthos/v4/public/service"
	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
)

const (
	seedVariable = "CRYO_SEED" // runs the pipeline of this seed only

	oversizeBytes = 20_000

	// settleTime is how long everything may take once everything works, and stopTime
	// how long a graceful stop may.
	settleTime = 10 * time.Minute
	stopTime   = time.Minute
)

// What a sender sees acknowledged was delivered, in any pipeline. See
// delivery_property_exceptions_test.go for those that the engine makes impossible.
func TestOnlyDeliveredMessagesAreAcknowledged(t *testing.T) {
	if given := os.Getenv(seedVariable); given != "" {
		seed, err := strconv.ParseUint(given, 10, 64)
		require.NoError(t, err, seedVariable)
		checkPipeline(t, seed)
		return
	}
	n := 300
	if os.Getenv("CRYO_LONG_TESTS") == "1" {
		n = 3_000
	}
	first := uint64(time.Now().UnixNano())
	for i := range n {
		if checkPipeline(t, first+uint64(i)); t.Failed() {
			return
		}
	}
}

// checkPipeline runs the pipeline of a seed. One that fails is made smaller and shown.
func checkPipeline(t *testing.T, seed uint64) {
	t.Helper()
	spec := newPipeline(seed)
	faults := runPipeline(t, spec)
	if len(faults) == 0 {
		return
	}
	smaller, faultsThen := shrink(t, spec, faults)
	t.Errorf("%s=%d runs this pipeline again:\n%s\n%s\n\nThe smallest one found that fails:\n%s\n%s",
		seedVariable, seed, spec, strings.Join(faults, "\n"), smaller, strings.Join(faultsThen, "\n"))
}

// runPipeline runs a pipeline to its end, in virtual time, and returns what was wrong.
func runPipeline(t *testing.T, spec *pipelineSpec) (faults []string) {
	t.Helper()
	stuck := time.AfterFunc(time.Minute, func() { // in real time
		fmt.Fprintf(os.Stderr, "%s=%d hangs:\n%s\n", seedVariable, spec.seed, spec)
	})
	defer stuck.Stop()
	defer func() {
		if p := recover(); p != nil {
			faults = append(faults, fmt.Sprintf("the end: %v", p)) // goroutines that the pipeline left behind
		}
	}()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, spec)
		w.run()
		faults = w.faults
	})
	return faults
}

// world is a pipeline that runs, with all that it talks to.
type world struct {
	t       *testing.T
	e       *engine
	spec    *pipelineSpec
	failing atomic.Bool // outputs and peers fail at random
	drops   string      // the first letters of what may be dropped on purpose

	end     context.Context // of senders and peers
	cancel  context.CancelFunc
	running sync.WaitGroup

	mu        sync.Mutex
	random    *rand.Rand
	delivered map[string]map[string]bool // by leaf and id
	open      map[string]bool            // ids that are not settled
	faults    []string
}

func newWorld(t *testing.T, spec *pipelineSpec) *world {
	w := &world{
		t: t, e: newEngine(t), spec: spec, random: rand.New(rand.NewPCG(spec.seed, 1)),
		delivered: make(map[string]map[string]bool), open: make(map[string]bool),
	}
	if spec.has(dropped + "-") {
		w.drops += dropped
	}
	if spec.has("bounds_check") {
		w.drops += oversize
	}
	w.e.log.deaf = true
	w.failing.Store(true)
	w.end, w.cancel = context.WithCancel(context.Background())
	w.register()
	t.Cleanup(func() { // for a pipeline that could not be built
		w.cancel()
		w.running.Wait()
	})
	return w
}

// chance rolls the dice.
func (w *world) chance(percent int) bool { return w.intn(100) < percent }

func (w *world) intn(n int) int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.random.IntN(n)
}

func (w *world) fault(format string, args ...any) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.faults = append(w.faults, fmt.Sprintf(format, args...))
}

// sleep sleeps unless all ends.
func (w *world) sleep(ctx context.Context, d time.Duration) {
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
}

// run runs the pipeline until all is settled, stops it, and ends all.
func (w *world) run() {
	w.servePeers()
	senders := w.serveSenders()
	p := w.e.start(inYAML(w.spec.inputConf()), inYAML(w.spec.output.conf()), w.processorsYAML()...)
	w.sendAll(senders)

	settled := make(chan struct{})
	go func() {
		for w.left() > 0 && w.end.Err() == nil {
			w.sleep(w.end, 10*time.Millisecond)
		}
		close(settled)
	}()
	select {
	case <-settled:
	case <-time.After(time.Duration(w.spec.faults) * time.Millisecond):
	}
	w.failing.Store(false)
	select {
	case <-settled:
		began := time.Now()
		if err := p.stream.StopWithin(stopTime); err != nil {
			w.fault("the pipeline didn't stop in %v: %v", time.Since(began), err)
		}
	case <-time.After(settleTime):
		w.mu.Lock()
		left := fmt.Sprint(sortedKeys(w.open))
		w.mu.Unlock()
		w.fault("not settled %v after everything works: %s", settleTime, left)
	}
	p.kill()
	w.cancel()
	w.running.Wait()
	<-settled
}

func (w *world) processorsYAML() []string {
	var list []string
	for _, p := range w.spec.processors {
		list = append(list, inYAML(p.conf))
	}
	return list
}

func (w *world) left() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.open)
}

// What is known of deliveries.

var anID = regexp.MustCompile("(?m)^" + idPattern)

// idsIn finds the ids in a message's content, which may be of several.
func idsIn(content []byte) []string { return anID.FindAllString(string(content), -1) }

// deliver records that a leaf has a message.
func (w *world) deliver(leaf string, content []byte) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.delivered[leaf] == nil {
		w.delivered[leaf] = make(map[string]bool)
	}
	for _, id := range idsIn(content) {
		w.delivered[leaf][id] = true
	}
}

// acknowledged checks that what the sender sees acknowledged was delivered, or dropped
// on purpose.
func (w *world) acknowledged(ids ...string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, id := range ids {
		delete(w.open, id)
		if !strings.Contains(w.drops, id[:1]) && !w.isDelivered(w.spec.output, id) {
			w.faults = append(w.faults, id+" was acknowledged and not delivered")
		}
	}
}

// rejected records that the sender saw messages rejected.
func (w *world) rejected(ids ...string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, id := range ids {
		delete(w.open, id)
		if w.spec.replay {
			w.faults = append(w.faults, id+" was rejected, but is to be redelivered")
		}
	}
}

// isDelivered reports whether an output has delivered a message: at all outputs of a
// broker that fans out, and at one of the others'.
func (w *world) isDelivered(o *out, id string) bool {
	has := func(child *out) bool { return w.isDelivered(child, id) }
	switch o.kind {
	case "sink", "cryo", "cryo_server":
		return w.delivered[o.name][id]
	case "drop":
		return true
	case "reject":
		return false
	case "broker":
		if strings.HasPrefix(o.pattern, "fan_out") {
			return !slices.ContainsFunc(o.children, func(child *out) bool { return !has(child) })
		}
	}
	return slices.ContainsFunc(o.children, has)
}

func sortedKeys(m map[string]bool) []string {
	var keys []string
	for key := range m {
		keys = append(keys, key)
	}
	slices.Sort(keys)
	return keys
}

// Components of the test.

// register registers the sink and the processor flaky.
func (w *world) register() {
	sinkSpec := service.NewConfigSpec().Fields(service.NewStringField("name"), service.NewStringField("fails"), service.NewIntField("percent"),
		service.NewIntField("max_in_flight"), service.NewBoolField("forgiven").Default(false), service.NewBatchPolicyField("batching"))
	err := w.e.env.RegisterBatchOutput("sink", sinkSpec, func(parsed *service.ParsedConfig, _ *service.Resources) (service.BatchOutput, service.BatchPolicy, int, error) {
		s := &sink{w: w}
		s.name, _ = parsed.FieldString("name")
		s.fails, _ = parsed.FieldString("fails")
		s.percent, _ = parsed.FieldInt("percent")
		s.forgiven, _ = parsed.FieldBool("forgiven")
		maxInFlight, _ := parsed.FieldInt("max_in_flight")
		policy, err := parsed.FieldBatchPolicy("batching")
		return s, policy, maxInFlight, err
	})
	require.NoError(w.t, err)
	err = w.e.env.RegisterProcessor("flaky", service.NewConfigSpec(), func(*service.ParsedConfig, *service.Resources) (service.Processor, error) {
		return flaky{w}, nil
	})
	require.NoError(w.t, err)
}

// flaky is a processor that fails at random, or sets a metadata field that outputs look
// at.
type flaky struct{ w *world }

func (f flaky) Process(_ context.Context, m *service.Message) (service.MessageBatch, error) {
	mood := "good"
	if f.w.failing.Load() {
		switch f.w.intn(5) {
		case 0:
			return nil, errors.New("flaky")
		case 1:
			mood = "bad"
		}
	}
	m.MetaSetMut("mood", mood)
	return service.MessageBatch{m}, nil
}

func (flaky) Close(context.Context) error { return nil }

// sink is an output that delivers, or fails at random: the whole batch, though it may
// have delivered some of it, or single messages.
type sink struct {
	w        *world
	name     string
	fails    string
	percent  int
	forgiven bool // what fails counts as delivered
}

func (s *sink) Connect(context.Context) error { return nil }
func (s *sink) Close(context.Context) error   { return nil }

var errSink = errors.New("sink fails")

func (s *sink) WriteBatch(ctx context.Context, batch service.MessageBatch) error {
	// No two leaves are done at the same instant: the engine's own races are not looked for here.
	number, _ := strconv.Atoi(strings.TrimPrefix(s.name, "sink"))
	s.w.sleep(ctx, time.Duration(s.w.intn(4))*5*time.Millisecond+time.Duration(number)*time.Microsecond)
	var failed []int
	fails := s.w.failing.Load() && s.fails != "never" && s.w.chance(s.percent)
	for i, m := range batch {
		if fails && (s.w.chance(50) || s.fails == "single" && i == len(batch)-1 && failed == nil) {
			failed = append(failed, i)
			if !s.forgiven {
				continue
			}
		}
		content, err := m.AsBytes()
		if err != nil {
			return err
		}
		s.w.deliver(s.name, content)
	}
	switch {
	case !fails, s.fails == "single" && failed == nil:
		return nil
	case s.fails == "whole":
		return errSink
	default:
		batchErr := service.NewBatchError(batch, errSink)
		for _, i := range failed {
			batchErr.Failed(i, errSink)
		}
		return batchErr
	}
}

// Peers of our outputs.

// servePeers starts the other ends of our outputs.
func (w *world) servePeers() {
	w.spec.output.walk(func(o *out) {
		switch o.kind {
		case "cryo":
			address := strings.TrimPrefix(o.fields["url"].(string), "ws://")
			w.serve(address, func(s *cryo.Session) { w.running.Go(func() { w.receive(o, s) }) })
		case "cryo_server":
			for i := range 2 {
				w.running.Go(func() { w.client(o.fields["address"].(string), uint64(i+1), func(s *cryo.Session) { w.receive(o, s) }) })
			}
		}
	})
}

// serve runs a Cryo server until all ends.
func (w *world) serve(address string, connected func(*cryo.Session)) {
	server := newServer(w.t, cryo.ServerOptions{Authorize: cryo.Tokens(token), OnSession: func(s *cryo.Session, _ *cryo.Upgrade) { connected(s) }})
	socket, err := w.e.net.Listen("tcp", address)
	require.NoError(w.t, err)
	h := &http.Server{Handler: server, ReadHeaderTimeout: time.Minute, ErrorLog: quiet}
	w.running.Go(func() { _ = h.Serve(socket) })
	w.running.Go(func() {
		<-w.end.Done()
		_ = server.Shutdown(w.end)
		_ = h.Close()
	})
}

// client dials an address, and again when its session has ended, until all ends.
func (w *world) client(address string, id uint64, connected func(*cryo.Session)) {
	for w.end.Err() == nil {
		s, err := cryo.Dial(w.end, "ws://"+address+"/", &cryo.DialOptions{Token: token, SessionID: id, NetDial: w.e.net.Dial})
		if err == nil {
			connected(s)
			<-s.Done()
		}
		w.sleep(w.end, time.Duration(1+w.intn(200))*time.Millisecond)
	}
}

// receive does with messages and streams what a peer may do.
func (w *world) receive(o *out, s *cryo.Session) {
	defer end(s)
	var streams sync.WaitGroup
	defer streams.Wait()
	streams.Go(func() {
		for {
			st, err := s.AcceptStream(w.end)
			if err != nil {
				return
			}
			streams.Go(func() {
				content, err := io.ReadAll(st)
				if err == nil {
					w.act(o, s, content, st.Ack, st.Close)
				}
			})
		}
	})
	for {
		m, err := s.Receive(w.end)
		if err != nil {
			return
		}
		streams.Go(func() {
			w.act(o, s, m.Payload, m.Ack, func() error { return m.Reject("not now") })
		})
	}
}

func (w *world) act(o *out, s *cryo.Session, content []byte, ack, reject func() error) {
	fate := 0
	if w.failing.Load() {
		fate = w.intn(20)
	}
	switch fate {
	case 1, 2, 3:
		_ = reject()
		return
	case 4, 5:
		select {
		case <-time.After(time.Duration(w.intn(3000)) * time.Millisecond):
		case <-s.Done():
			return
		}
	case 6:
		end(s)
		return
	case 7:
		_ = s.Close(w.end, "enough")
		return
	case 8:
		return // no answer
	}
	w.deliver(o.name, content)
	_ = ack()
}

// Senders.

// line gives a sender its session: the present one, or the next.
type line struct {
	mu      sync.Mutex
	session *cryo.Session
	changed chan struct{}
}

func newLine() *line { return &line{changed: make(chan struct{})} }

func (l *line) set(s *cryo.Session) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.session = s
	close(l.changed)
	l.changed = make(chan struct{})
}

// get waits for a session; nil is the end.
func (l *line) get(ctx context.Context) *cryo.Session {
	for {
		l.mu.Lock()
		s, changed := l.session, l.changed
		l.mu.Unlock()
		if s != nil && s.Err() == nil {
			return s
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil
		}
	}
}

// serveSenders prepares the other ends of the input.
func (w *world) serveSenders() []*line {
	var lines []*line
	switch w.spec.input {
	case "cryo":
		l := newLine()
		lines = append(lines, l)
		w.serve(somewhere, l.set)
	case "cryo_server":
		for i := range w.spec.clients {
			l := newLine()
			lines = append(lines, l)
			w.running.Go(func() { w.client(somewhere, uint64(100+i), l.set) })
		}
	}
	for _, l := range lines {
		w.running.Go(func() { w.disturb(l) })
	}
	return lines
}

// disturb ends a sender's session now and then.
func (w *world) disturb(l *line) {
	for w.failing.Load() && w.end.Err() == nil {
		w.sleep(w.end, time.Duration(w.intn(10_000))*time.Millisecond)
		l.mu.Lock()
		s := l.session
		l.mu.Unlock()
		if s != nil && w.failing.Load() && w.chance(50) {
			end(s)
		}
	}
}

// sendAll starts to send everything.
func (w *world) sendAll(lines []*line) {
	for _, j := range w.spec.jobs {
		for _, id := range j.ids {
			w.open[id] = true
		}
	}
	if w.spec.input == "feed" {
		w.running.Go(w.feedAll)
		return
	}
	for i, j := range w.spec.jobs {
		w.running.Go(func() {
			w.sleep(w.end, time.Duration(j.wait)*time.Millisecond)
			if l := lines[i%len(lines)]; j.stream {
				w.sendLines(l, j.ids)
			} else {
				w.sendBurst(l, j.ids)
			}
		})
	}
}

func messageOf(id string) []byte {
	if strings.HasPrefix(id, oversize) {
		return []byte(id + strings.Repeat(" ", oversizeBytes-len(id)))
	}
	return []byte(id)
}

// sendBurst sends messages together, and again what was not settled when the session
// ended.
func (w *world) sendBurst(l *line, ids []string) {
	for len(ids) > 0 {
		s := l.get(w.end)
		if s == nil {
			return
		}
		messages := make([]cryo.OutMessage, len(ids))
		for i, id := range ids {
			messages[i] = cryo.OutMessage{Kind: cryo.KindText, Payload: messageOf(id)}
		}
		err := s.SendBatch(w.end, messages)
		errs := make([]error, len(ids))
		if batchErr, ok := errors.AsType[*cryo.BatchError](err); ok {
			errs = batchErr.Errs
		}
		var again []string
		for i, id := range ids {
			switch _, rejected := errors.AsType[*cryo.RejectedError](errs[i]); {
			case errs[i] == nil:
				w.acknowledged(id)
			case rejected:
				w.rejected(id)
			case errors.Is(errs[i], net.ErrClosed), w.end.Err() != nil:
				again = append(again, id)
			default:
				w.fault("%s could not be sent: %v", id, errs[i])
			}
		}
		ids = again
	}
}

// sendLines sends a stream with a line for each message.
func (w *world) sendLines(l *line, ids []string) {
	content := strings.Join(ids, "\n") + "\n"
	for {
		s := l.get(w.end)
		if s == nil {
			return
		}
		switch err := s.SendStream(w.end, strings.NewReader(content), &cryo.StreamOptions{Name: "lines"}); {
		case err == nil:
			w.acknowledged(ids...)
			return
		case errors.Is(err, cryo.ErrStreamCancelled):
			w.rejected(ids...)
			return
		case errors.Is(err, net.ErrClosed), w.end.Err() != nil:
		default:
			w.fault("the stream of %v could not be sent: %v", ids, err)
			return
		}
	}
}

// feedAll gives the engine's input one batch after the other: while it waits to redeliver,
// it holds a mutex, and a verdict that waits for that would stop virtual time.
func (w *world) feedAll() {
	for _, j := range w.spec.jobs {
		batch := make(service.MessageBatch, len(j.ids))
		for i, id := range j.ids {
			batch[i] = service.NewMessage(messageOf(id))
		}
		f := w.e.produceBatch(batch)
		select {
		case err := <-f.verdict:
			if err == nil {
				w.acknowledged(j.ids...)
			} else {
				w.rejected(j.ids...)
			}
		case <-w.end.Done():
			return
		}
	}
}

// Making a pipeline that fails smaller.

// shrink leaves out what can be left out.
func shrink(t *testing.T, spec *pipelineSpec, faults []string) (*pipelineSpec, []string) {
	t.Helper()
	budget := time.Now().Add(20 * time.Second)
again:
	for _, smaller := range spec.smaller() {
		if unpreventable(smaller) != "" {
			continue
		}
		for range 2 {
			if time.Now().After(budget) {
				return spec, faults
			}
			if found := runPipeline(t, smaller); len(found) > 0 {
				spec, faults = smaller, found
				goto again
			}
		}
	}
	return spec, faults
}

// smaller gives the pipelines with one thing less.
func (s *pipelineSpec) smaller() (list []*pipelineSpec) {
	with := func(change func(*pipelineSpec)) {
		c := *s
		change(&c)
		list = append(list, &c)
	}
	for i := range s.jobs {
		if len(s.jobs) > 1 {
			with(func(c *pipelineSpec) { c.jobs = without(s.jobs, i) })
		}
	}
	for i := range s.processors {
		with(func(c *pipelineSpec) { c.processors = without(s.processors, i) })
	}
	for _, o := range s.output.smaller() {
		with(func(c *pipelineSpec) { c.output = o })
	}
	for i, j := range s.jobs {
		if half := len(j.ids) / 2; half > 0 {
			with(func(c *pipelineSpec) { c.jobs = slices.Clone(s.jobs); c.jobs[i].ids = j.ids[:half] })
			with(func(c *pipelineSpec) { c.jobs = slices.Clone(s.jobs); c.jobs[i].ids = j.ids[half:] })
		}
	}
	return list
}

func (o *out) smaller() (list []*out) {
	with := func(change func(*out)) {
		c := *o
		change(&c)
		list = append(list, &c)
	}
	if o.kind != "drop_on" || !o.children[0].forgiven() { // or its failures would no longer be forgiven
		for _, child := range o.children {
			if child.kind != "reject" {
				list = append(list, child)
			}
		}
	}
	for i := range o.processors {
		with(func(c *out) { c.processors = without(o.processors, i) })
	}
	for i := range o.batched {
		with(func(c *out) { c.batched = without(o.batched, i) })
	}
	if o.batching != nil {
		with(func(c *out) { c.batching, c.batched = nil, nil })
	}
	for i, child := range o.children {
		if o.kind == "switch" && i+1 < len(o.children) && len(o.children) > 2 {
			with(func(c *out) { c.children, c.cases = without(o.children, i), without(o.cases, i) })
		}
		for _, smaller := range child.smaller() {
			with(func(c *out) { c.children = slices.Clone(o.children); c.children[i] = smaller })
		}
	}
	return list
}

func without[T any](list []T, i int) []T { return slices.Delete(slices.Clone(list), i, i+1) }
