package plugin

import (
	"context"
	"strconv"
	"sync"

	"github.com/redpanda-data/benthos/v4/public/service"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// feeder holds the state that all feeds of an input share.
type feeder struct {
	conf    *receiveConfig
	queue   *queue
	metrics *receiveMetrics
	log     *service.Logger

	errorLog, streamLog, pullLog limitedLog

	stopped  context.Context // done when the input closes
	draining context.Context // done when the engine stops reading batches, or the input closes
}

// sessionFeed receives the messages, streams and events of one session.
type sessionFeed struct {
	*feeder
	source
	ended chan struct{} // closed when the session has ended and the pipeline has received all its messages

	// Set before the feed runs.
	emitsEvents bool
	previous    <-chan struct{} // the field ended of the previous feed with the same session id, or nil

	// Undelivered items and streams, beginning with those of the handover; receiver.close
	// collects them. All items in left were received after those in the queue, even if they
	// already have a sequence number.
	left    []item // accessed only by receiveMessages while it runs
	mu      sync.Mutex
	streams []*cryo.IncomingStream // streams that have not been read; guarded by mu
}

func (fr *feeder) newFeed(h *handover) *sessionFeed {
	identity := identityOf(h.session)
	f := &sessionFeed{
		feeder:  fr,
		source:  source{session: h.session, identity: identity, quota: fr.queue.acquireClient(identity.client())},
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

// run receives from the session until the session ends. It returns false if the input closes
// first.
func (f *sessionFeed) run() bool {
	if !f.emitConnected() {
		return false
	}
	var streams sync.WaitGroup
	streams.Go(f.acceptStreams)
	f.receiveMessages()
	streams.Wait() // even a truncated stream may still deliver complete messages
	if f.stopped.Err() != nil || !f.emitDisconnected() {
		return false
	}
	f.queue.releaseClient(f.quota)
	return true
}

// receiveMessages delivers the session's messages in order. After the end of the session it
// continues with those that have already been received.
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

// filter returns the items that message_types selects. It acknowledges and drops the others,
// and logs the texts of dropped errors.
func (f *sessionFeed) filter(items []item) []item {
	selected := items[:0]
	for i := range items {
		switch m := items[i].message; {
		case m == nil || f.conf.types[m.Kind]:
			selected = append(selected, items[i])
		default:
			if m.Kind == cryo.KindError {
				if log, ok := f.errorLog.allow(); ok {
					log.With("session", f.id, "text", strconv.Quote(f.session.Redact(string(m.Payload)))).Warn("The peer's application reported an error")
				}
			}
			f.metrics.filtered.Incr(1, messageTypeName(m.Kind))
			_ = m.Ack() // fails only if the session has ended
		}
	}
	return selected
}
