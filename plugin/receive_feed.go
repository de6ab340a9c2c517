package plugin

import (
	"context"
	"strconv"
	"sync"

	"github.com/redpanda-data/benthos/v4/public/service"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// feeder is the state that the feeds of an input share.
type feeder struct {
	conf    *receiveConfig
	queue   *queue
	metrics *receiveMetrics
	log     *service.Logger

	errorLog, streamLog, pullLog limitedLog

	stopped  context.Context // done when the input closes
	draining context.Context // done when the engine reads no more batches, or the input closes
}

// sessionFeed receives the messages, streams and events of one session.
type sessionFeed struct {
	*feeder
	source
	ended chan struct{} // closed when the session has ended and all its messages are in the pipeline

	// Set before the feed runs.
	emitsEvents bool
	previous    <-chan struct{} // field ended of the last feed with the same session id, or nil

	// Undelivered items and streams, first those of the handover; receiver.close collects them.
	// The items in left come after all delivered ones, also if they have a sequence number.
	left    []item // owned by receiveMessages
	mu      sync.Mutex
	streams []*cryo.IncomingStream // unread; guarded by mu
}

func (fr *feeder) newFeed(h *handover) *sessionFeed {
	identity := identityOf(h.session)
	f := &sessionFeed{
		feeder:  fr,
		source:  source{session: h.session, identity: identity, quota: fr.queue.acquireClient(identity.id)},
		ended:   make(chan struct{}),
		left:    h.items,
		streams: h.streams,
	}
	if fr.conf.sessions {
		f.firstPass.none = make(chan struct{}, 1)
	}
	for i := range f.left {
		f.left[i].source = &f.source
	}
	return f
}

// run receives from the session until it ends. It returns false if the input closes first.
func (f *sessionFeed) run() bool {
	if !f.emitConnected() {
		return false
	}
	var streams sync.WaitGroup
	streams.Go(f.acceptStreams)
	f.receiveMessages()
	streams.Wait() // truncated streams may still deliver complete messages
	if f.stopped.Err() != nil || !f.emitDisconnected() {
		return false
	}
	f.queue.releaseClient(f.quota)
	return true
}

// receiveMessages delivers the session's messages in order, including those that were
// received before the session ended.
func (f *sessionFeed) receiveMessages() {
	f.left = f.filter(f.left) // the previous input may have had other message_types
	for {
		if f.left = f.queue.deliver(f.left); len(f.left) > 0 {
			return
		}
		messages, err := f.session.ReceiveBatch(f.stopped, f.conf.maxBatchCount)
		if err != nil {
			return
		}
		f.metrics.countReceived(messages)
		items := make([]item, len(messages))
		for i, m := range messages {
			items[i] = item{source: &f.source, message: m}
		}
		f.left = f.filter(items)
	}
}

// filter returns the items whose types are in message_types, and acknowledges the others.
func (f *sessionFeed) filter(items []item) []item {
	selected := items[:0]
	for i := range items {
		switch m := items[i].message; {
		case m == nil || f.conf.types[m.Kind]:
			selected = append(selected, items[i])
		default:
			if m.Kind == cryo.KindError {
				if log, ok := f.errorLog.allow(); ok {
					log.With("session", f.id, "text", strconv.Quote(f.session.Redact(string(m.Payload)))).Warn("The peer's application reports an error")
				}
			}
			f.metrics.filtered.Incr(1, messageTypeName(m.Kind))
			_ = m.Ack() // fails only if the session has ended
		}
	}
	return selected
}
