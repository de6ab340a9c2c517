package ws

import (
	"encoding/binary"
	"math/bits"
	"slices"
	"strconv"
	"unicode/utf8"

	"github.com/gorilla/websocket"
)

// Bits and values of a frame's first two bytes.
const (
	finalBit  = 0x80
	maskBit   = 0x80
	opcode    = 0x0F
	lengthOf  = 0x7F
	length16  = 126 // two bytes of length follow
	length64  = 127 // eight do
	maskBytes = 4

	opContinuation = 0

	maxControl   = 125 // bytes of a control frame's payload
	maxFrameHead = 2 + 8 + maskBytes
)

// Error is a violation of RFC 6455 by the peer.
type Error struct {
	Code    int    // close code: 1002, or 1009 for a message that is too long
	Problem string // description of the violation
}

func (e *Error) Error() string { return "websocket: " + e.Problem }

var errTooLong = &Error{websocket.CloseMessageTooBig, "read limit exceeded"}

func broken(problem string) error { return &Error{websocket.CloseProtocolError, problem} }

// Next goes to the next message. The one before must be read to its end, or discarded. A
// close frame returns a [*websocket.CloseError], and a violation of RFC 6455 an [*Error].
func (c *Conn) Next() error {
	c.size = 0
	return c.nextFrame(false)
}

// Text reports whether the message is text.
func (c *Conn) Text() bool { return c.text }

// Size returns the size of the message's fragments so far, in bytes.
func (c *Conn) Size() int { return int(c.size) }

// Final reports whether the present fragment is the message's last.
func (c *Conn) Final() bool { return c.final }

// Left returns the number of unread bytes of the present fragment.
func (c *Conn) Left() int { return c.left }

// nextFrame goes to the next data frame, and processes the control frames before it. A
// close frame returns a [*websocket.CloseError].
func (c *Conn) nextFrame(continues bool) error {
	for {
		head, err := c.t.peek(2)
		if err != nil {
			return err
		}
		first, second := head[0], head[1]
		if err := c.check(first, second, continues); err != nil {
			return err
		}
		size := 2
		switch second & lengthOf {
		case length16:
			size += 2
		case length64:
			size += 8
		}
		if head, err = c.t.peek(size); err != nil {
			return err
		}
		length := uint64(second & lengthOf)
		switch length {
		case length16:
			length = uint64(binary.BigEndian.Uint16(head[2:]))
		case length64:
			length = binary.BigEndian.Uint64(head[2:])
		}
		if length > MaxMessage {
			return errTooLong
		}
		c.key = 0
		if second&maskBit != 0 {
			if head, err = c.t.peek(size + maskBytes); err != nil {
				return err
			}
			c.key = binary.LittleEndian.Uint32(head[size:])
			size += maskBytes
		}
		switch op := int(first & opcode); op {
		case opContinuation, websocket.TextMessage, websocket.BinaryMessage:
			if c.size+length > MaxMessage {
				return errTooLong
			}
			c.t.skip(size)
			c.text = c.text && continues || op == websocket.TextMessage
			c.size += length
			c.left, c.final = int(length), first&finalBit != 0
			if continues {
				c.onMore(c.left, c.final)
			}
			return nil
		default:
			if err := c.control(op, size, int(length)); err != nil {
				return err
			}
		}
	}
}

// check validates a frame's first two bytes.
func (c *Conn) check(first, second byte, continues bool) error {
	for i, name := range []string{"RSV1", "RSV2", "RSV3"} {
		if first&(0x40>>i) != 0 {
			return broken(name + " set")
		}
	}
	switch op := int(first & opcode); op {
	case websocket.CloseMessage, websocket.PingMessage, websocket.PongMessage:
		if second&lengthOf > maxControl {
			return broken("len > 125 for control")
		}
		if first&finalBit == 0 {
			return broken("FIN not set on control")
		}
	case websocket.TextMessage, websocket.BinaryMessage:
		if continues {
			return broken("data before FIN")
		}
	case opContinuation:
		if !continues {
			return broken("continuation after FIN")
		}
	default:
		return broken("bad opcode " + strconv.Itoa(op))
	}
	if second&maskBit != 0 == c.masks {
		return broken("bad MASK")
	}
	return nil
}

// control processes a control frame whose head is decoded.
func (c *Conn) control(op, head, length int) error {
	frame, err := c.t.peek(head + length)
	if err != nil {
		return err
	}
	c.t.skip(head + length)
	payload := frame[head:]
	mask(payload, c.key)
	switch op {
	case websocket.PingMessage:
		c.onPing(payload)
	case websocket.CloseMessage:
		closed := &websocket.CloseError{Code: websocket.CloseNoStatusReceived}
		if len(payload) == 1 {
			return broken("close frame of one byte")
		}
		if len(payload) >= 2 {
			closed.Code, closed.Text = int(binary.BigEndian.Uint16(payload)), string(payload[2:])
			if !mayClose(closed.Code) {
				return broken("bad close code " + strconv.Itoa(closed.Code))
			}
			if !utf8.ValidString(closed.Text) {
				return broken("invalid utf8 payload in close frame")
			}
		}
		return closed
	}
	c.onMore(0, false)
	return nil
}

const (
	closeReserved   = 1004 // has no meaning yet
	closeBadGateway = 1014 // registered at IANA after RFC 6455; gorilla does not know it
)

// mayClose reports whether a close frame may carry the code: those of RFC 6455, 7.4, and
// those that IANA has registered since.
func mayClose(code int) bool {
	switch code {
	case closeReserved, websocket.CloseNoStatusReceived, websocket.CloseAbnormalClosure:
		return false
	default:
		return code >= websocket.CloseNormalClosure && code <= closeBadGateway || code >= 3000 && code <= 4999
	}
}

// ReadHead appends the message's next bytes, up to n or its end.
func (c *Conn) ReadHead(b []byte, n int) ([]byte, error) {
	for n > 0 {
		if c.left == 0 {
			if c.final {
				break
			}
			if err := c.NextFragment(); err != nil {
				return b, err
			}
		}
		part := min(n, c.left)
		n -= part
		b = slices.Grow(b, part)[:len(b)+part]
		if err := c.ReadFull(b[len(b)-part:]); err != nil {
			return b, err
		}
	}
	return b, nil
}

// ReadFull fills b, which is at most the rest of the fragment.
func (c *Conn) ReadFull(b []byte) error {
	n, err := c.t.readFull(b)
	c.key = mask(b[:n], c.key)
	c.left -= n
	return err
}

// NextFragment goes to the next fragment of the message. The one before must be read to
// its end, and not be the last.
func (c *Conn) NextFragment() error { return c.nextFrame(true) }

// Discard reads and drops the rest of the message.
func (c *Conn) Discard() error {
	for {
		for c.left > 0 {
			if len(c.t.ahead) == 0 {
				if err := c.t.fill(); err != nil {
					return err
				}
			}
			n := min(c.left, len(c.t.ahead))
			c.t.skip(n)
			c.left -= n
		}
		if c.final {
			return nil
		}
		if err := c.NextFragment(); err != nil {
			return err
		}
	}
}

// mask applies or removes a key, 32 bytes at a time where possible, and returns the key rotated
// for the bytes that follow.
func mask(b []byte, key uint32) uint32 {
	if key == 0 {
		return 0
	}
	wide := uint64(key)<<32 | uint64(key)
	for len(b) >= 32 {
		binary.LittleEndian.PutUint64(b, binary.LittleEndian.Uint64(b)^wide)
		binary.LittleEndian.PutUint64(b[8:], binary.LittleEndian.Uint64(b[8:])^wide)
		binary.LittleEndian.PutUint64(b[16:], binary.LittleEndian.Uint64(b[16:])^wide)
		binary.LittleEndian.PutUint64(b[24:], binary.LittleEndian.Uint64(b[24:])^wide)
		b = b[32:]
	}
	for i := range b {
		b[i] ^= byte(key)
		key = bits.RotateLeft32(key, -8)
	}
	return key
}
