package cryo

import (
	"fmt"
	"sync"

	"github.com/cryo-connect/cryo-connect/internal/wire"
	"github.com/cryo-connect/cryo-connect/internal/ws"
)

const (
	// maxControl bounds what is read of the payload of a frame that is no data, in bytes:
	// names end at 1,024 bytes, and longer texts are truncated.
	maxControl = 2 << 10
	// smallPayload is the largest payload that needs no capacity of its own until it is
	// whole, in bytes: a chunk of the default size is one.
	smallPayload = DefaultChunkBytes
	// mediumPayload is the largest payload of a message in fragments that can do without
	// the one slot for larger ones, in bytes.
	mediumPayload = 1 << 20
	// trustFactor is how many times what has come of a larger payload is allocated for the
	// rest of it: its length is the peer's word.
	trustFactor = 16
)

// chunkBuffer holds one chunk of a stream, of the default size or down to half of it, and
// is used again when that was read. It spares a stream a fresh 64 KiB a chunk, which would
// have to be zeroed and miss the caches.
type chunkBuffer [DefaultChunkBytes]byte

var chunkPool = sync.Pool{New: func() any { return new(chunkBuffer) }}

func (b *chunkBuffer) release() {
	if b != nil {
		ws.Poison(b[:])
		chunkPool.Put(b)
	}
}

// received is a frame that was read. It owns the memory of its payload and what of the
// receive buffer is reserved for that, until they are taken or dropped. The payload of a
// frame that is no data, or that was not admitted, is valid until the next one is read.
type received struct {
	wire.Frame
	reservation reservation
	pooled      *chunkBuffer // the payload's memory, if it is of the pool
	decision    decision     // about data
}

// detach moves the payload out, with all that belongs to it.
func (in *received) detach() (payload []byte, h reservation, pooled *chunkBuffer) {
	payload, h, pooled = in.Payload, in.reservation, in.pooled
	in.Payload, in.reservation, in.pooled = nil, reservation{}, nil
	return payload, h, pooled
}

// release gives up what nobody took.
func (in *received) release() {
	_, h, pooled := in.detach()
	pooled.release()
	h.release()
}

// frameReader reads the frames of a session. Reading goroutine.
type frameReader struct {
	conn    *ws.Conn
	sid     uint64
	limit   *receiveLimit
	isOurs  func(number uint32) bool // reports whether a number is one of ours
	head    [wire.MaxHeader]byte
	control [32]byte // a payload that is no data, if it is as small
}

// next reads a frame. A [*ProtocolError] is the peer's, and the rest of the message must
// be discarded then; any other error is the connection's. in must be dropped in any case.
func (r *frameReader) next(in *received) error {
	*in = received{}
	if err := r.conn.Next(); err != nil {
		return err
	}
	if r.conn.Text() {
		return &ProtocolError{Problem: "text message on the WebSocket"}
	}
	head, err := r.conn.ReadHead(r.head[:0], wire.HeaderSize)
	if err == nil {
		head, err = r.conn.ReadHead(head, wire.HeaderLen(head)-len(head))
	}
	if err != nil {
		return err
	}
	in.Frame, err = wire.DecodeHeader(head, r.conn.Size())
	switch {
	case err != nil:
		return &ProtocolError{Err: err}
	case in.SID != r.sid:
		return &ProtocolError{Problem: fmt.Sprintf("%v frame for the foreign session %d", in.Type, in.SID)}
	case !in.Type.IsData(), in.Type == wire.Error && r.isOurs(in.Ack):
		return r.readControl(in)
	}
	if err := r.readData(in); err != nil || in.decision == admitted {
		return err
	}
	in.release()
	if in.Type == wire.Error { // for the log
		return r.readControl(in)
	}
	return r.conn.Discard()
}

// readControl reads what is needed of a frame that must not wait for capacity.
func (r *frameReader) readControl(in *received) (err error) {
	if in.Type.HasPayload() {
		if in.Payload, err = r.conn.ReadHead(r.control[:0], maxControl); err != nil {
			return err
		}
	}
	if err := r.conn.Discard(); err != nil {
		return err
	}
	return r.check(in)
}

// check returns what is wrong with a frame as far as it has come.
func (r *frameReader) check(in *received) error {
	if err := in.Check(r.conn.Size()); err != nil {
		return &ProtocolError{Err: err}
	}
	return nil
}

// readData reads the payload of a data frame into memory of its own, of exactly its size,
// if it is admitted. Capacity is reserved before memory is allocated: of the receive buffer
// where all of the payload has come already, else as a part of what is coming in.
func (r *frameReader) readData(in *received) error {
	var part partial
	defer r.limit.complete(&part)
	size, final := r.conn.Left(), r.conn.Final()
	memory := size
	pooled := final && in.Type == wire.TxChunk && size > len(chunkBuffer{})/2 && size <= len(chunkBuffer{})
	if pooled { // costs the whole buffer
		memory = len(chunkBuffer{})
	}
	whole, reserved := final && size <= r.conn.Buffered(), 0
	if whole {
		reserved = memory + overhead(in.Type)
	}
	if in.decision = r.limit.admit(in, &part, reserved); in.decision != admitted {
		return nil
	}
	var payload []byte
	if pooled {
		in.pooled = chunkPool.Get().(*chunkBuffer)
		payload = in.pooled[:0]
	}
	for {
		if !whole {
			if in.decision = r.limit.reserve(&in.Frame, &part, size, final); in.decision != admitted {
				return nil
			}
		}
		for r.conn.Left() > 0 {
			if len(payload) == cap(payload) {
				if part.large() && !r.limit.wants(&in.Frame) { // the session is ending
					in.decision = unwanted
					return nil
				}
				more := max(min(size, smallPayload), trustFactor*len(payload))
				payload = append(make([]byte, 0, min(more, allowance(size, final))), payload...)
			}
			part := payload[len(payload):min(cap(payload), len(payload)+r.conn.Left())]
			if err := r.conn.ReadFull(part); err != nil {
				return err
			}
			payload = payload[:len(payload)+len(part)]
		}
		if final {
			break
		}
		if err := r.conn.NextFragment(); err != nil {
			return err
		}
		size, final = size+r.conn.Left(), r.conn.Final()
		if size > wire.MaxPayload {
			return &ProtocolError{Err: wire.PayloadTooLarge(in.Type, r.conn.Size())}
		}
	}
	if !pooled {
		memory = size
		if cap(payload) > size || payload == nil { // of many fragments, or of none
			payload = append(make([]byte, 0, size), payload...)
		}
	}
	in.Payload = payload
	r.limit.count(&in.reservation, memory+overhead(in.Type))
	return nil
}

// allowance is how much memory a payload may take of which so much has been announced: what
// is final is known, and the rest of a message in fragments is reserved in steps.
func allowance(size int, final bool) int {
	switch {
	case final:
		return size
	case size <= smallPayload:
		return smallPayload
	case size <= mediumPayload:
		return mediumPayload
	default:
		return wire.MaxPayload
	}
}

// overhead is what a received frame costs beside its payload.
func overhead(t wire.Type) int {
	if t == wire.TxChunk {
		return chunkOverhead
	}
	return messageOverhead
}
