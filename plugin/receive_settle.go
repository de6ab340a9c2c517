package plugin

import (
	"context"
	"errors"
	"time"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// What the pipeline's verdict on a batch does: acknowledgements, redeliveries,
// rejections.

// settle acts on the pipeline's verdict. No error means that every message of the batch
// is delivered. An error of a batch of one is that message's. An error of a batch of
// several says nothing of any one of them, whatever messages it names
// (docs/engine-faults.md): each is delivered again, alone, and then its own verdict
// counts. Only the first verdict on a delivery does. A hard stop gives none.
func (r *receiver) settle(ctx context.Context, d *delivery, err error) {
	if err != nil && ctx.Err() != nil || !r.decide(d) {
		return
	}
	r.acknowledgeReceipt(d)
	var answers []*answer
	if err == nil {
		if answers, err = d.answers(); err != nil {
			if log, ok := r.answerLog.allow(); ok {
				log.Warnf("A batch of %d messages counts as not delivered: %v", len(d.items), err)
			}
		}
	}
	switch {
	case err == nil:
		r.delivered(ctx, d, answers)
	case len(d.items) > 1:
		r.log.Debugf("Delivering %d messages again, each alone: %v", len(d.items), err)
		r.redeliver(d, func() { r.redeliveries.alone(d.items) })
	case r.conf.replay:
		r.failed(d, err)
	default:
		r.cameThrough(d.items)
		r.reject(d.items, err)
		r.release(d.items)
		r.settled(d)
	}
}

// decide reports whether this is the first verdict on a delivery, of an input that is
// not closed.
func (r *receiver) decide(d *delivery) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, known := r.deliveries[d]; !known || d.decided {
		return false
	}
	d.decided = true
	return true
}

// settled forgets a delivery of which nothing is left to do.
func (r *receiver) settled(d *delivery) {
	r.mu.Lock()
	delete(r.deliveries, d)
	r.mu.Unlock()
}

// delivered acknowledges a batch: each message once its response, if it has one, is
// acknowledged. Until then close counts it as unsettled, so that a hard stop in the
// middle leaves no message to nobody; at worst one is delivered twice.
func (r *receiver) delivered(ctx context.Context, d *delivery, answers []*answer) {
	r.cameThrough(d.items)
	delivered, answered := d.split(answers)
	if !r.conf.onReceipt {
		r.acknowledge(delivered)
	}
	r.release(delivered)
	r.mu.Lock()
	if r.redeliveries.delivered(); len(r.redeliveries.early) > 0 {
		r.wakeRead()
	}
	r.mu.Unlock()
	if len(answered) > 0 {
		r.answer(ctx, answered)
	}
	r.settled(d)
}

// failed delivers a message again that has failed alone, after a wait.
func (r *receiver) failed(d *delivery, err error) {
	it := d.items[0]
	r.cameThrough(d.items)
	r.log.Debugf("Delivering a message again: %v", err)
	if it.failures >= outageFailures {
		if log, ok := r.redeliveryLog.allow(); ok {
			log.Warnf("A message of session %s has failed %d times and is delivered again until it succeeds: %v", it.source.id, it.failures+1, err)
		}
	}
	r.redeliver(d, func() { r.redeliveries.failed(it, time.Now()) })
}

// redeliver queues the messages of a delivery to be handed over again. They stay in
// flight.
func (r *receiver) redeliver(d *delivery, queue func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, known := r.deliveries[d]; !known {
		return // closed meanwhile, with all that this delivery has
	}
	delete(r.deliveries, d)
	r.moved = time.Now()
	for i := range d.items {
		d.items[i].acknowledged = d.items[i].acknowledged || d.acknowledged
	}
	queue()
	r.wakeRead()
}

// release ends the time of messages in the pipeline. There may be none: that all of a
// batch have failed shows that the pipeline moves, too. ReadBatch is woken only when
// it waits for a place: a fortieth of the CPU time for messages that come one at a
// time.
func (r *receiver) release(items []item) {
	r.shares.give(items)
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return // nothing is in flight any more
	}
	full := r.inFlight >= r.conf.maxInFlight
	r.inFlight -= len(items)
	r.moved = time.Now()
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

// acknowledgeReceipt acknowledges a batch, once, as soon as the pipeline has it, with
// acknowledge: received. A batch that ReadBatch has returned may still be thrown away
// by the engine, when it stops; so the proof is that the engine asks for the next one,
// or has a verdict.
func (r *receiver) acknowledgeReceipt(d *delivery) {
	if !r.conf.onReceipt {
		return
	}
	r.mu.Lock()
	first := !d.acknowledged
	d.acknowledged = true
	r.mu.Unlock()
	if first {
		r.acknowledge(d.items)
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
	if log, ok := r.rejectLog.allow(); ok {
		if r.conf.onReceipt {
			log.Errorf("Lost %d messages that were acknowledged when they were received: %v", len(items), cause)
		} else {
			log.Errorf("Rejected %d messages: %v", len(items), cause)
		}
	}
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
		r.metrics.rejected.Incr(1, messageTypeName(it.message.Kind))
	}
	it.reject()
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
