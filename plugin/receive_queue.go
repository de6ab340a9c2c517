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

// queue holds the items that wait for ReadBatch, and those that ReadBatch has returned and that
// have been neither acknowledged nor rejected. max_in_flight limits their total number, but
// does not delay session events.
type queue struct {
	conf     *receiveConfig
	log      *service.Logger
	stopped  context.Context // done when the input closes
	inFlight *quota.Quota    // counts all items of the queue against max_in_flight
	streams  *quota.Quota    // slots for open streams; see transfer
	gauge    *gauge          // reports the number of items in inFlight

	arrivals chan []item   // new items from the feeds; unbuffered, so that a feed keeps those that are not received
	wake     chan struct{} // capacity 1; signals a new redelivery
	heldBack atomic.Int64  // number of streams whose messages in flight are as large as allowed
	offered  atomic.Uint64 // number of items offered so far, from which sequence numbers are derived

	// Accessed only by ReadBatch, and by close.
	rest     []item // new items that were received from arrivals, but not returned yet
	newFirst bool   // whether the next batch takes new items, if there are any, before an item that has failed alone and is due

	mu           sync.Mutex
	clients      map[string]*clientQuota // by client, see identity
	deliveries   map[*delivery]struct{}  // unacknowledged batches in the pipeline
	redeliveries redeliveries
	lastProgress time.Time // when the last batch was returned, or the last result applied
}

// clientQuota is one client's share of max_in_flight and of the stream slots. The sessions of one
// owner are one client; without an owner, the sessions with one id are. The quota is kept while
// such a session feeds the input or has items in flight, so that it outlasts a reconnect. A stream
// that stays open after its session has ended has items in flight, too.
type clientQuota struct {
	*quota.Share
	slots *quota.Share // slots for open streams
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

// clientLimit returns how much of max_in_flight one client of a listener may use: three
// quarters, and at least one. The rest is left for other clients if all messages of one client
// fail, or if it acknowledges no responses.
func clientLimit(maxInFlight int) int { return max(1, maxInFlight-max(1, maxInFlight/4)) }

// newStreamQuota returns the quota of open streams. If shared is true, several clients share
// it, and a client may open another stream only while it has fewer open streams than there are
// free slots. So a single client gets at most half of the slots, rounded up.
func newStreamQuota(maxOpen int, shared bool) *quota.Quota {
	if !shared {
		return quota.New(int64(maxOpen), nil)
	}
	return quota.New(int64(maxOpen), func(held, free int64) bool { return held < free })
}

// acquireClient returns the quota of a client for a new feed. Call releaseClient when the
// feed ends.
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

// feedsOf returns the number of feeds of a client.
func (q *queue) feedsOf(client string) int {
	q.mu.Lock()
	defer q.mu.Unlock()
	if c := q.clients[client]; c != nil {
		return c.feeds
	}
	return 0
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

// deliver passes items of one session to ReadBatch in order, as soon as max_in_flight and the
// client's quota allow. It returns the items that were not passed on because the input has
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
// for capacity, because failing messages of its client may occupy all of it for a long time. It
// returns false if the input closes first.
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
		if items[i].message == nil && items[i].began.IsZero() {
			items[i].began = time.Now()
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

// nextRedelivery returns a message to redeliver now, if there is one. Otherwise due becomes
// ready when the next one is due; it is nil if none waits, or if new items come first. The
// messages of a failed batch of several messages precede all other items. Messages that have
// failed alone alternate with new items.
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

// arrived reports whether there are new items. It does not wait for them.
func (q *queue) arrived() bool {
	if len(q.rest) == 0 {
		select {
		case q.rest = <-q.arrivals:
		default:
		}
	}
	return len(q.rest) > 0
}

// batch removes and returns up to max_batch_count new items.
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

// addDelivery adds a delivery that ReadBatch is about to return.
func (q *queue) addDelivery(d *delivery) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.deliveries[d] = struct{}{}
	q.lastProgress = time.Now()
	d.began = q.lastProgress
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

// firstResult records that a delivery has a result. It reports whether that is the first one,
// and the input has not closed.
func (q *queue) firstResult(d *delivery) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	if _, known := q.deliveries[d]; !known || d.hasResult {
		return false
	}
	d.hasResult = true
	return true
}

// redeliverAlone queues the messages of a failed batch for redelivery, each alone.
func (q *queue) redeliverAlone(d *delivery) {
	q.redeliver(d, func() { q.redeliveries.addUnidentified(d.items) })
}

// redeliverLater queues a message that has failed alone for redelivery after a wait.
func (q *queue) redeliverLater(d *delivery) {
	endFirstPass(d.items)
	q.redeliver(d, func() { q.redeliveries.addFailed(d.items[0], time.Now()) })
}

// redeliver removes a delivery, and calls add to queue its messages for redelivery. They stay
// in flight. It has no effect after close, which has already returned them.
func (q *queue) redeliver(d *delivery, add func()) {
	q.mu.Lock()
	defer q.mu.Unlock()
	delete(q.deliveries, d)
	q.lastProgress = time.Now()
	add()
	q.wakeRead()
}

// delivered releases the in-flight capacity of delivered items, and expedites redeliveries.
// items is empty if all messages of a batch have responses.
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
	var parts []quota.Part // one for each run of items of a client
	for i := range items {
		if c := items[i].source.quota; i > 0 && items[i-1].source.quota == c {
			parts[len(parts)-1].N++
		} else {
			parts = append(parts, quota.Part{Share: c.Share, N: 1})
		}
	}
	q.inFlight.Release(parts)
	for i := range items {
		if c := items[i].source.quota; i == 0 || items[i-1].source.quota != c {
			q.removeIdleLocked(c)
		}
	}
}

// retain keeps items of a delivery after removeDelivery, so that close still returns them.
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

// oldest returns when the oldest item was received that ReadBatch has returned and that has been
// neither acknowledged nor rejected; zero if there is none.
func (q *queue) oldest() (oldest time.Time) {
	q.mu.Lock()
	defer q.mu.Unlock()
	older := func(items []item) {
		for i := range items {
			if t := items[i].received(); oldest.IsZero() || t.Before(oldest) {
				oldest = t
			}
		}
	}
	for d := range q.deliveries {
		older(d.items)
	}
	older(q.redeliveries.unidentified)
	older(q.redeliveries.ready)
	older(q.redeliveries.shortened)
	older(q.redeliveries.full)
	return oldest
}

// longestDelivery returns the first item of the batch that has been in the pipeline for the longest
// time without a result, and when ReadBatch returned that batch. It returns false if there is none.
func (q *queue) longestDelivery() (first item, began time.Time, ok bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for d := range q.deliveries {
		if !d.hasResult && (!ok || d.began.Before(began)) { // a result: responses are not acknowledged yet
			first, began, ok = d.items[0], d.began, true
		}
	}
	return first, began, ok
}

func (q *queue) wakeRead() {
	select {
	case q.wake <- struct{}{}:
	default:
	}
}

// close returns all items of the queue in the order in which they were received. Call it only
// after all feeds have ended. Later results are ignored.
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
