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
	// chunkOverhead is what a chunk counts beside its payload.
	chunkOverhead = 128
	// pullAhead is how much of a stream is fetched before it is read.
	pullAhead = 256 << 10
)

// Why an IncomingStream ended other than whole, or by the end of its session.
var (
	// ErrStreamIdle: nothing of the stream was received within the idle timeout.
	ErrStreamIdle = errors.New("stream idle")
	// ErrStreamBroken: chunks were missing, or the size was not as announced.
	ErrStreamBroken = errors.New("the stream is broken")
	// ErrBufferFull: MaxBufferBytes left no capacity for a chunk while a send waited for
	// its acknowledgement; see [SessionOptions]. Messages are rejected with the same text.
	ErrBufferFull = errors.New("receive buffer full: too many unacknowledged messages")

	errStreamUnread = errors.New("the stream can't be acknowledged before it is read to io.EOF")
)

// IncomingStream is a stream that the peer sends. It is read by one goroutine at a
// time, and then settled by Ack or Close, from any; Close after Ack does nothing, so
// defer it. Until then it counts as open, and what of it is not read against
// MaxBufferBytes. A stream that has failed is cancelled and no longer counts, and need
// not be settled when it is read to its error.
type IncomingStream struct {
	s     *Session
	tx    uint32
	name  string
	size  int64     // -1: unknown
	pull  bool      // chunks come only when fetched
	start uint32    // TX_START's number
	since time.Time // when TX_START came

	arrived chan struct{} // holds a token when there is something new for Read

	settling sync.Mutex // held by Ack and Close, before other locks: the second one gets what the first has found

	mu          sync.Mutex
	idleTimeout time.Duration
	accepted    bool          // TX_START is acknowledged
	idle        *time.Timer   // set when accepted
	active      time.Time     // when something last happened
	large       time.Duration // of [receiveLimit.timeForLarge], when idle was last set
	chunks      []chunk
	buffered    int   // bytes in chunks
	received    int64 // bytes that came
	nextSeq     uint32
	fetching    bool    // a TX_FETCH is under way
	finish      *uint32 // TX_FINISH's number, when it has come
	failed      error   // why nothing more comes though the stream is not whole; TX_CANCEL is sent
	readOut     bool    // Read has returned io.EOF
	settled     settlement
	unacked     error // why Ack fails, once the stream is settled; nil if it is acknowledged
}

var _ io.ReadCloser = (*IncomingStream)(nil)

// chunk is what is left to be read of a chunk, and what is to be released when that is
// nothing.
type chunk struct {
	left   []byte
	hold   hold
	pooled *chunkBuffer
}

func (c *chunk) release() {
	c.pooled.release()
	c.hold.release()
	*c = chunk{}
}

// settlement is what the receiver has said of a stream.
type settlement int

const (
	unsettled settlement = iota
	acknowledged
	rejected
)

// Name returns the stream's name, at most 1,024 bytes of UTF-8. The peer has chosen it:
// don't use it as a path as it is, and see [Session.Redact] for logging it.
func (st *IncomingStream) Name() string { return st.name }

// Size returns the number of bytes that the peer has announced, or -1.
func (st *IncomingStream) Size() int64 { return st.size }

// Tx returns the peer's number of the stream.
func (st *IncomingStream) Tx() uint32 { return st.tx }

// Session returns the session that the stream is received on.
func (st *IncomingStream) Session() *Session { return st.s }

// Received returns the number of bytes that were received so far.
func (st *IncomingStream) Received() int64 {
	st.mu.Lock()
	defer st.mu.Unlock()
	return st.received
}

// SetIdleTimeout sets another time than [SessionOptions.StreamIdleTimeout] for the
// stream; 0 is that one. Call it before the first Read.
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
// whole. Otherwise, after all bytes that were received, it returns [io.ErrUnexpectedEOF]
// for a stream that is truncated by the end of its session, or [ErrStreamIdle],
// [ErrStreamBroken] or [ErrBufferFull]. Close from another goroutine ends a Read that waits
// with [ErrStreamClosed].
func (st *IncomingStream) Read(p []byte) (int, error) {
	st.acceptOnce()
	for {
		n, err := st.take(p)
		if n > 0 || err != nil || len(p) == 0 {
			return n, err
		}
		select {
		case <-st.arrived:
		case <-st.s.done:
			// Nothing more comes. What came before the end was queued before.
			if n, err := st.take(p); n > 0 || err != nil {
				return n, err
			}
			return 0, truncated(st.Received(), st.s.Err())
		}
	}
}

func (st *IncomingStream) take(p []byte) (int, error) {
	st.mu.Lock()
	defer st.mu.Unlock()
	n := 0
	for n < len(p) && len(st.chunks) > 0 {
		first := &st.chunks[0]
		k := copy(p[n:], first.left)
		n += k
		if first.left = first.left[k:]; len(first.left) == 0 {
			first.release()
			st.chunks = st.chunks[1:]
		}
	}
	if n > 0 {
		st.buffered -= n
		st.active = time.Now()
		st.fetchLocked()
		return n, nil
	}
	switch {
	case len(st.chunks) > 0: // p has no room
		return 0, nil
	case st.failed != nil:
		return 0, st.failed
	case st.settled == rejected:
		return 0, ErrStreamClosed
	case st.wholeLocked():
		st.readOut = true
		return 0, io.EOF
	default:
		return 0, nil
	}
}

// wholeLocked reports whether all bytes have come: TX_FINISH has, or in pull mode
// as many as were announced. An announced size of 0 is not believed without
// TX_FINISH: the published Node client announces it whatever the source holds.
func (st *IncomingStream) wholeLocked() bool {
	return st.finish != nil || st.pull && st.size > 0 && st.received == st.size
}

// acceptOnce lets the peer send.
func (st *IncomingStream) acceptOnce() {
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.accepted || st.failed != nil || st.settled != unsettled {
		return
	}
	st.accepted = true
	st.active = time.Now()
	st.s.out.acknowledge([]uint32{st.start})
	if !st.s.isEnding() {
		st.large = st.s.limit.timeForLarge()
		st.idle = time.AfterFunc(st.idleTimeout, st.checkIdle)
	}
	st.fetchLocked()
}

// fetchLocked asks for the next chunk, if the stream is pulled. While fewer
// bytes have come than were announced, one more chunk surely exists; asking past
// the end breaks the published server.
func (st *IncomingStream) fetchLocked() {
	if !st.pull || !st.accepted || st.fetching || st.failed != nil || st.settled != unsettled || st.finish != nil {
		return
	}
	from := st.nextSeq
	to := from + 1
	switch {
	case st.size == 0:
		to = from // an empty range makes the published server say TX_FINISH
	case st.received == st.size, st.buffered >= pullAhead:
		return
	}
	st.fetching = true
	st.s.out.control(wire.Frame{SID: st.s.id, Type: wire.TxFetch, Ack: st.s.pend.number(), Tx: st.tx, Start: from, End: to})
}

// Ack acknowledges the whole stream: it was delivered. TX_FINISH is acknowledged, now
// or when it is received. Call it when Read has returned io.EOF and all
// that was read is safe. Before that it is an error, also where exactly all bytes were
// read, and the stream stays as it is: read on, or call Close, as nothing else ends a
// stream that has come whole. After the end of the session, and for a stream that was
// cancelled already because it was idle or broken, nothing can be
// acknowledged: then Ack settles the stream and returns the cause. After Close it returns
// [ErrStreamClosed], and a second time what it has returned before.
func (st *IncomingStream) Ack() error { return st.settle(acknowledged) }

// Close cancels the stream unless it is acknowledged: the peer receives TX_CANCEL and no
// acknowledgement of TX_FINISH. Once Ack has settled the stream, and a second time, it does
// nothing and returns nil. After the end of the session the peer can't be reached; then
// Close returns the error of [Session.Err].
func (st *IncomingStream) Close() error { return st.settle(rejected) }

// settle sends the peer the outcome, once. Of Ack and Close the first one counts. A
// failure that comes later finds the stream settled and changes nothing. One that came
// before makes it rejected, and TX_CANCEL is sent by whoever takes it out of the table.
func (st *IncomingStream) settle(as settlement) error {
	st.settling.Lock()
	defer st.settling.Unlock()
	st.mu.Lock()
	if st.settled != unsettled {
		defer st.mu.Unlock()
		if as == acknowledged {
			return st.unacked
		}
		return nil
	}
	var err error
	switch {
	case as == rejected:
		st.unacked = ErrStreamClosed
	case st.failed != nil:
		as, err = rejected, st.failed
	case !st.readOut && st.s.isEnding():
		as, err = rejected, st.s.Err()
	case !st.readOut:
		st.mu.Unlock()
		return errStreamUnread
	}
	st.settled = as
	if err != nil {
		st.unacked = err
	}
	finish := st.finish
	st.dropLocked()
	st.mu.Unlock()
	st.signal()

	heard, open := true, st.s.incoming.settled(st)
	if open {
		defer st.s.incoming.answered()
	}
	switch {
	case !open: // it has failed, and is cancelled already
	case as == rejected:
		heard = st.s.cancel(st.tx)
	case finish != nil:
		heard = st.s.out.acknowledge([]uint32{*finish})
	default: // it is pulled, and remembered
		heard = !st.s.isEnding()
	}
	if heard || err != nil {
		return err
	}
	err = st.s.Err()
	if as == acknowledged {
		st.mu.Lock()
		st.unacked = err
		st.mu.Unlock()
	}
	return err
}

// stopIdle is called when the session has ended: the timer would keep both in memory.
func (st *IncomingStream) stopIdle() {
	st.mu.Lock()
	defer st.mu.Unlock()
	st.stopIdleLocked()
}

func (st *IncomingStream) stopIdleLocked() {
	if st.idle != nil {
		st.idle.Stop()
	}
}

// dropLocked gives up what was not read.
func (st *IncomingStream) dropLocked() {
	st.stopIdleLocked()
	for i := range st.chunks {
		st.chunks[i].release()
	}
	st.chunks, st.buffered = nil, 0
}

// failLocked ends a stream of which no more is taken: what came can be read before
// the error. Without the lock, cancelFailed is called then.
func (st *IncomingStream) failLocked(err error) {
	if st.failed != nil || st.settled != unsettled {
		return
	}
	st.failed = err
	st.stopIdleLocked()
	st.signal()
}

// truncate ends a stream that has not come whole.
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
// reads are paused (backpressure), or a large frame is coming in: the stream's next bytes may
// be in it, or behind it. Timer's goroutine.
func (st *IncomingStream) checkIdle() {
	st.failIdle()
	st.s.incoming.cancelFailed(st)
}

func (st *IncomingStream) failIdle() {
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.wholeLocked() || st.failed != nil || st.settled != unsettled || st.s.isEnding() {
		return
	}
	active := st.active
	if st.buffered > 0 || st.s.limit.paused.Load() {
		active = time.Now()
	} else if t := st.s.limit.resumedAt(); t.After(active) {
		active = t
	}
	left := st.idleTimeout - time.Since(active)
	large := st.s.limit.timeForLarge()
	left, st.large = max(left, large-st.large), large
	if left > 0 {
		st.idle.Reset(left)
		return
	}
	st.failLocked(fmt.Errorf("%w for %v after %d bytes", ErrStreamIdle, st.idleTimeout, st.received))
}

// wantsChunks reports whether the stream takes chunks. Any other is a violation, or late.
func (st *IncomingStream) wantsChunks() bool {
	st.mu.Lock()
	defer st.mu.Unlock()
	return st.accepted && st.failed == nil && st.settled == unsettled
}

// chunk appends a chunk. It reports false when the stream ends because the receive buffer
// is full. Reading goroutine.
func (st *IncomingStream) chunk(f *received) bool {
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.failed != nil || st.settled != unsettled {
		return true // cancelled; what was under way is discarded
	}
	if len(f.Payload) > 0 {
		st.active = time.Now() // an empty chunk keeps no stream open
	}
	st.fetching = false
	after := st.received + int64(len(f.Payload))
	switch {
	case f.decision == unwanted && st.s.isEnding(): // the session ended first, and cancels it next
		st.failLocked(truncated(st.received, st.s.Err()))
	case !st.accepted, f.decision == unwanted: // which was asked before it was accepted
		st.failLocked(fmt.Errorf("%w: chunks before TX_START was acknowledged", ErrStreamBroken))
	case st.finish != nil:
		st.failLocked(fmt.Errorf("%w: chunks after TX_FINISH", ErrStreamBroken))
	case f.Seq != st.nextSeq:
		st.failLocked(fmt.Errorf("%w: chunk %d where %d was due", ErrStreamBroken, f.Seq, st.nextSeq))
	case st.size >= 0 && after > st.size:
		st.failLocked(fmt.Errorf("%w: more than the %d bytes that were announced", ErrStreamBroken, st.size))
	case f.decision == bufferFull:
		st.failLocked(ErrBufferFull)
		return false
	default:
		st.nextSeq++
		st.received = after
		if len(f.Payload) > 0 {
			st.buffered += len(f.Payload)
			payload, held, pooled := f.take()
			st.chunks = append(st.chunks, chunk{payload, held, pooled})
		}
		st.fetchLocked()
		st.signal()
	}
	return true
}

// awaitsFinish reports whether the stream is acknowledged and its TX_FINISH has not come.
func (st *IncomingStream) awaitsFinish() bool {
	st.mu.Lock()
	defer st.mu.Unlock()
	return st.settled == acknowledged && st.finish == nil
}

// finished takes TX_FINISH. It reports whether it can be acknowledged at once.
// Reading goroutine.
func (st *IncomingStream) finished(number uint32) (now bool) {
	st.mu.Lock()
	defer st.mu.Unlock()
	switch {
	case st.failed != nil, st.finish != nil, st.settled == rejected:
		return false // cancelled, or received before
	case st.size >= 0 && st.received < st.size:
		st.failLocked(fmt.Errorf("%w: finished after %d of %d bytes", ErrStreamBroken, st.received, st.size))
		return false
	}
	st.finish = &number
	st.signal()
	return st.settled == acknowledged
}
