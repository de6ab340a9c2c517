package plugin

import (
	"context"
	"errors"
	"sync/atomic"
	"time"

	"github.com/redpanda-data/benthos/v4/public/service"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// source is the session that items were received from.
type source struct {
	session *cryo.Session
	*identity
	quota     *clientQuota
	firstPass firstPass
}

// item is a received message until it is acknowledged or rejected: a frame, a part of a
// stream that a scanner has produced, or a session event.
type item struct {
	source   *source
	message  *cryo.Message    // nil unless the item is a frame
	part     *service.Message // nil if the item is a frame
	owner    partOwner        // scanner batch or event of the part
	index    int              // index of the part in owner
	sequence uint64           // sequence number in the input

	acknowledged bool // on receipt

	// State of redeliveries after the item has failed alone.
	failures   int
	due        time.Time // time of the next delivery
	expedited  bool      // redelivered before due
	deliveries uint64    // successful deliveries of the input at the last failure
}

// partOwner is a scanner batch or a session event, and receives the results of its parts.
type partOwner interface {
	// done sets the result of a part; nil means that it is delivered. Only the first call for
	// a part counts.
	done(index int, err error)
	// stream returns the stream that the part belongs to, or nil.
	stream() *cryo.IncomingStream
	// movable reports whether another input can deliver the part.
	movable() bool
}

var errNotDelivered = errors.New(rejection)

// acknowledge acknowledges frames to their senders, and marks parts as delivered. The error
// is that of a session that has ended.
func acknowledge(items []item, metrics *receiveMetrics) error {
	messages := make([]*cryo.Message, 0, len(items))
	for i := range items {
		if items[i].message != nil {
			messages = append(messages, items[i].message)
		} else {
			items[i].owner.done(items[i].index, nil)
		}
	}
	if len(messages) == 0 {
		return nil
	}
	metrics.observeLatency(messages[0])
	return cryo.AckBatch(messages)
}

// reject rejects an item to its sender. If the session has ended, it only releases the item's
// part of the receive buffer.
func (it *item) reject() {
	if it.message != nil {
		_ = it.message.Reject(rejection)
	} else {
		it.owner.done(it.index, errNotDelivered)
	}
}

// describe adds a frame's metadata to its message.
func (it *item) describe(m *service.Message) {
	m.MetaSetMut(metaMessageType, messageTypeName(it.message.Kind))
	m.MetaSetMut(metaAckID, int64(it.message.Number()))
	it.source.describe(m)
}

// delivery is a batch in the pipeline.
type delivery struct {
	items     []item
	responses *service.SyncResponseStore

	// Guarded by the queue's mutex.
	hasResult    bool
	acknowledged bool   // on receipt
	retained     []item // items whose responses were unacknowledged at a hard stop
}

// newDelivery returns a delivery of items, and its batch for the pipeline. All messages share
// one context, in which the engine finds the store of synchronous responses. It contains no
// data of single messages, because the engine restores contexts by position after each batched
// processor (docs/engine-faults.md), so that a message may get the context of another. The
// messages are copied into one slice, which saves an allocation per message.
func newDelivery(items []item, withMetadata bool) (*delivery, service.MessageBatch) {
	stored, responses := service.NewMessage(nil).WithSyncResponseStore()
	ctx := stored.Context()
	d := &delivery{items: items, responses: responses, acknowledged: true}
	messages := make([]service.Message, len(items))
	batch := make(service.MessageBatch, len(items))
	for i := range items {
		d.acknowledged = d.acknowledged && items[i].acknowledged
		if it := &items[i]; it.part != nil {
			messages[i] = *it.part.Copy().WithContext(ctx) // the part may be redelivered
		} else if messages[i] = *service.NewMessageWithContext(ctx, it.message.Payload); withMetadata {
			it.describe(&messages[i])
		}
		batch[i] = &messages[i]
	}
	return d, batch
}

// firstPass counts a session's items without a result of their own. Redelivered items do not
// count, so that a message that always fails does not delay the session's disconnected event.
type firstPass struct {
	count atomic.Int64
	none  chan struct{} // capacity 1; signals a count of 0; nil if nothing waits for that
}

func (p *firstPass) add(n int) {
	if p.none == nil || n == 0 || p.count.Add(int64(n)) != 0 {
		return
	}
	select {
	case p.none <- struct{}{}:
	default:
	}
}

// wait waits for a count of 0. It must be called after the last add of a positive number. It
// returns false if ctx is done first.
func (p *firstPass) wait(ctx context.Context) bool {
	for p.count.Load() > 0 {
		select {
		case <-p.none:
		case <-ctx.Done():
			return false
		}
	}
	return true
}

// endFirstPass ends the first pass of items that have a result of their own.
func endFirstPass(items []item) {
	for i := range items {
		if items[i].failures == 0 {
			items[i].source.firstPass.add(-1)
		}
	}
}
