package cryo

import (
	"sync"
	"sync/atomic"
	"time"

	"github.com/cryo-connect/cryo-connect/internal/quota"
	"github.com/cryo-connect/cryo-connect/internal/wire"
	"github.com/cryo-connect/cryo-connect/internal/ws"
)

const (
	// rejectAfter is how long backpressure may keep an answer from us that one of our
	// senders waits for, and recheckEvery how often a longer wait looks for such a sender.
	rejectAfter  = 10 * time.Second
	recheckEvery = time.Second
	// receiveTimeout is how long a large payload may take to come in while others wait
	// for what is reserved for it.
	receiveTimeout = time.Minute
)

// receiveBuffer is what received data may take. A server's sessions share it.
//
// bytes holds what is whole and not settled, incoming what of more than 64 KiB is not whole.
// Both are granted while less than MaxBufferBytes is held, so that a payload of any size is
// received. slot goes to one payload in fragments that has outgrown 1 MiB: nobody knows how
// large it gets, so it takes the largest, whatever else is coming in. Together they hold at
// most twice MaxBufferBytes and two payloads of 16 MiB, beside 64 KiB a session.
//
// Two payloads never wait for each other: the first reservation is made while nothing is
// held, and the second is that of the slot, whose owner needs no other one.
type receiveBuffer struct{ bytes, incoming, slot *quota.Quota }

func newReceiveBuffer(limit int) receiveBuffer {
	return receiveBuffer{
		// A session may hold up to eight times what is still free, so that a busy one
		// may use most of it and always leaves some for others.
		bytes:    quota.New(int64(limit), func(held, free int64) bool { return (held+7)/8 <= free }),
		incoming: quota.New(int64(limit), nil),
		slot:     quota.New(1, nil),
	}
}

// reservation is a reservation. It has one owner: it is moved, and never copied.
type reservation struct {
	share *quota.Share
	n     int64
}

// release releases it, once.
func (h *reservation) release() {
	if h.n != 0 {
		h.share.Release(h.n)
		*h = reservation{}
	}
}

// join moves another one of the same share into this one.
func (h *reservation) join(other *reservation) {
	if other.n != 0 {
		h.share, h.n = other.share, h.n+other.n
		*other = reservation{}
	}
}

// releaseAll releases all that a share holds.
func releaseAll(share *quota.Share) {
	if held, _ := share.Usage(); held > 0 {
		share.Release(held)
	}
}

// partial is what is reserved for a payload that is not whole, and how long it has waited.
type partial struct {
	incoming, slot reservation
	waited         time.Duration
}

func (p *partial) large() bool { return p.incoming.n > 0 }

// decision is what becomes of a data frame.
type decision int

const (
	admitted   decision = iota // its payload is read
	bufferFull                 // the receive buffer is full, and waiting would be in vain
	unwanted                   // nobody takes it
)

// receiveLimit decides whether the payload of a data frame is read. Its methods are the
// reading goroutine's, except where they say otherwise.
type receiveLimit struct {
	conn       *ws.Conn
	ending     <-chan struct{}
	hasWaiters func() bool            // reports whether a local sender waits for an answer
	wants      func(*wire.Frame) bool // reports whether anybody takes the frame; no longer when the session is ending

	bytes, incoming, slot *quota.Share
	belowLimit            *quota.Share // of bytes too, and holds nothing: it is granted whenever the limit is not reached

	rejecting bool                      // what has no capacity is rejected at once while a sender waits
	changed   chan struct{}             // holds a token when wants may have changed
	paused    atomic.Bool               // it waits
	resumed   atomic.Pointer[time.Time] // when it last stopped waiting

	largeMu     sync.Mutex
	largeStart  time.Time     // when the reading of a large payload began; zero while none is read
	largeTotal  time.Duration // that the reading of those before has taken
	interrupted bool          // the reading is
}

func newReceiveLimit(conn *ws.Conn, b receiveBuffer, ending <-chan struct{}, awaited func() bool, wants func(*wire.Frame) bool) *receiveLimit {
	return &receiveLimit{
		conn: conn, ending: ending, hasWaiters: awaited, wants: wants,
		bytes: b.bytes.Share(), incoming: b.incoming.Share(), slot: b.slot.Share(), belowLimit: b.bytes.Share(),
		changed: make(chan struct{}, 1),
	}
}

// admit decides about a data frame, and reserves n bytes of the receive buffer for it.
func (l *receiveLimit) admit(in *received, p *partial, n int) decision {
	if !l.wants(&in.Frame) {
		return unwanted
	}
	if l.rejecting {
		if held, free := l.bytes.Usage(); free > 0 && held <= free {
			l.rejecting = false
		}
	}
	_, d := l.acquire(l.bytes, int64(n), &in.Frame, p)
	if d == admitted {
		in.reservation = reservation{l.bytes, int64(n)}
	}
	return d
}

// reserve sees that p covers a payload of which size bytes are announced, and no more will
// be if final: for a small one there is nothing to do. What isn't whole is not counted as
// received, or it would keep others out however slowly it comes.
func (l *receiveLimit) reserve(f *wire.Frame, p *partial, size int, final bool) decision {
	n := int64(allowance(size, final))
	if n <= smallPayload || n <= p.incoming.n {
		return admitted
	}
	share, units := l.incoming, n
	passes := l.bytes
	if p.large() {
		// It holds what others may be waiting for, so it must not wait for what its own
		// session is to settle: the limit counts, and not its share.
		passes = l.belowLimit
	}
	alone := p.large() || !final && size > mediumPayload
	if alone {
		share, units = l.slot, 1
	}
	l.endLarge() // the wait is not its own doing
	for {
		if _, d := l.acquire(passes, 0, f, p); d != admitted {
			return d
		}
		waited, d := l.acquire(share, units, f, p)
		if d != admitted {
			return d
		}
		if !waited || passes.TryAcquire(0) {
			break
		}
		share.Release(units) // while it waited, others have filled the receive buffer
	}
	if alone {
		p.slot = reservation{l.slot, 1}
		n -= p.incoming.n
		l.incoming.Force(n)
	}
	p.incoming.join(&reservation{l.incoming, n})
	l.beginLarge()
	return admitted
}

// complete ends what reserve began: the payload is whole and counted, or given up.
func (l *receiveLimit) complete(p *partial) {
	if p.large() {
		l.endLarge()
	}
	p.slot.release()
	p.incoming.release()
}

// count makes a reservation what a received frame costs, whatever the limit.
func (l *receiveLimit) count(h *reservation, cost int) {
	if more := int64(cost) - h.n; more > 0 {
		l.bytes.Force(more)
		h.join(&reservation{l.bytes, more})
	}
}

// acquire reserves n, and waits for it if it must. This is the backpressure: nothing is
// read meanwhile, and what waits holds nothing of what it waits for. The wait ends when
// nobody wants the frame any more, and it may be in vain: the answer that a local sender
// waits for may be behind what is not read, and what is held may be waiting for that
// sender, as it does where a response is sent before its request is settled. So after
// rejectAfter, data is rejected while that is so, until the session holds no more than is
// free.
func (l *receiveLimit) acquire(share *quota.Share, n int64, f *wire.Frame, p *partial) (waited bool, d decision) {
	if share.TryAcquire(n) {
		return false, admitted
	}
	if l.rejecting && l.hasWaiters() {
		return false, bufferFull
	}
	request := share.Request(n)
	begin := time.Now()
	l.conn.ReleaseBuffer()
	l.paused.Store(true)
	patience := time.NewTimer(rejectAfter - p.waited)
	defer func() {
		patience.Stop()
		now := time.Now()
		p.waited += now.Sub(begin)
		l.resumed.Store(&now)
		l.conn.SetHeard() // the silence was ours
		l.paused.Store(false)
	}()
	for {
		select {
		case <-request.Granted():
			return true, admitted
		case <-l.changed:
		case <-l.ending:
		case <-patience.C:
			if l.hasWaiters() {
				request.Cancel()
				l.rejecting = true
				return true, bufferFull
			}
			patience.Reset(recheckEvery)
		}
		if !l.wants(f) {
			request.Cancel()
			return true, unwanted
		}
	}
}

// recheck has a wait ask again whether its frame is wanted. From any goroutine.
func (l *receiveLimit) recheck() {
	select {
	case l.changed <- struct{}{}:
	default:
	}
}

// resumedAt is when the last wait ended; zero before there was one. From any goroutine.
func (l *receiveLimit) resumedAt() time.Time {
	if t := l.resumed.Load(); t != nil {
		return *t
	}
	return time.Time{}
}

func (l *receiveLimit) beginLarge() {
	l.largeMu.Lock()
	defer l.largeMu.Unlock()
	l.largeStart = time.Now()
}

// endLarge ends what beginLarge began, if it did, and what is left of an interruption: what
// is read next is something else.
func (l *receiveLimit) endLarge() {
	l.largeMu.Lock()
	defer l.largeMu.Unlock()
	if !l.largeStart.IsZero() {
		l.largeTotal += time.Since(l.largeStart)
		l.largeStart = time.Time{}
	}
	if l.interrupted {
		l.interrupted = false
		l.conn.ResumeReads()
	}
}

// interruptLarge makes the reading of a large payload fail with [os.ErrDeadlineExceeded], if
// one is being read. From any goroutine.
func (l *receiveLimit) interruptLarge() {
	l.largeMu.Lock()
	defer l.largeMu.Unlock()
	if !l.largeStart.IsZero() {
		l.interrupted = true
		l.conn.Interrupt()
	}
}

// largeReadTime is how long large payloads were being read, until now. From any goroutine.
func (l *receiveLimit) largeReadTime() time.Duration {
	l.largeMu.Lock()
	defer l.largeMu.Unlock()
	if l.largeStart.IsZero() {
		return l.largeTotal
	}
	return l.largeTotal + time.Since(l.largeStart)
}

// starvesOthers reports that others have waited for a minute for what is reserved for a
// payload that has been coming in for as long. It does so once a minute, to one session,
// which is to end. The heartbeat's goroutine.
func (l *receiveLimit) starvesOthers() bool {
	l.largeMu.Lock()
	from := l.largeStart
	l.largeMu.Unlock()
	if from.IsZero() || time.Since(from) < receiveTimeout {
		return false
	}
	return l.incoming.Starved(receiveTimeout) || l.slot.Starved(receiveTimeout)
}
