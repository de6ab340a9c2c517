package plugin

import (
	"cmp"
	"container/heap"
	"math/rand/v2"
	"slices"
	"time"
)

const (
	// firstRedelivery is about how long a message that has failed waits before it is
	// delivered again. The wait doubles up to mostRedelivery, and from the failure
	// number outageFailures on up to outageRedelivery, as long as the pipeline delivers
	// nothing else of the input.
	firstRedelivery  = 10 * time.Millisecond
	mostRedelivery   = time.Second
	outageRedelivery = 30 * time.Second
	outageFailures   = 10
)

// redeliveries are messages that the pipeline gets again, each alone: an error of a
// batch of several says nothing about any one of them, one of a batch of one does. The
// queue's mutex guards them.
//
// A delivery ends the wait of the others, since an outage may be over. But a message
// that fails again after such an early end waits for its full time: one that can't be
// delivered would come again with each of the others.
type redeliveries struct {
	unknown    []item // of batches of several, in order
	early      []item // failed alone, before they are due, in order
	eager      waits  // failed alone, until they are due or anything is delivered
	patient    waits  // failed alone, until they are due
	deliveries uint64
}

// alone adds the messages of a batch of several that has failed.
func (q *redeliveries) alone(items []item) { q.unknown = append(q.unknown, items...) }

// failed adds a message that has failed alone.
func (q *redeliveries) failed(it item, now time.Time) {
	outage := it.failures > 0 && it.deliveries == q.deliveries
	it.due = now.Add(redeliveryWait(it.failures, outage))
	it.failures++
	it.deliveries = q.deliveries
	if it.early {
		it.early = false
		heap.Push(&q.patient, it)
	} else {
		heap.Push(&q.eager, it)
	}
}

// redeliveryWait is how long a message waits that failed so often before. It is spread
// at random by half of it, or messages that an output's batching has merged with one
// that can't be delivered would meet it again in each batch.
func redeliveryWait(failures int, outage bool) time.Duration {
	wait := min(firstRedelivery<<min(failures, outageFailures), mostRedelivery)
	if more := failures - outageFailures + 1; outage && more > 0 {
		wait = min(mostRedelivery<<min(more, 10), outageRedelivery)
	}
	return min(wait/2+rand.N(wait), outageRedelivery) //nolint:gosec // no secret
}

// delivered notes that the pipeline has delivered a batch.
func (q *redeliveries) delivered() {
	q.deliveries++
	if len(q.eager) == 0 {
		return
	}
	for i := range q.eager {
		q.eager[i].early = true
	}
	slices.SortFunc(q.eager, func(a, b item) int { return cmp.Compare(a.order, b.order) })
	q.early = append(q.early, q.eager...)
	q.eager = nil
}

// nextAlone returns the next message of a batch of several.
func (q *redeliveries) nextAlone() (item, bool) { return pop(&q.unknown) }

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

// next returns the message that has failed alone and is to be delivered now, if there is
// one. If not, wait is the time until one is, or negative when none waits.
func (q *redeliveries) next(now time.Time) (it item, wait time.Duration, ok bool) {
	if it, ok = pop(&q.early); ok {
		return it, 0, true
	}
	first := &q.eager
	if len(*first) == 0 || len(q.patient) > 0 && q.patient[0].due.Before((*first)[0].due) {
		first = &q.patient
	}
	if len(*first) == 0 {
		return item{}, -1, false
	}
	if wait = (*first)[0].due.Sub(now); wait > 0 {
		return item{}, wait, false
	}
	return heap.Pop(first).(item), 0, true
}

// drain returns every message, and leaves none.
func (q *redeliveries) drain() []item {
	all := slices.Concat(q.unknown, q.early, []item(q.eager), []item(q.patient))
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
