package cryo

import (
	"io"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gorilla/websocket"
)

const (
	gatherBytes    = 256 << 10 // written at once, at most
	gatherSmall    = 4 << 10   // … and by a session that has little to say
	readBytes      = 64 << 10  // read at once, while data flows
	wsReadBuffer   = 512       // gorilla's own; an idle session holds no other
	wsWriteBuffer  = 64 << 10  // gorilla's own, pooled; it fragments what is larger
	minBlock       = 512       // payload memory: allocated in blocks of as much as waits to be read …
	maxBlock       = 16 << 10  // … within these bounds, so that a message that is kept long keeps little else
	maxGuess       = 1 << 20   // a frame is guessed to be as large as the last one, up to this
	maxControlText = 123       // text of a WebSocket close frame, and of BYE (peers.md: more ends the Node client)
)

// Buffers are held only while data flows, so that idle sessions cost little.
var (
	wsWritePool = &sync.Pool{}
	readPool    = bufferPool(readBytes)
	smallPool   = bufferPool(gatherSmall)
	largePool   = bufferPool(gatherBytes)
)

func bufferPool(size int) *sync.Pool {
	return &sync.Pool{New: func() any {
		b := make([]byte, 0, size)
		return &b
	}}
}

// transport is the network connection below the WebSocket. Once gathering, it
// collects what is written until flush, and it reads in large pieces as long as
// much comes. One goroutine reads; writes may come from any.
type transport struct {
	net.Conn
	heard   atomic.Bool   // bytes were read since this was last cleared
	sending atomic.Bool   // a piece is being written
	pieces  atomic.Uint64 // written so far

	// Owned by the heartbeat.
	wasSending bool   // at the last beat
	hadWritten uint64 // pieces, at the last beat

	// Owned by the reading goroutine.
	rbuf   *[]byte // from readPool; what was read ahead
	rpos   int
	bulk   bool      // the last read filled what it was given: more is probably there
	readAt time.Time // of the last read
	ended  error     // of the last read, which had nothing more to give

	wmu       sync.Mutex
	gathering bool
	wbuf      *[]byte // from a pool; what waits for flush
}

// gather starts collecting writes. Before it, writes go straight through, as
// the upgrade and TLS need it.
func (t *transport) gather() {
	t.wmu.Lock()
	t.gathering = true
	t.wmu.Unlock()
}

func (t *transport) Read(p []byte) (int, error) {
	if t.rbuf == nil {
		if !t.bulk {
			n, err := t.read(p)
			t.bulk = n == len(p)
			return n, err
		}
		buf := readPool.Get().(*[]byte)
		n, err := t.read((*buf)[:cap(*buf)])
		t.bulk = false // the next read waits without a large buffer
		if n == 0 {
			readPool.Put(buf)
			return 0, err
		}
		*buf = (*buf)[:n]
		t.rbuf, t.rpos = buf, 0
	}
	n := copy(p, (*t.rbuf)[t.rpos:])
	if t.rpos += n; t.rpos == len(*t.rbuf) {
		t.bulk = len(*t.rbuf) >= wsReadBuffer
		readPool.Put(t.rbuf)
		t.rbuf = nil
	}
	return n, nil
}

// read reads from the network, and gives data or an error, never both: gorilla
// would take a message for whole whose first fragment came along with the end.
func (t *transport) read(p []byte) (int, error) {
	n, err := t.Conn.Read(p)
	if n > 0 {
		t.heard.Store(true)
		t.readAt = time.Now()
		return n, nil
	}
	t.ended = err
	return 0, err
}

// waiting is how much has been read ahead.
func (t *transport) waiting() int {
	if t.rbuf == nil {
		return 0
	}
	return len(*t.rbuf) - t.rpos
}

// Write gathers p. The lock is never held while the network is written to: the
// reading goroutine gets here when gorilla closes a WebSocket for an error.
func (t *transport) Write(p []byte) (int, error) {
	t.wmu.Lock()
	if t.gathering && t.gathered()+len(p) <= gatherBytes {
		t.reserve(len(p))
		*t.wbuf = append(*t.wbuf, p...)
		t.wmu.Unlock()
		return len(p), nil
	}
	t.wmu.Unlock()
	if err := t.flush(); err != nil {
		return 0, err
	}
	return t.write(p)
}

// write writes to the network, in pieces, so that it shows whether it gets on.
func (t *transport) write(p []byte) (written int, err error) {
	t.sending.Store(true)
	defer t.sending.Store(false)
	for len(p) > 0 && err == nil {
		var n int
		n, err = t.Conn.Write(p[:min(len(p), gatherBytes)])
		t.pieces.Add(1)
		written += n
		p = p[n:]
	}
	return written, err
}

// alive tells whether the peer gave a sign of life since the last beat: it was
// heard, or it took what was being written then. A large message may keep a slow
// line busy for longer than silence is borne, with our pings behind it. What is
// written without waiting proves nothing, the kernel takes that.
func (t *transport) alive() bool {
	sending, written := t.sending.Load(), t.pieces.Load()
	took := t.wasSending && written != t.hadWritten
	t.wasSending, t.hadWritten = sending, written
	return t.heard.Swap(false) || took
}

// flush writes what was gathered. Only one goroutine at a time may call it.
func (t *transport) flush() error {
	t.wmu.Lock()
	buf := t.wbuf
	t.wbuf = nil
	t.wmu.Unlock()
	if buf == nil {
		return nil
	}
	_, err := t.write(*buf)
	recycle(buf)
	return err
}

func (t *transport) gathered() int {
	if t.wbuf == nil {
		return 0
	}
	return len(*t.wbuf)
}

// reserve makes room for n bytes more: first a small buffer, then a large one.
func (t *transport) reserve(n int) {
	size := t.gathered() + n
	if t.wbuf != nil && size <= cap(*t.wbuf) {
		return
	}
	pool := smallPool
	if size > gatherSmall {
		pool = largePool
	}
	buf := pool.Get().(*[]byte)
	*buf = (*buf)[:0]
	if t.wbuf != nil {
		*buf = append(*buf, *t.wbuf...)
		recycle(t.wbuf)
	}
	t.wbuf = buf
}

func recycle(buf *[]byte) {
	if cap(*buf) == gatherSmall {
		smallPool.Put(buf)
	} else {
		largePool.Put(buf)
	}
}

// SetWriteDeadline does nothing: gorilla calls it for every frame, and what
// bounds our writes is the end of the session, which closes the connection.
func (t *transport) SetWriteDeadline(time.Time) error { return nil }

// closeWrite half-closes the connection: our last bytes arrive even where the
// peer's are still unread here.
func (t *transport) closeWrite() error {
	if c, ok := t.Conn.(interface{ CloseWrite() error }); ok {
		return c.CloseWrite()
	}
	return nil
}

// blocks hands out memory for received frames, never twice.
type blocks struct {
	free []byte
	last int // size of the last frame: the next is often as large
}

// readFrame reads the rest of a WebSocket message, behind its head, into memory
// that is the frame's own from then on.
func (b *blocks) readFrame(head []byte, r io.Reader, t *transport) ([]byte, error) {
	if cap(b.free) < max(minBlock, min(b.last+1, maxGuess)) {
		size := min(max(t.waiting(), minBlock), maxBlock)
		b.free = make([]byte, 0, max(size, min(b.last+1, maxGuess)))
	}
	frame := b.free[:copy(b.free[:headerSize], head)]
	for {
		n, err := r.Read(frame[len(frame):cap(frame)])
		frame = frame[:len(frame)+n]
		if err == io.EOF {
			break
		}
		if err != nil {
			return nil, err
		}
		if len(frame) == cap(frame) {
			grown := make([]byte, len(frame), min(2*len(frame), maxFrame+1))
			copy(grown, frame)
			frame = grown
		}
	}
	b.last = len(frame)
	if len(frame) < cap(frame)/2 && cap(frame) > maxBlock {
		// The guess was wrong: a small frame must not keep a large block.
		b.free = nil
		return slices.Clone(frame), nil
	}
	b.free = frame[len(frame):]
	if cap(frame) > maxBlock || cap(b.free) < minBlock {
		b.free = nil // what is left is of no use, and would keep all of the block while the session is idle
	}
	return slices.Clip(frame), nil
}

// newWebSocketDialer and newUpgrader agree on buffers and on no compression.
func newWebSocketDialer() *websocket.Dialer {
	return &websocket.Dialer{
		ReadBufferSize:  wsReadBuffer,
		WriteBufferSize: wsWriteBuffer,
		WriteBufferPool: wsWritePool,
	}
}

func newUpgrader() *websocket.Upgrader {
	return &websocket.Upgrader{
		ReadBufferSize:  wsReadBuffer,
		WriteBufferSize: wsWriteBuffer,
		WriteBufferPool: wsWritePool,
	}
}
