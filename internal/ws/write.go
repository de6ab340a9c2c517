package ws

import (
	"encoding/binary"
	"math/rand/v2"
)

// Copies tells whether a payload of so many bytes is copied into what is gathered;
// others are written from where they are.
func (c *Conn) Copies(n int) bool { return c.masks || n < WriteDirect }

// Write gathers a message of two parts, as one frame. The head is short: with the frame's
// own, it fits into what is written at once.
func (c *Conn) Write(op int, head, payload []byte) error {
	room := maxFrameHead + len(head)
	if c.Copies(len(payload)) {
		room += len(payload)
	}
	b, err := c.t.reserve(room)
	if err != nil {
		return err
	}
	b, key := c.appendHead(b, op, len(head)+len(payload))
	start := len(b)
	b = append(b, head...)
	if !c.Copies(len(payload)) {
		c.t.gathered(b)
		if err := c.t.flush(); err != nil {
			return err
		}
		_, err := c.t.write(payload)
		return err
	}
	for {
		n := min(len(payload), cap(b)-len(b))
		b = append(b, payload[:n]...)
		key = mask(b[start:], key)
		c.t.gathered(b)
		if payload = payload[n:]; len(payload) == 0 {
			return nil
		}
		// One larger than the buffer goes out in pieces.
		if err := c.t.flush(); err != nil {
			return err
		}
		if b, err = c.t.reserve(len(payload)); err != nil {
			return err
		}
		start = 0
	}
}

// appendHead begins a frame of so many bytes, and returns the key of its mask.
func (c *Conn) appendHead(b []byte, op, size int) (_ []byte, key uint32) {
	second := byte(0)
	if c.masks {
		second, key = maskBit, rand.Uint32() //nolint:gosec // not a secret; ChaCha8 can't be foreseen from outside
	}
	b = append(b, finalBit|byte(op))
	switch {
	case size <= maxControl:
		b = append(b, second|byte(size))
	case size < 1<<16:
		b = binary.BigEndian.AppendUint16(append(b, second|length16), uint16(size))
	default:
		b = binary.BigEndian.AppendUint64(append(b, second|length64), uint64(size))
	}
	if c.masks {
		b = binary.LittleEndian.AppendUint32(b, key)
	}
	return b, key
}

// MakeRoom takes the buffer for so many more bytes to be gathered, or for as many as are
// written at once.
func (c *Conn) MakeRoom(n int) { c.t.makeRoom(n) }

// MaxHead is the most bytes that the head of a frame takes.
const MaxHead = maxFrameHead

// Flush writes what was gathered to the network.
func (c *Conn) Flush() error { return c.t.flush() }

// CanTryFlush reports whether the connection can be written to without waiting: TCP can,
// TLS can't.
func (c *Conn) CanTryFlush() bool { return c.t.canTryFlush() }

// TryFlush writes what was gathered, as far as that needs no waiting. It reports false
// when some is left for Flush, or there was an error, which Flush will meet too.
func (c *Conn) TryFlush() bool { return c.t.tryFlush() }

// CloseWrite half-closes the connection: our last bytes arrive even where the peer's are
// still unread here.
func (c *Conn) CloseWrite() error { return c.t.closeWrite() }
