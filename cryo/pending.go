package cryo

import (
	"sync"
	"sync/atomic"
)

// Our own numbers stay within one of two ranges of 2^30, so that they meet
// neither each other's nor those of the published peers, which start at 0: an
// ERROR that carries one of our numbers can then only be a refusal (protocol,
// "ERROR"). Each session starts at another place in its range, so that an answer
// that was meant for an older connection of the same session meets no frame.
const (
	dialingNumbers   uint32 = 0x40000000
	listeningNumbers uint32 = 0xC0000000
	numberMask       uint32 = 1<<30 - 1
)

// sendBatch is one wait for a batch of acknowledgements.
type sendBatch struct {
	done     chan struct{}    // closed when left is 0
	progress []atomic.Uint32  // by index: the bits below
	one      [1]atomic.Uint32 // progress of a batch of one frame

	// Guarded by the pending's mutex until done is closed.
	numbers []uint32  // by index
	first   [1]uint32 // numbers of a batch of one frame
	left    int       // frames not settled yet
	errs    []error   // by index; nil until one fails

	backlog backlog
}

// The progress of a frame. It is settled when it is written and answered, whichever
// comes second: its payload's memory is in use until then.
const (
	frameSending  uint32 = 1 << iota // the peer may have all of it though it is not written
	frameWritten                     // its payload's memory is not in use any more
	frameAnswered                    // before it was written
)

func newSendBatch(size int) *sendBatch {
	b := &sendBatch{done: make(chan struct{}), left: size}
	if size == 1 {
		b.progress, b.numbers = b.one[:], b.first[:]
	} else {
		b.progress, b.numbers = make([]atomic.Uint32, size), make([]uint32, size)
	}
	return b
}

func (b *sendBatch) fail(i int, err error) {
	if b.errs == nil {
		b.errs = make([]error, len(b.progress))
	}
	b.errs[i] = err
}

func (b *sendBatch) settle(i int, err error) {
	if err != nil {
		b.fail(i, err)
	}
	if b.left--; b.left == 0 {
		close(b.done)
	}
}

// pending numbers this end's acknowledged frames and knows who waits for which. A
// number has its place in a table, by its last bits, and is passed over while another
// one has that: a map in its stead made outputs a tenth slower.
type pending struct {
	mu      sync.Mutex
	base    uint32
	first   uint32              // offset of the first number within the range
	next    uint32              // offset of the next number behind the first
	wrapped bool                // all numbers of the range were used once
	table   []waiter            // its size is a power of two, or 0; at most half of it is taken
	waiting int                 // taken places
	given   map[uint32]struct{} // numbers that were given up: what comes for them is late; nil is none
	visited int                 // entries that abandon has looked at
	ended   error               // set at the end of the session: nobody can wait any more
}

// The table's sizes: when it is made, and when it is empty and kept nevertheless.
const (
	minTable     = 4
	maxIdleTable = 128
)

// maxGivenUp bounds the numbers that are remembered as given up. Beyond it they
// are forgotten, all at once: they are for counting only.
const maxGivenUp = 16 << 10

// waiter is a place in the table; a free one has no batch.
type waiter struct {
	batch  *sendBatch
	index  int // in the batch
	number uint32
}

func newPending(base, first uint32) *pending { return &pending{base: base, first: first} }

func (p *pending) place(number uint32) *waiter { return &p.table[int(number)&(len(p.table)-1)] }

// number takes a number that nobody waits for.
func (p *pending) number() uint32 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.numberLocked()
}

func (p *pending) numberLocked() uint32 {
	for {
		n := p.base | (p.first+p.next)&numberMask
		p.next = (p.next + 1) & numberMask
		p.wrapped = p.wrapped || p.next == 0
		if len(p.table) == 0 || p.place(n).batch == nil {
			return n
		}
	}
}

// register numbers the frames of a batch, calling assign for each, and makes
// their acknowledgements awaited.
func (p *pending) register(size int, assign func(i int, number uint32)) (*sendBatch, error) {
	b := newSendBatch(size)
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ended != nil {
		return nil, p.ended
	}
	p.growLocked(size)
	for i := range size {
		n := p.numberLocked()
		*p.place(n) = waiter{b, i, n}
		b.numbers[i] = n
		assign(i, n)
	}
	p.waiting += size
	return b, nil
}

// growLocked makes room for so many more.
func (p *pending) growLocked(n int) {
	size := max(len(p.table), minTable)
	for size < 2*(p.waiting+n) {
		size *= 2
	}
	if size == len(p.table) {
		return
	}
	old := p.table
	p.table = make([]waiter, size)
	for _, w := range old {
		if w.batch != nil {
			*p.place(w.number) = w
		}
	}
}

// outcome is that of a peer's answer to one of our numbers.
type outcome int

const (
	answerUnknown outcome = iota // nobody waits for the number
	answerTaken                  // the wait ends, now or when the frame is written
	answerEarly                  // the frame was not sent yet
)

// answer takes the peer's answer to a number: nil is its ACK.
func (p *pending) answer(number uint32, err error) outcome {
	p.mu.Lock()
	defer p.mu.Unlock()
	w := p.findLocked(number)
	if w == nil {
		return answerUnknown
	}
	progress := &w.batch.progress[w.index]
	switch before := progress.Load(); {
	case before == 0:
		return answerEarly
	case before&frameWritten != 0:
		p.settleOneLocked(w, err)
	case before&frameAnswered == 0: // the first answer counts
		if err != nil {
			w.batch.fail(w.index, err)
		}
		if progress.Or(frameAnswered)&frameWritten != 0 { // by now
			p.settleOneLocked(w, nil)
		}
	}
	return answerTaken
}

// written ends the wait for a frame that was answered before it was written, unless it
// was given up meanwhile.
func (p *pending) written(number uint32, b *sendBatch) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if w := p.findLocked(number); w != nil && w.batch == b {
		p.settleOneLocked(w, nil)
	}
}

// settle ends the wait for one number, whatever has become of its frame. It reports
// whether anybody waited.
func (p *pending) settle(number uint32, err error) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	w := p.findLocked(number)
	if w == nil {
		return false
	}
	p.settleOneLocked(w, err)
	return true
}

// findLocked returns who waits for a number, or nil.
func (p *pending) findLocked(number uint32) *waiter {
	if p.waiting == 0 {
		return nil
	}
	w := p.place(number)
	if w.batch == nil || w.number != number {
		return nil
	}
	return w
}

func (p *pending) settleLocked(w *waiter, err error) {
	w.batch.settle(w.index, err)
	*w = waiter{}
	p.waiting--
}

// settleOneLocked is settleLocked, and gives back a large table that is empty.
func (p *pending) settleOneLocked(w *waiter, err error) {
	p.settleLocked(w, err)
	if p.waiting == 0 && len(p.table) > maxIdleTable {
		p.table = nil
	}
}

// awaited tells whether anybody waits for an acknowledgement.
func (p *pending) awaited() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.waiting > 0
}

// issued tells whether a number is one of ours, awaited or not. It stays true
// after a time-out, so a late ERROR is still known as a refusal.
func (p *pending) issued(number uint32) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return number&^numberMask == p.base && (p.wrapped || (number-p.first)&numberMask < p.next)
}

// abandon settles what is left of a batch with err.
func (p *pending) abandon(b *sendBatch, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, number := range b.numbers {
		p.visited++
		if w := p.findLocked(number); w != nil && w.batch == b {
			p.giveUpLocked(number)
			p.settleLocked(w, err)
		}
	}
}

func (p *pending) giveUpLocked(number uint32) {
	if p.given == nil || len(p.given) == maxGivenUp {
		p.given = make(map[uint32]struct{})
	}
	p.given[number] = struct{}{}
}

// late reports whether a number was given up, once.
func (p *pending) late(number uint32) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	_, ok := p.given[number]
	delete(p.given, number)
	return ok
}

// end settles all that is left with err, and all that comes later at once.
func (p *pending) end(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.ended = err
	for i := range p.table {
		if w := &p.table[i]; w.batch != nil {
			p.settleLocked(w, err)
		}
	}
}
