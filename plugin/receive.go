package plugin

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/redpanda-data/benthos/v4/public/service"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// The receiving half of the inputs: sessions → batches → acknowledgements.

// source is a session that feeds the input, with what its messages' metadata
// say of it.
type source struct {
	session *cryo.Session
	*identity
	ended chan struct{} // closed when all it received is taken, and told of

	// Where sessions are told of.
	before   *source // one with the same id that this one follows, if any
	underway underway
}

// item is a received message on its way to the pipeline, or in it: one frame,
// what a scanner has cut from a stream, or an event.
type item struct {
	source   *source
	message  *cryo.Message    // a frame; of all else nil
	part     *service.Message // nil of a frame
	of       settler          // what the part belongs to: a scanner's batch or an event …
	at       int              // … and its place there
	failures int              // failed deliveries so far
	due      time.Time        // when it may be tried again
}

// settler learns what becomes of its parts; nil is delivered.
type settler interface{ done(at int, err error) }

var (
	_ settler = (*scanned)(nil)
	_ settler = (*sessionEvent)(nil)
)

// receiver hands what its sessions receive to the pipeline, in batches, and
// settles it.
type receiver struct {
	conf    receiveConfig
	log     *service.Logger
	metrics receiveMetrics
	answers sender // of synchronous responses

	errorLines, streamLines, answerLines, rejectLines *sparing // of the log

	arrivals chan []item   // from the sessions' pumps; not buffered, so that they queue up fairly
	shares   *shares       // of the clients, in flight
	places   *places       // of the open streams
	wake     chan struct{} // holds a token when there is a new replay or a place is free
	rest     []item        // arrived, not yet handed over; owned by ReadBatch

	stopped context.Context
	stop    context.CancelFunc
	pumps   sync.WaitGroup
	watch   sync.Once // starts watchForStalls

	mu         sync.Mutex
	sources    map[*cryo.Session]*source
	byID       map[string]*source     // the last one of each id, where sessions are told of
	deliveries map[*delivery]struct{} // not settled
	stallTold  bool                   // a stall was reported, and isn't over
	moved      time.Time              // when something was last handed over or settled
	inFlight   int                    // messages handed over and not settled, those that wait for a replay included
	replays    []item                 // failed messages, by the time when they are due
	gone       bool                   // rejectRest was called: nothing is replayed any more
	abandoned  []item                 // taken from a session, but too late to be handed over
}

func newReceiver(conf receiveConfig, res *service.Resources) *receiver {
	r := &receiver{
		conf:       conf,
		log:        res.Logger(),
		metrics:    newReceiveMetrics(res.Metrics()),
		answers:    sender{chunkBytes: cryo.DefaultChunkBytes, ackTimeout: conf.ackTimeout, metrics: newAnswerMetrics(res.Metrics())},
		errorLines: newSparing(), streamLines: newSparing(), answerLines: newSparing(), rejectLines: newSparing(),
		arrivals:   make(chan []item),
		wake:       make(chan struct{}, 1),
		shares:     newShares(conf.maxInFlight, conf.shared),
		places:     newPlaces(conf.streams.maxOpen, conf.shared),
		sources:    make(map[*cryo.Session]*source),
		byID:       make(map[string]*source),
		deliveries: make(map[*delivery]struct{}),
	}
	r.stopped, r.stop = context.WithCancel(context.Background())
	return r
}

// receiveFrom starts to take a session's messages. The channel is closed when
// all that the session had received is taken and no more will come.
func (r *receiver) receiveFrom(s *cryo.Session) <-chan struct{} {
	src := &source{session: s, identity: identityOf(s), ended: make(chan struct{}), underway: underway{none: make(chan struct{}, 1)}}
	r.mu.Lock()
	defer r.mu.Unlock()
	if known := r.sources[s]; known != nil {
		return known.ended
	}
	r.sources[s] = src
	if r.conf.sessions {
		src.before, r.byID[src.id] = r.byID[src.id], src
	}
	r.watch.Do(func() { r.pumps.Go(r.watchForStalls) })
	r.pumps.Go(func() {
		if r.takeAll(src) {
			r.forget(src)
		}
	})
	return src.ended
}

// takeAll takes what a session receives, from its beginning to its end. It
// reports false when the input ends first.
func (r *receiver) takeAll(src *source) bool {
	if !r.tellArrival(src) {
		return false
	}
	var streams sync.WaitGroup
	streams.Go(func() { r.acceptStreams(src) })
	r.pump(src)
	streams.Wait() // what was complete of those that were cut off is taken too
	return r.stopped.Err() == nil && r.tellDeparture(src)
}

// pump takes a session's messages in order. What the session received before
// its end still goes to the pipeline: nobody else has it.
func (r *receiver) pump(src *source) {
	for {
		room := r.awaitShare(src)
		if room == 0 {
			return
		}
		messages, err := src.session.ReceiveBatch(r.stopped, min(room, r.conf.maxBatchCount))
		if err != nil {
			return
		}
		r.metrics.took(messages)
		items := r.wanted(src, messages)
		if len(items) == 0 {
			continue
		}
		r.setsOut(src, len(items))
		if !r.reserve(src, len(items)) {
			r.abandon(items)
			return
		}
		if !r.offer(items) {
			return
		}
	}
}

// awaitShare waits until a client may have more in the pipeline, and says how much.
// It gives 0 when the input ends first.
func (r *receiver) awaitShare(src *source) int {
	for {
		room, freed := r.shares.room(src.id)
		if room > 0 || !r.await(freed) {
			return room
		}
	}
}

// reserve waits until so many messages fit into a client's share. It reports false
// when the input ends first.
func (r *receiver) reserve(src *source, n int) bool {
	for {
		freed := r.shares.reserve(src.id, n)
		if freed == nil {
			return true
		}
		if !r.await(freed) {
			return false
		}
	}
}

// offer waits until the items are taken. It reports false, and keeps them for
// rejectRest, when the input ends first.
func (r *receiver) offer(items []item) bool {
	select {
	case r.arrivals <- items:
		return true
	case <-r.stopped.Done():
		r.abandon(items)
		return false
	}
}

// forget ends a source whose session has ended.
func (r *receiver) forget(src *source) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.sources, src.session)
	if r.byID[src.id] == src {
		delete(r.byID, src.id)
	}
	src.before = nil // or all there ever were would be kept
	close(src.ended)
}

// wanted acknowledges the messages of types that are not asked for, and gives
// the others.
func (r *receiver) wanted(src *source, messages []cryo.Message) []item {
	items := make([]item, 0, len(messages))
	for i := range messages {
		m := &messages[i]
		if r.conf.types[m.Type] {
			items = append(items, item{message: m, source: src})
			continue
		}
		if m.Type == cryo.TypeError {
			r.errorLines.do(r.log, func(log *service.Logger) {
				log.Warnf("The application at the other end of session %s reports an error: %q (at most one such line a second)", src.id, m.LogText())
			})
		}
		r.metrics.filtered.Incr(1, messageTypeName(m.Type))
		_ = m.Ack() // if the session has ended, nobody waits for it
	}
	return items
}

// read waits for messages and hands them over. lost tells that the only session
// has ended; all its messages come before ErrNotConnected. It is nil where there
// is no such session.
func (r *receiver) read(ctx context.Context, lost <-chan struct{}) (service.MessageBatch, service.AckFunc, error) {
	for {
		it, due, ok := r.nextReplay()
		if ok {
			return r.handOver([]item{it})
		}
		arrivals, ended := r.arrivals, lost
		if room := r.room(); room == 0 {
			arrivals = nil
		} else if len(r.rest) > 0 {
			return r.handOver(r.take(room))
		}
		if len(r.rest) > 0 {
			ended = nil // not yet
		}
		select {
		case r.rest = <-arrivals:
		case <-r.wake:
		case <-due:
		case <-ended:
			return nil, nil, service.ErrNotConnected
		case <-ctx.Done():
			return nil, nil, ctx.Err()
		}
	}
}

// stallPatience is how long a pipeline that has taken all it may can settle
// nothing before a log line says so.
const stallPatience = 10 * time.Second

// watchForStalls looks from time to time. ReadBatch would know when it began to wait,
// but mustn't wait for a timer: for each message that comes alone the runtime would
// wake the thread that waits for the network. Without one there are 1.02 to 1.08 times
// as many.
func (r *receiver) watchForStalls() {
	look := time.NewTicker(stallPatience / 10)
	defer look.Stop()
	for {
		select {
		case <-look.C:
			r.reportStall()
		case <-r.stopped.Done():
			return
		}
	}
}

// reportStall tells of a pipeline that has taken all the messages that it may have, or
// doesn't ask for more while others wait: its output hangs or is very slow, or has a
// batching policy that can't fill. It tells once until there is room again: what is
// slow settles something now and then.
func (r *receiver) reportStall() {
	r.mu.Lock()
	defer r.mu.Unlock()
	stalled := r.inFlight > 0 && time.Since(r.moved) >= stallPatience
	if stalled == r.stallTold {
		return
	}
	full := r.inFlight >= r.conf.maxInFlight || r.shares.exhausted()
	for s := range r.sources {
		full = full || s.Paused()
	}
	if r.stallTold = full; !full || !stalled {
		return
	}
	share := ""
	if r.conf.shared {
		share = fmt.Sprintf(", %d of one client", r.shares.limit)
	}
	r.log.Warnf("The pipeline has taken %d messages and settled none for %v, and takes no more (%s: %d%s, or %s). An output hangs or is very slow, or it collects batches by count or byte_size that can't fill: make these smaller, or give them a period",
		r.inFlight, stallPatience, fieldMaxInFlight, r.conf.maxInFlight, share, fieldMaxBufferBytes)
}

// take counts up to room messages as in flight: what has arrived, and what else
// waits already.
func (r *receiver) take(room int) []item {
	limit := min(room, r.conf.maxBatchCount)
more:
	for len(r.rest) < limit {
		select {
		case items := <-r.arrivals:
			r.rest = append(r.rest, items...)
		default:
			break more
		}
	}
	n := min(limit, len(r.rest))
	taken := r.rest[:n:n]
	r.rest = r.rest[n:]
	r.mu.Lock()
	r.inFlight += n
	r.moved = time.Now()
	r.mu.Unlock()
	r.metrics.unacknowledged.add(n)
	return taken
}

func (r *receiver) room() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.conf.maxInFlight - r.inFlight
}

// nextReplay gives a failed message that may be tried again, or tells when the
// next one may; nil is never.
func (r *receiver) nextReplay() (it item, due <-chan time.Time, ok bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.replays) == 0 {
		return item{}, nil, false
	}
	it = r.replays[0]
	if wait := time.Until(it.due); wait > 0 {
		return item{}, time.After(wait), false
	}
	r.replays = slices.Delete(r.replays, 0, 1)
	return it, nil, true
}

// handOver makes the pipeline's batch of the items.
func (r *receiver) handOver(items []item) (service.MessageBatch, service.AckFunc, error) {
	d, batch := newDelivery(items, r.conf.includeMetadata)
	r.mu.Lock()
	r.deliveries[d] = struct{}{}
	r.mu.Unlock()
	if r.conf.onReceipt {
		r.acknowledge(items)
	}
	return batch, func(ctx context.Context, err error) error {
		r.settle(ctx, d, err)
		return nil
	}, nil
}

// close stops taking messages, and gives the sessions that were taken from.
// What is not settled stays unacknowledged.
func (r *receiver) close() []*cryo.Session {
	r.stop()
	r.pumps.Wait()
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Collect(maps.Keys(r.sources))
}

// rejectRest rejects all that close left unsettled, for sessions that go on
// without this input: their senders would wait for ever, and the messages would
// count against max_buffer_bytes for ever.
func (r *receiver) rejectRest() {
	r.mu.Lock()
	left := slices.Concat(r.rest, r.replays, r.abandoned)
	for d := range r.deliveries {
		left = append(left, d.items...)
	}
	r.rest, r.replays, r.abandoned = nil, nil, nil
	clear(r.deliveries)
	r.gone = true
	r.mu.Unlock()
	for _, it := range left {
		it.reject()
	}
}
