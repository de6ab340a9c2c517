package ws

import (
	"encoding/binary"
	"math/rand/v2"
)

// Copies reports whether a payload of n bytes is copied into the write buffer; others are
// written from the caller's memory.
func (c *Conn) Copies(n int) bool { return c.masks || n < WriteDirect }

// Write gathers a message of two parts, as one frame. head and the frame's own header must
// fit into GatherBytes.
func (c *Conn) Write(op int, head, payload []byte) error {
	size := maxFrameHead + len(head)
	if c.Copies(len(payload)) {
		size += len(payload)
	}
	b, err := c.t.reserve(size)
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
		// A payload larger than the buffer is written in pieces.
		if err := c.t.flush(); err != nil {
			return err
		}
		if b, err = c.t.reserve(len(payload)); err != nil {
			return err
		}
		start = 0
	}
}

// appendHead begins a frame with a payload of size bytes, and returns the key of its mask.
func (c *Conn) appendHead(b []byte, op, size int) (_ []byte, key uint32) {
	second := byte(0)
	if c.masks {
		second, key = maskBit, rand.Uint32() //nolint:gosec // not a secret; ChaCha8 is not predictable from outside
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

// Grow makes capacity for n more bytes to be gathered, or for as many as one write gathers.
func (c *Conn) Grow(n int) { c.t.grow(n) }

// MaxHead is the size of the longest header of a frame, in bytes.
const MaxHead = maxFrameHead

// Flush writes the gathered bytes to the network.
func (c *Conn) Flush() error { return c.t.flush() }

// CanTryFlush reports whether the connection can be written to without waiting: TCP can,
// TLS can't.
func (c *Conn) CanTryFlush() bool { return c.t.canTryFlush() }

// TryFlush writes as much of the gathered bytes as the kernel accepts without waiting. It
// reports false if some are left for Flush, or after an error, which Flush will return.
func (c *Conn) TryFlush() bool { return c.t.tryFlush() }

// CloseWrite half-closes the connection: our last bytes arrive even if the peer's are still
// unread here.
func (c *Conn) CloseWrite() error { return c.t.closeWrite() }
