package cryo

import (
	"sync"
	"sync/atomic"

	"github.com/cryo-connect/cryo-connect/internal/wire"
)

// Our own numbers stay within one of two ranges of 2^30, so that they meet
// neither each other's nor those of the published peers, which start at 0: an
// ERROR that carries one of our numbers can then only be a rejection (protocol,
// "ERROR"). Each session starts at a random number of its range, so that an answer
// to an older connection of the same session matches no frame.
const (
	dialingNumbers   uint32 = 0x40000000
	listeningNumbers uint32 = 0xC0000000
	numberMask       uint32 = 1<<30 - 1
)

// call is a wait for the answers to its frames. Each frame must leave both the writer,
// which releases it, and the ackTable, which completes it. The last of these closes done.
type call struct {
	frames    []outFrame
	remaining atomic.Int64 // releases and completions still to come
	done      chan struct{}
	errs      []error     // by outFrame.index; nil without an error; guarded by the ackTable's mutex
	one       [1]outFrame // memory of frames, if there is one
}

// init prepares a call for this number of frames, which the caller fills in.
func (c *call) init(frames int) {
	if frames == 1 {
		c.frames = c.one[:]
	} else {
		c.frames = make([]outFrame, frames)
	}
	for i := range c.frames {
		c.frames[i].call, c.frames[i].index = c, i
	}
	c.done = make(chan struct{})
	c.remaining.Store(2 * int64(frames))
	if frames == 0 {
		close(c.done)
	}
}

// newCall returns a call of one frame.
func newCall(f wire.Frame) *call {
	c := &call{}
	c.init(1)
	c.frames[0].Frame = f
	return c
}

// leave counts a release or a completion.
func (c *call) leave() {
	if c.remaining.Add(-1) == 0 {
		close(c.done)
	}
}

// outFrame is a frame of a call, or a stream's chunk.
type outFrame struct {
	wire.Frame
	call   *call         // nil for a chunk, which is never answered
	index  int           // position in call.errs
	window *window       // send window of a chunk's stream; nil for other frames
	state  atomic.Uint32 // the bits below, which are set and never cleared
}

const (
	frameDequeued uint32 = 1 << iota // the writer has begun to write it: the peer may have all of it
	frameReleased                    // it has left the writer: its payload is no longer in use
	frameWritten                     // … because its last byte was copied or written
	frameAnswered                    // the peer has acknowledged or rejected it; a rejection is in call.errs
)

func (f *outFrame) is(bits uint32) bool { return f.state.Load()&bits != 0 }

// ackTable numbers the frames that this end sends and the peer acknowledges, and finds the
// frame that an answer is for. A frame is in the table from its registration until it is
// complete: when it is both written and answered, or its call is cancelled, or the session
// ends. The last bits of a number select its slot; a number is skipped while its slot is in
// use: see docs/development/performance.md, "Design notes".
//
// Lock order: a stream's mutex may be held while this one is locked; the writer's must not
// be.
type ackTable struct {
	mu       sync.Mutex
	base     uint32
	first    uint32      // offset of the first number within the range
	next     uint32      // offset of the next number from the first
	wrapped  bool        // all numbers of the range were used once
	slots    []*outFrame // length 0 or a power of two; at most half are not nil
	waiting  int         // number of slots that are not nil
	empty    emptySignal
	timedOut map[uint32]struct{} // numbers of cancelled calls, whose answers are late; may be nil
	ended    error               // the session's cause of end; nothing is registered once it is set
}

const (
	minSlots     = 4   // size of the smallest table
	maxIdleSlots = 128 // largest size that an empty table keeps
)

// maxTimedOut bounds the remembered numbers of cancelled calls. When it is reached, all of
// them are forgotten: they only serve to count late answers.
const maxTimedOut = 16 << 10

func newAckTable(base, first uint32) *ackTable { return &ackTable{base: base, first: first} }

func (t *ackTable) slot(number uint32) **outFrame { return &t.slots[int(number)&(len(t.slots)-1)] }

// number returns a number for a frame that is not in the table.
func (t *ackTable) number() uint32 {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.numberLocked()
}

func (t *ackTable) numberLocked() uint32 {
	for {
		n := t.base | (t.first+t.next)&numberMask
		t.next = (t.next + 1) & numberMask
		t.wrapped = t.wrapped || t.next == 0
		if len(t.slots) == 0 || *t.slot(n) == nil {
			return n
		}
	}
}

// register numbers the frames of a call and adds them. After the end of the session they are
// completed with its cause instead.
func (t *ackTable) register(c *call) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.ended != nil {
		for i := range c.frames {
			t.failLocked(&c.frames[i], t.ended)
			c.leave()
		}
		return
	}
	t.growLocked(len(c.frames))
	for i := range c.frames {
		f := &c.frames[i]
		f.Ack = t.numberLocked()
		*t.slot(f.Ack) = f
	}
	t.waiting += len(c.frames)
}

// growLocked makes slots for n more frames.
func (t *ackTable) growLocked(n int) {
	size := max(len(t.slots), minSlots)
	for size < 2*(t.waiting+n) {
		size *= 2
	}
	if size == len(t.slots) {
		return
	}
	old := t.slots
	t.slots = make([]*outFrame, size)
	for _, f := range old {
		if f != nil {
			*t.slot(f.Ack) = f
		}
	}
}

// answerResult is the result of matching a peer's answer to a frame.
type answerResult int

const (
	answerForeign   answerResult = iota // the number was not assigned by this end
	answerUnknown                       // the number is ours, but not in the table
	answerLate                          // the number's call was cancelled; returned once a number
	answerAccepted                      // the frame is complete, now or once it is written
	answerRepeated                      // the frame was answered before: only the first answer counts
	answerPremature                     // the frame was not sent yet
)

// answer records the peer's answer to a number: its ACK if err is nil, else a rejection.
func (t *ackTable) answer(number uint32, err error) answerResult {
	t.mu.Lock()
	defer t.mu.Unlock()
	f := t.findLocked(number)
	switch {
	case f == nil:
		return t.unmatchedLocked(number)
	case !f.is(frameDequeued):
		return answerPremature
	case f.is(frameAnswered):
		return answerRepeated
	}
	t.failLocked(f, err)
	if f.state.Or(frameAnswered)&frameWritten != 0 {
		t.completeLocked(f, nil)
	}
	return answerAccepted
}

func (t *ackTable) unmatchedLocked(number uint32) answerResult {
	if _, late := t.timedOut[number]; late {
		delete(t.timedOut, number)
		return answerLate
	}
	if t.issuedLocked(number) {
		return answerUnknown
	}
	return answerForeign
}

// issued reports whether a number was assigned by this end, in the table or not: an ERROR with it is
// an answer.
func (t *ackTable) issued(number uint32) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.issuedLocked(number)
}

func (t *ackTable) issuedLocked(number uint32) bool {
	return number&^numberMask == t.base && (t.wrapped || (number-t.first)&numberMask < t.next)
}

// released is called once for each frame, when it has left the writer, written or dropped.
// If it is dropped, the caller may hold the writer's mutex.
func (t *ackTable) released(f *outFrame, written bool) {
	size := len(f.Payload)
	f.Payload = nil // not in use any more, long before a large call is done
	if !written {
		f.state.Or(frameReleased)
	} else if f.state.Or(frameReleased|frameWritten)&frameAnswered != 0 {
		t.complete(f)
	}
	if f.window != nil {
		f.window.release(size)
	}
	if f.call != nil {
		f.call.leave()
	}
}

// drop releases frames that the writer does not queue.
func (t *ackTable) drop(frames []outFrame) {
	for i := range frames {
		t.released(&frames[i], false)
	}
}

// complete removes a frame that was answered before it was written, unless its call was
// cancelled meanwhile.
func (t *ackTable) complete(f *outFrame) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.findLocked(f.Ack) == f {
		t.completeLocked(f, nil)
	}
}

// findLocked returns the frame that a number belongs to, or nil.
func (t *ackTable) findLocked(number uint32) *outFrame {
	if t.waiting == 0 {
		return nil
	}
	f := *t.slot(number)
	if f == nil || f.Ack != number {
		return nil
	}
	return f
}

// completeLocked removes a frame. A large table is released when it becomes empty.
func (t *ackTable) completeLocked(f *outFrame, err error) {
	t.failLocked(f, err)
	*t.slot(f.Ack) = nil
	if t.waiting--; t.waiting == 0 {
		t.emptiedLocked()
	}
	f.call.leave()
}

func (t *ackTable) emptiedLocked() {
	if len(t.slots) > maxIdleSlots {
		t.slots = nil
	}
	t.empty.send()
}

// whenEmpty returns a channel that is closed when no frame is in the table.
func (t *ackTable) whenEmpty() <-chan struct{} {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.empty.wait(t.waiting == 0)
}

// emptySignal reports that a table is empty. The table's mutex guards it.
type emptySignal struct{ waiting chan struct{} } // nil while nothing waits

// wait returns a channel that is closed by the next send, or now if the table is empty already.
func (e *emptySignal) wait(empty bool) <-chan struct{} {
	if e.waiting == nil {
		e.waiting = make(chan struct{})
	}
	waiting := e.waiting
	if empty {
		e.send()
	}
	return waiting
}

// send must be called when the table becomes empty.
func (e *emptySignal) send() {
	if e.waiting != nil {
		close(e.waiting)
		e.waiting = nil
	}
}

// failLocked records the error of a frame; nil is ignored.
func (t *ackTable) failLocked(f *outFrame, err error) {
	if err == nil {
		return
	}
	if f.call.errs == nil {
		f.call.errs = make([]error, len(f.call.frames))
	}
	f.call.errs[f.index] = err
}

// cancel completes the remaining frames of a call with err.
func (t *ackTable) cancel(c *call, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for i := range c.frames {
		f := &c.frames[i]
		if t.findLocked(f.Ack) != f {
			continue
		}
		if t.timedOut == nil || len(t.timedOut) == maxTimedOut {
			t.timedOut = make(map[uint32]struct{})
		}
		t.timedOut[f.Ack] = struct{}{}
		t.completeLocked(f, err)
	}
}

// errors returns the errors of a call whose frames are all complete, by index; nil if there
// are none.
func (t *ackTable) errors(c *call) []error {
	t.mu.Lock()
	defer t.mu.Unlock()
	return c.errs
}

// count returns the number of unanswered frames.
func (t *ackTable) count() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.waiting
}

// hasWaiters reports whether a caller waits for an answer.
func (t *ackTable) hasWaiters() bool { return t.count() > 0 }

// end completes all frames with err, and those that are registered later.
func (t *ackTable) end(err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.ended = err
	for _, f := range t.slots {
		if f != nil {
			t.completeLocked(f, err)
		}
	}
}
