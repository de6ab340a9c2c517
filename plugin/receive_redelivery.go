package plugin

import (
	"container/heap"
	"math/rand/v2"
	"slices"
	"time"
)

const (
	// firstRedelivery is about how long a message that has failed waits before it is
	// delivered again. The wait doubles up to mostRedelivery, and where a message has
	// failed outageFailures times, and nothing else of the input was delivered since,
	// up to outageRedelivery.
	firstRedelivery  = 10 * time.Millisecond
	mostRedelivery   = time.Second
	outageRedelivery = 30 * time.Second
	outageFailures   = 10
)

// redeliveries are messages that the pipeline gets again, each alone: an error of a
// batch of several says nothing of any one of them, one of a batch of one does. The
// receiver's mutex guards them.
type redeliveries struct {
	now   []item // of batches of several, in order
	later waits  // failed alone
	long  int    // of later: waits of more than mostRedelivery
}

// alone adds the messages of a batch that has failed.
func (q *redeliveries) alone(items []item) { q.now = append(q.now, items...) }

// failed adds a message that has failed alone.
func (q *redeliveries) failed(it item, now time.Time) {
	it.failed = now
	it.due = now.Add(redeliveryWait(it.failures))
	it.failures++
	if it.failures > outageFailures {
		q.long++
	}
	heap.Push(&q.later, it)
}

// redeliveryWait is how long a message waits that failed so often before. It is spread
// at random by half of it, or messages that an output's batching has merged with one
// that can't be delivered would meet it again in each batch.
func redeliveryWait(failures int) time.Duration {
	wait := min(firstRedelivery<<min(failures, outageFailures), mostRedelivery)
	if failures >= outageFailures {
		wait = min(mostRedelivery<<min(failures-outageFailures+1, 10), outageRedelivery)
	}
	return min(wait/2+rand.N(wait), outageRedelivery) //nolint:gosec // no secret
}

// delivered shortens the waits of an outage, since the outputs deliver again: to about
// mostRedelivery from the failure, so that a message that can't be delivered among
// others that are doesn't come with each of them.
func (q *redeliveries) delivered() {
	if q.long == 0 {
		return
	}
	q.long = 0
	for i := range q.later {
		if it := &q.later[i]; it.failures > outageFailures {
			it.failures = outageFailures
			if due := it.failed.Add(redeliveryWait(outageFailures - 1)); due.Before(it.due) {
				it.due = due
			}
		}
	}
	heap.Init(&q.later)
}

// next takes the message that is to be delivered now, if there is one. If not, wait is
// the time until one is, or negative when none waits.
func (q *redeliveries) next(now time.Time) (it item, wait time.Duration, ok bool) {
	if len(q.now) > 0 {
		it, q.now[0] = q.now[0], item{}
		if q.now = q.now[1:]; len(q.now) == 0 {
			q.now = nil
		}
		return it, 0, true
	}
	if len(q.later) == 0 {
		return item{}, -1, false
	}
	if wait = q.later[0].due.Sub(now); wait > 0 {
		return item{}, wait, false
	}
	it = heap.Pop(&q.later).(item)
	if it.failures > outageFailures {
		q.long--
	}
	return it, 0, true
}

// all takes every message.
func (q *redeliveries) all() []item {
	all := slices.Concat(q.now, []item(q.later))
	*q = redeliveries{}
	return all
}

// waits is a heap of messages by the time when they are due.
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
