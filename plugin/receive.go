package plugin

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
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
	noEvents bool // it has ended, and a later session with its id is connected already

	// What the listener's last input has left of the session.
	left    []item                 // to be handed over before all else; the pump's
	streams []*cryo.IncomingStream // of which nothing was read; acceptStreams'
}

// item is a received message on its way to the pipeline, or in it: one frame,
// what a scanner has cut from a stream, or an event.
type item struct {
	source  *source
	message *cryo.Message    // a frame; of all else nil
	part    *service.Message // nil of a frame
	of      settler          // what the part belongs to: a scanner's batch or an event …
	at      int              // … and its index there
	order   uint64           // in which the input has received it

	acknowledged bool // on receipt

	// Where it has failed alone; see redeliveries.
	failures   int       // so far
	due        time.Time // when it is delivered again
	early      bool      // it is delivered again before that
	deliveries uint64    // of the input, at the last failure
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

	errorLog, streamLog, answerLog, rejectLog, redeliveryLog limitedLog

	arrivals chan []item   // from the sessions' pumps; not buffered, so that they queue up fairly
	shares   *shares       // of the clients, in flight
	places   *places       // of the open streams
	wake     chan struct{} // holds a token when there is a new redelivery or a place is free
	received atomic.Uint64 // items so far

	// Owned by ReadBatch.
	rest     []item    // arrived, not yet handed over
	last     *delivery // handed over; the engine may still throw it away
	yield    bool      // what has arrived goes before messages that have failed alone
	watching bool      // the engine's stop ends draining

	stopped  context.Context // by close
	stop     context.CancelFunc
	draining context.Context // the engine reads no more; ends with stopped too
	drain    context.CancelFunc
	pumps    sync.WaitGroup
	watch    sync.Once // starts watchForStalls

	mu         sync.Mutex
	sources    map[*cryo.Session]*source
	byID       map[string]*source     // the last one of each id, where sessions are told of
	deliveries map[*delivery]struct{} // not settled
	stallTold  bool                   // a stall was reported, and isn't over
	moved      time.Time              // when something was last handed over or settled
	inFlight   int                    // messages handed over and not settled, those that wait to be delivered again included
	abandoned  []item                 // received, but too late to be handed over
	closed     bool                   // nothing is settled any more

	redeliveries redeliveries
}

func newReceiver(conf receiveConfig, res *service.Resources) *receiver {
	r := &receiver{
		conf:       conf,
		log:        res.Logger(),
		metrics:    newReceiveMetrics(meterOf(res)),
		answers:    sender{chunkBytes: cryo.DefaultChunkBytes, ackTimeout: conf.ackTimeout, metrics: newAnswerMetrics(meterOf(res))},
		arrivals:   make(chan []item),
		wake:       make(chan struct{}, 1),
		shares:     newShares(conf.maxInFlight, conf.shared),
		places:     newPlaces(conf.streams.maxOpen, conf.shared),
		sources:    make(map[*cryo.Session]*source),
		byID:       make(map[string]*source),
		deliveries: make(map[*delivery]struct{}),
	}
	r.errorLog, r.streamLog, r.answerLog = newLimitedLog(r.log), newLimitedLog(r.log), newLimitedLog(r.log)
	r.rejectLog, r.redeliveryLog = newLimitedLog(r.log), newLimitedLog(r.log)
	r.stopped, r.stop = context.WithCancel(context.Background())
	r.draining, r.drain = context.WithCancel(r.stopped)
	return r
}

// receiveFrom starts to take a session's messages, behind what another input has left
// of it. The channel is closed when all that the session had received is taken and no
// more will come.
func (r *receiver) receiveFrom(h *handover) <-chan struct{} {
	s := h.session
	src := &source{session: s, identity: identityOf(s), ended: make(chan struct{}), underway: underway{none: make(chan struct{}, 1)}, left: h.items, streams: h.streams}
	for i := range src.left {
		src.left[i].source = src
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if known := r.sources[s]; known != nil {
		return known.ended
	}
	r.sources[s] = src
	if r.conf.sessions {
		known := r.byID[src.id]
		if src.noEvents = known != nil && s.Err() != nil && known.session.Err() == nil; !src.noEvents {
			src.before, r.byID[src.id] = known, src
		}
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
	src.left = r.wantedItems(src.left)
	for len(src.left) > 0 { // what is not handed over stays there for close
		n := min(len(src.left), r.conf.maxBatchCount)
		if !r.reserve(src, n) {
			return
		}
		items := src.left[:n:n]
		src.left = src.left[n:]
		r.setsOut(src, items)
		if !r.offer(items) {
			return
		}
	}
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
		r.setsOut(src, items)
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

// offer waits until the items are taken. It reports false, and keeps them for close,
// when the input ends first.
func (r *receiver) offer(items []item) bool {
	select {
	case r.arrivals <- items:
		return true
	case <-r.stopped.Done():
		r.abandon(items)
		return false
	}
}

// abandon keeps items for close that come too late to be handed over.
func (r *receiver) abandon(items []item) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.abandoned = append(r.abandoned, items...)
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
func (r *receiver) wanted(src *source, messages []*cryo.Message) []item {
	items := make([]item, 0, len(messages))
	for _, m := range messages {
		if it := (item{message: m, source: src}); r.wants(&it) {
			items = append(items, it)
		}
	}
	return items
}

// wantedItems is wanted for what another input has left, of which message_types may
// have differed.
func (r *receiver) wantedItems(left []item) []item {
	items := make([]item, 0, len(left))
	for _, it := range left {
		if it.message == nil || r.wants(&it) {
			items = append(items, it)
		}
	}
	return items
}

func (r *receiver) wants(it *item) bool {
	m := it.message
	if r.conf.types[m.Kind] {
		return true
	}
	if m.Kind == cryo.KindError {
		if log, ok := r.errorLog.allow(); ok {
			log.Warnf("The application at the other end of session %s reports an error: %q", it.source.id, it.source.session.Redact(string(m.Payload)))
		}
	}
	r.metrics.filtered.Incr(1, messageTypeName(m.Kind))
	_ = m.Ack() // if the session has ended, nobody waits for it
	return false
}

// read waits for messages and hands them over. lost tells that the only session
// has ended; all its messages come before ErrNotConnected. It is nil where there
// is no such session.
func (r *receiver) read(ctx context.Context, lost <-chan struct{}) (service.MessageBatch, service.AckFunc, error) {
	if r.last != nil {
		r.acknowledgeReceipt(r.last)
		r.last = nil
	}
	if !r.watching { // here, because the engine may never ask again
		r.watching = true
		context.AfterFunc(ctx, r.drain)
	}
	for {
		if it, ok := r.nextAlone(); ok {
			return r.handOver([]item{it})
		}
		room := r.room()
		if r.yield && room > 0 && r.arrived() {
			r.yield = false
			return r.handOver(r.take(room))
		}
		it, due, ok := r.nextRedelivery()
		if ok {
			r.yield = true
			return r.handOver([]item{it})
		}
		arrivals, ended := r.arrivals, lost
		if room == 0 {
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

// arrived reports whether a message waits to be handed over.
func (r *receiver) arrived() bool {
	if len(r.rest) == 0 {
		select {
		case r.rest = <-r.arrivals:
		default:
		}
	}
	return len(r.rest) > 0
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
		full = full || s.Stats().Paused
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

// nextAlone returns a message of a batch of several that has failed.
func (r *receiver) nextAlone() (item, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.redeliveries.nextAlone()
}

// nextRedelivery returns a message that has failed alone and is to be delivered again
// now, or a channel that is ready when the next one is; nil is never.
func (r *receiver) nextRedelivery() (it item, due <-chan time.Time, ok bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	it, wait, ok := r.redeliveries.next(time.Now())
	if !ok && wait >= 0 {
		due = time.After(wait)
	}
	return it, due, ok
}

// handOver makes the pipeline's batch of the items.
func (r *receiver) handOver(items []item) (service.MessageBatch, service.AckFunc, error) {
	d, batch := newDelivery(items, r.conf.includeMetadata)
	r.mu.Lock()
	r.deliveries[d] = struct{}{}
	r.mu.Unlock()
	r.last = d
	return batch, func(ctx context.Context, err error) error {
		r.settle(ctx, d, err)
		return nil
	}, nil
}
