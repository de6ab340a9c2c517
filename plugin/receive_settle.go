package plugin

import (
	"context"
	"errors"
	"slices"
	"time"

	"github.com/redpanda-data/benthos/v4/public/service"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// What the pipeline's verdict does: acknowledgements, rejections, replays.

// settle acts on the pipeline's verdict over a batch, message by message: one
// that fails holds up none of the others, nor does one that is answered first.
// Only the first verdict counts.
func (r *receiver) settle(ctx context.Context, d *delivery, err error) {
	r.mu.Lock()
	_, first := r.deliveries[d]
	delete(r.deliveries, d)
	r.mu.Unlock()
	if !first {
		return
	}
	r.cameThrough(d.items)
	delivered, answered, failed := d.items, []*answer(nil), []item(nil)
	answers, unclear := d.answers()
	if unclear != nil {
		r.log.Warnf("A batch of %d messages counts as not delivered: %v", len(d.items), unclear)
		err = unclear
	}
	if err != nil || answers != nil {
		delivered, answered, failed = d.split(d.failed(err), answers)
	}
	if !r.conf.onReceipt {
		r.acknowledge(delivered)
	}
	r.release(delivered)
	switch {
	case len(failed) == 0:
	case r.conf.replay:
		r.log.Debugf("Trying %d messages again that were not delivered: %v", len(failed), err)
		r.replayLater(failed)
	default:
		r.reject(failed, err)
		r.release(failed)
	}
	if len(answered) > 0 {
		r.answer(ctx, answered)
	}
}

// release ends the time of messages in the pipeline. There may be none: that all of a
// batch have failed shows that the pipeline moves, too. ReadBatch is woken only when
// it waits for a place: a fortieth of the CPU time for messages that come one at a
// time.
func (r *receiver) release(items []item) {
	r.shares.give(items)
	r.mu.Lock()
	full := r.inFlight >= r.conf.maxInFlight
	r.inFlight -= len(items)
	r.moved = time.Now()
	r.mu.Unlock()
	r.metrics.unacknowledged.add(-len(items))
	if full {
		r.wakeRead()
	}
}

func (r *receiver) wakeRead() {
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

func (r *receiver) acknowledge(items []item) {
	messages := make([]*cryo.Message, 0, len(items))
	for i := range items {
		if items[i].message != nil {
			messages = append(messages, items[i].message)
		} else {
			items[i].of.done(items[i].at, nil)
		}
	}
	if len(messages) > 0 {
		r.metrics.acknowledged(messages[0])
	}
	if err := cryo.AckBatch(messages); err != nil {
		r.log.Debugf("Delivered, but the sender can't be told and may send again: %v", err)
	}
}

func (r *receiver) reject(items []item, cause error) {
	r.rejectLines.do(r.log, func(log *service.Logger) {
		if r.conf.onReceipt {
			log.Errorf("Lost %d messages that were acknowledged when they were received: %v (at most one such line a second)", len(items), cause)
		} else {
			log.Errorf("Rejected %d messages: %v (at most one such line a second)", len(items), cause)
		}
	})
	if r.conf.onReceipt {
		return
	}
	for _, it := range items {
		r.refuse(it)
	}
}

// refuse rejects one item, and counts it.
func (r *receiver) refuse(it item) {
	if it.message != nil {
		r.metrics.rejected.Incr(1, messageTypeName(it.message.Type))
	}
	it.reject()
}

// abandon keeps items of which nothing is known at the end of the input, for
// rejectRest.
func (r *receiver) abandon(items []item) {
	r.mu.Lock()
	late := r.gone
	if !late {
		r.abandoned = append(r.abandoned, items...)
	}
	r.mu.Unlock()
	for i := range items {
		if late {
			items[i].reject()
		}
	}
}

// reject tells the sender. If its session has ended, it knows already, and this
// frees the memory that the item counts.
func (it *item) reject() {
	if it.message != nil {
		_ = it.message.Reject(rejection)
	} else {
		it.of.done(it.at, errNotDelivered)
	}
}

var errNotDelivered = errors.New(rejection)

// replayLater lets failed messages be handed over again, each alone, so that the
// next failure is its own. The wait doubles from 10 ms to one second.
func (r *receiver) replayLater(failed []item) {
	now := time.Now()
	r.mu.Lock()
	if r.gone {
		r.mu.Unlock()
		for _, it := range failed {
			it.reject()
		}
		return
	}
	defer r.mu.Unlock()
	for _, it := range failed {
		it.due = now.Add(min(10*time.Millisecond<<min(it.failures, 10), time.Second))
		it.failures++
		at, _ := slices.BinarySearchFunc(r.replays, it.due, func(other item, due time.Time) int {
			if other.due.After(due) {
				return 1
			}
			return -1 // behind those that are due at the same time
		})
		r.replays = slices.Insert(r.replays, at, it)
	}
	r.wakeRead()
}
