package cryotest

import (
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// connBuffer is the capacity of one direction in bytes, like a socket's buffers: a writer
// waits when it is full.
const connBuffer = 64 << 10

// Conn is one end of a connection in memory. It behaves like TCP: it buffers,
// can be half-closed, and has deadlines.
type Conn struct {
	in, out       *half
	local, remote net.Addr
	readRate      atomic.Int64 // bytes a second; 0 is no limit
}

var _ net.Conn = (*Conn)(nil)

// Pipe makes a connection and returns its ends.
func Pipe() (*Conn, *Conn) {
	a, b := newHalf(), newHalf()
	client := &net.TCPAddr{IP: net.IPv4(192, 0, 2, 1), Port: 50000}
	server := &net.TCPAddr{IP: net.IPv4(192, 0, 2, 2), Port: 80}
	return &Conn{in: a, out: b, local: client, remote: server},
		&Conn{in: b, out: a, local: server, remote: client}
}

// Freeze makes the connection a black hole in both directions: written data is buffered
// and does not arrive.
func (c *Conn) Freeze() {
	c.in.change(func(h *half) { h.frozen = true })
	c.out.change(func(h *half) { h.frozen = true })
}

// StopReading stops the arrival of data at this end, until ReadOn.
func (c *Conn) StopReading() { c.in.change(func(h *half) { h.frozen = true }) }

// ReadSlowly limits the rate at which data arrives at this end.
func (c *Conn) ReadSlowly(bytesPerSecond int) { c.readRate.Store(int64(bytesPerSecond)) }

// ReadOn ends StopReading.
func (c *Conn) ReadOn() { c.in.change(func(h *half) { h.frozen = false }) }

// Cut resets the connection.
func (c *Conn) Cut() {
	c.in.change(func(h *half) { h.reset = true })
	c.out.change(func(h *half) { h.reset = true })
}

// CloseWrite makes the other end read EOF after the data.
func (c *Conn) CloseWrite() error {
	c.out.change(func(h *half) { h.finished = true })
	return nil
}

// Close closes this end. The other end can still read the data that was written.
func (c *Conn) Close() error {
	c.in.change(func(h *half) { h.readerGone = true })
	c.out.change(func(h *half) { h.finished, h.writerGone = true, true })
	return nil
}

func (c *Conn) Read(p []byte) (int, error) {
	n, err := c.in.read(p)
	if rate := c.readRate.Load(); rate > 0 {
		time.Sleep(time.Duration(n) * time.Second / time.Duration(rate))
	}
	return n, c.opError("read", err)
}

func (c *Conn) Write(p []byte) (int, error) {
	n, err := c.out.write(p)
	return n, c.opError("write", err)
}

func (c *Conn) opError(op string, err error) error {
	if err == nil || errors.Is(err, io.EOF) {
		return err
	}
	return &net.OpError{Op: op, Net: "tcp", Source: c.local, Addr: c.remote, Err: err}
}

// LocalAddr returns a fixed address.
func (c *Conn) LocalAddr() net.Addr { return c.local }

// RemoteAddr returns a fixed address.
func (c *Conn) RemoteAddr() net.Addr { return c.remote }

// SetDeadline bounds reads and writes.
func (c *Conn) SetDeadline(t time.Time) error {
	_ = c.SetReadDeadline(t)
	return c.SetWriteDeadline(t)
}

// SetReadDeadline bounds reads.
func (c *Conn) SetReadDeadline(t time.Time) error { return c.in.readLimit.set(c.in, t) }

// SetWriteDeadline bounds writes.
func (c *Conn) SetWriteDeadline(t time.Time) error { return c.out.writeLimit.set(c.out, t) }

// half is one direction of a connection.
type half struct {
	mu                    sync.Mutex
	changed               *sync.Cond
	data                  []byte
	finished              bool // EOF follows the data
	readerGone            bool
	writerGone            bool
	frozen                bool
	reset                 bool
	readLimit, writeLimit deadline
}

func newHalf() *half {
	h := &half{}
	h.changed = sync.NewCond(&h.mu)
	return h
}

func (h *half) change(f func(*half)) {
	h.mu.Lock()
	defer h.mu.Unlock()
	f(h)
	h.changed.Broadcast()
}

func (h *half) read(p []byte) (int, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for {
		switch {
		case h.readerGone:
			return 0, net.ErrClosed
		case h.reset:
			return 0, syscall.ECONNRESET
		case h.readLimit.passed:
			return 0, os.ErrDeadlineExceeded
		case len(p) == 0:
			return 0, nil
		case len(h.data) > 0 && !h.frozen:
			n := copy(p, h.data)
			h.data = h.data[n:]
			h.changed.Broadcast()
			return n, nil
		case h.finished && !h.frozen:
			return 0, io.EOF
		}
		h.changed.Wait()
	}
}

func (h *half) write(p []byte) (written int, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for {
		switch {
		case h.writerGone:
			return written, net.ErrClosed
		case h.reset:
			return written, syscall.ECONNRESET
		case h.finished, h.readerGone:
			return written, syscall.EPIPE
		case h.writeLimit.passed:
			return written, os.ErrDeadlineExceeded
		}
		n := min(len(p), connBuffer-len(h.data))
		h.data = append(h.data, p[:n]...)
		written, p = written+n, p[n:]
		if n > 0 { // otherwise two waiting writers would wake each other for ever
			h.changed.Broadcast()
		}
		if len(p) == 0 {
			return written, nil
		}
		h.changed.Wait()
	}
}

// deadline wakes the waiting reader or writer when it passes; guarded by its half.
type deadline struct {
	timer  *time.Timer
	passed bool
}

func (d *deadline) set(h *half, t time.Time) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if d.timer != nil {
		d.timer.Stop()
	}
	d.timer, d.passed = nil, false
	switch wait := time.Until(t); {
	case t.IsZero():
	case wait <= 0:
		d.passed = true
	default:
		var timer *time.Timer
		timer = time.AfterFunc(wait, func() {
			h.change(func(*half) { d.passed = d.passed || d.timer == timer })
		})
		d.timer = timer
	}
	h.changed.Broadcast()
	return nil
}
