package cryo

import (
	"fmt"
	"runtime"
	"slices"
	"sync"

	"github.com/gorilla/websocket"

	"github.com/cryo-connect/cryo-connect/internal/wire"
	"github.com/cryo-connect/cryo-connect/internal/ws"
)

// maxUnwritten bounds the memory of acknowledgements and other small frames that
// wait to be written, in bytes. Beyond it nothing more is read, so that a peer that
// sends and never reads can't make them grow.
const (
	maxUnwritten = 1 << 20
	ackCost      = 4
	controlCost  = 128 // and the payload
)

// nonblockingBytes bounds the payload of a frame that is written without a goroutine.
const nonblockingBytes = 16 << 10

// maxPongs bounds the answers that a flood of pings can queue up.
const maxPongs = 16

// maxFrameHeader is the size of the longest header, that of ENDPOINT_INFO, in bytes.
const maxFrameHeader = wire.AckHeaderSize + 12

// maxIdleSlice bounds the memory of numbers and of pointers to frames that an empty queue
// keeps for the next ones.
const maxIdleSlice = 16

// writer is the queue of what a session sends, and writes it. Nobody waits for the network
// here: whoever queues something while nobody writes is the writer. It writes a small frame in
// place, as far as the network takes it without waiting, and starts a goroutine for all else,
// which ends when nothing is left. Each frame of data leaves the writer once, by
// ackTable.released: copied, written, not written because of an error, withdrawn before it was
// taken, or dropped when nothing is written any more.
//
// Its mutex may be locked by who holds a stream's. Who holds it locks no other but a
// window's.
type writer struct {
	conn   *ws.Conn
	sid    uint64
	acks   *ackTable
	failed func(error) // ends the session, when writing has failed

	head [maxFrameHeader]byte // memory of a frame's header; owned by who writes

	mu        sync.Mutex
	queue     queue
	withdrawn int           // released frames in the queue
	taken     int           // bytes of data being written
	unwritten int           // bytes of acknowledgements and control frames, those being written included
	shrunk    chan struct{} // closed when unwritten falls; nil when nobody waits
	pongs     int           // in the queue
	dataEnded bool          // no more data can be queued
	closing   *closeFrame   // written when all else is; nothing can be queued behind it
	active    bool          // somebody writes
	idle      *sync.Cond    // active has become false
	closed    bool          // nothing more is taken or written
}

// queue is what waits to be written, or what is taken of it to be written as a whole, in
// this order.
type queue struct {
	wsPing  bool
	wsPong  []byte // the newest WebSocket ping's data; older ones need no answer
	acks    []uint32
	control []wire.Frame // small frames for whose answers nobody waits
	data    []*outFrame
	closing *closeFrame // where all else is written
}

// closeFrame ends the WebSocket.
type closeFrame struct {
	bye    *wire.Frame // nil: none
	code   int
	reason string
}

// frames is the number of frames of Cryo.
func (q *queue) frames() int { return len(q.acks) + len(q.control) + len(q.data) }

func (q *queue) empty() bool { return !q.wsPing && q.wsPong == nil && q.frames() == 0 }

// isSmall reports whether there is only a small frame, whose sender may wait for nothing
// else.
func (q *queue) isSmall() bool {
	if q.wsPing || q.wsPong != nil || len(q.control) > 0 || q.frames() != 1 {
		return false
	}
	return len(q.acks) == 1 || q.data[0].call != nil && len(q.data[0].Payload) <= nonblockingBytes
}

// cost is what the queue counts towards maxUnwritten.
func (q *queue) cost() int {
	cost := len(q.acks) * ackCost
	for i := range q.control {
		cost += controlCost + len(q.control[i].Payload)
	}
	return cost
}

// newWriter makes the writer of a session. failed is called by the writing goroutine.
func newWriter(conn *ws.Conn, sid uint64, acks *ackTable, failed func(error)) *writer {
	w := &writer{conn: conn, sid: sid, acks: acks, failed: failed}
	w.idle = sync.NewCond(&w.mu)
	return w
}

// enqueue runs a change of the queue, and sees that it is written. It reports false when
// nothing can be queued any more.
func (w *writer) enqueue(change func(q *queue)) bool { return w.enqueueKind(false, change) }

// enqueueKind is enqueue for data, or for what is none.
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
		w.unwritten += ackCost * len(numbers)
	})
}

// send queues frames. It drops them when nothing can be queued any more.
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

// control queues a small frame for whose answer nobody waits.
func (w *writer) control(f wire.Frame) bool {
	return w.enqueue(func(*queue) { w.controlLocked(f) })
}

func (w *writer) controlLocked(f wire.Frame) {
	w.queue.control = append(w.queue.control, f)
	w.unwritten += controlCost + len(f.Payload)
}

// pong queues the answer to a ping, or a keepalive that looks like one.
func (w *writer) pong(number uint32) {
	w.enqueue(func(*queue) {
		if w.pongs == maxPongs {
			return // as many answers are queued
		}
		w.pongs++
		w.controlLocked(wire.Frame{SID: w.sid, Type: wire.PingPong, Ack: number, Payload: []byte(wire.Pong)})
	})
}

// ping queues a heartbeat: a ping of WebSocket and, if wanted, one of Cryo.
func (w *writer) ping(cryo bool) {
	number := w.acks.number()
	w.enqueue(func(q *queue) {
		if q.wsPing {
			return // the last one is still unwritten
		}
		q.wsPing = true
		if cryo {
			w.controlLocked(wire.Frame{SID: w.sid, Type: wire.PingPong, Ack: number, Payload: []byte(wire.Ping)})
		}
	})
}

func (w *writer) webSocketPong(data []byte) {
	w.enqueue(func(q *queue) { q.wsPong = append([]byte{}, data...) }) // not nil: there is one
}

// endData has no more data queued; acknowledgements and control frames are until the end.
func (w *writer) rejectData() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.dataEnded = true
}

// ends reports whether the end is queued, so that nothing is queued any more.
func (w *writer) isClosing() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.isClosingLocked()
}

func (w *writer) isClosingLocked() bool { return w.closed || w.closing != nil }

// queueClose queues the end behind everything else; nothing can be queued then.
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

// cancel gives up a call: it is settled with err, and what is not taken yet is not written.
// A frame that is being written may still arrive, and the call is done when it has left the
// writer. In this order: as long as a number is awaited, its frame is queued or was taken.
func (w *writer) cancel(c *call, err error) {
	w.acks.cancel(c, err)
	w.withdraw(c.frames)
}

// withdraw drops those of the frames that are still queued. Their pointers leave the queue
// at their turn, or as soon as they are more than half of it: so it costs time in
// proportion to these frames, however long the queue is.
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
		w.queue.data = nil // it may have been long
	}
	w.withdrawn = 0
}

// crowded returns nil when few enough small frames are unwritten, else a channel
// that is closed when it is worth asking again.
func (w *writer) overLimit() <-chan struct{} {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.unwritten <= maxUnwritten || w.isClosingLocked() {
		return nil
	}
	if w.shrunk == nil {
		w.shrunk = make(chan struct{})
	}
	return w.shrunk
}

// queuedBytes returns what waits to be written.
func (w *writer) queuedBytes() int64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	n := int64(w.unwritten)
	for _, f := range w.queue.data {
		n += int64(len(f.Payload)) // nil if it was withdrawn; what is taken is not in the queue
	}
	return n
}

// takenBytes returns the size of the data being written.
func (w *writer) takenBytes() int64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return int64(w.taken)
}

// abort drops what is queued, at the end of the session. What is being written is released
// by who writes it: the connection is closed then, or about to be.
func (w *writer) abort() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.closed = true
	for _, f := range w.queue.data {
		if !f.is(frameReleased) {
			w.acks.released(f, false)
		}
	}
	w.queue, w.withdrawn = queue{}, 0
	w.wakeLocked()
}

// wait returns when nobody is writing.
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

// writeInPlace writes what the network takes of a small frame without waiting. It reports
// false if a goroutine must go on: with the rest, or with what was queued meanwhile. Who
// sends one message at a time waits for that, and for its acknowledgement.
func (w *writer) writeInPlace(q *queue) bool {
	err := w.gather(q)
	return w.finishWrite(q, err, err == nil && w.conn.TryFlush())
}

// write is the writing goroutine. Others that are about to queue something may do so first,
// and then it goes out with the next write; a frame that is alone is written at once, as its
// sender may wait for nothing else.
func (w *writer) write() {
	if !w.single() {
		runtime.Gosched()
	}
	for idle := false; !idle; {
		q := w.dequeue()
		err := w.gather(&q)
		if err == nil {
			err = w.conn.Flush() // and what was not taken in place
		}
		if err == nil && q.closing != nil {
			err = w.conn.CloseWrite()
		}
		idle = w.finishWrite(&q, err, true)
	}
}

// single reports whether there is no more than one frame to write.
func (w *writer) single() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.queue.frames() <= 1
}

// take takes what is queued, and the end when nothing is.
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

// takeDataLocked takes about as much data as is written at once. What is small
// goes out in between: a pong that waited for a large batch could come too late
// for the peer.
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
	w.taken = size
	clear(data[kept:n])
	if w.queue.data = data[n:]; n == len(data) {
		w.queue.data = nil
	}
	return data[:kept]
}

// put ends the writing of what was taken, and releases its chunks: a stream's window counts
// what is not in the network yet. It reports whether nothing is left to be written, so that
// the next one who queues something writes. flushed is false if a part is left.
func (w *writer) finishWrite(q *queue, err error, flushed bool) (idle bool) {
	if err != nil {
		w.failed(fmt.Errorf("connection lost: writing: %w", err)) // first: who can't queue asks why
		w.abort()
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.unwritten -= q.cost()
	w.taken = 0
	w.wakeLocked()
	for i, f := range q.data {
		if f.window != nil {
			w.acks.released(f, err == nil)
		}
		q.data[i] = nil // its memory may live on with what follows
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

// gather puts what was taken into the buffer of the next write to the network. It releases
// the frames of calls, even if they are only copied: the peer may answer the first of many
// long before it has taken the last, on a slow line. A large payload is written from where it
// is, and may be answered before its frame is released.
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

// grow makes capacity for the data in one step, so that it does not outgrow one buffer after
// the other.
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

// gatherFrame puts one frame into one WebSocket message.
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

// window counts the bytes of a stream's chunks that are not written, with their overhead.
// The stream waits while they are too many.
type window struct {
	freed chan struct{} // holds a token when used has fallen

	mu   sync.Mutex
	used int
}

// acquire counts a chunk, if nothing is counted or it fits below streamWindow.
func (w *window) acquire(chunk int) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.used > 0 && w.used+chunk+chunkOverhead > streamWindow {
		return false
	}
	w.used += chunk + chunkOverhead
	return true
}

// release is called when a chunk is written, or won't be.
func (w *window) release(chunk int) {
	w.mu.Lock()
	w.used -= chunk + chunkOverhead
	w.mu.Unlock()
	select {
	case w.freed <- struct{}{}:
	default:
	}
}
