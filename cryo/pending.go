package cryo

import "sync"

// Our own numbers stay within one of two ranges of 2^30, so that they meet
// neither each other's nor those of the published peers, which start at 0: an
// ERROR that carries one of our numbers can then only be a refusal (protocol,
// "ERROR").
const (
	dialingNumbers   uint32 = 0x40000000
	listeningNumbers uint32 = 0xC0000000
	numberMask       uint32 = 1<<30 - 1
)

// sendBatch is one wait for a batch of acknowledgements.
type sendBatch struct {
	done chan struct{} // closed when left is 0

	// Guarded by the pending's mutex until done is closed.
	left int     // frames not settled yet
	errs []error // by index; nil until one fails
}

func (b *sendBatch) settle(i, size int, err error) {
	if err != nil {
		if b.errs == nil {
			b.errs = make([]error, size)
		}
		b.errs[i] = err
	}
	if b.left--; b.left == 0 {
		close(b.done)
	}
}

// pending numbers this end's acknowledged frames and knows who waits for which.
type pending struct {
	mu      sync.Mutex
	base    uint32
	next    uint32 // offset of the next number within the range
	wrapped bool   // all numbers of the range were used once
	waiting map[uint32]waiter
	most    int                 // waited at once since the map was made
	given   map[uint32]struct{} // numbers that were given up: what comes for them is late; nil is none
	ended   error               // set at the end of the session: nobody can wait any more
}

// maxIdleWaiting bounds the numbers for which an empty map keeps its room.
const maxIdleWaiting = 128

// maxGivenUp bounds the numbers that are remembered as given up. Beyond it they
// are forgotten, all at once: they are for counting only.
const maxGivenUp = 16 << 10

type waiter struct {
	batch       *sendBatch
	index, size int
}

func newPending(base uint32) *pending {
	return &pending{base: base, waiting: make(map[uint32]waiter)}
}

// number takes a number that nobody waits for.
func (p *pending) number() uint32 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.numberLocked()
}

func (p *pending) numberLocked() uint32 {
	for {
		n := p.base | p.next
		p.next = (p.next + 1) & numberMask
		p.wrapped = p.wrapped || p.next == 0
		if _, taken := p.waiting[n]; !taken {
			return n
		}
	}
}

// register numbers the frames of a batch, calling assign for each, and makes
// their acknowledgements awaited.
func (p *pending) register(size int, assign func(i int, number uint32)) (*sendBatch, error) {
	b := &sendBatch{done: make(chan struct{}), left: size}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ended != nil {
		return nil, p.ended
	}
	for i := range size {
		n := p.numberLocked()
		p.waiting[n] = waiter{b, i, size}
		assign(i, n)
	}
	p.most = max(p.most, len(p.waiting))
	return b, nil
}

// settle ends the wait for one number: nil is the peer's ACK. It reports
// whether anybody waited.
func (p *pending) settle(number uint32, err error) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	w, ok := p.waiting[number]
	if ok {
		delete(p.waiting, number)
		w.batch.settle(w.index, w.size, err)
		p.shrinkLocked()
	}
	return ok
}

// shrinkLocked gives back the room of a map that was large and is empty.
func (p *pending) shrinkLocked() {
	if len(p.waiting) == 0 && p.most > maxIdleWaiting {
		p.waiting, p.most = make(map[uint32]waiter), 0
	}
}

// awaited tells whether anybody waits for an acknowledgement.
func (p *pending) awaited() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.waiting) > 0
}

// issued tells whether a number is one of ours, awaited or not. It stays true
// after a time-out, so a late ERROR is still known as a refusal.
func (p *pending) issued(number uint32) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return number&^numberMask == p.base && (p.wrapped || number&numberMask < p.next)
}

// abandon settles what is left of a batch with err.
func (p *pending) abandon(b *sendBatch, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for n, w := range p.waiting {
		if w.batch == b {
			if p.given == nil || len(p.given) == maxGivenUp {
				p.given = make(map[uint32]struct{})
			}
			p.given[n] = struct{}{}
		}
	}
	p.settleAll(err, func(w waiter) bool { return w.batch == b })
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
	p.settleAll(err, func(waiter) bool { return true })
}

func (p *pending) settleAll(err error, which func(waiter) bool) {
	for n, w := range p.waiting {
		if which(w) {
			delete(p.waiting, n)
			w.batch.settle(w.index, w.size, err)
		}
	}
}
