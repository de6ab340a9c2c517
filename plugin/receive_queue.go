package plugin

import (
	"cmp"
	"context"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/redpanda-data/benthos/v4/public/service"

	"github.com/cryo-connect/cryo-connect/internal/quota"
)

// queue contains the items that wait for ReadBatch, and those that ReadBatch has returned and
// that are neither acknowledged nor rejected. Together they are limited by max_in_flight;
// events are not limited.
type queue struct {
	conf     *receiveConfig
	log      *service.Logger
	stopped  context.Context // done when the input closes
	inFlight *quota.Quota    // all items of the queue
	streams  *quota.Quota    // slots of open streams; see transfer
	gauge    *gauge          // number of items in inFlight

	arrivals chan []item   // new items from the feeds; unbuffered, so that a feed keeps undelivered ones
	wake     chan struct{} // capacity 1; signals a new redelivery
	offered  atomic.Uint64 // number of items so far, for their sequence numbers

	// Owned by ReadBatch.
	rest     []item // new items, received from arrivals
	newFirst bool   // the next batch is of new items, before those that have failed alone

	stallReported bool // the current stall is logged; owned by watchForStalls

	mu           sync.Mutex
	clients      map[string]*clientQuota // by session id
	deliveries   map[*delivery]struct{}  // unacknowledged batches in the pipeline
	redeliveries redeliveries
	lastProgress time.Time // time of the last batch or result
}

// clientQuota is the quota of max_in_flight and of open streams of the sessions with one id. It
// exists while such a session feeds the input or has items in flight, as an open stream without
// a session has, so that it outlasts a reconnect.
type clientQuota struct {
	*quota.Share
	slots *quota.Share // of open streams
	id    string
	feeds int // guarded by the queue's mutex
}

func newQueue(stopped context.Context, conf *receiveConfig, log *service.Logger, unacknowledged *gauge) *queue {
	q := &queue{
		conf: conf, log: log, stopped: stopped, gauge: unacknowledged,
		arrivals:     make(chan []item),
		wake:         make(chan struct{}, 1),
		clients:      make(map[string]*clientQuota),
		deliveries:   make(map[*delivery]struct{}),
		lastProgress: time.Now(),
	}
	var fair func(held, free int64) bool
	if conf.shared {
		limit := int64(clientLimit(conf.maxInFlight))
		fair = func(held, _ int64) bool { return held < limit }
	}
	q.inFlight = quota.New(int64(conf.maxInFlight), fair)
	q.streams = newStreamQuota(conf.streams.maxOpen, conf.shared)
	return q
}

// clientLimit returns the quota of max_in_flight of one client of a listener: three quarters,
// and at least one. It leaves capacity for others if all messages of a client fail, or if the
// client acknowledges no responses.
func clientLimit(maxInFlight int) int { return max(1, maxInFlight-max(1, maxInFlight/4)) }

// newStreamQuota returns the quota of open streams. If several clients share it, a client may
// open another stream only while it has fewer than are free: at most half, and at least one.
func newStreamQuota(maxOpen int, shared bool) *quota.Quota {
	if !shared {
		return quota.New(int64(maxOpen), nil)
	}
	return quota.New(int64(maxOpen), func(held, free int64) bool { return held < free })
}

// acquireClient returns the quota of a session id for a new feed. The feed must call
// releaseClient when it ends.
func (q *queue) acquireClient(id string) *clientQuota {
	q.mu.Lock()
	defer q.mu.Unlock()
	c := q.clients[id]
	if c == nil {
		c = &clientQuota{Share: q.inFlight.Share(), slots: q.streams.Share(), id: id}
		q.clients[id] = c
	}
	c.feeds++
	return c
}

func (q *queue) releaseClient(c *clientQuota) {
	q.mu.Lock()
	defer q.mu.Unlock()
	c.feeds--
	q.removeIdleLocked(c)
}

func (q *queue) removeIdleLocked(c *clientQuota) {
	if c.feeds > 0 {
		return
	}
	if held, _ := c.Usage(); held == 0 {
		delete(q.clients, c.id)
	}
}

// deliver passes items of one session to ReadBatch, in order, as max_in_flight and the
// client's quota allow. It returns the items that are not passed on because the input has
// closed.
func (q *queue) deliver(items []item) (left []item) {
	for len(items) > 0 {
		acquired, err := items[0].source.quota.AcquireUpTo(q.stopped, int64(min(len(items), q.conf.maxBatchCount)))
		if err != nil {
			return items
		}
		q.gauge.add(int(acquired))
		if !q.offer(items[:acquired:acquired]) {
			return items
		}
		items = items[acquired:]
	}
	return nil
}

// deliverEvent passes an event to ReadBatch. An event counts as in flight, but does not wait
// for capacity: failing messages of its client may occupy all of it for a long time.
func (q *queue) deliverEvent(it item) bool {
	it.source.quota.Force(1)
	q.gauge.add(1)
	return q.offer([]item{it})
}

func (q *queue) offer(items []item) bool {
	last := q.offered.Add(uint64(len(items)))
	firstPasses := 0
	for i := range items {
		items[i].sequence = last - uint64(len(items)-1-i)
		if items[i].failures == 0 {
			firstPasses++
		}
	}
	items[0].source.firstPass.add(firstPasses)
	select {
	case q.arrivals <- items:
		return true
	case <-q.stopped.Done():
		return false
	}
}

// next waits for the items of the next batch. It returns ErrNotConnected when lost is closed
// and no items are left.
func (q *queue) next(ctx context.Context, lost <-chan struct{}) ([]item, error) {
	for {
		it, due, ok := q.nextRedelivery()
		switch {
		case ok:
			return []item{it}, nil
		case q.arrived():
			q.newFirst = false
			return q.batch(), nil
		}
		select {
		case q.rest = <-q.arrivals:
		case <-q.wake:
		case <-due:
		case <-lost:
			return nil, service.ErrNotConnected
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// nextRedelivery returns the next message to redeliver now, or a channel that is ready when
// one is due; the channel is nil if there is none. Messages of a failed batch of several
// precede all other items. Messages that have failed alone alternate with new items.
func (q *queue) nextRedelivery() (it item, due <-chan time.Time, ok bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if it, ok = q.redeliveries.nextUnidentified(); ok {
		return it, nil, true
	}
	if q.newFirst && q.arrived() {
		return item{}, nil, false
	}
	it, wait, ok := q.redeliveries.next(time.Now())
	if !ok && wait >= 0 {
		due = time.After(wait)
	}
	q.newFirst = q.newFirst || ok
	return it, due, ok
}

// arrived reports whether there are new items.
func (q *queue) arrived() bool {
	if len(q.rest) == 0 {
		select {
		case q.rest = <-q.arrivals:
		default:
		}
	}
	return len(q.rest) > 0
}

// batch returns new items, up to max_batch_count.
func (q *queue) batch() []item {
more:
	for len(q.rest) < q.conf.maxBatchCount {
		select {
		case items := <-q.arrivals:
			q.rest = append(q.rest, items...)
		default:
			break more
		}
	}
	n := min(q.conf.maxBatchCount, len(q.rest))
	items := q.rest[:n:n]
	q.rest = q.rest[n:]
	return items
}

// addDelivery adds a delivery that ReadBatch returns.
func (q *queue) addDelivery(d *delivery) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.deliveries[d] = struct{}{}
	q.lastProgress = time.Now()
}

// markReceived marks the items of a delivery as acknowledged on receipt. It returns them, or
// nil if they were marked before.
func (q *queue) markReceived(d *delivery) []item {
	q.mu.Lock()
	defer q.mu.Unlock()
	if d.acknowledged {
		return nil
	}
	d.acknowledged = true
	for i := range d.items {
		d.items[i].acknowledged = true
	}
	return d.items
}

// firstResult reports whether a result is the first one of its delivery, and the input has
// not closed.
func (q *queue) firstResult(d *delivery) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	if _, known := q.deliveries[d]; !known || d.hasResult {
		return false
	}
	d.hasResult = true
	return true
}

// redeliverAlone queues the messages of a failed batch of several for redelivery, each alone.
func (q *queue) redeliverAlone(d *delivery) {
	q.redeliver(d, func() { q.redeliveries.addUnidentified(d.items) })
}

// redeliverLater queues a message that has failed alone for redelivery after a wait.
func (q *queue) redeliverLater(d *delivery) {
	endFirstPass(d.items)
	q.redeliver(d, func() { q.redeliveries.addFailed(d.items[0], time.Now()) })
}

// redeliver queues the messages of a delivery for redelivery. They stay in flight. After
// close, which has returned them, it has no effect.
func (q *queue) redeliver(d *delivery, add func()) {
	q.mu.Lock()
	defer q.mu.Unlock()
	delete(q.deliveries, d)
	q.lastProgress = time.Now()
	add()
	q.wakeRead()
}

// delivered releases the in-flight capacity of delivered items, and expedites redeliveries.
// The items may be empty, if all messages of a batch have responses.
func (q *queue) delivered(items []item) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.releaseLocked(items)
	if q.redeliveries.delivered(); len(q.redeliveries.ready) > 0 {
		q.wakeRead()
	}
}

// release releases the in-flight capacity of items.
func (q *queue) release(items []item) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.releaseLocked(items)
}

func (q *queue) releaseLocked(items []item) {
	q.lastProgress = time.Now()
	q.gauge.add(-len(items))
	for len(items) > 0 {
		c, n := items[0].source.quota, 1
		for n < len(items) && items[n].source.quota == c {
			n++
		}
		items = items[n:]
		c.Release(int64(n))
		q.removeIdleLocked(c)
	}
}

// retain retains items of a delivery for close.
func (q *queue) retain(d *delivery, items []item) {
	q.mu.Lock()
	defer q.mu.Unlock()
	d.retained = append(d.retained, items...)
}

// removeDelivery removes a delivery, except for its retained items.
func (q *queue) removeDelivery(d *delivery) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if d.items = d.retained; len(d.items) == 0 {
		delete(q.deliveries, d)
	}
}

func (q *queue) wakeRead() {
	select {
	case q.wake <- struct{}{}:
	default:
	}
}

// close returns all items of the queue in the order of their receipt. It must be called after
// all feeds have ended. Later results are ignored.
func (q *queue) close() []item {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.gauge.close()
	items := slices.Concat(q.rest, q.redeliveries.drain())
	for d := range q.deliveries {
		items = append(items, d.items...)
	}
	q.rest = nil
	clear(q.deliveries)
	slices.SortStableFunc(items, func(a, b item) int { return cmp.Compare(a.sequence, b.sequence) })
	return items
}

// stallTimeout is the time without progress after which a full pipeline is logged as stalled.
const stallTimeout = 10 * time.Second

// watchForStalls checks periodically for stalls until the input closes. It runs beside
// ReadBatch, because a timer in ReadBatch would cost a wake-up of the network poller for each
// single message. paused reports whether the reads of a session are paused (backpressure).
func (q *queue) watchForStalls(paused func() bool) {
	ticker := time.NewTicker(stallTimeout / 10)
	defer ticker.Stop()
	for {
		select {
		case <-ticker.C:
			q.reportStall(paused)
		case <-q.stopped.Done():
			return
		}
	}
}

// reportStall logs a pipeline that makes no progress while max_in_flight or max_buffer_bytes
// is reached: its output hangs or is very slow, or has a batching policy that can never fill a
// batch. A stall is logged once. It ends when the limits are no longer reached, because a
// slow output makes progress from time to time.
func (q *queue) reportStall(paused func() bool) {
	q.mu.Lock()
	idle := time.Since(q.lastProgress)
	q.mu.Unlock()
	used := q.inFlight.Used()
	stalled := used > 0 && idle >= stallTimeout
	if stalled == q.stallReported {
		return
	}
	full := q.inFlight.Full() || paused()
	if q.stallReported = full; !full || !stalled {
		return
	}
	log := q.log.With("in_flight", used, "idle", stallTimeout, fieldMaxInFlight, q.conf.maxInFlight)
	if q.conf.shared {
		log = log.With("client_quota", clientLimit(q.conf.maxInFlight))
	}
	log.Warn("Pipeline stalled: check whether an output hangs, or waits for a batch that cannot fill (lower its count or byte_size, or set a period)")
}
