// Package wire encodes and decodes the thirteen frames of Cryo. It consists of pure functions,
// and is the only package that depends on byte offsets within a frame.
package wire

import (
	"encoding/binary"
	"fmt"
	"slices"
	"strings"
)

// MaxPayload is the maximum size of a frame's payload, in bytes.
const MaxPayload = 16 << 20

// Version is the only version of the protocol, as announced in ENDPOINT_INFO.
const Version = 1

// FeatureStreams is the bit of ENDPOINT_INFO's features of an endpoint that supports streams.
const FeatureStreams uint64 = 1

// Sizes in bytes.
const (
	HeaderSize      = 8 + 1                              // session id and type, which every frame has
	AckHeaderSize   = HeaderSize + 4                     // … and the number, which all types but TX_CHUNK have
	ChunkHeaderSize = HeaderSize + 4 + 4                 // a TX_CHUNK's, in front of its bytes
	MaxFrame        = AckHeaderSize + 4 + 4 + MaxPayload // a TX_START with the longest name, behind its tx and size
)

// Texts of the protocol.
const (
	Ping      = "ping"      // PING_PONG's payload, one way …
	Pong      = "pong"      // … and the other
	Anonymous = "anonymous" // an empty stream name
)

// Type is a frame's type: the byte at offset 8.
type Type byte

// The thirteen types of frames. Each comment gives the layout behind the session
// id (u64) and the type byte, and in parentheses the chapter of the protocol's
// description; integers are big-endian, text is UTF-8.
const (
	TxStart      Type = 0   // ack u32 · tx u32 · size i32 (-1 = unknown) · name: opens a stream ("Streams")
	TxChunk      Type = 1   // tx u32 · seq u32 · bytes: never acknowledged ("Streams")
	TxFinish     Type = 2   // ack u32 · tx u32: the stream is whole ("Streams")
	TxFlow       Type = 3   // ack u32 · flow u8: how the peer shall send streams from now on ("Streams")
	TxFetch      Type = 4   // ack u32 · tx u32 · start u32 · end u32: asks for chunks by index, half open ("Streams")
	TxCancel     Type = 5   // ack u32 · tx u32: the receiver cancels the peer's stream ("Streams")
	Binary       Type = 249 // ack u32 · bytes: BINARYDATA ("Acknowledgements")
	UTF8         Type = 250 // ack u32 · text: UTF8DATA ("Acknowledgements")
	PingPong     Type = 251 // ack u32 · "ping" or "pong" ("Heartbeat")
	Error        Type = 252 // ack u32 · text: a rejection of the peer's frame, or an application's message ("ERROR")
	Ack          Type = 253 // ack u32 of the peer's frame ("Acknowledgements")
	Bye          Type = 254 // ack u32 · reason: the sender is about to close ("Closing")
	EndpointInfo Type = 255 // ack u32 · version u32 · features u64 ("Transport and handshake")
)

// String returns the type's name as the protocol spells it.
func (t Type) String() string {
	switch t {
	case TxStart:
		return "TX_START"
	case TxChunk:
		return "TX_CHUNK"
	case TxFinish:
		return "TX_FINISH"
	case TxFlow:
		return "TX_FLOW"
	case TxFetch:
		return "TX_FETCH"
	case TxCancel:
		return "TX_CANCEL"
	case Binary:
		return "BINARYDATA"
	case UTF8:
		return "UTF8DATA"
	case PingPong:
		return "PING_PONG"
	case Error:
		return "ERROR"
	case Ack:
		return "ACK"
	case Bye:
		return "BYE"
	case EndpointInfo:
		return "ENDPOINT_INFO"
	default:
		return fmt.Sprintf("unassigned type %d", byte(t))
	}
}

// Flow selects the end that decides when a stream's chunks are sent (TX_FLOW).
type Flow byte

const (
	// FlowPush selects the sender, once TX_START is acknowledged.
	FlowPush Flow = 0
	// FlowPull selects the receiver, by TX_FETCH.
	FlowPull Flow = 1
)

// Frame is one Cryo frame. The fields that its type does not have are zero.
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

// FrameError is the reason why some bytes are not a Cryo frame, or why a frame can't be
// encoded.
type FrameError struct {
	Type    Type   // type of the frame; undefined if the frame is too short to have one
	Size    int    // size of the frame, received or to be encoded, in bytes
	Problem string // the violation
}

func (e *FrameError) Error() string {
	if e.Size < HeaderSize {
		return fmt.Sprintf("malformed frame of %d bytes: %s", e.Size, e.Problem)
	}
	return fmt.Sprintf("malformed %v frame of %d bytes: %s", e.Type, e.Size, e.Problem)
}

// Text returns BYE's reason or ERROR's text: invalid UTF-8 is replaced and trailing NULs
// are dropped, because the published peers truncate these texts by their UTF-16 length.
func (f *Frame) Text() string {
	return strings.ToValidUTF8(strings.TrimRight(string(f.Payload), "\x00"), "\uFFFD")
}

// Parse reads one frame. The payload is a part of b, not a copy, and has
// no capacity behind it; bytes behind a fixed layout are ignored, as the published peers
// do. The error is always a [*FrameError].
func Parse(b []byte) (Frame, error) {
	f, err := DecodeHeader(b[:min(len(b), HeaderLen(b))], len(b))
	if err != nil {
		return Frame{}, err
	}
	if f.Type.HasPayload() {
		f.Payload = slices.Clip(b[HeaderLen(b):])
	}
	if err := f.Check(len(b)); err != nil {
		return Frame{}, err
	}
	return f, nil
}

// HeaderLen returns the number of bytes before the payload of a frame that begins with head:
// HeaderSize while that is not known, or if there is no such type.
func HeaderLen(head []byte) int {
	if len(head) < HeaderSize {
		return HeaderSize
	}
	size, known := Type(head[8]).fixedSize()
	if !known {
		return HeaderSize
	}
	return size
}

// MaxHeader is the largest HeaderLen.
const MaxHeader = AckHeaderSize + 4 + 4 + 4

// DecodeHeader decodes a frame without its payload, for which Check must be called once it
// is read. head is HeaderLen bytes, or the whole frame if that is shorter; size is the size of
// the frame, for the error, which is always a [*FrameError]. Of a frame of an unknown type, only
// SID and Type are decoded.
func DecodeHeader(head []byte, size int) (Frame, error) {
	if len(head) < HeaderSize {
		return Frame{}, &FrameError{Size: size, Problem: "shorter than session id and type"}
	}
	f := Frame{SID: binary.BigEndian.Uint64(head), Type: Type(head[8])}
	fixed, known := f.Type.fixedSize()
	if !known {
		return f, nil
	}
	if len(head) < fixed {
		return Frame{}, &FrameError{Type: f.Type, Size: size, Problem: fmt.Sprintf("shorter than its %d bytes", fixed)}
	}
	f.readFields(head[HeaderSize:fixed])
	if f.Type.HasPayload() && size-fixed > MaxPayload {
		return Frame{}, PayloadTooLarge(f.Type, size)
	}
	return f, nil
}

// PayloadTooLarge is the error for a frame of more than MaxPayload.
func PayloadTooLarge(t Type, size int) *FrameError {
	return &FrameError{Type: t, Size: size, Problem: payloadTooLarge}
}

// Check returns a [*FrameError] if a frame violates the protocol, or is of an unknown type. size
// is the size of the frame, in bytes.
func (f *Frame) Check(size int) error {
	problem := f.problem()
	if f.IsCAMP() {
		problem = "it is a frame of another protocol, CAMP"
	}
	if problem != "" {
		return &FrameError{Type: f.Type, Size: size, Problem: problem}
	}
	return nil
}

// IsCAMP reports whether a frame has the layout of CAMP, a successor to Cryo. The first published
// client of CAMP announces itself as one of Cryo, and its messages are the same, but a PING_PONG
// has no number, and a TX_START has a size of 64 bits and a flow before its name, so that the name
// would begin with the lower half of the size and the flow. A name of Cryo is mistaken for that if
// its fifth byte is 0 or 1, and either the size is announced or the first four bytes are not UTF-8.
func (f *Frame) IsCAMP() bool {
	switch {
	case f.Type == TxStart && len(f.Payload) > 4 && f.Payload[4] <= byte(FlowPull):
		return f.Size >= 0 || string(f.Payload[:4]) == "\xff\xff\xff\xff"
	case f.Type == PingPong && len(f.Payload) == 0:
		text := binary.BigEndian.AppendUint32(nil, f.Ack)
		return string(text) == Ping || string(text) == Pong
	default:
		return false
	}
}

// IsData reports whether frames of the type carry a message or a part of a stream.
func (t Type) IsData() bool {
	switch t {
	case UTF8, Binary, Error, TxChunk:
		return true
	default:
		return false
	}
}

// readFields decodes the fields between the type byte and the payload.
func (f *Frame) readFields(b []byte) {
	if f.Type != TxChunk {
		f.Ack = binary.BigEndian.Uint32(b)
		b = b[4:]
	}
	switch f.Type {
	case TxStart:
		f.Tx = binary.BigEndian.Uint32(b)
		// The published peers treat every negative size as unknown.
		f.Size = max(int32(binary.BigEndian.Uint32(b[4:])), -1)
	case TxChunk:
		f.Tx = binary.BigEndian.Uint32(b)
		f.Seq = binary.BigEndian.Uint32(b[4:])
	case TxFinish, TxCancel:
		f.Tx = binary.BigEndian.Uint32(b)
	case TxFlow:
		f.Flow = Flow(b[0])
	case TxFetch:
		f.Tx = binary.BigEndian.Uint32(b)
		f.Start = binary.BigEndian.Uint32(b[4:])
		f.End = binary.BigEndian.Uint32(b[8:])
	case EndpointInfo:
		f.Version = binary.BigEndian.Uint32(b)
		f.Features = binary.BigEndian.Uint64(b[4:])
	}
}

// Append appends the frame's bytes to b. The error is always a
// [*FrameError]; b comes back unchanged with it.
func Append(b []byte, f *Frame) ([]byte, error) {
	b, err := AppendHeader(b, f)
	if err != nil {
		return b, err
	}
	return append(b, f.Payload...), nil
}

// AppendHeader appends a frame without its payload, its last part, so that a large payload
// need not be copied.
func AppendHeader(b []byte, f *Frame) ([]byte, error) {
	fixed, known := f.Type.fixedSize()
	if !known {
		return b, &FrameError{Type: f.Type, Size: HeaderSize + len(f.Payload), Problem: unknownType}
	}
	if problem := f.problem(); problem != "" {
		return b, &FrameError{Type: f.Type, Size: fixed + len(f.Payload), Problem: problem}
	}
	b = binary.BigEndian.AppendUint64(b, f.SID)
	b = append(b, byte(f.Type))
	if f.Type != TxChunk {
		b = binary.BigEndian.AppendUint32(b, f.Ack)
	}
	switch f.Type {
	case TxStart:
		b = binary.BigEndian.AppendUint32(b, f.Tx)
		b = binary.BigEndian.AppendUint32(b, uint32(f.Size))
	case TxChunk:
		b = binary.BigEndian.AppendUint32(b, f.Tx)
		b = binary.BigEndian.AppendUint32(b, f.Seq)
	case TxFinish, TxCancel:
		b = binary.BigEndian.AppendUint32(b, f.Tx)
	case TxFlow:
		b = append(b, byte(f.Flow))
	case TxFetch:
		b = binary.BigEndian.AppendUint32(b, f.Tx)
		b = binary.BigEndian.AppendUint32(b, f.Start)
		b = binary.BigEndian.AppendUint32(b, f.End)
	case EndpointInfo:
		b = binary.BigEndian.AppendUint32(b, f.Version)
		b = binary.BigEndian.AppendUint64(b, f.Features)
	}
	return b, nil
}

// fixedSize returns the number of bytes before the payload, and whether there is such a type.
func (t Type) fixedSize() (size int, known bool) {
	switch t {
	case TxStart:
		return AckHeaderSize + 4 + 4, true // tx, size
	case TxChunk:
		return ChunkHeaderSize, true // tx, seq
	case TxFinish, TxCancel:
		return AckHeaderSize + 4, true // tx
	case TxFlow:
		return AckHeaderSize + 1, true // flow
	case TxFetch:
		return AckHeaderSize + 4 + 4 + 4, true // tx, start, end
	case EndpointInfo:
		return AckHeaderSize + 4 + 8, true // version, features
	case Binary, UTF8, PingPong, Error, Ack, Bye:
		return AckHeaderSize, true
	default:
		return 0, false
	}
}

// Known reports whether there is such a type.
func (t Type) Known() bool {
	_, known := t.fixedSize()
	return known
}

// HasPayload reports whether frames of the type end with text or bytes.
func (t Type) HasPayload() bool {
	switch t {
	case TxStart, TxChunk, Binary, UTF8, PingPong, Error, Bye:
		return true
	default:
		return false
	}
}

const (
	payloadTooLarge = "payload over 16 MiB"
	unknownType     = "no such frame type"
)

// problem describes how a frame violates the protocol; it is empty if the frame does not.
func (f *Frame) problem() string {
	switch {
	case !f.Type.Known():
		return unknownType
	case len(f.Payload) > MaxPayload:
		return payloadTooLarge
	case len(f.Payload) > 0 && !f.Type.HasPayload():
		return "this type carries no payload"
	case f.Type == PingPong && string(f.Payload) != Ping && string(f.Payload) != Pong:
		return "neither ping nor pong"
	case f.Type == TxFlow && f.Flow > FlowPull:
		return fmt.Sprintf("flow %d is neither push (0) nor pull (1)", f.Flow)
	case f.Type == TxStart && f.Size < -1:
		return fmt.Sprintf("size %d is neither a size nor -1", f.Size)
	default:
		return ""
	}
}
