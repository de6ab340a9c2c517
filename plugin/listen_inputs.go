package plugin

import (
	"slices"
	"sync"
	"time"

	"github.com/redpanda-data/benthos/v4/public/service"

	"github.com/cryo-connect/cryo-connect/cryo"
)

const (
	// noInputTimeout is how long the messages of a new listener wait for an input to start
	// before they are rejected.
	noInputTimeout = 5 * time.Second
	// nextInputTimeout is how long messages wait for another input after the last one has
	// closed. It is longer than the engine's shutdown_timeout (20 s by default), within which
	// a pipeline is stopped or replaced.
	nextInputTimeout = time.Minute
)

// listenInputs are the inputs of a listener. Each session is assigned to one input. If there is
// no input, sessions wait for one; after a timeout, their messages are rejected.
type listenInputs struct {
	address  string // for log lines
	log      *service.Logger
	sessions func() []*cryo.Session // returns the connected sessions
	timer    *time.Timer            // calls rejectWithoutInput

	mu        sync.Mutex
	all       []*receiver
	next      int         // number of sessions that were assigned in turn
	waiting   []*handover // sessions without an input
	until     time.Time   // when messages begin to be rejected if no input has started
	rejecting bool        // whether messages are rejected, because until has passed
	closing   bool        // whether the last component has left, so that messages are no longer rejected
}

func newListenInputs(address string, log *service.Logger, sessions func() []*cryo.Session) *listenInputs {
	i := &listenInputs{address: address, log: log, sessions: sessions, until: time.Now().Add(noInputTimeout)}
	i.mu.Lock() // the callback must not run before the field timer is set
	defer i.mu.Unlock()
	i.timer = time.AfterFunc(noInputTimeout, i.rejectWithoutInput)
	return i
}

// assign assigns a new session to an input.
func (i *listenInputs) assign(s *cryo.Session) {
	i.mu.Lock()
	defer i.mu.Unlock()
	switch {
	case slices.ContainsFunc(i.all, func(in *receiver) bool { return in.has(s) }):
		// An input that has started in the meantime already receives from the session.
	case len(i.all) > 0:
		i.inputFor(s).receiveFrom(&handover{session: s})
	case i.rejecting:
		s.SetSendOnly(true)
	default:
		i.waiting = append(i.waiting, &handover{session: s})
	}
}

// inputFor returns the input for a new session. Inputs take turns, but an input that still has
// events of an earlier session with the same id takes precedence, so that the events stay in
// order.
func (i *listenInputs) inputFor(s *cryo.Session) *receiver {
	id := identityOf(s).id
	for _, in := range i.all {
		if in.hasEventsOf(id) {
			return in
		}
	}
	i.next++
	return i.all[(i.next-1)%len(i.all)]
}

// full reports whether there are too many sessions: maxSessions that are connected, and as many
// that have ended but whose messages the pipeline has not received yet.
func (i *listenInputs) full(maxSessions int) bool {
	i.mu.Lock()
	defer i.mu.Unlock()
	n := len(i.waiting)
	for _, in := range i.all {
		n += in.sessionCount()
	}
	return n >= 2*maxSessions
}

// minEndedSessions is how many sessions of one client may have ended and wait for the pipeline, if a
// quarter of max_sessions is less.
const minEndedSessions = 16

// clientFull reports whether an input has too many sessions of one client that have ended but whose
// messages the pipeline has not received yet. They may wait for the client's own quota of
// max_in_flight, and must not deny others; see full.
func (i *listenInputs) clientFull(client string, maxSessions int) bool {
	limit := max(minEndedSessions, maxSessions/4)
	i.mu.Lock()
	defer i.mu.Unlock()
	return slices.ContainsFunc(i.all, func(in *receiver) bool { return in.endedOf(client, limit) >= limit })
}

// add adds an input. The first input receives from all connected sessions, and takes over the
// messages of closed inputs. Later ones receive from new sessions, in turn.
func (i *listenInputs) add(r *receiver) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.all = append(i.all, r)
	i.rejecting = false
	if len(i.all) > 1 {
		return
	}
	for _, h := range i.waiting {
		r.receiveFrom(h)
	}
	i.waiting = nil
	for _, s := range i.sessions() {
		s.SetSendOnly(false)
		r.receiveFrom(&handover{session: s})
	}
}

// remove closes an input, and hands its sessions and their unacknowledged messages over to
// another input. If there is no other, they wait for one; their connections are still read,
// because an output may wait for acknowledgements. If last is true, the listener's last
// component is leaving: the messages are then neither acknowledged nor rejected, so that
// clients can send them to another server.
func (i *listenInputs) remove(r *receiver, last bool) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.all = slices.DeleteFunc(i.all, func(in *receiver) bool { return in == r })
	left := r.close()
	switch {
	case last || i.closing: // other components may have left while this one was leaving
		logUndelivered(r.log, left)
	case len(i.all) > 0:
		for _, h := range left {
			i.all[0].receiveFrom(h)
		}
	default:
		i.waiting = left
		i.until = time.Now().Add(nextInputTimeout)
		i.timer.Reset(nextInputTimeout)
	}
}

// rejectWithoutInput rejects the messages that wait for an input, and those that sessions send
// from now on, if no input has started in time.
func (i *listenInputs) rejectWithoutInput() {
	i.mu.Lock()
	defer i.mu.Unlock()
	if len(i.all) > 0 || i.closing || time.Now().Before(i.until) { // the timer may have been reset while it fired
		return
	}
	i.rejecting = true
	rejected, lost := 0, 0
	for _, h := range i.waiting {
		h.session.SetSendOnly(true) // even if the session has ended, because it may still have buffered messages
		n, m := h.reject()
		rejected, lost = rejected+n, lost+m
	}
	i.waiting = nil
	for _, s := range i.sessions() {
		s.SetSendOnly(true)
	}
	log := i.log.With("address", i.address, "timeout", nextInputTimeout)
	if rejected > 0 {
		log.With("messages", rejected).Warn("Rejected messages of a closed input: no other input has started")
	}
	if lost > 0 {
		log.With("messages", lost).Error("Lost messages that were acknowledged on receipt: no other input has started")
	}
}

// close stops the timer, and logs the messages that remain undelivered.
func (i *listenInputs) close() {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.closing = true
	i.timer.Stop()
	logUndelivered(i.log, i.waiting)
}
