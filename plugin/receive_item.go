package plugin

import (
	"context"
	"errors"
	"sync/atomic"
	"time"

	"github.com/redpanda-data/benthos/v4/public/service"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// source is the session from which items were received.
type source struct {
	session *cryo.Session
	*identity
	quota     *clientQuota
	firstPass firstPass
}

// item is something that was received and has been neither acknowledged nor rejected yet: a
// message in a frame, a part of a stream that a scanner has produced, or a session event.
type item struct {
	source   *source
	message  *cryo.Message    // nil unless the item is a message in a frame
	part     *service.Message // part of a stream, or event; nil if message is set
	owner    partOwner        // what the part belongs to: a scanner batch or a session event
	index    int              // index of the part in owner
	sequence uint64           // position among all items of the input
	began    time.Time        // when a part or an event was first queued; zero for a message in a frame, which has its own time

	acknowledged bool // whether the item was acknowledged on receipt

	// The state of an item that is redelivered because it has failed alone.
	failures   int
	due        time.Time // when the item is redelivered next
	expedited  bool      // whether the item is redelivered before due
	deliveries uint64    // number of successful deliveries of the input when the item last failed
}

// partOwner is a scanner batch or a session event. It receives the results of its parts.
type partOwner interface {
	// done sets the result of a part; nil means that it was delivered. Only the first call for
	// a part counts.
	done(index int, err error)
	// stream returns the stream that the parts belong to, or nil for an event.
	stream() *cryo.IncomingStream
	// movable reports whether another input can deliver the parts.
	movable() bool
}

// received returns when the item was received.
func (it *item) received() time.Time {
	if it.message != nil {
		return it.message.Time()
	}
	return it.began
}

var errNotDelivered = errors.New(rejection)

// acknowledge acknowledges messages to their senders, and marks parts as delivered. It returns
// an error only if a session has ended.
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

// reject sends an error for a message to its sender, or marks a part as failed. If the session
// has ended, it only releases the item's part of the receive buffer.
func (it *item) reject() {
	if it.message != nil {
		_ = it.message.Reject(rejection)
	} else {
		it.owner.done(it.index, errNotDelivered)
	}
}

// describe adds metadata to m, which is the message that was received in a frame.
func (it *item) describe(m *service.Message) {
	m.MetaSetMut(metaMessageType, messageTypeName(it.message.Kind))
	m.MetaSetMut(metaAckID, int64(it.message.Number()))
	it.source.describe(m)
}

// identify adds to a logger what identifies the item, but nothing of its content.
func (it *item) identify(log *service.Logger) *service.Logger {
	log = log.With("session", it.source.id)
	if it.message != nil {
		return log.With("ack_id", it.message.Number())
	}
	if stream := it.owner.stream(); stream != nil {
		return log.With("stream", it.source.session.Redact(stream.Name()), "tx_id", stream.Tx())
	}
	return log // a session event
}

// delivery is a batch that was passed to the pipeline and has not been completed.
type delivery struct {
	items     []item
	responses *service.SyncResponseStore

	// Guarded by the queue's mutex.
	began        time.Time // when ReadBatch returned the batch
	hasResult    bool
	acknowledged bool   // whether the items were acknowledged on receipt
	retained     []item // items whose responses were unacknowledged at a hard stop
}

// newDelivery returns a delivery of items, and the batch for the pipeline, whose messages carry
// metadata if withMetadata is true. All messages share one context, in which the engine finds
// the store of synchronous responses. The context contains nothing about individual messages,
// because the engine restores contexts by position after each batched processor
// (docs/development/engine-faults.md), so that a message may get the context of another. The messages are
// elements of one slice, which saves an allocation for each.
func newDelivery(items []item, withMetadata bool) (*delivery, service.MessageBatch) {
	stored, responses := service.NewMessage(nil).WithSyncResponseStore()
	ctx := stored.Context()
	d := &delivery{items: items, responses: responses, acknowledged: true}
	messages := make([]service.Message, len(items))
	batch := make(service.MessageBatch, len(items))
	for i := range items {
		d.acknowledged = d.acknowledged && items[i].acknowledged
		if it := &items[i]; it.part != nil {
			messages[i] = *it.part.Copy().WithContext(ctx) // a copy, because the part may be redelivered
		} else if messages[i] = *service.NewMessageWithContext(ctx, it.message.Payload); withMetadata {
			it.describe(&messages[i])
		}
		batch[i] = &messages[i]
	}
	return d, batch
}

// firstPass counts the items of a session that do not have their own result yet.
// Redelivered items that have had one do not count, so that a message that always fails does
// not delay the session's disconnected event.
type firstPass struct {
	count atomic.Int64
	none  chan struct{} // capacity 1; signals that the count is 0; nil if no goroutine waits for that
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

// wait waits until the count is 0. Call it only after the last call to add with a positive
// number. It returns false if ctx is done first.
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

// endFirstPass stops counting items that now have their own result.
func endFirstPass(items []item) {
	for i := range items {
		if items[i].failures == 0 {
			items[i].source.firstPass.add(-1)
		}
	}
}
