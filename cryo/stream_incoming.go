package cryo

import (
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/cryo-connect/cryo-connect/internal/wire"
)

const (
	// chunkOverhead is counted for a chunk in addition to its payload, in bytes.
	chunkOverhead = 128
	// pullAhead bounds the unread bytes of a stream beyond which no more are fetched.
	pullAhead = 256 << 10
)

// Errors of a stream that ended before it was complete, other than the end of its session.
var (
	// ErrStreamIdle: nothing of the stream was received within the idle timeout.
	ErrStreamIdle = errors.New("stream idle")
	// ErrStreamBroken: chunks were missing, or the size differs from the announced one.
	ErrStreamBroken = errors.New("the stream is broken")
	// ErrBufferFull: MaxBufferBytes left no capacity for a chunk while a send waited for
	// its acknowledgement; see [SessionOptions]. Messages are rejected with the same text.
	ErrBufferFull = errors.New("receive buffer full: too many unacknowledged messages")

	errStreamUnread = errors.New("the stream can't be acknowledged before Read has returned io.EOF")
)

// IncomingStream is a stream that the peer sends. One goroutine at a time may read it; Ack or
// Close settles it, from any goroutine. Close after Ack does nothing, so defer it. Until the
// stream is settled it counts as open, and its unread bytes count against MaxBufferBytes. A
// stream that has failed is cancelled and no longer counts as open; it need not be settled if
// it is read to its error.
type IncomingStream struct {
	s           *Session
	tx          uint32
	name        string
	size        int64     // -1: unknown
	pull        bool      // chunks come only when fetched
	startNumber uint32    // number of TX_START
	announcedAt time.Time // time of TX_START

	arrived chan struct{} // holds a token when Read must check again

	settleMu sync.Mutex // held by Ack and Close, locked before mu: the second call returns the result of the first

	mu           sync.Mutex
	idleTimeout  time.Duration
	accepted     bool          // TX_START is acknowledged
	idleTimer    *time.Timer   // set when accepted
	lastActive   time.Time     // time of the last non-empty chunk or Read
	largeAtReset time.Duration // result of [receiveLimit.largeReadTime] when idleTimer was last set
	chunks       []chunk
	buffered     int   // unread bytes in chunks
	received     int64 // bytes received so far
	nextSeq      uint32
	fetching     bool    // a TX_FETCH is in flight
	finishNumber *uint32 // number of TX_FINISH; nil before it is received
	failed       error   // why the stream ended incomplete; TX_CANCEL is sent
	reachedEOF   bool    // Read has returned io.EOF
	settled      settlement
	ackErr       error // why Ack fails, once the stream is settled; nil if it is acknowledged
}

var _ io.ReadCloser = (*IncomingStream)(nil)

// chunk is a received chunk. Its memory and reservation are released when all of it is read.
type chunk struct {
	unread      []byte
	reservation reservation
	pooled      *chunkBuffer
}

func (c *chunk) release() {
	c.pooled.release()
	c.reservation.release()
	*c = chunk{}
}

// settlement is the application's decision about a stream: Ack or Close.
type settlement int

const (
	unsettled settlement = iota
	acknowledged
	rejected
)

// Name returns the stream's name, at most 1,024 bytes of UTF-8. The peer chose it: do not use
// it as a path without checks, and see [Session.Redact] for logging it.
func (st *IncomingStream) Name() string { return st.name }

// Size returns the number of bytes that the peer has announced, or -1.
func (st *IncomingStream) Size() int64 { return st.size }

// Tx returns the peer's number of the stream.
func (st *IncomingStream) Tx() uint32 { return st.tx }

// Session returns the session that the stream is received on.
func (st *IncomingStream) Session() *Session { return st.s }

// Received returns the number of bytes received so far.
func (st *IncomingStream) Received() int64 {
	st.mu.Lock()
	defer st.mu.Unlock()
	return st.received
}

// SetIdleTimeout sets the idle timeout of the stream in place of
// [SessionOptions.StreamIdleTimeout], which 0 and less restore. Call it before the first Read.
func (st *IncomingStream) SetIdleTimeout(d time.Duration) {
	if d <= 0 {
		d = st.s.opts.StreamIdleTimeout
	}
	st.mu.Lock()
	defer st.mu.Unlock()
	st.idleTimeout = d
}

// Read returns bytes that were received, and waits if there are none. The first Read
// acknowledges TX_START, and the peer begins to send. [io.EOF] means that the stream is
// complete. Otherwise, after all received bytes, it returns [io.ErrUnexpectedEOF] for a stream
// that is truncated by the end of its session, or [ErrStreamIdle], [ErrStreamBroken] or
// [ErrBufferFull]. After Close in another goroutine, a waiting Read returns [ErrStreamClosed].
func (st *IncomingStream) Read(p []byte) (int, error) {
	st.acceptOnce()
	for {
		n, err := st.readBuffered(p)
		if n > 0 || err != nil || len(p) == 0 {
			return n, err
		}
		select {
		case <-st.arrived:
		case <-st.s.done:
			// All chunks that were received before the end are queued by now.
			if n, err := st.readBuffered(p); n > 0 || err != nil {
				return n, err
			}
			return 0, truncated(st.Received(), st.s.Err())
		}
	}
}

func (st *IncomingStream) readBuffered(p []byte) (int, error) {
	st.mu.Lock()
	defer st.mu.Unlock()
	n := 0
	for n < len(p) && len(st.chunks) > 0 {
		first := &st.chunks[0]
		k := copy(p[n:], first.unread)
		n += k
		if first.unread = first.unread[k:]; len(first.unread) == 0 {
			first.release()
			st.chunks = st.chunks[1:]
		}
	}
	if n > 0 {
		st.buffered -= n
		st.lastActive = time.Now()
		st.fetchLocked()
		return n, nil
	}
	switch {
	case len(st.chunks) > 0: // p is empty
		return 0, nil
	case st.failed != nil:
		return 0, st.failed
	case st.settled == rejected:
		return 0, ErrStreamClosed
	case st.wholeLocked():
		st.reachedEOF = true
		return 0, io.EOF
	default:
		return 0, nil
	}
}

// wholeLocked reports whether the stream was received completely: TX_FINISH was received or, in
// pull mode, the announced number of bytes. An announced size of 0 is not trusted without
// TX_FINISH: the published Node client announces it whatever the source's size.
func (st *IncomingStream) wholeLocked() bool {
	return st.finishNumber != nil || st.pull && st.size > 0 && st.received == st.size
}

// acceptOnce acknowledges TX_START at the first Read, so that the peer sends data.
func (st *IncomingStream) acceptOnce() {
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.accepted || st.failed != nil || st.settled != unsettled {
		return
	}
	st.accepted = true
	st.s.limit.recheck() // its first chunk may have been received already
	st.lastActive = time.Now()
	st.s.writer.acknowledge([]uint32{st.startNumber})
	if !st.s.isEnding() {
		st.largeAtReset = st.s.limit.largeReadTime()
		st.idleTimer = time.AfterFunc(st.idleTimeout, st.checkIdle)
	}
	st.fetchLocked()
}

// fetchLocked requests the next chunk of a pulled stream. It never requests a chunk beyond the
// announced size: that breaks the published server.
func (st *IncomingStream) fetchLocked() {
	if !st.pull || !st.accepted || st.fetching || st.failed != nil || st.settled != unsettled || st.finishNumber != nil {
		return
	}
	from := st.nextSeq
	to := from + 1
	switch {
	case st.size == 0:
		to = from // the published server answers an empty range with TX_FINISH
	case st.received == st.size, st.buffered >= pullAhead:
		return
	}
	st.fetching = true
	st.s.writer.control(wire.Frame{SID: st.s.id, Type: wire.TxFetch, Ack: st.s.acks.number(), Tx: st.tx, Start: from, End: to})
}

// Ack acknowledges the whole stream: it was delivered. TX_FINISH is acknowledged, now or when it
// is received. Call Ack when Read has returned io.EOF and the data is delivered. An earlier call
// returns an error and does not settle the stream, even if all bytes are read: read to io.EOF, or
// call Close, because nothing else ends a stream that was received completely. After the end of
// the session, and for a stream that was cancelled because it was idle or broken, nothing can be
// acknowledged: Ack settles the stream and returns the cause. After Close it returns
// [ErrStreamClosed]; a second Ack returns the result of the first.
func (st *IncomingStream) Ack() error { return st.settle(acknowledged) }

// Close cancels the stream unless it is acknowledged: the peer receives TX_CANCEL and no
// acknowledgement of TX_FINISH. Once the stream is settled, Close does nothing and returns nil.
// After the end of the session the peer can't be reached, and Close returns the error of
// [Session.Err].
func (st *IncomingStream) Close() error { return st.settle(rejected) }

// settle records and sends the decision of Ack or Close, whichever is called first. A later
// failure of the stream changes nothing. After an earlier one the stream counts as rejected, and
// TX_CANCEL is sent by the goroutine that removes the stream from the table.
func (st *IncomingStream) settle(as settlement) error {
	st.settleMu.Lock()
	defer st.settleMu.Unlock()
	st.mu.Lock()
	if st.settled != unsettled {
		defer st.mu.Unlock()
		if as == acknowledged {
			return st.ackErr
		}
		return nil
	}
	var err error
	switch {
	case as == rejected:
		st.ackErr = ErrStreamClosed
	case st.failed != nil:
		as, err = rejected, st.failed
	case !st.reachedEOF && st.s.isEnding():
		as, err = rejected, st.s.Err()
	case !st.reachedEOF:
		st.mu.Unlock()
		return errStreamUnread
	}
	st.settled = as
	if err != nil {
		st.ackErr = err
	}
	finish := st.finishNumber
	st.releaseLocked()
	st.mu.Unlock()
	st.signal()

	queued, open := true, st.s.incoming.removeSettled(st)
	if open {
		defer st.s.incoming.answered()
	}
	switch {
	case !open: // failed and cancelled before
	case as == rejected:
		queued = st.s.cancel(st.tx)
	case finish != nil:
		queued = st.s.writer.acknowledge([]uint32{*finish})
	default: // pulled: TX_FINISH will be acknowledged when it is received
		queued = !st.s.isEnding()
	}
	if queued || err != nil {
		return err
	}
	err = st.s.Err()
	if as == acknowledged {
		st.mu.Lock()
		st.ackErr = err
		st.mu.Unlock()
	}
	return err
}

// stopIdle stops the idle timer at the end of the session, which the timer would keep in
// memory.
func (st *IncomingStream) stopIdle() {
	st.mu.Lock()
	defer st.mu.Unlock()
	st.stopIdleLocked()
}

func (st *IncomingStream) stopIdleLocked() {
	if st.idleTimer != nil {
		st.idleTimer.Stop()
	}
}

// releaseLocked releases unread chunks.
func (st *IncomingStream) releaseLocked() {
	st.stopIdleLocked()
	for i := range st.chunks {
		st.chunks[i].release()
	}
	st.chunks, st.buffered = nil, 0
}

// failLocked ends a stream with an error, which Read returns after all received bytes. The
// caller must call cancelFailed once the lock is released.
func (st *IncomingStream) failLocked(err error) {
	if st.failed != nil || st.settled != unsettled {
		return
	}
	st.failed = err
	st.stopIdleLocked()
	st.signal()
}

// truncate ends a stream that is incomplete.
func (st *IncomingStream) truncate(cause error) {
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.accepted && st.wholeLocked() {
		return
	}
	st.failLocked(truncated(st.received, cause))
}

func truncated(received int64, cause error) error {
	return fmt.Errorf("%w after %d bytes: %w", io.ErrUnexpectedEOF, received, cause)
}

func (st *IncomingStream) hasFailed() bool {
	st.mu.Lock()
	defer st.mu.Unlock()
	return st.failed != nil
}

func (st *IncomingStream) signal() {
	select {
	case st.arrived <- struct{}{}:
	default:
	}
}

// checkIdle cancels a stream that is idle. Time does not count while bytes of it are unread,
// reads are paused (backpressure), or a large frame is being received: the stream's next bytes
// may be in it, or behind it. Timer's goroutine.
func (st *IncomingStream) checkIdle() {
	st.failIdle()
	st.s.incoming.cancelFailed(st)
}

// failIdle fails the stream if it is idle, else it resets the timer.
func (st *IncomingStream) failIdle() {
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.wholeLocked() || st.failed != nil || st.settled != unsettled || st.s.isEnding() {
		return
	}
	active := st.lastActive
	if st.buffered > 0 || st.s.limit.paused.Load() {
		active = time.Now()
	} else if t := st.s.limit.resumedAt(); t.After(active) {
		active = t
	}
	left := st.idleTimeout - time.Since(active)
	large := st.s.limit.largeReadTime()
	left, st.largeAtReset = max(left, large-st.largeAtReset), large
	if left > 0 {
		st.idleTimer.Reset(left)
		return
	}
	st.failLocked(fmt.Errorf("%w for %v after %d bytes", ErrStreamIdle, st.idleTimeout, st.received))
}

// isAnnounced reports whether the stream has neither been accepted nor failed, nor been settled.
func (st *IncomingStream) isAnnounced() bool {
	st.mu.Lock()
	defer st.mu.Unlock()
	return !st.accepted && st.failed == nil && st.settled == unsettled
}

// wantsChunks reports whether the stream receives chunks: it is accepted, and has neither
// failed nor been settled.
func (st *IncomingStream) wantsChunks() bool {
	st.mu.Lock()
	defer st.mu.Unlock()
	return st.accepted && st.failed == nil && st.settled == unsettled
}

// addChunk appends a chunk. It returns false if the stream fails because the receive buffer is
// full. Reading goroutine.
func (st *IncomingStream) addChunk(f *received) bool {
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.failed != nil || st.settled != unsettled {
		return true // cancelled: chunks in flight are discarded
	}
	if len(f.Payload) > 0 {
		st.lastActive = time.Now() // an empty chunk keeps no stream open
	}
	st.fetching = false
	after := st.received + int64(len(f.Payload))
	switch {
	case f.decision == unwanted && st.s.isEnding(): // the session has ended, and will cancel the stream
		st.failLocked(truncated(st.received, st.s.Err()))
	case !st.accepted, f.decision == unwanted: // unwanted: decided before it was accepted
		st.failLocked(fmt.Errorf("%w: chunk received before TX_START was acknowledged", ErrStreamBroken))
	case st.finishNumber != nil:
		st.failLocked(fmt.Errorf("%w: chunk received after TX_FINISH", ErrStreamBroken))
	case f.Seq != st.nextSeq:
		st.failLocked(fmt.Errorf("%w: chunk %d received, expected %d", ErrStreamBroken, f.Seq, st.nextSeq))
	case st.size >= 0 && after > st.size:
		st.failLocked(fmt.Errorf("%w: more than the announced %d bytes", ErrStreamBroken, st.size))
	case f.decision == bufferFull:
		st.failLocked(ErrBufferFull)
		return false
	default:
		st.nextSeq++
		st.received = after
		if len(f.Payload) > 0 {
			st.buffered += len(f.Payload)
			payload, held, pooled := f.detach()
			st.chunks = append(st.chunks, chunk{payload, held, pooled})
		}
		st.fetchLocked()
		st.signal()
	}
	return true
}

// awaitsFinish reports whether the stream is acknowledged and its TX_FINISH not yet received.
func (st *IncomingStream) awaitsFinish() bool {
	st.mu.Lock()
	defer st.mu.Unlock()
	return st.settled == acknowledged && st.finishNumber == nil
}

// handleFinish processes TX_FINISH. It reports whether it can be acknowledged now. Reading
// goroutine.
func (st *IncomingStream) handleFinish(number uint32) (now bool) {
	st.mu.Lock()
	defer st.mu.Unlock()
	switch {
	case st.failed != nil, st.finishNumber != nil, st.settled == rejected:
		return false // cancelled, or received before
	case st.size >= 0 && st.received < st.size:
		st.failLocked(fmt.Errorf("%w: finished after %d of %d bytes", ErrStreamBroken, st.received, st.size))
		return false
	}
	st.finishNumber = &number
	st.signal()
	return st.settled == acknowledged
}
