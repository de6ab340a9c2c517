package plugin

import (
	"cmp"
	"slices"

	"github.com/redpanda-data/benthos/v4/public/service"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// handover is what an input of a listener leaves of a session to the next one when it
// closes: the messages that are not settled, in the order in which they were received,
// and the streams that nothing was read of. What was not yet taken from the session is
// in its own queue.
type handover struct {
	session *cryo.Session
	items   []item
	streams []*cryo.IncomingStream
}

// close stops receiving, and returns what it leaves by session; nothing of it is
// settled any more by this input. The engine calls it when all verdicts are in, or
// after a hard stop: then the pipeline may have delivered some of the messages, and
// whoever gets them next may deliver them again. Either is safe, as none of them is
// acknowledged.
func (r *receiver) close() []*handover {
	r.drain()
	r.stop()
	r.pumps.Wait()
	r.mu.Lock()
	defer r.mu.Unlock()
	r.closed = true
	r.metrics.unacknowledged.close()
	r.metrics.streamsOpen.close()

	left := slices.Concat(r.rest, r.redeliveries.takeAll(), r.abandoned)
	for d := range r.deliveries {
		for i := range d.items {
			d.items[i].acknowledged = d.items[i].acknowledged || d.acknowledged
		}
		left = append(left, d.items...)
	}
	clear(r.deliveries)
	r.rest, r.abandoned = nil, nil

	bySession := make(map[*cryo.Session]*handover)
	of := func(s *cryo.Session) *handover {
		if bySession[s] == nil {
			bySession[s] = &handover{session: s}
		}
		return bySession[s]
	}
	slices.SortStableFunc(left, func(a, b item) int { return cmp.Compare(a.order, b.order) })
	for _, src := range r.sources {
		of(src.session).streams = src.streams
		left = append(left, src.left...) // behind all that was taken of them
	}
	for _, it := range left {
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

// moves reports whether another input can deliver the item. Not an event: the next
// input has events of its own for the sessions that it gets. Nor a part of a stream
// that is cancelled, as one is that was not read to its end.
func (it *item) moves() bool {
	switch of := it.of.(type) {
	case *sessionEvent:
		of.done(it.at, nil)
		return false
	case *scanned:
		if it.acknowledged || !of.transfer.isSettled() {
			return true
		}
		it.reject() // for the memory that it counts
		return false
	default:
		return true
	}
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
