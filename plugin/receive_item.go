package plugin

import (
	"context"
	"errors"
	"sync/atomic"
	"time"

	"github.com/redpanda-data/benthos/v4/public/service"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// source is the session of items.
type source struct {
	session *cryo.Session
	*identity
	client    *client // its quota of max_in_flight
	firstPass firstPass
}

// item is a message from its receipt to its verdict: a frame, a part that a scanner has cut
// from a stream, or an event.
type item struct {
	source  *source
	message *cryo.Message    // a frame; else nil
	part    *service.Message // nil for a frame
	of      settler          // what the part belongs to: a scanner's batch, or an event
	at      int              // index of the part there
	order   uint64           // sequence number in the input

	acknowledged bool // on receipt

	// After failures alone; see redeliveries.
	failures   int
	due        time.Time // of the next delivery
	early      bool      // it is delivered before that
	deliveries uint64    // of the input, at the last failure
}

// settler is what parts belong to.
type settler interface {
	// done settles a part; only the first call for each counts. err is nil if the part is
	// delivered.
	done(at int, err error)
	// stream returns the stream that the part was cut from, or nil.
	stream() *cryo.IncomingStream
	// movable reports whether another input can still settle the part.
	movable() bool
}

var errNotDelivered = errors.New(rejection)

// acknowledge acknowledges items to their senders, and settles parts. If a session has
// ended, nobody receives its acknowledgements.
func acknowledge(items []item, metrics *receiveMetrics) error {
	messages := make([]*cryo.Message, 0, len(items))
	for i := range items {
		if items[i].message != nil {
			messages = append(messages, items[i].message)
		} else {
			items[i].of.done(items[i].at, nil)
		}
	}
	if len(messages) == 0 {
		return nil
	}
	metrics.acknowledged(messages[0])
	return cryo.AckBatch(messages)
}

// reject rejects an item to its sender. If the session has ended, it only releases what the
// item has reserved.
func (it *item) reject() {
	if it.message != nil {
		_ = it.message.Reject(rejection)
	} else {
		it.of.done(it.at, errNotDelivered)
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
	decided      bool   // by the pipeline's first verdict
	acknowledged bool   // on receipt
	left         []item // by a hard stop, while their responses were not acknowledged
}

// newDelivery makes the pipeline's batch of items. The messages have one context: that in
// which the engine finds the store of their synchronous responses. Nothing else is in it,
// because the engine puts contexts back by position after each batched processor
// (docs/engine-faults.md), so that a message may return with another one's. What a batch
// needs is allocated at once, so the messages are copies of what the engine's constructors
// return: one allocation a message less.
func newDelivery(items []item, withMetadata bool) (*delivery, service.MessageBatch) {
	stored, responses := service.NewMessage(nil).WithSyncResponseStore()
	ctx := stored.Context()
	d := &delivery{items: items, responses: responses, acknowledged: true}
	messages := make([]service.Message, len(items))
	batch := make(service.MessageBatch, len(items))
	for i := range items {
		d.acknowledged = d.acknowledged && items[i].acknowledged
		if it := &items[i]; it.part != nil {
			messages[i] = *it.part.Copy().WithContext(ctx) // it may have to be delivered again
		} else if messages[i] = *service.NewMessageWithContext(ctx, it.message.Payload); withMetadata {
			it.describe(&messages[i])
		}
		batch[i] = &messages[i]
	}
	return d, batch
}

// firstPass counts a session's items that have had no verdict of their own yet. Redeliveries
// do not count: a message that always fails must not keep a session from leaving.
type firstPass struct {
	count atomic.Int64
	none  chan struct{} // holds a token when the count has come to 0; nil: nobody waits for that
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

// wait waits for a count of 0, when nothing is added any more. It returns false if ctx is
// done first.
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

// passed ends the first pass of items that have a verdict of their own.
func passed(items []item) {
	for i := range items {
		if items[i].failures == 0 {
			items[i].source.firstPass.add(-1)
		}
	}
}
