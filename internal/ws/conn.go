// Package ws reads and writes WebSocket messages (RFC 6455) over a connection that
// gorilla/websocket has opened or upgraded. It is independent of the messages' contents.
//
// gorilla's own reader and writer serve any message from any goroutine in any number of
// frames, and allocate for it. This package writes each message as one frame into the buffer
// of the next write to the network, and reads it into its final memory: see
// docs/development/performance.md, "Design notes".
package ws

import (
	"fmt"
	"io"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// MaxMessage bounds the messages that are read, in bytes: the largest Cryo frame.
const MaxMessage = 8 + 1 + 4 + 4 + 4 + 16<<20

// Sizes that callers may rely on, in bytes.
const (
	GatherBytes = 256 << 10 // maximum size of one gathered write
	WriteDirect = 256 << 10 // smallest payload that is written without a copy, unless it is masked
	ReadDirect  = 16 << 10  // smallest missing part of a payload that is read without a buffer
)

const (
	gatherSome  = 32 << 10  // write buffer for less …
	gatherSmall = 4 << 10   // … and for little data
	readBytes   = 128 << 10 // read buffer while data flows
	readSmall   = 1152      // only read buffer of an idle session: enough for a message of 1 KiB
	pieceBytes  = 16 << 10  // one TLS record; size of a write where the kernel does not count delivered bytes
	maxResponse = 1 << 20   // bytes of the response to an upgrade or to a proxy's CONNECT
)

// Buffers are held only while data flows, so that idle sessions cost little.
var (
	readPool  = bufferPool(readBytes)
	smallPool = bufferPool(gatherSmall)
	somePool  = bufferPool(gatherSome)
	largePool = bufferPool(GatherBytes)
)

// Poisoning is for tests: pooled memory is overwritten when it is returned, so that a later
// use is detected.
var Poisoning atomic.Bool

// Poison overwrites free memory, if Poisoning is on.
func Poison(free []byte) {
	if !Poisoning.Load() || len(free) == 0 {
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

// Conn is one end of a WebSocket. One goroutine may read, and one write; Close may be
// called from any.
type Conn struct {
	t      *transport
	masks  bool                       // this end dialled, so only this end masks
	onPing func(data []byte)          // called on the reading goroutine; data is valid until it returns
	onMore func(size int, final bool) // called on the reading goroutine

	// Owned by the reading goroutine.
	text  bool   // the message is text
	size  uint64 // bytes of the message's fragments so far
	left  int    // unread bytes of the frame
	final bool   // the frame is the message's last
	key   uint32 // mask of the frame; 0 is none
}

// New returns one end of a WebSocket whose handshake is done. masks is true at the end
// that dialled.
func New(c net.Conn, masks bool) *Conn { return newConn(&transport{Conn: c}, masks) }

func newConn(t *transport, masks bool) *Conn {
	t.queue = sendQueueOf(t.Conn)
	return &Conn{t: t, masks: masks, final: true}
}

// Start sets the handlers, which are called on the reading goroutine. onPing is called for a ping,
// with data that is valid until it returns. onMore is called for each frame that begins no message,
// before the next one is read: for a ping or pong, with 0 and false, and for a further fragment of a
// message, with its size, and whether it is the last.
func (c *Conn) Start(onPing func(data []byte), onMore func(size int, final bool)) {
	c.onPing, c.onMore = onPing, onMore
}

// Close closes the network connection without a close handshake.
func (c *Conn) Close() error { return c.t.Close() }

// RemoteAddr returns the peer's network address.
func (c *Conn) RemoteAddr() net.Addr { return c.t.RemoteAddr() }

// Buffered returns the number of bytes in the read buffer.
func (c *Conn) Buffered() int { return len(c.t.ahead) }

// ReleaseBuffer returns a mostly empty large read buffer to its pool. It is called before a
// pause of reads. Reading goroutine.
func (c *Conn) ReleaseBuffer() { c.t.releaseMostlyRead() }

// Interrupt makes the read in progress, or the next one, fail with
// [os.ErrDeadlineExceeded]. No data is lost: after ResumeReads, the message can be read or
// discarded from where it was interrupted. It may be called from any goroutine.
func (c *Conn) Interrupt() { _ = c.t.SetReadDeadline(time.Unix(1, 0)) }

// ResumeReads ends an Interrupt. Reading goroutine.
func (c *Conn) ResumeReads() { _ = c.t.SetReadDeadline(time.Time{}) }

// Drained reports whether the read buffer is empty and small, so that more data is unlikely.
func (c *Conn) Drained() bool { return c.t.drained() }

// LastRead returns the time of the last read from the network. Reading goroutine.
func (c *Conn) LastRead() time.Time { return c.t.readAt }

// Received returns the number of bytes received from the network. It may be called from any
// goroutine.
func (c *Conn) Received() int64 { return c.t.got.Load() }

// DiscardAll reads and drops all data until the connection ends. Reading goroutine.
func (c *Conn) DiscardAll() { c.t.discard() }

// Heard reports whether anything was received since the last call. It may be called from any
// goroutine.
func (c *Conn) Heard() bool { return c.t.heard.Swap(false) }

// SetHeard makes the next Heard return true, after a pause of reads at this end.
func (c *Conn) SetHeard() { c.t.heard.Store(true) }

// Progress returns the number of bytes delivered so far, and of those still undelivered. On
// Linux, bytes on a TCP connection are delivered when the peer's kernel has acknowledged them,
// and those in the send buffer are the backlog. Otherwise they are delivered when this end's
// kernel has accepted them, and only a write in progress is the backlog: the contents of the
// send buffer are unknown. It may be called from any goroutine.
func (c *Conn) Progress() (delivered, backlog int64) {
	if c.t.queue != nil {
		return c.t.queue.progress()
	}
	return c.t.accepted.Load(), c.t.unaccepted.Load()
}

// transport is the network connection below the WebSocket. It reads in large
// pieces while much data arrives, and buffers writes until flush. One
// goroutine reads, and one writes. The handshake uses it as a [net.Conn].
type transport struct {
	net.Conn
	heard atomic.Bool  // bytes were read since it was last cleared
	got   atomic.Int64 // number of bytes read since it was last reset

	queue      *sendQueue   // nil if the kernel does not count delivered bytes; only then these count:
	accepted   atomic.Int64 // bytes that the connection has accepted
	unaccepted atomic.Int64 // bytes of the write in progress that it has not accepted

	response int // bytes of the handshake's response that were read

	// Owned by the reading goroutine.
	ahead  []byte          // unread part of small or of large
	large  *[]byte         // from readPool; nil while small is in use
	small  [readSmall]byte // buffer of an idle session
	bulk   bool            // the last read filled its buffer, so more data is likely
	readAt time.Time       // time of the last read

	// Owned by the goroutine that writes.
	wbuf        *[]byte            // from a pool; gathered for the next flush
	nonblocking *nonblockingWriter // nil where the connection does not support it, and before probed
	probed      bool               // nonblocking is set
}

var errLargeResponse = fmt.Errorf("the response to the upgrade is longer than %d bytes", maxResponse)

// Read is used by the handshake. It returns one byte at a time, so that the handshake
// consumes none of the bytes that follow its response.
func (t *transport) Read(p []byte) (int, error) {
	if t.response == maxResponse {
		return 0, errLargeResponse
	}
	if _, err := t.peek(1); err != nil {
		return 0, err
	}
	n := copy(p[:min(len(p), 1)], t.ahead)
	t.skip(n)
	t.response += n
	return n, nil
}

// peek returns the next n bytes, at most readSmall, and waits for them. They are
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

// drained reports whether the read buffer is empty and small.
func (t *transport) drained() bool { return len(t.ahead) == 0 && t.large == nil }

// fill reads more. It acquires a large buffer when a read has filled the small one, and
// releases it as soon as a read does not fill it: a session that waits for the network
// holds none, unless the last read filled the small buffer exactly.
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
		Poison((*t.large)[:readBytes])
		readPool.Put(t.large)
		t.large = nil
	}
}

// releaseMostlyRead releases a large buffer if less than a quarter of it is unread, and
// copies that to memory of its own: so no byte is copied more than once.
func (t *transport) releaseMostlyRead() {
	if t.large == nil || len(t.ahead) >= readBytes/4 {
		return
	}
	memory := t.small[:]
	if len(t.ahead) > len(memory) {
		memory = make([]byte, len(t.ahead))
	}
	t.ahead = memory[:copy(memory, t.ahead)]
	t.release()
}

// readFull fills p, and returns how much of it is filled.
func (t *transport) readFull(p []byte) (filled int, err error) {
	for {
		n := copy(p[filled:], t.ahead)
		t.skip(n)
		if filled += n; filled == len(p) {
			return filled, nil
		}
		if len(p)-filled < ReadDirect {
			if err := t.fill(); err != nil {
				return filled, err
			}
			continue
		}
		t.release()
		t.bulk = false
		n, err := t.read(p[filled:])
		if err != nil {
			return filled, err
		}
		filled += n
	}
}

// discard reads and drops everything. The bytes read ahead go first: they may fill the
// buffer, and fill needs some of it.
func (t *transport) discard() {
	for t.ahead = nil; t.fill() == nil; {
		t.ahead = nil
	}
	t.release()
}

// read reads from the network, and returns data or an error, never both.
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
	case io.EOF: //nolint:errorlint // net.Conn returns it unwrapped
		// io.EOF would be mistaken for the end of complete data, such as a stream.
		err = io.ErrUnexpectedEOF
	}
	return 0, err
}

// Write is used by the handshake. It does not gather.
func (t *transport) Write(p []byte) (int, error) { return t.write(p) }

// write writes to the network, in pieces unless the kernel counts delivered bytes.
func (t *transport) write(p []byte) (written int, err error) {
	if t.queue != nil {
		return t.Conn.Write(p)
	}
	defer t.unaccepted.Store(0)
	for len(p) > 0 && err == nil {
		t.unaccepted.Store(int64(len(p)))
		var n int
		n, err = t.Conn.Write(p[:min(len(p), pieceBytes)])
		t.accepted.Add(int64(n))
		written += n
		p = p[n:]
	}
	return written, err
}

// flush writes the gathered bytes.
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

// canTryFlush reports whether the connection can be written to without waiting: TCP can,
// TLS can't.
func (t *transport) canTryFlush() bool {
	if !t.probed {
		t.nonblocking, t.probed = newNonblockingWriter(t.Conn), true
	}
	return t.nonblocking != nil
}

// tryFlush writes as much of the gathered bytes as the kernel accepts without waiting. It
// returns false if some are left for flush, or after an error, which flush will return.
func (t *transport) tryFlush() bool {
	n := t.nonblocking.write(*t.wbuf)
	t.accepted.Add(int64(n))
	if n < len(*t.wbuf) {
		*t.wbuf = slices.Delete(*t.wbuf, 0, n)
		return false
	}
	recycle(t.wbuf)
	t.wbuf = nil
	return true
}

// reserve returns the gathered bytes, with capacity for n more, or for as many as one write
// gathers. It flushes first if they would exceed that. Appended bytes count when they are
// passed to gathered.
func (t *transport) reserve(n int) ([]byte, error) {
	if t.wbuf != nil && len(*t.wbuf)+n > GatherBytes {
		if err := t.flush(); err != nil {
			return nil, err
		}
	}
	t.grow(n)
	return *t.wbuf, nil
}

// grow makes capacity for n more bytes in one buffer, or for as many as one write gathers.
func (t *transport) grow(n int) {
	if t.wbuf != nil {
		n += len(*t.wbuf)
	}
	n = min(n, GatherBytes)
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

// gathered sets the gathered bytes: those that reserve has returned, with appended ones.
func (t *transport) gathered(b []byte) { *t.wbuf = b }

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
	Poison(*buf)
	poolFor(cap(*buf)).Put(buf)
}

// socketOf returns the TCP socket of a connection that announces one by a method TCPConn, because it
// passes on data unchanged, such as one that has read a PROXY header. It returns any other
// connection itself.
func socketOf(c net.Conn) net.Conn {
	if over, ok := c.(interface{ TCPConn() (*net.TCPConn, bool) }); ok {
		if socket, ok := over.TCPConn(); ok {
			return socket
		}
	}
	return c
}

// closeWrite half-closes the connection: our last bytes arrive even if the peer's are still
// unread here.
func (t *transport) closeWrite() error {
	if c, ok := t.Conn.(interface{ CloseWrite() error }); ok {
		return c.CloseWrite()
	}
	return nil
}
