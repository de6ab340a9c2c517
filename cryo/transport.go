package cryo

import (
	"errors"
	"io"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gorilla/websocket"

	"github.com/cryo-connect/cryo-connect/internal/wire"
)

const (
	gatherBytes    = 256 << 10 // written at once, at most
	gatherSome     = 32 << 10  // … by a session that has less to say, which may be slow to take it
	gatherSmall    = 4 << 10   // … and by one that has little
	writeDirect    = 256 << 10 // a payload of so much is written from where it is, unless it is masked
	readBytes      = 128 << 10 // read at once, while data flows: 1.3 times as many messages of 16 KiB as with half of it
	readSmall      = 1152      // … and by a session that waits: a message of 1 KiB. It holds no other memory for that
	readDirect     = 16 << 10  // what a message lacks by so much is read without a buffer
	minBlock       = 512       // payload memory: allocated in blocks of as much as waits to be read …
	maxBlock       = 16 << 10  // … within these bounds, so that a message that is kept long keeps little else
	maxTrusted     = 128 << 10 // memory is given for messages that have not come yet, up to so much …
	trustFactor    = 16        // … and then up to so many times what has come: 2.4 times as many messages of 1 MiB as by doubling
	maxAnswer      = 1 << 20   // bytes of an answer to an upgrade, or to a proxy's CONNECT
	maxControlText = 123       // text of a WebSocket close frame, and of BYE (peers.md: more ends the Node client)
)

// Buffers are held only while data flows, so that idle sessions cost little.
var (
	readPool  = bufferPool(readBytes)
	smallPool = bufferPool(gatherSmall)
	somePool  = bufferPool(gatherSome)
	largePool = bufferPool(gatherBytes)
	chunkPool = sync.Pool{New: func() any { return new(chunkMemory) }}
)

// chunkMemory holds one frame of a stream, with chunks of the default size or
// down to half of it, and is used again when it was read. That spares a stream a
// fresh 64 KiB for each of its chunks, which have to be zeroed and miss the caches:
// 1.4 times as many.
type chunkMemory [wire.ChunkHeaderSize + DefaultChunkBytes]byte

// fitsChunk tells whether a frame of n bytes fits, and uses more than half: what
// is counted as held is to be near to what is in memory.
func fitsChunk(n int) bool { return n > len(chunkMemory{})/2 && n <= len(chunkMemory{}) }

func (m *chunkMemory) giveBack() {
	if m != nil {
		poison(m[:])
		chunkPool.Put(m)
	}
}

// poisoned is set by tests: memory that is used again is overwritten as soon as it is
// free, so that whoever still uses it is found.
var poisoned atomic.Bool

func poison(free []byte) {
	if !poisoned.Load() || len(free) == 0 {
		return
	}
	free[0] = 0xDB
	for n := 1; n < len(free); n *= 2 {
		copy(free[n:], free[:n])
	}
}

func bufferPool(size int) *sync.Pool {
	return &sync.Pool{New: func() any {
		b := make([]byte, 0, size)
		return &b
	}}
}

// transport is the network connection below the WebSocket. It reads in large
// pieces as long as much comes, and collects what is written until flush. One
// goroutine reads, and one writes. The handshake uses it as a [net.Conn].
type transport struct {
	net.Conn
	heard   atomic.Bool   // bytes were read since this was last cleared
	got     atomic.Int64  // bytes that were read since this was last cleared
	sending atomic.Bool   // a piece is being written
	pieces  atomic.Uint64 // written so far

	// Owned by the heartbeat.
	wasSending bool   // at the last beat
	hadWritten uint64 // pieces, at the last beat

	answered int // bytes that the handshake has read

	// Owned by the reading goroutine.
	ahead  []byte          // what was read ahead: a part of small, or of large
	large  *[]byte         // from readPool; nil while small is read into
	small  [readSmall]byte // memory of a session that waits
	bulk   bool            // the last read filled what it was given: more is probably there
	readAt time.Time       // of the last read

	// Owned by the writing goroutine, or by who writes in its place.
	wbuf  *[]byte // from a pool; what waits for flush
	once  *atOnce // nil where the connection can't, and before it was asked
	asked bool    // whether the connection can
}

// Read is the handshake's: a byte at a time, so that it takes nothing of what
// follows it.
func (t *transport) Read(p []byte) (int, error) {
	if t.answered == maxAnswer {
		return 0, errors.New("the answer is too long")
	}
	if _, err := t.peek(1); err != nil {
		return 0, err
	}
	n := copy(p[:min(len(p), 1)], t.ahead)
	t.skip(n)
	t.answered += n
	return n, nil
}

// peek gives the next n bytes, at most readSmall, and waits for them. They are
// valid until more is read.
func (t *transport) peek(n int) ([]byte, error) {
	for len(t.ahead) < n {
		if err := t.fill(); err != nil {
			return nil, err
		}
	}
	return t.ahead[:n], nil
}

func (t *transport) skip(n int) { t.ahead = t.ahead[n:] }

// waiting is how much has been read ahead.
func (t *transport) waiting() int { return len(t.ahead) }

// drained tells whether all that has come is read, and was little.
func (t *transport) drained() bool { return len(t.ahead) == 0 && t.large == nil }

// fill reads more. A large buffer is taken when a read has filled the small one,
// and given back as soon as a read leaves room in it: whoever waits for the
// network for long doesn't hold one, unless what came fills the small one exactly.
func (t *transport) fill() error {
	buf := t.small[:]
	switch {
	case len(t.ahead) == 0 && t.bulk:
		if t.large == nil {
			t.large = readPool.Get().(*[]byte)
		}
		buf = (*t.large)[:readBytes]
	case len(t.ahead) == 0:
		t.release()
	case t.large != nil:
		buf = (*t.large)[:readBytes]
	}
	kept := copy(buf, t.ahead) // a part of a frame's head, if anything
	n, err := t.read(buf[kept:])
	t.bulk = n == len(buf)-kept
	t.ahead = buf[:kept+n]
	return err
}

func (t *transport) release() {
	if t.large != nil {
		poison((*t.large)[:readBytes])
		readPool.Put(t.large)
		t.large = nil
	}
}

// readFull fills p.
func (t *transport) readFull(p []byte) error {
	for {
		n := copy(p, t.ahead)
		t.skip(n)
		if p = p[n:]; len(p) == 0 {
			return nil
		}
		if len(p) < readDirect {
			if err := t.fill(); err != nil {
				return err
			}
			continue
		}
		t.release()
		t.bulk = false
		n, err := t.read(p)
		if err != nil {
			return err
		}
		p = p[n:]
	}
}

// discard reads all that comes, and forgets it.
func (t *transport) discard() {
	for t.fill() == nil {
		t.ahead = nil
	}
	t.release()
}

// read reads from the network, and gives data or an error, never both.
func (t *transport) read(p []byte) (int, error) {
	n, err := t.Conn.Read(p)
	if n > 0 {
		t.heard.Store(true)
		t.got.Add(int64(n))
		t.readAt = time.Now()
		return n, nil
	}
	switch err {
	case nil:
		err = io.ErrNoProgress
	case io.EOF: //nolint:errorlint // a connection's own
		// Nobody may take it for the end of something whole, such as a stream.
		err = io.ErrUnexpectedEOF
	}
	return 0, err
}

// Write is the handshake's, and writes at once.
func (t *transport) Write(p []byte) (int, error) { return t.write(p) }

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

// flush writes what was gathered.
func (t *transport) flush() error {
	buf := t.wbuf
	t.wbuf = nil
	if buf == nil {
		return nil
	}
	_, err := t.write(*buf)
	recycle(buf)
	return err
}

// canWriteAtOnce tells whether the connection can be written to without waiting:
// TCP can, TLS can't.
func (t *transport) canWriteAtOnce() bool {
	if !t.asked {
		t.once, t.asked = newAtOnce(t.Conn), true
	}
	return t.once != nil
}

// flushAtOnce writes what was gathered, as far as that needs no waiting. It
// reports false when some is left for flush, or there was an error, which flush
// will meet too.
func (t *transport) flushAtOnce() bool {
	n := t.once.write(*t.wbuf)
	if n > 0 {
		t.pieces.Add(1)
	}
	if n < len(*t.wbuf) {
		*t.wbuf = slices.Delete(*t.wbuf, 0, n)
		return false
	}
	recycle(t.wbuf)
	t.wbuf = nil
	return true
}

// reserve gives what is gathered, with room for n bytes more, or as many as are
// written at once. It may have to be flushed for that. What is appended counts
// when gathered is told of it.
func (t *transport) reserve(n int) ([]byte, error) {
	if t.wbuf != nil && len(*t.wbuf)+n > gatherBytes {
		if err := t.flush(); err != nil {
			return nil, err
		}
	}
	t.makeRoom(n)
	return *t.wbuf, nil
}

// makeRoom sees that so much more can be gathered in one buffer, or as much as is
// written at once.
func (t *transport) makeRoom(n int) {
	if t.wbuf != nil {
		n += len(*t.wbuf)
	}
	n = min(n, gatherBytes)
	if t.wbuf != nil && n <= cap(*t.wbuf) {
		return
	}
	buf := poolFor(n).Get().(*[]byte)
	*buf = (*buf)[:0]
	if t.wbuf != nil {
		*buf = append(*buf, *t.wbuf...)
		recycle(t.wbuf)
	}
	t.wbuf = buf
}

// gathered takes back what reserve gave, with what was appended.
func (t *transport) gathered(b []byte) { *t.wbuf = b }

// writeThrough writes what was gathered, and a payload behind it.
func (t *transport) writeThrough(payload []byte) error {
	buf := t.wbuf
	t.wbuf = nil
	first := min(len(payload), gatherBytes-len(*buf)) // one piece for alive
	pieces := net.Buffers{*buf, payload[:first]}
	t.sending.Store(true)
	_, err := pieces.WriteTo(t.Conn)
	t.pieces.Add(1)
	t.sending.Store(false)
	recycle(buf)
	if err == nil {
		_, err = t.write(payload[first:])
	}
	return err
}

func poolFor(size int) *sync.Pool {
	switch {
	case size <= gatherSmall:
		return smallPool
	case size <= gatherSome:
		return somePool
	default:
		return largePool
	}
}

func recycle(buf *[]byte) {
	poison(*buf)
	poolFor(cap(*buf)).Put(buf)
}

// closeWrite half-closes the connection: our last bytes arrive even where the
// peer's are still unread here.
func (t *transport) closeWrite() error {
	if c, ok := t.Conn.(interface{ CloseWrite() error }); ok {
		return c.CloseWrite()
	}
	return nil
}

// blocks hands out memory for received frames: 1.05 times as many messages of up to
// 1 KiB as with an allocation each. The memory of a frame is handed out again for the
// next one, unless keep is called between the two. Nothing is ever returned, so no
// path through the reading of a frame can return the memory of another one.
type blocks struct {
	free  []byte
	taken int // bytes at the start of free, in use by the frame that is handled now
}

// take returns empty memory for a frame of n bytes, or for a part of one that is
// large. waiting is how many more bytes wait to be read.
func (b *blocks) take(n, waiting int) []byte {
	n = min(n, maxTrusted)
	b.taken = 0
	if n > maxBlock/2 {
		return make([]byte, 0, n)
	}
	if n > len(b.free) {
		b.free = make([]byte, max(n, min(max(waiting, minBlock), maxBlock)))
	}
	memory := b.free[:0:n]
	if waiting <= n && len(b.free)-n > minBlock {
		b.free = nil // nothing follows: an idle session keeps no large block
	} else {
		b.taken = n
	}
	poison(memory[:n])
	return memory
}

// keep leaves the memory that was taken last to whoever has it now.
func (b *blocks) keep() { b.free, b.taken = b.free[b.taken:], 0 }

// newWebSocketDialer and newUpgrader agree on small buffers, as only the
// handshake uses them, and on no compression.
func newWebSocketDialer() *websocket.Dialer {
	return &websocket.Dialer{ReadBufferSize: readSmall, WriteBufferSize: readSmall}
}

func newUpgrader() *websocket.Upgrader {
	return &websocket.Upgrader{ReadBufferSize: readSmall, WriteBufferSize: readSmall}
}
