package cryo

import (
	"fmt"
	"sync"

	"github.com/cryo-connect/cryo-connect/internal/wire"
	"github.com/cryo-connect/cryo-connect/internal/ws"
)

const (
	// maxControl bounds the part of a control frame's payload that is read, in bytes: names
	// have at most 1,024 bytes, and longer texts are truncated.
	maxControl = 2 << 10
	// smallPayload is the size of the largest payload that is received without a
	// reservation, in bytes: that of a chunk of the default size.
	smallPayload = DefaultChunkBytes
	// mediumPayload is the size of the largest message in fragments that is received
	// without the slot for larger ones, in bytes.
	mediumPayload = 1 << 20
	// trustFactor is the ratio of the memory allocated for a larger payload to the bytes of
	// it that have been received: its length is not trusted.
	trustFactor = 16
)

// chunkBuffer is pooled memory for one chunk of a stream, of at least half the default size. It
// returns to the pool when the chunk has been read: fresh memory for each chunk would have to be
// zeroed, and would miss the CPU's caches.
type chunkBuffer [DefaultChunkBytes]byte

var chunkPool = sync.Pool{New: func() any { return new(chunkBuffer) }}

func (b *chunkBuffer) release() {
	if b != nil {
		ws.Poison(b[:])
		chunkPool.Put(b)
	}
}

// received is a frame that was read. It owns the memory of its payload and the reservation
// for it, until they are detached or released. The payload of a control frame, or of a frame
// that was not admitted, is valid until the next frame is read.
type received struct {
	wire.Frame
	reservation reservation
	pooled      *chunkBuffer // the payload's memory, if it is from the pool
	decision    decision     // about data
}

// detach moves the payload out, with its reservation and its pooled memory.
func (in *received) detach() (payload []byte, h reservation, pooled *chunkBuffer) {
	payload, h, pooled = in.Payload, in.reservation, in.pooled
	in.Payload, in.reservation, in.pooled = nil, reservation{}, nil
	return payload, h, pooled
}

// release releases whatever was not detached.
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
	isOurs  func(number uint32) bool // reports whether this end has issued the number
	onData  func()                   // called for each data frame and TX_START, before it may have to wait
	head    [wire.MaxHeader]byte
	control [32]byte // a small payload that is not data
}

// next reads a frame. After a [*ProtocolError], a violation by the peer, the rest of the
// message must be discarded; any other error is the connection's. in must be released in any
// case.
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
		return &ProtocolError{Problem: fmt.Sprintf("%v frame for another session: %d", in.Type, in.SID)}
	case !in.Type.Known(): // ignored, as the published peers do
		r.limit.awaitOther(r.conn.Left())
		return r.conn.Discard()
	case in.Type == wire.Ack, in.Type == wire.Error && r.isOurs(in.Ack):
		return r.readControl(in) // counted by the caller, unless it answers a frame
	case in.Type == wire.TxStart:
		r.onData()
		if r.limit.wants(&in.Frame) {
			r.limit.awaitRates(&in.Frame, 0)
		} else {
			r.limit.awaitOther(0)
		}
		return r.readControl(in)
	case !in.Type.IsData():
		r.limit.awaitOther(0)
		return r.readControl(in)
	}
	r.onData()
	if err := r.readData(in); err != nil || in.decision == admitted {
		return err
	}
	in.release()
	if in.Type == wire.Error { // for the log
		return r.readControl(in)
	}
	return r.conn.Discard()
}

// readControl reads a frame that must not wait for capacity, with at most maxControl bytes of
// its payload. The rest is ignored, but counts, unless it was counted with data that is not admitted.
func (r *frameReader) readControl(in *received) (err error) {
	if in.Type.HasPayload() {
		if in.Payload, err = r.conn.ReadHead(r.control[:0], maxControl); err != nil {
			return err
		}
	}
	if ignored := r.conn.Left(); ignored > 0 && in.decision == admitted {
		r.limit.awaitOther(ignored)
	}
	if err := r.conn.Discard(); err != nil {
		return err
	}
	return r.check(in)
}

// check returns a [*ProtocolError] if the frame violates the protocol.
func (r *frameReader) check(in *received) error {
	if err := in.Check(r.conn.Size()); err != nil {
		return &ProtocolError{Err: err}
	}
	return nil
}

// readData reads the payload of a data frame, if it is admitted, into its own memory of exactly
// its size. Capacity is reserved before memory is allocated: in the receive buffer if the whole
// payload has been received already, else in the capacity for incomplete payloads.
func (r *frameReader) readData(in *received) error {
	var part partial
	defer r.limit.complete(&part)
	size, final := r.conn.Left(), r.conn.Final()
	memory := size
	pooled := final && in.Type == wire.TxChunk && size > len(chunkBuffer{})/2 && size <= len(chunkBuffer{})
	if pooled { // the whole buffer counts
		memory = len(chunkBuffer{})
	}
	whole, reserved := final && size <= r.conn.Buffered(), 0
	if whole {
		reserved = memory + overhead(in.Type)
	}
	if in.decision = r.limit.admit(in, &part, size, reserved); in.decision != admitted {
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
		if cap(payload) > size || payload == nil { // many fragments, or an empty payload
			payload = append(make([]byte, 0, size), payload...)
		}
	}
	in.Payload = payload
	r.limit.count(&in.reservation, memory+overhead(in.Type))
	return nil
}

// allowance returns the memory that a payload may take when size bytes of it are announced:
// its exact size if the fragment is the last, else the next step.
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

// overhead returns the bytes that a received frame counts in addition to its payload.
func overhead(t wire.Type) int {
	if t == wire.TxChunk {
		return chunkOverhead
	}
	return messageOverhead
}
