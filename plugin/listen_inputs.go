package plugin

import (
	"slices"
	"sync"
	"time"

	"github.com/redpanda-data/benthos/v4/public/service"

	"github.com/cryo-connect/cryo-connect/cryo"
)

const (
	// noInputPatience is how long messages wait for an input of the same
	// listener to start before they are rejected.
	noInputPatience = 5 * time.Second
	// nextInputPatience is how long they wait for another input when the last one
	// has closed: while its pipeline is replaced, or stops for good, which takes the
	// engine's shutdown_timeout (20 s by default) at most.
	nextInputPatience = time.Minute
)

// listenInputs are the inputs of a listener. They share its sessions: each session has one input,
// and waits, or is rejected what it sends, while there is none.
type listenInputs struct {
	address  string // for log lines
	log      *service.Logger
	sessions func() []*cryo.Session // those that are connected
	patience *time.Timer            // runs rejectWithoutInput

	mu        sync.Mutex
	all       []*receiver
	next      int         // index of the input that gets the next session, modulo their number
	waiting   []*handover // for an input …
	until     time.Time   // … to start
	rejecting bool        // there was no input until then: messages are rejected
	closing   bool        // the last component has left: nothing is rejected any more
}

func newListenInputs(address string, log *service.Logger, sessions func() []*cryo.Session) *listenInputs {
	i := &listenInputs{address: address, log: log, sessions: sessions, until: time.Now().Add(noInputPatience)}
	i.mu.Lock() // the timer is not set before it can run
	defer i.mu.Unlock()
	i.patience = time.AfterFunc(noInputPatience, i.rejectWithoutInput)
	return i
}

// assign gives a new session an input.
func (i *listenInputs) assign(s *cryo.Session) {
	i.mu.Lock()
	defer i.mu.Unlock()
	switch {
	case slices.ContainsFunc(i.all, func(in *receiver) bool { return in.has(s) }):
		// An input that has started meanwhile has found it.
	case len(i.all) > 0:
		i.inputFor(s).receiveFrom(&handover{session: s})
	case i.rejecting:
		s.SetSendOnly(true)
	default:
		i.waiting = append(i.waiting, &handover{session: s})
	}
}

// inputFor returns the inputs in turn, unless one has yet to report the session that this one
// has taken over.
func (i *listenInputs) inputFor(s *cryo.Session) *receiver {
	id := identityOf(s).id
	for _, in := range i.all {
		if in.follows(id) {
			return in
		}
	}
	i.next++
	return i.all[(i.next-1)%len(i.all)]
}

// full reports whether there are as many sessions as there may be: those that are connected,
// and as many again that have ended, with messages that the pipeline has not received yet.
func (i *listenInputs) full(maxSessions int) bool {
	i.mu.Lock()
	defer i.mu.Unlock()
	n := len(i.waiting)
	for _, in := range i.all {
		n += in.keeps()
	}
	return n >= 2*maxSessions
}

// add lets an input receive: the first from all sessions that are connected, and what others
// have left; later ones from their part of those that connect.
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

// remove closes an input and hands its sessions, with all that is unacknowledged of them, to
// another. Without one they wait, and are read on, which acknowledgements for an output need. With
// the last component nothing is sent: a client may send again, to another server, what it saw
// neither acknowledged nor rejected.
func (i *listenInputs) remove(r *receiver, last bool) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.all = slices.DeleteFunc(i.all, func(in *receiver) bool { return in == r })
	left := r.close()
	switch {
	case last:
		reportLeft(r.log, left)
	case len(i.all) > 0:
		for _, h := range left {
			i.all[0].receiveFrom(h)
		}
	default:
		i.waiting = left
		i.until = time.Now().Add(nextInputPatience)
		i.patience.Reset(nextInputPatience)
	}
}

// rejectWithoutInput rejects what sessions have sent, and what they send from now on.
func (i *listenInputs) rejectWithoutInput() {
	i.mu.Lock()
	defer i.mu.Unlock()
	if len(i.all) > 0 || i.closing || time.Now().Before(i.until) { // an earlier timer may fire late
		return
	}
	i.rejecting = true
	rejected, lost := 0, 0
	for _, h := range i.waiting {
		h.session.SetSendOnly(true) // one that has ended may have left messages
		n, m := h.reject()
		rejected, lost = rejected+n, lost+m
	}
	i.waiting = nil
	for _, s := range i.sessions() {
		s.SetSendOnly(true)
	}
	if rejected > 0 {
		i.log.Warnf("Rejected %d messages that an input on %s has left: no other has followed it for %v", rejected, i.address, nextInputPatience)
	}
	if lost > 0 {
		i.log.Errorf("Lost %d messages that were acknowledged when they were received: no input on %s has followed theirs for %v", lost, i.address, nextInputPatience)
	}
}

// close ends the waits for an input.
func (i *listenInputs) close() {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.closing = true
	i.patience.Stop()
	reportLeft(i.log, i.waiting)
}
