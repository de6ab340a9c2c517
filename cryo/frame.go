package cryo

import (
	"encoding/binary"
	"fmt"
	"slices"
	"strings"
)

// The codec: pure functions over byte slices. Nothing outside this file knows
// a byte offset of a frame.

// MaxPayload is the most bytes that the payload of one frame may have: 16 MiB. Longer data travels as a stream.
const MaxPayload = 16 << 20

// ProtocolVersion is the only version of the protocol there is, as announced
// in ENDPOINT_INFO.
const ProtocolVersion = 1

// FeatureTransactions is the bit of ENDPOINT_INFO's features that says that an
// endpoint understands streams.
const FeatureTransactions uint64 = 1

const (
	headerSize = 8 + 1                       // sid, type
	chunkStart = headerSize + 4 + 4          // … tx, seq: a TX_CHUNK's bytes
	ackEnd     = headerSize + 4              // … and the ack number, which all types but TX_CHUNK have
	maxFrame   = ackEnd + 4 + 4 + MaxPayload // a TX_START with the longest name, behind its tx and size

	pingText  = "ping"      // PING_PONG's payload, one way …
	pongText  = "pong"      // … and the other
	anonymous = "anonymous" // what an empty stream name means
)

// Type is a frame's type: the byte at offset 8.
type Type byte

// The thirteen frame types. Each comment gives the layout behind the session
// id (u64) and the type byte, and in parentheses the chapter of the protocol's
// description; integers are big-endian, text is UTF-8.
const (
	TypeTxStart      Type = 0   // ack u32 · tx u32 · size i32 (-1 = unknown) · name: opens a stream ("Streams")
	TypeTxChunk      Type = 1   // tx u32 · seq u32 · bytes: never acknowledged ("Streams")
	TypeTxFinish     Type = 2   // ack u32 · tx u32: the stream is whole ("Streams")
	TypeTxFlow       Type = 3   // ack u32 · flow u8: how the peer shall send streams from now on ("Streams")
	TypeTxFetch      Type = 4   // ack u32 · tx u32 · start u32 · end u32: asks for chunks by index, half open ("Streams")
	TypeTxCancel     Type = 5   // ack u32 · tx u32: the receiver wants no more of the peer's stream ("Streams")
	TypeBinary       Type = 249 // ack u32 · bytes: BINARYDATA ("Acknowledgements")
	TypeUTF8         Type = 250 // ack u32 · text: UTF8DATA ("Acknowledgements")
	TypePingPong     Type = 251 // ack u32 · "ping" or "pong" ("Heartbeat")
	TypeError        Type = 252 // ack u32 · text: a refusal of the peer's frame, or an application's message ("ERROR")
	TypeAck          Type = 253 // ack u32 of the peer's frame ("Acknowledgements")
	TypeBye          Type = 254 // ack u32 · reason: the end is near ("Closing")
	TypeEndpointInfo Type = 255 // ack u32 · version u32 · features u64 ("Transport and handshake")
)

// String gives the type's name as the protocol writes it.
func (t Type) String() string {
	switch t {
	case TypeTxStart:
		return "TX_START"
	case TypeTxChunk:
		return "TX_CHUNK"
	case TypeTxFinish:
		return "TX_FINISH"
	case TypeTxFlow:
		return "TX_FLOW"
	case TypeTxFetch:
		return "TX_FETCH"
	case TypeTxCancel:
		return "TX_CANCEL"
	case TypeBinary:
		return "BINARYDATA"
	case TypeUTF8:
		return "UTF8DATA"
	case TypePingPong:
		return "PING_PONG"
	case TypeError:
		return "ERROR"
	case TypeAck:
		return "ACK"
	case TypeBye:
		return "BYE"
	case TypeEndpointInfo:
		return "ENDPOINT_INFO"
	default:
		return fmt.Sprintf("unassigned type %d", byte(t))
	}
}

// Flow says who decides when a stream's chunks travel (TX_FLOW).
type Flow byte

const (
	// FlowPush lets chunks follow TX_START's acknowledgement without asking.
	FlowPush Flow = 0
	// FlowPull sends only the chunks that TX_FETCH asked for.
	FlowPull Flow = 1
)

// Frame is one Cryo frame. Which fields count depends on the type; the others
// are zero.
type Frame struct {
	SID      uint64 // the session's id; all types
	Type     Type
	Flow     Flow   // TX_FLOW
	Ack      uint32 // all but TX_CHUNK
	Tx       uint32 // all TX types but TX_FLOW
	Seq      uint32 // TX_CHUNK
	Start    uint32 // TX_FETCH: the first chunk wanted …
	End      uint32 // … and the one behind the last
	Size     int32  // TX_START: bytes, or -1 for unknown
	Version  uint32 // ENDPOINT_INFO
	Features uint64 // ENDPOINT_INFO

	// Payload is the frame's last part, of any length up to MaxPayload: the
	// bytes of BINARYDATA and TX_CHUNK, the text of UTF8DATA and ERROR, BYE's
	// reason, TX_START's name, and PING_PONG's "ping" or "pong".
	Payload []byte
}

// FrameError says why some bytes are not a Cryo frame, or why a frame can't be
// written as one.
type FrameError struct {
	Type    Type   // of the frame; meaningless where it is too short to have one
	Size    int    // bytes of the frame, as it came or as it would have been written
	Problem string // what is wrong, in words
}

func (e *FrameError) Error() string {
	if e.Size < headerSize {
		return fmt.Sprintf("malformed frame of %d bytes: %s", e.Size, e.Problem)
	}
	return fmt.Sprintf("malformed %v frame of %d bytes: %s", e.Type, e.Size, e.Problem)
}

// Text gives a payload that people read, BYE's reason or ERROR's text: invalid
// UTF-8 is replaced and trailing NULs are dropped, because the published peers
// cut these texts by their UTF-16 length.
func (f *Frame) Text() string {
	return strings.ToValidUTF8(strings.TrimRight(string(f.Payload), "\x00"), "\uFFFD")
}

// ParseFrame reads one frame. The payload is a part of b, not a copy, and has
// no room to append into what lies behind it; bytes behind a fixed layout are
// ignored, as the published peers do. The error is always a [*FrameError].
func ParseFrame(b []byte) (Frame, error) {
	if len(b) < headerSize {
		return Frame{}, &FrameError{Size: len(b), Problem: "shorter than session id and type"}
	}
	f := Frame{SID: binary.BigEndian.Uint64(b), Type: Type(b[8])}
	fixed, known := f.Type.fixedSize()
	if !known {
		return Frame{}, &FrameError{Type: f.Type, Size: len(b), Problem: "no such frame type"}
	}
	if len(b) < fixed {
		return Frame{}, &FrameError{Type: f.Type, Size: len(b), Problem: fmt.Sprintf("shorter than its %d bytes", fixed)}
	}
	f.readFields(b[headerSize:fixed])
	if f.Type.hasPayload() {
		f.Payload = slices.Clip(b[fixed:])
	}
	if problem := f.problem(); problem != "" {
		return Frame{}, &FrameError{Type: f.Type, Size: len(b), Problem: problem}
	}
	return f, nil
}

// isData tells from a frame's first bytes whether it carries what a session
// receives and holds: a message, or a part of a stream.
func isData(head []byte) bool {
	if len(head) < headerSize {
		return false
	}
	switch Type(head[8]) {
	case TypeUTF8, TypeBinary, TypeError, TypeTxChunk:
		return true
	default:
		return false
	}
}

func isChunk(head []byte) bool { return len(head) == headerSize && Type(head[8]) == TypeTxChunk }

// readFields reads what stands between the type byte and the payload.
func (f *Frame) readFields(b []byte) {
	if f.Type != TypeTxChunk {
		f.Ack = binary.BigEndian.Uint32(b)
		b = b[4:]
	}
	switch f.Type {
	case TypeTxStart:
		f.Tx = binary.BigEndian.Uint32(b)
		// The published peers take every negative size for unknown.
		f.Size = max(int32(binary.BigEndian.Uint32(b[4:])), -1)
	case TypeTxChunk:
		f.Tx = binary.BigEndian.Uint32(b)
		f.Seq = binary.BigEndian.Uint32(b[4:])
	case TypeTxFinish, TypeTxCancel:
		f.Tx = binary.BigEndian.Uint32(b)
	case TypeTxFlow:
		f.Flow = Flow(b[0])
	case TypeTxFetch:
		f.Tx = binary.BigEndian.Uint32(b)
		f.Start = binary.BigEndian.Uint32(b[4:])
		f.End = binary.BigEndian.Uint32(b[8:])
	case TypeEndpointInfo:
		f.Version = binary.BigEndian.Uint32(b)
		f.Features = binary.BigEndian.Uint64(b[4:])
	}
}

// AppendFrame appends the frame's bytes to b. The error is always a
// [*FrameError]; b comes back unchanged with it.
func AppendFrame(b []byte, f *Frame) ([]byte, error) {
	b, err := appendHeader(b, f)
	if err != nil {
		return b, err
	}
	return append(b, f.Payload...), nil
}

// appendHeader appends all of a frame but its payload, which is its last part,
// so that a writer need not copy a large one.
func appendHeader(b []byte, f *Frame) ([]byte, error) {
	fixed, known := f.Type.fixedSize()
	if !known {
		return b, &FrameError{Type: f.Type, Size: headerSize + len(f.Payload), Problem: "no such frame type"}
	}
	if problem := f.problem(); problem != "" {
		return b, &FrameError{Type: f.Type, Size: fixed + len(f.Payload), Problem: problem}
	}
	b = binary.BigEndian.AppendUint64(b, f.SID)
	b = append(b, byte(f.Type))
	if f.Type != TypeTxChunk {
		b = binary.BigEndian.AppendUint32(b, f.Ack)
	}
	switch f.Type {
	case TypeTxStart:
		b = binary.BigEndian.AppendUint32(b, f.Tx)
		b = binary.BigEndian.AppendUint32(b, uint32(f.Size))
	case TypeTxChunk:
		b = binary.BigEndian.AppendUint32(b, f.Tx)
		b = binary.BigEndian.AppendUint32(b, f.Seq)
	case TypeTxFinish, TypeTxCancel:
		b = binary.BigEndian.AppendUint32(b, f.Tx)
	case TypeTxFlow:
		b = append(b, byte(f.Flow))
	case TypeTxFetch:
		b = binary.BigEndian.AppendUint32(b, f.Tx)
		b = binary.BigEndian.AppendUint32(b, f.Start)
		b = binary.BigEndian.AppendUint32(b, f.End)
	case TypeEndpointInfo:
		b = binary.BigEndian.AppendUint32(b, f.Version)
		b = binary.BigEndian.AppendUint64(b, f.Features)
	}
	return b, nil
}

// fixedSize is how many bytes stand in front of the payload, and whether there
// is such a type.
func (t Type) fixedSize() (size int, known bool) {
	switch t {
	case TypeTxStart:
		return ackEnd + 4 + 4, true // tx, size
	case TypeTxChunk:
		return chunkStart, true // tx, seq
	case TypeTxFinish, TypeTxCancel:
		return ackEnd + 4, true // tx
	case TypeTxFlow:
		return ackEnd + 1, true // flow
	case TypeTxFetch:
		return ackEnd + 4 + 4 + 4, true // tx, start, end
	case TypeEndpointInfo:
		return ackEnd + 4 + 8, true // version, features
	case TypeBinary, TypeUTF8, TypePingPong, TypeError, TypeAck, TypeBye:
		return ackEnd, true
	default:
		return 0, false
	}
}

// hasPayload tells the types that end with text or bytes.
func (t Type) hasPayload() bool {
	switch t {
	case TypeTxStart, TypeTxChunk, TypeBinary, TypeUTF8, TypePingPong, TypeError, TypeBye:
		return true
	default:
		return false
	}
}

// problem names what the protocol does not allow in a frame of a known type,
// or is empty.
func (f *Frame) problem() string {
	switch {
	case len(f.Payload) > MaxPayload:
		return "payload over 16 MiB"
	case len(f.Payload) > 0 && !f.Type.hasPayload():
		return "this type carries no payload"
	case f.Type == TypePingPong && string(f.Payload) != pingText && string(f.Payload) != pongText:
		return "neither ping nor pong"
	case f.Type == TypeTxFlow && f.Flow > FlowPull:
		return fmt.Sprintf("flow %d is neither push (0) nor pull (1)", f.Flow)
	case f.Type == TypeTxStart && f.Size < -1:
		return fmt.Sprintf("size %d is neither a size nor -1", f.Size)
	default:
		return ""
	}
}
