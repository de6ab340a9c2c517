package plugin

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/redpanda-data/benthos/v4/public/service"

	"github.com/cryo-connect/cryo-connect/internal/quota"
)

// queue is what waits for ReadBatch, and what ReadBatch has handed over and is not settled:
// together no more than max_in_flight, but for events.
type queue struct {
	conf     *receiveConfig
	log      *service.Logger
	stopped  context.Context // nothing more is handed over
	inFlight *quota.Quota    // items offered and not settled
	gauge    *gauge          // of inFlight

	arrivals chan []item   // from the feeds; not buffered: they keep what is not handed over
	wake     chan struct{} // holds a token when there is a new redelivery
	offered  atomic.Uint64 // items so far

	// Owned by ReadBatch.
	rest  []item // arrived, not yet handed over
	yield bool   // what has arrived goes before messages that have failed alone

	stallReported bool // and the stall is not over; owned by watchForStalls

	mu           sync.Mutex
	clients      map[string]*client     // by session id
	deliveries   map[*delivery]struct{} // not settled
	redeliveries redeliveries
	moved        time.Time // of the last hand-over or verdict
}

// client is a session id's share of max_in_flight. It is kept while a session with the id
// feeds the input or something of it is in flight, so that a client that reconnects keeps
// it.
type client struct {
	*quota.Share
	id    string
	feeds int // guarded by the queue's mutex
}

func newQueue(stopped context.Context, conf *receiveConfig, log *service.Logger, unacknowledged *gauge) *queue {
	q := &queue{
		conf: conf, log: log, stopped: stopped, gauge: unacknowledged,
		arrivals:   make(chan []item),
		wake:       make(chan struct{}, 1),
		clients:    make(map[string]*client),
		deliveries: make(map[*delivery]struct{}),
		moved:      time.Now(),
	}
	var fair func(held, free int64) bool
	if conf.shared {
		limit := int64(clientLimit(conf.maxInFlight))
		fair = func(held, _ int64) bool { return held < limit }
	}
	q.inFlight = quota.New(int64(conf.maxInFlight), fair)
	return q
}

// clientLimit is what one client of a listener may have of max_in_flight: three quarters,
// and at least one. A client whose messages the outputs reject, or that acknowledges no
// responses, would otherwise keep those of all others waiting.
func clientLimit(maxInFlight int) int { return max(1, maxInFlight-max(1, maxInFlight/4)) }

// join returns the client of a session id for a new feed, and leaveClient ends the feed's
// part in it.
func (q *queue) join(id string) *client {
	q.mu.Lock()
	defer q.mu.Unlock()
	c := q.clients[id]
	if c == nil {
		c = &client{Share: q.inFlight.Share(), id: id}
		q.clients[id] = c
	}
	c.feeds++
	return c
}

func (q *queue) leaveClient(c *client) {
	q.mu.Lock()
	defer q.mu.Unlock()
	c.feeds--
	q.removeIdleLocked(c)
}

func (q *queue) removeIdleLocked(c *client) {
	if c.feeds > 0 {
		return
	}
	if held, _ := c.Usage(); held == 0 {
		delete(q.clients, c.id)
	}
}

// deliver hands items of one session over, in order, in parts that max_in_flight and the
// client's share of it allow. It returns those that it has not handed over because the
// input has ended.
func (q *queue) deliver(items []item) (left []item) {
	for len(items) > 0 {
		acquired, err := items[0].source.client.AcquireUpTo(q.stopped, int64(min(len(items), q.conf.maxBatchCount)))
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

// deliverEvent hands an event over. It counts as in flight, but waits for no capacity: the
// failing messages of its own client may hold all of it for a long time.
func (q *queue) deliverEvent(it item) bool {
	it.source.client.Force(1)
	q.gauge.add(1)
	return q.offer([]item{it})
}

func (q *queue) offer(items []item) bool {
	last := q.offered.Add(uint64(len(items)))
	first := 0 // passes
	for i := range items {
		items[i].order = last - uint64(len(items)-1-i)
		if items[i].failures == 0 {
			first++
		}
	}
	items[0].source.firstPass.add(first)
	select {
	case q.arrivals <- items:
		return true
	case <-q.stopped.Done():
		return false
	}
}

// next waits for what is to be handed over next. All messages of a session that is lost
// come before ErrNotConnected.
func (q *queue) next(ctx context.Context, lost <-chan struct{}) ([]item, error) {
	for {
		it, due, ok := q.nextRedelivery()
		switch {
		case ok:
			return []item{it}, nil
		case q.arrived():
			q.yield = false
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

// nextRedelivery returns the message that is to be delivered again now, or a channel that
// is ready when the next one is; nil if there is none. Messages of a batch of several that
// has failed go before all else. A message that has failed alone lets something that has
// arrived go first, if it follows another such one.
func (q *queue) nextRedelivery() (it item, due <-chan time.Time, ok bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if it, ok = q.redeliveries.nextAlone(); ok {
		return it, nil, true
	}
	if q.yield && q.arrived() {
		return item{}, nil, false
	}
	it, wait, ok := q.redeliveries.next(time.Now())
	if !ok && wait >= 0 {
		due = time.After(wait)
	}
	q.yield = q.yield || ok
	return it, due, ok
}

// arrived reports whether something waits to be handed over.
func (q *queue) arrived() bool {
	if len(q.rest) == 0 {
		select {
		case q.rest = <-q.arrivals:
		default:
		}
	}
	return len(q.rest) > 0
}

// batch returns what has arrived, up to max_batch_count.
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

// handedOver adds a delivery that the pipeline gets.
func (q *queue) handedOver(d *delivery) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.deliveries[d] = struct{}{}
	q.moved = time.Now()
}

// received marks the items of a delivery as acknowledged on receipt, and returns them if
// they were not before.
func (q *queue) received(d *delivery) []item {
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

// decide reports whether this is the first verdict on a delivery, before the input closes.
func (q *queue) decide(d *delivery) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	if _, known := q.deliveries[d]; !known || d.decided {
		return false
	}
	d.decided = true
	return true
}

// redeliverAlone delivers each message of a batch of several that has failed again, alone.
func (q *queue) redeliverAlone(d *delivery) {
	q.redeliver(d, func() { q.redeliveries.alone(d.items) })
}

// redeliverLater delivers a message that has failed alone again, after a wait.
func (q *queue) redeliverLater(d *delivery) {
	passed(d.items)
	q.redeliver(d, func() { q.redeliveries.failed(d.items[0], time.Now()) })
}

// redeliver queues the messages of a delivery to be handed over again. They stay in flight.
// If the input has closed meanwhile, close has returned them, and nobody looks here.
func (q *queue) redeliver(d *delivery, add func()) {
	q.mu.Lock()
	defer q.mu.Unlock()
	delete(q.deliveries, d)
	q.moved = time.Now()
	add()
	q.wakeRead()
}

// delivered ends the time in flight of items that the pipeline has delivered; there may be
// none, if all of a batch have responses.
func (q *queue) delivered(items []item) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.releaseLocked(items)
	if q.redeliveries.delivered(); len(q.redeliveries.early) > 0 {
		q.wakeRead()
	}
}

// release ends the time in flight of items that are settled.
func (q *queue) release(items []item) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.releaseLocked(items)
}

func (q *queue) releaseLocked(items []item) {
	q.moved = time.Now()
	q.gauge.add(-len(items))
	for len(items) > 0 {
		c, n := items[0].source.client, 1
		for n < len(items) && items[n].source.client == c {
			n++
		}
		items = items[n:]
		c.Release(int64(n))
		q.removeIdleLocked(c)
	}
}

// leave leaves items of a delivery to close.
func (q *queue) leave(d *delivery, items []item) {
	q.mu.Lock()
	defer q.mu.Unlock()
	d.left = append(d.left, items...)
}

// settled removes a delivery, but for what is left of it.
func (q *queue) settled(d *delivery) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if d.items = d.left; len(d.items) == 0 {
		delete(q.deliveries, d)
	}
}

func (q *queue) wakeRead() {
	select {
	case q.wake <- struct{}{}:
	default:
	}
}

// close returns all items that are not settled, in the order in which the input has
// received them. It is called when no feed runs any more. No verdict counts from now on.
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
	slices.SortStableFunc(items, func(a, b item) int { return cmp.Compare(a.order, b.order) })
	return items
}

// stallPatience is how long a pipeline that gets no more messages may settle none before
// that is logged.
const stallPatience = 10 * time.Second

// watchForStalls looks for stalls from time to time, until the input ends. ReadBatch would
// know when it began to wait, but must not wait for a timer: for each message that comes
// alone the runtime would wake the thread that waits for the network. paused reports
// whether backpressure pauses the reads of a session.
func (q *queue) watchForStalls(paused func() bool) {
	look := time.NewTicker(stallPatience / 10)
	defer look.Stop()
	for {
		select {
		case <-look.C:
			q.reportStall(paused)
		case <-q.stopped.Done():
			return
		}
	}
}

// reportStall logs a pipeline that has all the messages that it may have, or does not ask
// for more while others wait: its output hangs or is very slow, or has a batching policy
// that can never fill a batch. It logs once until the pipeline gets more messages: what is
// slow settles something now and then.
func (q *queue) reportStall(paused func() bool) {
	q.mu.Lock()
	still := time.Since(q.moved)
	q.mu.Unlock()
	used := q.inFlight.Used()
	stalled := used > 0 && still >= stallPatience
	if stalled == q.stallReported {
		return
	}
	full := q.inFlight.Full() || paused()
	if q.stallReported = full; !full || !stalled {
		return
	}
	share := ""
	if q.conf.shared {
		share = fmt.Sprintf(", %d of one client", clientLimit(q.conf.maxInFlight))
	}
	q.log.Warnf("Pipeline stalled: %d messages in flight, none settled for %v (%s: %d%s, or %s). Check the outputs: one hangs or is very slow, or has batches by count or byte_size that can't fill: make these smaller, or give them a period",
		used, stallPatience, fieldMaxInFlight, q.conf.maxInFlight, share, fieldMaxBufferBytes)
}
