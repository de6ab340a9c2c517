package plugin

import (
	"context"
	"sync/atomic"

	"github.com/redpanda-data/benthos/v4/public/service"
)

// delivery is a batch in the pipeline, and the context of each of its messages: where
// the engine looks for the store of their synchronous responses. Nothing else is read
// from the context of a message: the engine puts contexts back by position behind each
// batched processor (docs/engine-faults.md), so a message may come back with that of
// another one.
type delivery struct {
	context.Context
	items     []item
	responses atomic.Pointer[responseStore] // nil until one comes

	// Guarded by the receiver's mutex.
	decided      bool // by the pipeline's first verdict
	acknowledged bool // on receipt
}

// Value finds where responses go.
func (d *delivery) Value(key any) any {
	if key == responsesKey {
		return d.respond().Value(key)
	}
	return d.Context.Value(key)
}

// newDelivery makes the pipeline's batch of the items. All that a batch needs for
// itself is allocated at once, so the messages are copies of what the engine's
// constructors return: an allocation a message less, of nine.
func newDelivery(items []item, withMetadata bool) (*delivery, service.MessageBatch) {
	d := &delivery{Context: context.Background(), items: items, acknowledged: true}
	messages := make([]service.Message, len(items))
	batch := make(service.MessageBatch, len(items))
	for i := range items {
		it := &items[i]
		d.acknowledged = d.acknowledged && it.acknowledged
		switch {
		case it.part != nil:
			messages[i] = *it.part.Copy().WithContext(d) // it may have to be delivered again
		case withMetadata:
			messages[i] = *service.NewMessageWithContext(d, it.message.Payload)
			it.describe(&messages[i])
		default:
			messages[i] = *service.NewMessageWithContext(d, it.message.Payload)
		}
		batch[i] = &messages[i]
	}
	return d, batch
}

// describe gives a message its metadata.
func (it *item) describe(m *service.Message) {
	m.MetaSetMut(metaMessageType, messageTypeName(it.message.Kind))
	m.MetaSetMut(metaAckID, int64(it.message.Number()))
	it.source.describe(m)
}

// split separates the items of a delivered batch that have no synchronous response
// from those whose response must be acknowledged first.
func (d *delivery) split(answers []*answer) (delivered []item, answered []*answer) {
	if answers == nil {
		return d.items, nil
	}
	for i, it := range d.items {
		a := answers[i]
		if a == nil {
			delivered = append(delivered, it)
			continue
		}
		if len(a.items) == 0 {
			answered = append(answered, a)
		}
		a.items = append(a.items, it)
	}
	return delivered, answered
}
