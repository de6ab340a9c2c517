package cryo

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/cryo-connect/cryo-connect/internal/wire"
)

const (
	// maxStreams is how many received streams of a session are announced, or accepted and
	// neither settled nor failed. They hold no data before the first Read.
	maxStreams = 256
	// maxRemembered is how many acknowledged streams are remembered, to acknowledge
	// their TX_FINISH when it comes.
	maxRemembered = 1024
)

// incomingStreams are those that the peer sends on a session. Whoever takes a stream out
// of the table sends its last answer: so the peer gets one, and gets it when the number
// may be used again.
type incomingStreams struct {
	s *Session

	mu         sync.Mutex
	pulls      bool                       // this end has asked to pull
	open       map[uint32]*IncomingStream // neither settled nor failed; at most maxStreams
	announced  []*IncomingStream          // of those, nobody has accepted yet; the oldest first
	changed    chan struct{}              // closed and replaced when a stream is announced or removed, its last answer queued, or a TX_CANCEL acknowledged
	answers    int                        // last answers, of streams that were taken out of open, that are not queued yet
	cancels    []sentCancel               // TX_CANCELs that the peer has not acknowledged; the newest maxStreams
	remembered []uint32                   // acknowledged streams whose TX_FINISH is still to come: they were whole by their size
	since      time.Time                  // when the last of these was acknowledged
}

func newIncomingStreams(s *Session) *incomingStreams {
	return &incomingStreams{s: s, open: make(map[uint32]*IncomingStream), changed: make(chan struct{})}
}

// accept returns an announced stream of one of the names, or a channel that is closed
// when it is worth asking again.
func (in *incomingStreams) accept(names []string) (*IncomingStream, <-chan struct{}) {
	in.mu.Lock()
	defer in.mu.Unlock()
	for i, st := range in.announced {
		if len(names) == 0 || slices.Contains(names, st.name) {
			in.announced = slices.Delete(in.announced, i, i+1)
			return st, nil
		}
	}
	return nil, in.changed
}

// pull is called before TX_FLOW is sent. From then on the streams that announce a size
// are pulled: a pushed one, which may meet TX_FLOW on the way, announces none.
func (in *incomingStreams) pull() {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.pulls = true
}

// start takes TX_START. Reading goroutine.
func (in *incomingStreams) start(f *wire.Frame) {
	name := wire.Anonymous
	if n := len(f.Payload); n > 0 && n <= maxStreamName {
		name = strings.ToValidUTF8(string(f.Payload), "\uFFFD")
	}
	outcome, evicted := in.announce(f, name)
	if evicted != nil {
		in.reject(evicted.tx)
	}
	switch outcome {
	case startRepeated:
		in.s.protocolError(&ProtocolError{Problem: fmt.Sprintf("TX_START for the stream %d, which is open", f.Tx)})
	case startRejected:
		in.reject(f.Tx)
	}
}

// reject cancels a stream that nobody has accepted.
func (in *incomingStreams) reject(tx uint32) {
	in.s.opts.OnReject(in.s, KindStream)
	in.s.cancel(tx)
}

// started is what becomes of a TX_START.
type started int

const (
	startAnnounced started = iota // AcceptStream hands it out
	startRepeated                 // the number is open
	startRejected
)

// announce adds a stream. Where the table is full, it evicts the stream that waits
// longest to be accepted, if that is longer than an open one may be idle.
func (in *incomingStreams) announce(f *wire.Frame, name string) (outcome started, evicted *IncomingStream) {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.forgetLocked(f.Tx) // whatever becomes of this one, it is another stream
	switch {
	case in.open[f.Tx] != nil:
		return startRepeated, nil
	case in.s.sendOnly.Load(), in.s.unsettled.draining.Load(), in.s.isEnding(), max(len(f.Payload), len(name)) > maxStreamName:
		return startRejected, nil
	case len(in.open) == maxStreams:
		if len(in.announced) == 0 || time.Since(in.announced[0].since) <= in.s.opts.StreamIdleTimeout {
			return startRejected, nil
		}
		evicted = in.announced[0]
		in.removeLocked(evicted)
	}
	st := &IncomingStream{
		s: in.s, tx: f.Tx, name: name, size: int64(f.Size), start: f.Ack,
		pull: in.pulls && f.Size >= 0, arrived: make(chan struct{}, 1),
		since: time.Now(), idleTimeout: in.s.opts.StreamIdleTimeout,
	}
	in.open[f.Tx] = st
	in.announced = append(in.announced, st)
	in.changedLocked()
	return startAnnounced, evicted
}

// chunk takes TX_CHUNK; one of a stream that is unknown, cancelled or settled is
// ignored. Reading goroutine.
func (in *incomingStreams) chunk(f *received) {
	st := in.find(f.Tx)
	if st == nil {
		return
	}
	kept := st.chunk(f)
	in.cancelFailed(st)
	if !kept {
		in.s.reportBufferFull()
	}
}

// finish takes TX_FINISH. It holds the mutex while it asks whether the stream is
// acknowledged already: a stream is remembered in the moment in which it is closed.
// Reading goroutine.
func (in *incomingStreams) finish(f *wire.Frame) {
	in.mu.Lock()
	st := in.open[f.Tx]
	var delivered bool
	if st != nil {
		delivered = st.finished(f.Ack)
	} else {
		delivered = in.forgetLocked(f.Tx)
	}
	if delivered {
		in.answers++
	}
	in.mu.Unlock()
	if delivered {
		in.s.out.acknowledge([]uint32{f.Ack})
		in.answered()
	}
	if st != nil {
		in.cancelFailed(st)
	}
}

func (in *incomingStreams) find(tx uint32) *IncomingStream {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.open[tx]
}

// forgetLocked reports whether a stream was remembered.
func (in *incomingStreams) forgetLocked(tx uint32) bool {
	i := slices.Index(in.remembered, tx)
	if i >= 0 {
		in.remembered = slices.Delete(in.remembered, i, i+1)
	}
	return i >= 0
}

// cancelFailed tells the peer to stop a stream that has failed. It no longer counts as
// open then: what came of it may still be read, and its receiver need not settle it.
func (in *incomingStreams) cancelFailed(st *IncomingStream) {
	if !st.hasFailed() {
		return
	}
	in.mu.Lock()
	accepted := !slices.Contains(in.announced, st)
	removed := in.removeToAnswerLocked(st)
	in.mu.Unlock()
	if !removed { // its receiver was faster
		return
	}
	defer in.answered()
	if accepted {
		in.s.cancel(st.tx)
	} else { // it has broken the protocol, and nobody will know it
		in.reject(st.tx)
	}
}

// removeToAnswerLocked is removeLocked for who calls answered once the stream's last answer
// is queued: the end of the session waits for that.
func (in *incomingStreams) removeToAnswerLocked(st *IncomingStream) bool {
	removed := in.removeLocked(st)
	if removed {
		in.answers++
	}
	return removed
}

func (in *incomingStreams) answered() {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.answers--
	in.changedLocked()
}

// removeLocked takes a stream out of the table, and reports whether it was there.
func (in *incomingStreams) removeLocked(st *IncomingStream) bool {
	if in.open[st.tx] != st {
		return false
	}
	delete(in.open, st.tx)
	if i := slices.Index(in.announced, st); i >= 0 {
		in.announced = slices.Delete(in.announced, i, i+1)
	}
	in.changedLocked()
	in.s.limit.reconsider() // what follows is discarded
	return true
}

// settled takes a stream out of the table, and reports whether it was there: answered must be
// called then. Of an acknowledged one, the TX_FINISH that is still to come is acknowledged then, of so many
// streams; of others it stays unanswered.
func (in *incomingStreams) settled(st *IncomingStream) bool {
	in.mu.Lock()
	defer in.mu.Unlock()
	if st.awaitsFinish() {
		if len(in.remembered) == maxRemembered {
			in.remembered = in.remembered[1:]
		}
		in.remembered, in.since = append(in.remembered, st.tx), time.Now()
	}
	return in.removeToAnswerLocked(st)
}

// wants reports whether the chunks of a stream are taken: it is accepted, and has neither
// failed nor been settled.
func (in *incomingStreams) wants(tx uint32) bool {
	st := in.find(tx)
	return st != nil && st.wantsChunks()
}

// end stops what the streams would still do by themselves, at the end of the session.
func (in *incomingStreams) end() {
	in.mu.Lock()
	open := slices.Collect(maps.Values(in.open))
	in.mu.Unlock()
	for _, st := range open {
		st.stopIdle()
	}
}

// refuse rejects the streams that nobody has accepted.
func (in *incomingStreams) refuse() {
	in.mu.Lock()
	waiting := slices.Clone(in.announced)
	for _, st := range waiting {
		in.removeLocked(st)
	}
	in.mu.Unlock()
	for _, st := range waiting {
		in.reject(st.tx)
	}
}

func (in *incomingStreams) changedLocked() {
	close(in.changed)
	in.changed = make(chan struct{})
}

// stop cancels the streams that have not come whole, as nothing more of them is taken. What
// has come can be read, and the cause then.
func (in *incomingStreams) stop(cause error) {
	in.mu.Lock()
	open := slices.Collect(maps.Values(in.open))
	in.mu.Unlock()
	for _, st := range open {
		st.truncate(cause)
		in.cancelFailed(st)
	}
}

// sentCancel is a TX_CANCEL that is not acknowledged.
type sentCancel struct {
	number uint32
	at     time.Time
}

// cancel sends TX_CANCEL, which names the peer's transaction.
func (s *Session) cancel(tx uint32) bool {
	number := s.pend.number()
	s.incoming.cancelling(number) // first: the answer must find it
	return s.out.control(wire.Frame{SID: s.id, Type: wire.TxCancel, Ack: number, Tx: tx})
}

func (in *incomingStreams) cancelling(number uint32) {
	in.mu.Lock()
	defer in.mu.Unlock()
	if len(in.cancels) == maxStreams { // not everybody answers it
		in.cancels = in.cancels[1:]
	}
	in.cancels = append(in.cancels, sentCancel{number, time.Now()})
}

// cancelAcknowledged takes the answer to a number that nobody waits for.
func (in *incomingStreams) cancelAcknowledged(number uint32) {
	in.mu.Lock()
	defer in.mu.Unlock()
	n := len(in.cancels)
	in.cancels = slices.DeleteFunc(in.cancels, func(c sentCancel) bool { return c.number == number })
	if len(in.cancels) < n {
		in.changedLocked()
	}
}

// awaitCancels waits until the peer has acknowledged each TX_CANCEL and sent the TX_FINISH of
// each acknowledged stream, or one of the channels is closed. It waits for half of CloseTimeout
// at most, which begins for each when it was sent or acknowledged: some peers never answer.
func (in *incomingStreams) awaitCancels(enough, ended <-chan struct{}) {
	begin, patience := time.Now(), in.s.opts.CloseTimeout/2
	for {
		changed, last := in.lastCancel()
		if last.After(begin) { // of a stream that was announced meanwhile
			last = begin
		}
		left := time.Until(last.Add(patience))
		if last.IsZero() || left <= 0 {
			return
		}
		timer := time.NewTimer(left)
		select {
		case <-changed:
		case <-timer.C:
		case <-enough:
			return
		case <-ended:
			return
		}
	}
}

// count returns how many streams are announced or open.
func (in *incomingStreams) count() int {
	in.mu.Lock()
	defer in.mu.Unlock()
	return len(in.open)
}

// lastCancel returns when the last TX_CANCEL that is not acknowledged was sent, or the last
// stream acknowledged whose TX_FINISH is to come, zero if there is none, and a channel that is
// closed when it is worth asking again. A last answer that is about to be queued counts as now.
func (in *incomingStreams) lastCancel() (changed <-chan struct{}, at time.Time) {
	in.mu.Lock()
	defer in.mu.Unlock()
	if n := len(in.cancels); n > 0 {
		at = in.cancels[n-1].at
	}
	if len(in.remembered) > 0 && in.since.After(at) {
		at = in.since
	}
	if in.answers > 0 {
		at = time.Now()
	}
	return in.changed, at
}

// awaitSettled waits until no stream is announced or open, and the last answers are queued.
func (in *incomingStreams) awaitSettled(ctx, session context.Context) error {
	for {
		in.mu.Lock()
		changed, open := in.changed, len(in.open)+in.answers
		in.mu.Unlock()
		if session.Err() != nil {
			return context.Cause(session)
		}
		if open == 0 {
			return nil
		}
		select {
		case <-changed:
		case <-session.Done():
		case <-ctx.Done():
			return contextError(ctx)
		}
	}
}

// outgoingStreams are those that this end sends on a session.
type outgoingStreams struct {
	mu     sync.Mutex
	nextTx uint32
	flow   wire.Flow // as the peer has asked for
	open   map[uint32]*OutgoingStream
}

func newOutgoingStreams() *outgoingStreams {
	return &outgoingStreams{open: make(map[uint32]*OutgoingStream)}
}

// add gives a stream its number, and how it has to be sent. It is complete when
// it becomes known: the peer may name a number before it was told.
func (o *outgoingStreams) add(st *OutgoingStream) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for o.open[o.nextTx] != nil {
		o.nextTx++
	}
	st.tx = o.nextTx
	o.nextTx++
	if st.pull = o.flow == wire.FlowPull; st.pull {
		st.fetches = make(chan fetch, maxFetches)
	}
	st.mu.Lock()
	st.unwatch = context.AfterFunc(st.ctx, func() { st.stop(ErrStreamClosed) })
	st.mu.Unlock()
	o.open[st.tx] = st
}

func (o *outgoingStreams) remove(st *OutgoingStream) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.open[st.tx] == st {
		delete(o.open, st.tx)
	}
}

// stopAll ends all streams for a reason.
func (o *outgoingStreams) stopAll(cause error) {
	o.mu.Lock()
	open := slices.Collect(maps.Values(o.open))
	o.mu.Unlock()
	for _, st := range open {
		st.stop(cause)
	}
}

// setFlow counts for the streams that are opened from then on.
func (o *outgoingStreams) setFlow(flow wire.Flow) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.flow = flow
}

// cancelled is the peer's TX_CANCEL. It reports false for a stream of which the peer
// can't know yet. Reading goroutine.
func (o *outgoingStreams) cancelled(tx uint32) bool {
	st := o.find(tx)
	switch {
	case st == nil:
		return true
	case !st.announced():
		return false
	default:
		st.stop(ErrStreamCancelled)
		return true
	}
}

// fetched is the peer's TX_FETCH. Reading goroutine.
func (o *outgoingStreams) fetched(tx, start, end uint32) {
	if st := o.find(tx); st != nil && st.pull {
		select {
		case st.fetches <- fetch{start, end}:
		default:
		}
	}
}

func (o *outgoingStreams) find(tx uint32) *OutgoingStream {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.open[tx]
}
