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
	// acceptPatience bounds the time that chunks wait for their streams to be accepted. Older
	// clients send chunks without waiting for the acknowledgement of TX_START. All streams of a
	// session share it, and half of the time between such waits restores it: so reads are paused
	// for this for at most a second at a time, and in the long run for a third of the time.
	acceptPatience = time.Second
	// rejectAfter is the time after which data without capacity is rejected if a local sender waits
	// for an answer, which may be behind that data. A longer wait checks for such a sender once per
	// recheckEvery.
	rejectAfter  = 10 * time.Second
	recheckEvery = time.Second
	// receiveTimeout bounds the time to receive a large payload while other payloads wait for the
	// capacity that is reserved for it. A payload that will exceed it at its current rate counts as
	// slow after slowAfter.
	receiveTimeout = time.Minute
	slowAfter      = 5 * time.Second
)

// receiveBuffer bounds the memory of received data. A server's sessions share it.
//
// bytes counts unsettled messages and unread chunks, incoming the incomplete payloads of more
// than 64 KiB. Both grant while less than MaxBufferBytes is reserved, so that a payload of any
// size can be received. slot is acquired by one payload in fragments that exceeds 1 MiB: its
// final size is unknown, so that the largest size is reserved, even beyond the limit of
// incoming. Together they reserve at most twice MaxBufferBytes and two payloads of 16 MiB, in
// addition to 64 KiB per session.
//
// Two payloads never wait for each other: a payload waits for incoming while it has no
// reservation. The only other capacity that it waits for and another incomplete payload may
// have is slot, whose owner waits for no other payload.
//
// holder, which may be nil, has the groups of the next session. In each of them, all sessions of a
// client are one holder: a client that opens many sessions gets no more than with one.
type receiveBuffer struct {
	bytes, incoming, slot *quota.Quota
	holder                *holder
}

// holder has the groups of the sessions of one client.
type holder struct {
	owned                 bool // by an owner: otherwise bytes is not used, because several clients may have one token and address
	bytes, incoming, slot quota.Group
}

// bytesGroup returns the group in bytes; nil is none.
func (h *holder) bytesGroup() *quota.Group {
	if h.owned {
		return &h.bytes
	}
	return nil
}

// leavesSome is the fairness of the receive buffer: a session may reserve up to eight times the
// free capacity, so that a busy one may use most of it, and always leaves some for others.
func leavesSome(held, free int64) bool { return (held+7)/8 <= free }

func newReceiveBuffer(limit int) receiveBuffer {
	return receiveBuffer{
		bytes:    quota.New(int64(limit), leavesSome),
		incoming: quota.NewStrict(int64(limit), leavesSome), // one payload may be as large as all capacity
		slot:     quota.New(1, nil),
	}
}

// reservation is capacity that is reserved for one payload. It has one owner: it is moved, and
// never copied.
type reservation struct {
	share *quota.Share
	n     int64
}

// release releases the reservation. A second call does nothing.
func (h *reservation) release() {
	if h.n != 0 {
		h.share.Release(h.n)
		*h = reservation{}
	}
}

// join moves another reservation of the same share into this one.
func (h *reservation) join(other *reservation) {
	if other.n != 0 {
		h.share, h.n = other.share, h.n+other.n
		*other = reservation{}
	}
}

// releaseAll releases everything that a share holds.
func releaseAll(share *quota.Share) {
	if held, _ := share.Usage(); held > 0 {
		share.Release(held)
	}
}

// partial has the reservations of an incomplete payload, and the time that it has waited for
// capacity.
type partial struct {
	incoming, slot reservation
	waited         time.Duration
}

func (p *partial) large() bool { return p.incoming.n > 0 }

// decision is the decision about a data frame.
type decision int

const (
	admitted   decision = iota // the payload is read
	bufferFull                 // the receive buffer is full, and a local sender waits for an answer
	unwanted                   // the session or the stream receives no data
)

// receiveLimit decides whether the payload of a data frame is read. Its methods must be called
// by the reading goroutine, except where their comments allow any goroutine.
type receiveLimit struct {
	conn       *ws.Conn
	ending     <-chan struct{}
	hasWaiters func() bool            // reports whether a local sender waits for an answer from the peer
	wants      func(*wire.Frame) bool // reports whether the frame can be received; false once the session is ending
	early      func(*wire.Frame) bool // reports whether it is a chunk of a stream that is not accepted yet

	bytes, incoming, slot *quota.Share
	belowLimit            *quota.Share // share of bytes that holds nothing: it grants whenever the limit is not reached
	rates                 throttle

	patience   time.Duration // remainder of acceptPatience at patienceAt
	patienceAt time.Time

	rejecting bool                      // data without capacity is rejected without a wait while a local sender waits
	changed   chan struct{}             // holds a token when wants may have changed
	paused    atomic.Bool               // reads are paused (backpressure)
	resumed   atomic.Pointer[time.Time] // end of the last pause; nil before there was one

	largeMu     sync.Mutex
	largeStart  time.Time     // start of reading a large payload; zero while none is read
	largeFrom   int64         // bytes received before that
	largeSize   int64         // announced bytes that were to be read then
	largeTotal  time.Duration // time spent reading earlier large payloads
	interrupted bool          // the reading of a large payload is interrupted
}

func newReceiveLimit(conn *ws.Conn, b receiveBuffer, ending <-chan struct{}, hasWaiters func() bool, wants, early func(*wire.Frame) bool) *receiveLimit {
	groups := b.holder
	if groups == nil {
		groups = new(holder)
	}
	return &receiveLimit{
		conn: conn, ending: ending, hasWaiters: hasWaiters, wants: wants, early: early,
		bytes: b.bytes.ShareOf(groups.bytesGroup()), incoming: b.incoming.ShareOf(&groups.incoming), slot: b.slot.ShareOf(&groups.slot), belowLimit: b.bytes.Share(),
		changed: make(chan struct{}, 1), patience: acceptPatience, patienceAt: time.Now(),
	}
}

// admit decides whether the payload of a data frame is read, of which size bytes are announced,
// and reserves n bytes of the receive buffer for it.
func (l *receiveLimit) admit(in *received, p *partial, size, n int) decision {
	if !l.wants(&in.Frame) {
		l.awaitAccepted(&in.Frame)
		if !l.wants(&in.Frame) {
			l.awaitOther(size)
			return unwanted
		}
	}
	if l.awaitRates(&in.Frame, size) && !l.wants(&in.Frame) {
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

// reserve makes p cover a payload of which size bytes are announced, and all if final. A small
// payload needs no reservation. An incomplete payload is not counted in the receive buffer,
// which would block others for as long as it takes to arrive.
func (l *receiveLimit) reserve(f *wire.Frame, p *partial, size int, final bool) decision {
	n := int64(allowance(size, final))
	if n <= smallPayload || n <= p.incoming.n {
		return admitted
	}
	share, units := l.incoming, n
	passes := l.bytes
	if p.large() {
		// Others may be waiting for its reservation, so it must not wait until its own
		// session settles messages: only the limit counts, not the session's share.
		passes = l.belowLimit
	}
	alone := p.large() || !final && size > mediumPayload
	if alone {
		share, units = l.slot, 1
	}
	l.endLarge() // the wait does not count as reading
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
		share.Release(units) // others have filled the receive buffer during the wait
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

// complete releases the reservations of reserve: the payload is complete and counted in the
// receive buffer, or it is not received.
func (l *receiveLimit) complete(p *partial) {
	if p.large() {
		l.endLarge()
	}
	p.slot.release()
	p.incoming.release()
}

// count raises a reservation to the cost of a received frame, even beyond the limit.
func (l *receiveLimit) count(h *reservation, cost int) {
	if more := int64(cost) - h.n; more > 0 {
		l.bytes.Force(more)
		h.join(&reservation{l.bytes, more})
	}
}

// acquire reserves n, and waits until it is granted. This is the backpressure: reads are paused
// meanwhile, and a payload that waits has no reservation in the share that it waits for. The wait
// ends when the frame can't be received any more. That could take forever: the answer to a local
// sender may be behind the unread data, and messages that fill the receive buffer may only be
// settled after that answer, as a request that is settled after its response. So after rejectAfter,
// data is rejected while a local sender waits, until the session holds no more than is free.
func (l *receiveLimit) acquire(share *quota.Share, n int64, f *wire.Frame, p *partial) (waited bool, d decision) {
	if share.TryAcquire(n) {
		return false, admitted
	}
	if l.rejecting && l.hasWaiters() {
		return false, bufferFull
	}
	request := share.Request(n)
	begin := l.pause()
	timer := time.NewTimer(rejectAfter - p.waited)
	defer func() {
		timer.Stop()
		p.waited += l.resume().Sub(begin)
	}()
	for {
		select {
		case <-request.Granted():
			return true, admitted
		case <-l.changed:
		case <-l.ending:
		case <-timer.C:
			if l.hasWaiters() {
				request.Cancel()
				l.rejecting = true
				return true, bufferFull
			}
			timer.Reset(recheckEvery)
		}
		if !l.wants(f) {
			request.Cancel()
			return true, unwanted
		}
	}
}

// awaitAccepted pauses reads at a chunk of a stream that is not accepted yet, until it is, or
// acceptPatience is used up. The wait is short, because the stream may only be accepted when
// others of the same session, whose chunks are behind this one, have ended.
func (l *receiveLimit) awaitAccepted(f *wire.Frame) {
	if !l.early(f) {
		return
	}
	begin := l.pause()
	patience := min(l.patience+begin.Sub(l.patienceAt)/2, acceptPatience)
	timer := time.NewTimer(patience)
	defer func() {
		timer.Stop()
		l.patienceAt = l.resume()
		l.patience = max(0, patience-l.patienceAt.Sub(begin)) // a busy machine may be late
	}()
	for l.early(f) {
		select {
		case <-l.changed:
		case <-l.ending:
			return
		case <-timer.C:
			return
		}
	}
}

// awaitRates pauses reads while a wanted frame exceeds a rate of throttle, and as long as it can be
// received. The wait is before any reservation for the frame, so that it keeps no other session
// waiting.
func (l *receiveLimit) awaitRates(f *wire.Frame, size int) (waited bool) {
	wait := l.rates.charge(f, size)
	if wait > 0 {
		l.awaitTime(wait, func() bool { return l.wants(f) })
	}
	return wait > 0
}

// awaitOther pauses reads while a frame that carries no message, with which size bytes are
// discarded, exceeds a rate of throttle.
func (l *receiveLimit) awaitOther(size int) {
	if wait := l.rates.chargeOther(size); wait > 0 {
		l.awaitTime(wait, func() bool { return true })
	}
}

// continued is called for a WebSocket frame that begins no message: a control frame, or a further
// fragment of size bytes. One that is small, and is not the last of a message that has been charged,
// may have to wait within a message: any number of them adds nothing to it.
func (l *receiveLimit) continued(size int, final bool) {
	l.rates.chargeMore(size)
	if size < smallFrame && !final {
		l.awaitOther(0)
	}
}

// awaitTime pauses reads for a time that a rate demands, as long as goesOn returns true, and not
// while the session is ending.
func (l *receiveLimit) awaitTime(wait time.Duration, goesOn func() bool) {
	select {
	case <-l.ending:
		return
	default:
	}
	begin := l.pause()
	resume := l.rates.pause(begin, wait)
	timer := time.NewTimer(wait)
	defer timer.Stop()
	for waiting := true; waiting && goesOn(); {
		select {
		case <-timer.C:
			waiting = false
		case <-l.changed:
		case <-l.ending:
			waiting = false
		}
	}
	resume(l.resume())
}

// pause marks reads as paused (backpressure), and returns the time.
func (l *receiveLimit) pause() time.Time {
	l.conn.ReleaseBuffer()
	l.paused.Store(true)
	return time.Now()
}

// resume ends pause, and returns the time.
func (l *receiveLimit) resume() time.Time {
	now := time.Now()
	l.resumed.Store(&now)
	l.conn.SetHeard() // the pause must not count towards the peer timeout
	l.paused.Store(false)
	return now
}

// recheck makes a wait check again whether its frame can be received. It may be called from any
// goroutine.
func (l *receiveLimit) recheck() {
	select {
	case l.changed <- struct{}{}:
	default:
	}
}

// resumedAt returns the end of the last pause; zero before there was one. It may be called from
// any goroutine.
func (l *receiveLimit) resumedAt() time.Time {
	if t := l.resumed.Load(); t != nil {
		return *t
	}
	return time.Time{}
}

// beginLarge marks the start of reading a large payload.
func (l *receiveLimit) beginLarge() {
	l.largeMu.Lock()
	defer l.largeMu.Unlock()
	l.largeStart = time.Now()
	l.largeFrom, l.largeSize = l.conn.Received()-int64(l.conn.Buffered()), int64(l.conn.Left())
}

// endLarge marks the end of reading a large payload, and ends its interruption. It does nothing
// if none is being read.
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
// one is being read. It may be called from any goroutine.
func (l *receiveLimit) interruptLarge() {
	l.largeMu.Lock()
	defer l.largeMu.Unlock()
	if !l.largeStart.IsZero() {
		l.interrupted = true
		l.conn.Interrupt()
	}
}

// largeReadTime returns the total time spent reading large payloads, until now. It may be called
// from any goroutine.
func (l *receiveLimit) largeReadTime() time.Duration {
	l.largeMu.Lock()
	defer l.largeMu.Unlock()
	if l.largeStart.IsZero() {
		return l.largeTotal
	}
	return l.largeTotal + time.Since(l.largeStart)
}

// starvesOthers reports whether another payload has waited for slowAfter for the capacity that is
// reserved for a payload which this session reads, and which takes more than receiveTimeout. It
// returns true for as many sessions as suffice for those that wait, which must then end. Heartbeat's
// goroutine.
func (l *receiveLimit) starvesOthers() bool {
	return l.slow() && (l.incoming.Starved(slowAfter) || l.slot.Starved(slowAfter))
}

// slow reports whether a large payload has taken longer than receiveTimeout to read, or will at its
// current rate.
func (l *receiveLimit) slow() bool {
	l.largeMu.Lock()
	defer l.largeMu.Unlock()
	if l.largeStart.IsZero() {
		return false
	}
	elapsed := time.Since(l.largeStart)
	due := float64(l.largeSize) * elapsed.Seconds() / receiveTimeout.Seconds()
	return elapsed >= receiveTimeout || elapsed >= slowAfter && float64(l.conn.Received()-l.largeFrom) < due
}
