package plugin

import (
	"cmp"
	"slices"

	"github.com/redpanda-data/benthos/v4/public/service"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// handover is the state that a closing input passes on for one session: its unacknowledged
// messages, in the order in which they were received, and its unread streams. Messages that the
// input has not yet received from the session remain in the session's receive buffer.
type handover struct {
	session *cryo.Session
	items   []item
	streams []*cryo.IncomingStream
}

// close stops receiving, and returns a handover for each session that is still in use. Results
// that arrive later are ignored. The engine closes an input after all results have arrived, or
// after a hard stop. In the latter case the pipeline may already have delivered some of the
// messages, which the next input may deliver again.
func (r *receiver) close() []*handover {
	r.drain()
	r.stop()
	r.feeds.Wait()
	r.metrics.streamsOpen.close()
	r.metrics.oldest.close()
	r.metrics.paused.close()
	items := r.queue.close()

	r.mu.Lock()
	defer r.mu.Unlock()
	bySession := make(map[*cryo.Session]*handover)
	handoverOf := func(s *cryo.Session) *handover {
		if bySession[s] == nil {
			bySession[s] = &handover{session: s}
		}
		return bySession[s]
	}
	for _, f := range r.sessions {
		handoverOf(f.session).streams = f.streams
		items = append(items, f.left...) // these were received after the session's items in the queue
	}
	for _, it := range items {
		if it.moveOrReject() {
			h := handoverOf(it.source.session)
			h.items = append(h.items, it)
		}
	}
	handovers := make([]*handover, 0, len(bySession))
	for _, h := range bySession {
		handovers = append(handovers, h)
	}
	// Sessions that have ended come first, because a newer session may have the same id.
	slices.SortStableFunc(handovers, func(a, b *handover) int { return cmp.Compare(ended(b.session), ended(a.session)) })
	return handovers
}

// moveOrReject reports whether another input can deliver the item. If not, it rejects the item.
func (it *item) moveOrReject() bool {
	if it.message != nil || it.owner.movable() || it.owner.stream() != nil && it.acknowledged {
		return true
	}
	it.reject() // releases the item's part of the receive buffer
	return false
}

// reject rejects the messages and streams, and returns how many it has rejected. lost is the
// number of messages that cannot be rejected any more, because they were acknowledged on
// receipt.
func (h *handover) reject() (rejected, lost int) {
	for i := range h.items {
		if h.items[i].acknowledged {
			lost++
		} else {
			h.items[i].reject()
			rejected++
		}
	}
	for _, st := range h.streams {
		_ = st.Close() // fails only if the session has ended
		rejected++
	}
	return rejected, lost
}

// logUndelivered logs how many messages no input will deliver.
func logUndelivered(log *service.Logger, handovers []*handover) {
	undelivered, lost := 0, 0
	for _, h := range handovers {
		undelivered += len(h.streams)
		for i := range h.items {
			if h.items[i].acknowledged {
				lost++
			} else {
				undelivered++
			}
		}
	}
	if lost > 0 {
		log.With("messages", lost).Error("Messages that were acknowledged on receipt may be lost: the pipeline stopped before reporting their results")
	}
	if undelivered > 0 {
		log.With("messages", undelivered).Info("Undelivered messages stay unacknowledged: their senders can send them again")
	}
}

func ended(s *cryo.Session) int {
	if s.Err() != nil {
		return 1
	}
	return 0
}
