package plugin

import (
	"context"
	"sync"

	"github.com/redpanda-data/benthos/v4/public/service"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/quota"
)

// feeder is what the feeds of an input share.
type feeder struct {
	conf        *receiveConfig
	queue       *queue
	openStreams *quota.Quota // streams that are being scanned or are not settled
	metrics     *receiveMetrics
	log         *service.Logger

	errorLog, streamLog, pullLog limitedLog

	stopped  context.Context // the input has closed
	draining context.Context // the engine reads no more; done with stopped too
}

// sessionFeed receives the messages, streams and events of one session.
type sessionFeed struct {
	*feeder
	source
	slots *quota.Share  // of openStreams
	ended chan struct{} // closed when the session has ended and all of it is handed over

	// Of events; set before the feed runs.
	emits    bool            // it emits events
	previous <-chan struct{} // ended of the last feed with the same session id, or nil

	// What is not handed over, for close: from the listener's last input at first. Only
	// items that this input has not numbered are in left.
	left    []item // owned by receiveMessages
	mu      sync.Mutex
	streams []*cryo.IncomingStream // of which nothing was read; guarded by mu
}

func (fr *feeder) newFeed(h *handover) *sessionFeed {
	identity := identityOf(h.session)
	f := &sessionFeed{
		feeder:  fr,
		source:  source{session: h.session, identity: identity, client: fr.queue.join(identity.id)},
		slots:   fr.openStreams.Share(),
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

// run receives from the session from its beginning to its end. It returns false if the
// input ends first.
func (f *sessionFeed) run() bool {
	if !f.emitConnected() {
		return false
	}
	var streams sync.WaitGroup
	streams.Go(f.acceptStreams)
	f.receiveMessages()
	streams.Wait() // truncated ones have whole messages too
	if f.stopped.Err() != nil || !f.emitDisconnected() {
		return false
	}
	f.queue.leaveClient(f.client)
	return true
}

// receiveMessages hands a session's messages over in order. What the session received
// before its end still goes to the pipeline: nobody else has it.
func (f *sessionFeed) receiveMessages() {
	f.left = f.filter(f.left) // the last input may have had other message_types
	for {
		if f.left = f.queue.deliver(f.left); len(f.left) > 0 {
			return
		}
		messages, err := f.session.ReceiveBatch(f.stopped, f.conf.maxBatchCount)
		if err != nil {
			return
		}
		f.metrics.took(messages)
		items := make([]item, len(messages))
		for i, m := range messages {
			items[i] = item{source: &f.source, message: m}
		}
		f.left = f.filter(items)
	}
}

// filter acknowledges the messages of types that are not in message_types, and returns the
// other items.
func (f *sessionFeed) filter(items []item) []item {
	selected := items[:0]
	for i := range items {
		switch m := items[i].message; {
		case m == nil || f.conf.types[m.Kind]:
			selected = append(selected, items[i])
		default:
			if m.Kind == cryo.KindError {
				if log, ok := f.errorLog.allow(); ok {
					log.With("session", f.id).Warnf("The peer's application reports an error: %q", f.session.Redact(string(m.Payload)))
				}
			}
			f.metrics.filtered.Incr(1, messageTypeName(m.Kind))
			_ = m.Ack() // if the session has ended, nobody waits for it
		}
	}
	return selected
}
