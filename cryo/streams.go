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
	// maxStreams bounds the received streams of a session that are announced, or accepted
	// and neither settled nor failed. A stream has no data before its first Read.
	maxStreams = 256
	// maxRemembered bounds the acknowledged streams that are remembered, to acknowledge
	// their TX_FINISH when it is received.
	maxRemembered = 1024
	// cancelGrace is the time without frames of cancelled streams after which the close frame
	// is sent: cryo-server may acknowledge TX_CANCEL while a last chunk still waits in a loop
	// of 5 ms timers. The loop never ends if the session closes first. On a busy machine these
	// timers are late.
	cancelGrace = 500 * time.Millisecond
)

// incomingStreams is the table of the streams that the peer sends on a session. The goroutine
// that removes a stream from the table sends its last answer, so that the peer receives exactly
// one, and only when it may use the number again.
type incomingStreams struct {
	s *Session

	mu         sync.Mutex
	pulls      bool                       // this end has asked to pull
	open       map[uint32]*IncomingStream // neither settled nor failed; at most maxStreams
	announced  []*IncomingStream          // those of open that are not accepted yet; the oldest first
	changed    chan struct{}              // closed and replaced when a stream is announced or removed, its last answer queued, or a TX_CANCEL acknowledged
	answers    int                        // number of removed streams whose last answer is not queued yet
	cancels    []sentCancel               // unacknowledged TX_CANCELs, at most the newest maxStreams
	quietSince time.Time                  // time of the last acknowledgement of a TX_CANCEL with grace, or chunk of a stream that is not open
	remembered []uint32                   // pulled streams that were acknowledged before their TX_FINISH
	since      time.Time                  // time of the last acknowledgement of a remembered stream
}

func newIncomingStreams(s *Session) *incomingStreams {
	return &incomingStreams{s: s, open: make(map[uint32]*IncomingStream), changed: make(chan struct{})}
}

// accept returns an announced stream with one of the names, or a channel that is closed
// when the announced streams change.
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

// startPulling is called before TX_FLOW is sent. From then on, streams with an announced size
// are pulled: a stream that the peer started to push before it received TX_FLOW announces none.
func (in *incomingStreams) startPulling() {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.pulls = true
}

// handleStart processes TX_START. Reading goroutine.
func (in *incomingStreams) handleStart(f *wire.Frame) {
	name := wire.Anonymous
	if n := len(f.Payload); n > 0 && n <= maxStreamName {
		name = strings.ToValidUTF8(string(f.Payload), "\uFFFD")
	}
	outcome, evicted := in.announce(f, name)
	if outcome == startRejected && max(len(f.Payload), len(name)) > maxStreamName {
		in.s.report("Rejecting a stream: its name is too long", "limit_bytes", maxStreamName)
	}
	if evicted != nil {
		in.reject(evicted.tx)
	}
	switch outcome {
	case startRepeated:
		in.s.protocolError(&ProtocolError{Problem: fmt.Sprintf("TX_START for stream %d, which is already open", f.Tx)})
	case startRejected:
		in.reject(f.Tx)
	}
}

// reject cancels a stream that was not accepted: no chunks of it are expected.
func (in *incomingStreams) reject(tx uint32) {
	in.s.opts.OnReject(in.s, KindStream)
	in.s.sendCancel(tx, false)
}

// startResult is the result of announce.
type startResult int

const (
	startAnnounced startResult = iota // AcceptStream may return it
	startRepeated                     // a stream with the number is open
	startRejected
)

// announce adds a stream. If the table is full, it evicts the oldest stream that is not
// accepted, if that has waited for longer than the stream idle timeout.
func (in *incomingStreams) announce(f *wire.Frame, name string) (outcome startResult, evicted *IncomingStream) {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.forgetLocked(f.Tx) // the number now belongs to this stream
	switch {
	case in.open[f.Tx] != nil:
		return startRepeated, nil
	case in.s.sendOnly.Load(), in.s.unsettled.draining.Load(), in.s.isEnding(), max(len(f.Payload), len(name)) > maxStreamName:
		return startRejected, nil
	case len(in.open) == maxStreams:
		if len(in.announced) == 0 || time.Since(in.announced[0].announcedAt) <= in.s.opts.StreamIdleTimeout {
			return startRejected, nil
		}
		evicted = in.announced[0]
		in.removeLocked(evicted)
	}
	st := &IncomingStream{
		s: in.s, tx: f.Tx, name: name, size: int64(f.Size), startNumber: f.Ack,
		pull: in.pulls && f.Size >= 0, arrived: make(chan struct{}, 1),
		announcedAt: time.Now(), idleTimeout: in.s.opts.StreamIdleTimeout,
	}
	in.open[f.Tx] = st
	in.announced = append(in.announced, st)
	in.changedLocked()
	return startAnnounced, evicted
}

// handleChunk processes TX_CHUNK. Chunks of unknown, cancelled or settled streams are
// ignored. Reading goroutine.
func (in *incomingStreams) handleChunk(f *received) {
	st := in.find(f.Tx)
	if st == nil {
		in.mu.Lock()
		defer in.mu.Unlock()
		in.quietSince = time.Now()
		return
	}
	kept := st.addChunk(f)
	if !in.s.isEnding() { // otherwise Close cancels it, and CloseNow sends nothing more
		in.cancelFailed(st)
	}
	if !kept {
		in.s.reportBufferFull()
	}
}

// handleFinish processes TX_FINISH. It holds the mutex for the whole check, because
// removeSettled removes a stream and remembers it in one step. Reading goroutine.
func (in *incomingStreams) handleFinish(f *wire.Frame) {
	in.mu.Lock()
	st := in.open[f.Tx]
	var delivered bool
	if st != nil {
		delivered = st.handleFinish(f.Ack)
	} else {
		delivered = in.forgetLocked(f.Tx)
	}
	if delivered {
		in.answers++
	}
	in.mu.Unlock()
	if delivered {
		in.s.writer.acknowledge([]uint32{f.Ack})
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

// forgetLocked removes a stream from the remembered ones, and reports whether it was there.
func (in *incomingStreams) forgetLocked(tx uint32) bool {
	i := slices.Index(in.remembered, tx)
	if i >= 0 {
		in.remembered = slices.Delete(in.remembered, i, i+1)
	}
	return i >= 0
}

// cancelFailed sends TX_CANCEL for a stream that has failed, and removes it from the table. Its
// received bytes may still be read, and it need not be settled.
func (in *incomingStreams) cancelFailed(st *IncomingStream) {
	if !st.hasFailed() {
		return
	}
	in.mu.Lock()
	accepted := !slices.Contains(in.announced, st)
	removed := in.removeToAnswerLocked(st)
	in.mu.Unlock()
	if !removed { // settled by the application meanwhile
		return
	}
	defer in.answered()
	if accepted {
		in.s.cancel(st.tx)
	} else { // the application never sees it
		in.reject(st.tx)
	}
}

// removeToAnswerLocked is removeLocked for a caller that calls answered once the stream's last
// answer is queued: the end of the session waits for that.
func (in *incomingStreams) removeToAnswerLocked(st *IncomingStream) bool {
	removed := in.removeLocked(st)
	if removed {
		in.answers++
	}
	return removed
}

// answered counts the last answer of a removed stream as queued.
func (in *incomingStreams) answered() {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.answers--
	in.changedLocked()
}

// removeLocked removes a stream from the table, and reports whether it was there.
func (in *incomingStreams) removeLocked(st *IncomingStream) bool {
	if in.open[st.tx] != st {
		return false
	}
	delete(in.open, st.tx)
	if i := slices.Index(in.announced, st); i >= 0 {
		in.announced = slices.Delete(in.announced, i, i+1)
	}
	in.changedLocked()
	in.s.limit.recheck() // later chunks are discarded
	return true
}

// removeSettled removes a settled stream from the table, and reports whether it was there: the
// caller must then call answered. An acknowledged stream without TX_FINISH is remembered, so that
// its TX_FINISH is acknowledged when it is received; that of a closed stream is never
// acknowledged.
func (in *incomingStreams) removeSettled(st *IncomingStream) bool {
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

// wants reports whether a stream receives chunks: it is accepted, and has neither failed nor
// been settled.
func (in *incomingStreams) wants(tx uint32) bool {
	st := in.find(tx)
	return st != nil && st.wantsChunks()
}

// isAnnounced reports whether a stream is announced and not accepted yet.
func (in *incomingStreams) isAnnounced(tx uint32) bool {
	st := in.find(tx)
	return st != nil && st.isAnnounced()
}

// stopTimers stops the idle timers of all streams, at the end of the session.
func (in *incomingStreams) stopTimers() {
	in.mu.Lock()
	open := slices.Collect(maps.Values(in.open))
	in.mu.Unlock()
	for _, st := range open {
		st.stopIdle()
	}
}

// rejectAnnounced rejects all streams that are not accepted.
func (in *incomingStreams) rejectAnnounced() {
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

// cancelIncomplete cancels the streams that are incomplete. Read returns their received bytes,
// and then the cause.
func (in *incomingStreams) cancelIncomplete(cause error) {
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
	grace  bool // chunks may follow its acknowledgement
}

// cancel sends TX_CANCEL for a stream of the peer whose chunks may still arrive. It returns false
// at the end of the session.
func (s *Session) cancel(tx uint32) bool { return s.sendCancel(tx, true) }

func (s *Session) sendCancel(tx uint32, grace bool) bool {
	number := s.acks.number()
	s.incoming.cancelSent(number, grace) // before it is sent: the answer must be matched
	return s.writer.control(wire.Frame{SID: s.id, Type: wire.TxCancel, Ack: number, Tx: tx})
}

// cancelSent records a TX_CANCEL as unacknowledged.
func (in *incomingStreams) cancelSent(number uint32, grace bool) {
	in.mu.Lock()
	defer in.mu.Unlock()
	if len(in.cancels) == maxStreams { // some peers never acknowledge it
		in.cancels = in.cancels[1:]
	}
	in.cancels = append(in.cancels, sentCancel{number, time.Now(), grace})
}

// cancelAcknowledged processes the answer to a number that is not in the ackTable, which may
// be that of a TX_CANCEL.
func (in *incomingStreams) cancelAcknowledged(number uint32) {
	in.mu.Lock()
	defer in.mu.Unlock()
	i := slices.IndexFunc(in.cancels, func(c sentCancel) bool { return c.number == number })
	if i < 0 {
		return
	}
	if in.cancels[i].grace {
		in.quietSince = time.Now()
	}
	in.cancels = slices.Delete(in.cancels, i, i+1)
	in.changedLocked()
}

// awaitCancels waits until the peer has acknowledged each TX_CANCEL (and, for a stream that was
// accepted, cancelGrace has passed since then), and the TX_FINISH of each acknowledged stream has
// been received. It returns earlier if one of the channels is closed. timeout is that of the close
// handshake; for each frame awaitCancels waits for at most half of it, because some peers never
// answer.
func (in *incomingStreams) awaitCancels(timeout time.Duration, enough, ended <-chan struct{}) {
	begin := time.Now()
	for {
		changed, until := in.cancelledUntil(begin, timeout)
		left := time.Until(until)
		if left <= 0 {
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

// cancelledUntil returns the time until which a wait of awaitCancels that began at begin lasts if
// nothing changes, and a channel that is closed when it may have changed.
func (in *incomingStreams) cancelledUntil(begin time.Time, timeout time.Duration) (changed <-chan struct{}, until time.Time) {
	in.mu.Lock()
	defer in.mu.Unlock()
	at := in.quietSince.Add(cancelGrace - timeout/2)
	if n := len(in.cancels); n > 0 && in.cancels[n-1].at.After(at) {
		at = in.cancels[n-1].at
	}
	if len(in.remembered) > 0 && in.since.After(at) {
		at = in.since
	}
	if in.answers > 0 || at.After(begin) { // sent for a stream that was announced during the wait
		at = begin
	}
	return in.changed, at.Add(timeout / 2)
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

// outgoingStreams is the table of the streams that this end sends on a session.
type outgoingStreams struct {
	mu     sync.Mutex
	nextTx uint32
	flow   wire.Flow // the peer's last TX_FLOW
	open   map[uint32]*OutgoingStream
	empty  emptySignal
}

func newOutgoingStreams() *outgoingStreams {
	return &outgoingStreams{open: make(map[uint32]*OutgoingStream)}
}

// add numbers a stream, sets whether it is pulled, and adds it to the table. The stream is
// fully initialised before it is added, because the peer may send its number at any time.
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

// remove removes a stream from the table.
func (o *outgoingStreams) remove(st *OutgoingStream) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.open[st.tx] == st {
		delete(o.open, st.tx)
	}
	if len(o.open) == 0 {
		o.empty.send()
	}
}

// whenEmpty returns a channel that is closed when no stream is in the table.
func (o *outgoingStreams) whenEmpty() <-chan struct{} {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.empty.wait(len(o.open) == 0)
}

// stopAll ends all streams with a cause.
func (o *outgoingStreams) stopAll(cause error) {
	o.mu.Lock()
	open := slices.Collect(maps.Values(o.open))
	o.mu.Unlock()
	for _, st := range open {
		st.stop(cause)
	}
}

// setFlow sets the flow of the streams that are opened from then on.
func (o *outgoingStreams) setFlow(flow wire.Flow) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.flow = flow
}

// handleCancel processes the peer's TX_CANCEL. It returns false for a stream whose TX_START was
// not sent yet. Reading goroutine.
func (o *outgoingStreams) handleCancel(tx uint32) bool {
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

// handleFetch processes the peer's TX_FETCH. Reading goroutine.
func (o *outgoingStreams) handleFetch(tx, start, end uint32) {
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
