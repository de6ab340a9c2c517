package plugin

import (
	"cmp"
	"container/heap"
	"math/rand/v2"
	"slices"
	"time"
)

const (
	// minRedeliveryWait is how long a message that has failed alone waits for its first
	// redelivery, without jitter. The wait doubles with each failure, up to maxRedeliveryWait.
	// After outageFailures failures it doubles further, up to maxOutageWait, as long as the
	// pipeline delivers no other message of the input.
	minRedeliveryWait = 10 * time.Millisecond
	maxRedeliveryWait = time.Second
	maxOutageWait     = 30 * time.Second
	outageFailures    = 10
)

// redeliveries holds the failed messages that are to be redelivered, each alone. It is guarded
// by the queue's mutex.
//
// A successful delivery ends the waits of other messages, because it may mean that an outage is
// over. A message that fails again after such an expedited redelivery waits for its full time;
// otherwise a message that always fails would be redelivered after each success.
type redeliveries struct {
	unidentified []item // messages of failed batches of several messages, in order
	ready        []item // messages that failed alone and no longer have to wait, in order
	shortened    waits  // messages that failed alone and wait, at most until the next successful delivery
	full         waits  // messages that failed alone and wait until they are due
	deliveries   uint64 // number of successful deliveries of the input
}

// addUnidentified adds the messages of a failed batch of several messages.
func (q *redeliveries) addUnidentified(items []item) {
	q.unidentified = append(q.unidentified, items...)
}

// addFailed adds a message that has failed alone.
func (q *redeliveries) addFailed(it item, now time.Time) {
	outage := it.failures > 0 && it.deliveries == q.deliveries
	it.due = now.Add(redeliveryWait(it.failures, outage))
	it.failures++
	it.deliveries = q.deliveries
	if it.expedited {
		it.expedited = false
		heap.Push(&q.full, it)
	} else {
		heap.Push(&q.shortened, it)
	}
}

// redeliveryWait returns how long a message waits after it has failed, with a jitter of 50 %.
// failures is the number of its earlier failures. outage is true if the input has had no
// successful delivery since the last earlier failure. Without jitter, messages that an output
// has batched with one that always fails would be batched with that one again.
func redeliveryWait(failures int, outage bool) time.Duration {
	wait := min(minRedeliveryWait<<min(failures, outageFailures), maxRedeliveryWait)
	if more := failures - outageFailures + 1; outage && more > 0 {
		wait = min(maxRedeliveryWait<<min(more, 10), maxOutageWait)
	}
	return min(wait/2+rand.N(wait), maxOutageWait) //nolint:gosec // no secret
}

// delivered expedites redeliveries, because the pipeline has delivered a batch.
func (q *redeliveries) delivered() {
	q.deliveries++
	if len(q.shortened) == 0 {
		return
	}
	for i := range q.shortened {
		q.shortened[i].expedited = true
	}
	slices.SortFunc(q.shortened, func(a, b item) int { return cmp.Compare(a.sequence, b.sequence) })
	q.ready = append(q.ready, q.shortened...)
	q.shortened = nil
}

// nextUnidentified removes and returns the next message of a failed batch of several messages.
func (q *redeliveries) nextUnidentified() (item, bool) { return pop(&q.unidentified) }

func pop(items *[]item) (it item, ok bool) {
	if len(*items) == 0 {
		return item{}, false
	}
	it, (*items)[0] = (*items)[0], item{}
	if *items = (*items)[1:]; len(*items) == 0 {
		*items = nil
	}
	return it, true
}

// next removes and returns a message that has failed alone and is due. If there is none, wait
// is the time until one is due, or negative if none is waiting.
func (q *redeliveries) next(now time.Time) (it item, wait time.Duration, ok bool) {
	if it, ok = pop(&q.ready); ok {
		return it, 0, true
	}
	first := &q.shortened
	if len(*first) == 0 || len(q.full) > 0 && q.full[0].due.Before((*first)[0].due) {
		first = &q.full
	}
	if len(*first) == 0 {
		return item{}, -1, false
	}
	if wait = (*first)[0].due.Sub(now); wait > 0 {
		return item{}, wait, false
	}
	return heap.Pop(first).(item), 0, true
}

// drain removes and returns all messages.
func (q *redeliveries) drain() []item {
	all := slices.Concat(q.unidentified, q.ready, []item(q.shortened), []item(q.full))
	*q = redeliveries{}
	return all
}

// waits is a heap of messages, ordered by their field due.
type waits []item

func (w waits) Len() int           { return len(w) }
func (w waits) Less(i, j int) bool { return w[i].due.Before(w[j].due) }
func (w waits) Swap(i, j int)      { w[i], w[j] = w[j], w[i] }
func (w *waits) Push(it any)       { *w = append(*w, it.(item)) }
func (w *waits) Pop() any {
	last := len(*w) - 1
	it := (*w)[last]
	(*w)[last] = item{}
	*w = (*w)[:last]
	return it
}
