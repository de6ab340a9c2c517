package plugin

import (
	"cmp"
	"slices"

	"github.com/redpanda-data/benthos/v4/public/service"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// handover is what an input of a listener leaves of a session to the next one when it
// closes: the messages that are not settled, in the order in which they were received,
// and the streams of which nothing was read. Messages that it has not received from the
// session are still in the session's own queue.
type handover struct {
	session *cryo.Session
	items   []item
	streams []*cryo.IncomingStream
}

// close stops receiving, and returns what it leaves by session; this input settles nothing
// of it any more. The engine calls it after all verdicts, or after a hard stop: then the
// pipeline may have delivered some of the messages, and the next input may deliver them
// again. Either is safe, as none of them is acknowledged.
func (r *receiver) close() []*handover {
	r.drain()
	r.stop()
	r.feeds.Wait()
	r.metrics.streamsOpen.close()
	items := r.queue.close()

	r.mu.Lock()
	defer r.mu.Unlock()
	bySession := make(map[*cryo.Session]*handover)
	of := func(s *cryo.Session) *handover {
		if bySession[s] == nil {
			bySession[s] = &handover{session: s}
		}
		return bySession[s]
	}
	for _, f := range r.sessions {
		of(f.session).streams = f.streams
		items = append(items, f.left...) // received after all that was handed over of the session
	}
	for _, it := range items {
		if it.moves() {
			h := of(it.source.session)
			h.items = append(h.items, it)
		}
	}
	handovers := make([]*handover, 0, len(bySession))
	for _, h := range bySession {
		handovers = append(handovers, h)
	}
	// Of two sessions with the same id the one that has ended comes first.
	slices.SortStableFunc(handovers, func(a, b *handover) int { return cmp.Compare(ended(b.session), ended(a.session)) })
	return handovers
}

// moves reports whether another input can deliver the item, and settles one that it cannot.
func (it *item) moves() bool {
	if it.message != nil || it.of.movable() || it.of.stream() != nil && it.acknowledged {
		return true
	}
	it.reject() // releases what it has reserved
	return false
}

// reject rejects all of it, and reports how many messages were lost that had been
// acknowledged when they were received.
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
		_ = st.Close() // if the session has ended, the sender knows
		rejected++
	}
	return rejected, lost
}

// reportLeft logs what stays unsettled of an input that no other follows.
func reportLeft(log *service.Logger, handovers []*handover) {
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
		log.Errorf("Lost up to %d messages that were acknowledged when they were received: the pipeline has stopped before it was known to have delivered them", lost)
	}
	if undelivered > 0 {
		log.Infof("Up to %d messages in the pipeline were not delivered before the stop and stay unacknowledged: their senders can send them again", undelivered)
	}
}

func ended(s *cryo.Session) int {
	if s.Err() != nil {
		return 1
	}
	return 0
}
