package cryo

import (
	"fmt"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/gorilla/websocket"

	"github.com/cryo-connect/cryo-connect/internal/wire"
	"github.com/cryo-connect/cryo-connect/internal/ws"
)

// maxUnwritten bounds the memory of unwritten acknowledgements and other small frames, in bytes.
// Beyond it nothing more is read, because a peer that sends and never reads could make them grow
// without bound. While those of all sessions of a server exceed maxUnwrittenTotal, the bound of
// each is crowdedUnwritten, so that a write of it, where an acknowledgement has nearly four times
// ackCost, needs no large buffer.
const (
	maxUnwritten      = 1 << 20
	maxUnwrittenTotal = 64 << 20
	crowdedUnwritten  = 4 << 10
	ackCost           = 4
	controlCost       = 128 // plus the payload
)

// nonblockingBytes bounds the payload of a frame that its sender writes itself, in bytes.
const nonblockingBytes = 16 << 10

// maxPongs bounds the queued answers to a flood of pings.
const maxPongs = 16

// maxFrameHeader is the size of the longest header, that of ENDPOINT_INFO, in bytes.
const maxFrameHeader = wire.AckHeaderSize + 12

// maxIdleSlice bounds the capacity of the slices that an empty queue keeps for reuse.
const maxIdleSlice = 16

// writer queues the frames that a session sends, and writes them. Queueing never waits for
// the network. At most one goroutine writes: if none does, the caller that queues a small frame
// writes it in place, as far as the network accepts it without waiting, and starts a goroutine
// for everything else, which ends when the queue is empty. Each data frame leaves the writer
// once, by ackTable.released: copied, written, not written because of an error, withdrawn before
// it was dequeued, or dropped at the end.
//
// Lock order: a stream's mutex may be held while this one is locked. While this one is held,
// no other may be locked but a window's.
type writer struct {
	conn   *ws.Conn
	sid    uint64
	acks   *ackTable
	failed func(error) // ends the session after a write error

	total *atomic.Int64 // sum of unwritten of all sessions of a server, or of this one at a dialling end

	head [maxFrameHeader]byte // memory of a frame's header; owned by the goroutine that writes

	mu        sync.Mutex
	queue     queue
	withdrawn int           // number of released frames in the queue
	dequeued  int           // bytes of data being written
	unwritten int           // bytes of acknowledgements and control frames, including those being written
	shrunk    chan struct{} // closed when unwritten falls; nil without a waiter
	pongs     int           // number of queued pongs
	dataEnded bool          // no more data can be queued
	closing   *closeFrame   // written last; nothing can be queued behind it
	active    bool          // a goroutine writes
	idle      *sync.Cond    // signalled when active becomes false
	closed    bool          // nothing more is dequeued or written
}

// queue holds unwritten frames, or a part of them that is written as a whole, in this order.
type queue struct {
	wsPing  bool
	wsPong  []byte // data of the newest WebSocket ping; older ones need no answer
	acks    []uint32
	control []wire.Frame // small frames whose answers are not awaited
	data    []*outFrame
	closing *closeFrame // set in the last part only
}

// closeFrame is the close frame of the WebSocket, with the BYE before it.
type closeFrame struct {
	bye    *wire.Frame // nil: no BYE
	code   int
	reason string
}

// frames returns the number of Cryo frames.
func (q *queue) frames() int { return len(q.acks) + len(q.control) + len(q.data) }

func (q *queue) empty() bool { return !q.wsPing && q.wsPong == nil && q.frames() == 0 }

// isSmall reports whether the queue is a single small frame, for whose answer a sender may be
// waiting.
func (q *queue) isSmall() bool {
	if q.wsPing || q.wsPong != nil || len(q.control) > 0 || q.frames() != 1 {
		return false
	}
	return len(q.acks) == 1 || q.data[0].call != nil && len(q.data[0].Payload) <= nonblockingBytes
}

// cost returns the bytes that the queue counts towards maxUnwritten.
func (q *queue) cost() int {
	cost := len(q.acks) * ackCost
	for i := range q.control {
		cost += controlCost + len(q.control[i].Payload)
	}
	return cost
}

// newWriter creates the writer of a session. failed is called by the writing goroutine.
func newWriter(conn *ws.Conn, sid uint64, acks *ackTable, failed func(error)) *writer {
	w := &writer{conn: conn, sid: sid, acks: acks, failed: failed, total: new(atomic.Int64)}
	w.idle = sync.NewCond(&w.mu)
	return w
}

// enqueue modifies the queue, and starts writing unless a write is in progress. It returns
// false when nothing more can be queued.
func (w *writer) enqueue(change func(q *queue)) bool { return w.enqueueKind(false, change) }

// enqueueKind is enqueue for data frames, or for other frames.
func (w *writer) enqueueKind(data bool, change func(q *queue)) bool {
	w.mu.Lock()
	if w.isClosingLocked() || data && w.dataEnded {
		w.mu.Unlock()
		return false
	}
	change(&w.queue)
	writes := !w.active
	w.active = true
	inPlace := writes && w.queue.isSmall() && w.conn.CanTryFlush()
	var q queue
	if inPlace {
		q = w.dequeueLocked()
	}
	w.mu.Unlock()
	if writes && !(inPlace && w.writeInPlace(&q)) {
		go w.write()
	}
	return true
}

// acknowledge queues acknowledgements.
func (w *writer) acknowledge(numbers []uint32) bool {
	return w.enqueue(func(q *queue) {
		q.acks = append(q.acks, numbers...)
		w.countLocked(ackCost * len(numbers))
	})
}

// send queues data frames. It drops them when nothing can be queued any more.
func (w *writer) send(frames []outFrame) bool {
	queued := w.enqueueKind(true, func(q *queue) {
		for i := range frames {
			q.data = append(q.data, &frames[i])
		}
	})
	if !queued {
		w.acks.drop(frames)
	}
	return queued
}

// control queues a small frame whose answer is not awaited.
func (w *writer) control(f wire.Frame) bool {
	return w.enqueue(func(*queue) { w.controlLocked(f) })
}

func (w *writer) controlLocked(f wire.Frame) {
	w.queue.control = append(w.queue.control, f)
	w.countLocked(controlCost + len(f.Payload))
}

// countLocked adds to the unwritten bytes.
func (w *writer) countLocked(n int) {
	w.unwritten += n
	w.total.Add(int64(n))
}

// pong queues the answer to a ping, or an unsolicited pong (keepalive).
func (w *writer) pong(number uint32) {
	w.enqueue(func(*queue) {
		if w.pongs == maxPongs {
			return
		}
		w.pongs++
		w.controlLocked(wire.Frame{SID: w.sid, Type: wire.PingPong, Ack: number, Payload: []byte(wire.Pong)})
	})
}

// ping queues a heartbeat: a WebSocket ping and, if cryo is set, a Cryo ping.
func (w *writer) ping(cryo bool) {
	number := w.acks.number()
	w.enqueue(func(q *queue) {
		if q.wsPing {
			return // the previous one is still unwritten
		}
		q.wsPing = true
		if cryo {
			w.controlLocked(wire.Frame{SID: w.sid, Type: wire.PingPong, Ack: number, Payload: []byte(wire.Ping)})
		}
	})
}

func (w *writer) webSocketPong(data []byte) {
	w.enqueue(func(q *queue) { q.wsPong = append([]byte{}, data...) }) // not nil, even if empty
}

// rejectData makes the queue reject data; acknowledgements and control frames are queued until
// the close frame.
func (w *writer) rejectData() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.dataEnded = true
}

// isClosing reports whether the close frame is queued, behind which nothing can be.
func (w *writer) isClosing() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.isClosingLocked()
}

func (w *writer) isClosingLocked() bool { return w.closed || w.closing != nil }

// queueClose queues the close frame behind everything else.
func (w *writer) queueClose(f closeFrame) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.isClosingLocked() {
		return
	}
	w.closing = &f
	w.wakeLocked()
	if !w.active {
		w.active = true
		go w.write()
	}
}

// cancel cancels a call: its frames are completed with err, and those that are not dequeued
// yet are not written. A frame that is being written may still arrive, and the call is done
// when the frame has left the writer. The order matters: while a number is in the ackTable, its
// frame is queued or was dequeued.
func (w *writer) cancel(c *call, err error) {
	w.acks.cancel(c, err)
	w.withdraw(c.frames)
}

// withdraw drops those of the frames that are still queued. Their pointers leave the queue
// at their turn, or as soon as they are more than half of it, so that the cost is
// proportional to the number of these frames, however long the queue is.
func (w *writer) withdraw(frames []outFrame) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for i := range frames {
		if f := &frames[i]; !f.is(frameDequeued | frameReleased) {
			w.acks.released(f, false)
			w.withdrawn++
		}
	}
	if 2*w.withdrawn > len(w.queue.data) {
		w.compactLocked()
	}
}

func (w *writer) compactLocked() {
	w.queue.data = slices.DeleteFunc(w.queue.data, func(f *outFrame) bool { return f.is(frameReleased) })
	if len(w.queue.data) == 0 {
		w.queue.data = nil // its array may be large
	}
	w.withdrawn = 0
}

// overLimit returns nil while unwritten small frames are within the limit, else a channel that
// is closed when some were written. Those of other sessions matter only until then: a peer that
// reads is not kept waiting by peers that do not.
func (w *writer) overLimit() <-chan struct{} {
	w.mu.Lock()
	defer w.mu.Unlock()
	limit := maxUnwritten
	if w.total.Load() > maxUnwrittenTotal {
		limit = crowdedUnwritten
	}
	if w.unwritten <= limit || w.isClosingLocked() {
		return nil
	}
	if w.shrunk == nil {
		w.shrunk = make(chan struct{})
	}
	return w.shrunk
}

// queuedBytes returns the number of unwritten bytes.
func (w *writer) queuedBytes() int64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	n := int64(w.unwritten)
	for _, f := range w.queue.data {
		n += int64(len(f.Payload)) // 0 if it was withdrawn
	}
	return n
}

// dequeuedBytes returns the size of the data being written, in bytes.
func (w *writer) dequeuedBytes() int64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return int64(w.dequeued)
}

// abort drops all queued frames, at the end of the session. Frames being written are released
// by the goroutine that writes them: the connection is closed, or about to be.
func (w *writer) abort() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.closed = true
	for _, f := range w.queue.data {
		if !f.is(frameReleased) {
			w.acks.released(f, false)
		}
	}
	w.countLocked(-w.queue.cost())
	w.queue, w.withdrawn = queue{}, 0
	w.wakeLocked()
}

// wait returns when no goroutine writes.
func (w *writer) wait() {
	w.mu.Lock()
	defer w.mu.Unlock()
	for w.active {
		w.idle.Wait()
	}
}

func (w *writer) wakeLocked() {
	if w.shrunk != nil {
		close(w.shrunk)
		w.shrunk = nil
	}
}

// writeInPlace writes as much of a small frame as the network accepts without waiting: a
// goroutine would only delay a sender of one message at a time. It returns false if a goroutine
// must continue, with the rest or with frames that were queued meanwhile.
func (w *writer) writeInPlace(q *queue) bool {
	err := w.gather(q)
	return w.finishWrite(q, err, err == nil && w.conn.TryFlush())
}

// write is the writing goroutine. It yields to goroutines that are about to queue something,
// so that their frames go out with the same write; a single frame is written without that
// delay, because a sender may be waiting for its answer.
func (w *writer) write() {
	if !w.single() {
		runtime.Gosched()
	}
	for idle := false; !idle; {
		q := w.dequeue()
		err := w.gather(&q)
		if err == nil {
			err = w.conn.Flush() // includes the rest of a write in place
		}
		if err == nil && q.closing != nil {
			err = w.conn.CloseWrite()
		}
		idle = w.finishWrite(&q, err, true)
	}
}

// single reports whether at most one frame is queued.
func (w *writer) single() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.queue.frames() <= 1
}

// dequeue removes the next frames to write from the queue, and the close frame when there are
// no others.
func (w *writer) dequeue() queue {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.dequeueLocked()
}

func (w *writer) dequeueLocked() queue {
	data := w.dequeueDataLocked()
	q := w.queue
	w.queue = queue{data: q.data}
	q.data = data
	w.pongs = 0
	if w.closing != nil && q.empty() && !w.closed {
		w.closed = true
		q.closing = w.closing
	}
	return q
}

// dequeueDataLocked removes about as much data as one write gathers. Small frames go out in
// between: a pong behind a large batch could reach the peer too late.
func (w *writer) dequeueDataLocked() []*outFrame {
	data := w.queue.data
	size, kept, n := 0, 0, 0
	for n < len(data) && size < ws.GatherBytes {
		f := data[n]
		n++
		if f.is(frameReleased) {
			w.withdrawn--
			continue
		}
		f.state.Or(frameDequeued) // before any byte leaves: an earlier answer is premature
		size += wire.AckHeaderSize + len(f.Payload)
		data[kept] = f
		kept++
	}
	w.dequeued = size
	clear(data[kept:n])
	if w.queue.data = data[n:]; n == len(data) {
		w.queue.data = nil
	}
	return data[:kept]
}

// finishWrite accounts for frames that were written, and releases chunks: a stream's window
// counts bytes that the network has not accepted. flushed is false if a part is unwritten. It
// reports whether nothing is left to write, so that the next caller that queues a frame writes.
func (w *writer) finishWrite(q *queue, err error, flushed bool) (idle bool) {
	if err != nil {
		w.failed(fmt.Errorf("connection lost: writing: %w", err)) // before abort: a caller that can't queue reads the cause
		w.abort()
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.countLocked(-q.cost())
	w.dequeued = 0
	w.wakeLocked()
	for i, f := range q.data {
		if f.window != nil {
			w.acks.released(f, err == nil)
		}
		q.data[i] = nil // the array may be in use by the frames behind
	}
	if w.queue.data == nil && cap(q.data) <= maxIdleSlice {
		w.queue.data = q.data[:0]
	}
	if w.queue.acks == nil && cap(q.acks) <= maxIdleSlice {
		w.queue.acks = q.acks[:0]
	}
	if flushed && w.queue.empty() && (w.closing == nil || w.closed) {
		w.active = false
		w.idle.Broadcast()
	}
	return !w.active
}

// gather puts frames into the buffer of the next write to the network. It releases the frames
// of calls as soon as they are copied: on a slow connection the peer may answer the first of many
// long before it has received the last. A large payload is written without a copy, and may be
// answered before its frame is released.
func (w *writer) gather(q *queue) error {
	var err error
	if q.wsPing {
		err = w.conn.Write(websocket.PingMessage, nil, nil)
	}
	if err == nil && q.wsPong != nil {
		err = w.conn.Write(websocket.PongMessage, nil, q.wsPong)
	}
	ack := wire.Frame{SID: w.sid, Type: wire.Ack}
	for i := 0; i < len(q.acks) && err == nil; i++ {
		ack.Ack = q.acks[i]
		err = w.gatherFrame(&ack)
	}
	for i := 0; i < len(q.control) && err == nil; i++ {
		err = w.gatherFrame(&q.control[i])
	}
	w.grow(q.data)
	for _, f := range q.data {
		if err == nil {
			err = w.gatherFrame(&f.Frame)
		}
		if f.window == nil {
			w.acks.released(f, err == nil)
		}
	}
	if q.closing != nil && err == nil {
		err = w.gatherClose(q.closing)
	}
	return err
}

// grow makes capacity for the data in one step, so that the buffer does not grow repeatedly.
func (w *writer) grow(data []*outFrame) {
	size := 0
	for _, f := range data {
		if n := len(f.Payload); w.conn.Copies(n) {
			size += ws.MaxHead + wire.AckHeaderSize + n
		}
	}
	if size > 0 {
		w.conn.Grow(size)
	}
}

// gatherFrame gathers one frame as one WebSocket message.
func (w *writer) gatherFrame(f *wire.Frame) error {
	head, err := wire.AppendHeader(w.head[:0], f)
	if err != nil {
		return err
	}
	return w.conn.Write(websocket.BinaryMessage, head, f.Payload)
}

func (w *writer) gatherClose(f *closeFrame) error {
	if f.bye != nil {
		if err := w.gatherFrame(f.bye); err != nil {
			return err
		}
	}
	return w.conn.Write(websocket.CloseMessage, nil, websocket.FormatCloseMessage(f.code, f.reason))
}

// window bounds the unwritten chunks of a stream by streamWindow.
type window struct {
	freed chan struct{} // holds a token when used has fallen

	mu   sync.Mutex
	used int // bytes of unwritten chunks, with their overhead
}

// acquire adds a chunk to the window if it fits, or if the window is empty.
func (w *window) acquire(chunk int) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.used > 0 && w.used+chunk+chunkOverhead > streamWindow {
		return false
	}
	w.used += chunk + chunkOverhead
	return true
}

// release is called when a chunk is written or dropped.
func (w *window) release(chunk int) {
	w.mu.Lock()
	w.used -= chunk + chunkOverhead
	w.mu.Unlock()
	select {
	case w.freed <- struct{}{}:
	default:
	}
}
