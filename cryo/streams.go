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
	// maxAnnounced is how many streams wait to be accepted at most; more are
	// cancelled. They hold no data: the sender waits too.
	maxAnnounced = 256
	// maxRemembered is how many acknowledged streams are remembered, to acknowledge
	// their TX_FINISH when it comes.
	maxRemembered = 1024
)

// Defaults of [StreamLimits].
const (
	DefaultMaxOpenStreams    = 16
	DefaultStreamIdleTimeout = 60 * time.Second
)

// StreamLimits bound what a session's received streams may cost. A zero value
// means its default.
type StreamLimits struct {
	// MaxOpenStreams bounds the streams that are accepted and not settled. A
	// failed one no longer counts once Read has returned its error. Default 16.
	MaxOpenStreams int
	// MaxStreamBytes cancels a stream that is longer. Default: any length is
	// taken, for what has been read is no longer held here.
	MaxStreamBytes int64
	// StreamIdleTimeout cancels an open stream of which nothing came for so
	// long, empty chunks aside. Time does not count while bytes of it wait to be
	// read, or reading is paused. Default 60 s.
	StreamIdleTimeout time.Duration
}

func (l StreamLimits) withDefaults() StreamLimits {
	if l.MaxOpenStreams <= 0 {
		l.MaxOpenStreams = DefaultMaxOpenStreams
	}
	if l.StreamIdleTimeout <= 0 {
		l.StreamIdleTimeout = DefaultStreamIdleTimeout
	}
	return l
}

// LimitStreams sets other limits for the streams that are accepted from then on.
func (s *Session) LimitStreams(limits StreamLimits) {
	s.incoming.mu.Lock()
	defer s.incoming.mu.Unlock()
	s.incoming.limits = limits.withDefaults()
	s.incoming.changedLocked()
}

// incomingStreams are those that the peer sends on a session.
type incomingStreams struct {
	s *Session

	mu         sync.Mutex
	limits     StreamLimits
	pulls      bool // this end has asked to pull
	open       map[uint32]*IncomingStream
	announced  []*IncomingStream // of those, nobody has accepted yet
	slots      int               // in use by streams that are accepted, and neither settled nor failed
	changed    chan struct{}     // closed and replaced when a stream may be accepted
	remembered []uint32          // acknowledged streams whose TX_FINISH is still to come: they were whole by their size
}

func newIncomingStreams(s *Session) *incomingStreams {
	return &incomingStreams{s: s, limits: s.opts.StreamLimits, open: make(map[uint32]*IncomingStream), changed: make(chan struct{})}
}

// accept gives an announced stream of one of the names and acquires a slot for
// it, or a channel that is closed when it is worth asking again.
func (in *incomingStreams) accept(names []string) (*IncomingStream, <-chan struct{}) {
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.slots < in.limits.MaxOpenStreams {
		for i, st := range in.announced {
			if len(names) == 0 || slices.Contains(names, st.name) {
				in.announced = slices.Delete(in.announced, i, i+1)
				in.slots++
				st.slot = true
				st.limit(in.limits)
				return st, nil
			}
		}
	}
	return nil, in.changed
}

func (in *incomingStreams) changedLocked() {
	close(in.changed)
	in.changed = make(chan struct{})
}

// pull is said before TX_FLOW is sent. From then on the streams that announce a
// size are pulled, also those that meet a later TX_FLOW on their way: a pushed
// one announces none.
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
	switch in.announce(f, name) {
	case startRepeated:
		in.s.protocolError(&ProtocolError{Problem: fmt.Sprintf("TX_START for the stream %d, which is open", f.Tx)})
	case startRefused:
		in.s.opts.OnRefused(KindStream)
		in.s.cancel(f.Tx)
	}
}

// started is what becomes of a TX_START.
type started int

const (
	startAnnounced started = iota // AcceptStream hands it out
	startRepeated                 // the number is open
	startRefused
)

func (in *incomingStreams) announce(f *wire.Frame, name string) started {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.forgetLocked(f.Tx) // whatever becomes of this one, it is another stream
	switch {
	case in.open[f.Tx] != nil:
		return startRepeated
	case in.s.refusing.Load(), len(in.announced) >= maxAnnounced, max(len(f.Payload), len(name)) > maxStreamName:
		return startRefused
	}
	st := &IncomingStream{
		s: in.s, tx: f.Tx, name: name, size: int64(f.Size), start: f.Ack,
		pull: in.pulls && f.Size >= 0, arrived: make(chan struct{}, 1),
	}
	in.open[f.Tx] = st
	in.announced = append(in.announced, st)
	in.changedLocked()
	return startAnnounced
}

// chunk takes TX_CHUNK; one of a stream that is unknown, cancelled or settled is
// ignored. Reading goroutine.
func (in *incomingStreams) chunk(f *wire.Frame) {
	if st := in.find(f.Tx); st != nil && !st.chunk(f) {
		in.s.reportNoRoom()
	}
}

// finish takes TX_FINISH. Reading goroutine.
func (in *incomingStreams) finish(f *wire.Frame) {
	if in.finished(f) {
		in.s.out.acknowledge([]uint32{f.Ack})
	}
}

// finished reports whether the stream of a TX_FINISH is acknowledged already. It holds
// the mutex all the time: a stream is remembered in the moment in which it is closed.
func (in *incomingStreams) finished(f *wire.Frame) bool {
	in.mu.Lock()
	defer in.mu.Unlock()
	if st := in.open[f.Tx]; st != nil {
		return st.finished(f.Ack)
	}
	return in.forgetLocked(f.Tx)
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

// failed releases the slot of a stream that the peer was told to stop, when Read has
// returned its error: its receiver need not settle it.
func (in *incomingStreams) failed(st *IncomingStream) {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.removeLocked(st)
}

// removeLocked takes a stream out of the tables and releases its slot, once.
func (in *incomingStreams) removeLocked(st *IncomingStream) {
	if in.open[st.tx] == st {
		delete(in.open, st.tx)
	}
	if i := slices.Index(in.announced, st); i >= 0 {
		in.announced = slices.Delete(in.announced, i, i+1)
	}
	if st.slot {
		st.slot = false
		in.slots--
		in.changedLocked()
	}
	if in.s.refusing.Load() {
		in.s.budget.wake() // what follows may be discarded now
	}
}

// settled releases the stream's slot. Of an acknowledged one, the TX_FINISH that is still
// to come is acknowledged then, of so many streams; of others it stays unanswered.
func (in *incomingStreams) settled(st *IncomingStream) {
	in.mu.Lock()
	defer in.mu.Unlock()
	if st.awaitsFinish() {
		if len(in.remembered) == maxRemembered {
			in.remembered = in.remembered[1:]
		}
		in.remembered = append(in.remembered, st.tx)
	}
	in.removeLocked(st)
}

// holds tells whether chunks may be kept: a stream is accepted and not settled.
func (in *incomingStreams) holds() bool {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.slots > 0
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
	in.mu.Unlock()
	for _, st := range waiting {
		in.s.opts.OnRefused(KindStream)
		_ = st.Close() // after the end of the session nobody hears it
	}
}

// cancel says TX_CANCEL, which names the peer's transaction.
func (s *Session) cancel(tx uint32) bool {
	return s.out.control(wire.Frame{SID: s.id, Type: wire.TxCancel, Ack: s.pend.number(), Tx: tx})
}

// outgoingStreams are those that this end sends on a session.
type outgoingStreams struct {
	mu     sync.Mutex
	nextTx uint32
	flow   Flow // as the peer has asked for
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
func (o *outgoingStreams) setFlow(flow Flow) {
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
