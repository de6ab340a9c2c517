package cryo

import "github.com/cryo-connect/cryo-connect/internal/wire"

// MaxPayload is the most bytes that a message, or a chunk of a stream, may have: 16 MiB.
// Longer data travels as a stream.
const MaxPayload = wire.MaxPayload

// Kind is the kind of a message.
type Kind int

// The kinds of messages, and of what [SessionOptions.OnReject] counts.
const (
	KindText   Kind = iota + 1 // text (UTF8DATA)
	KindBinary                 // bytes (BINARYDATA)
	KindError                  // an error that the peer's application sent (ERROR); received only
	KindStream                 // a stream; no message has this kind
)

// String returns the kind as a word.
func (k Kind) String() string {
	switch k {
	case KindText:
		return "text"
	case KindBinary:
		return "binary"
	case KindError:
		return "error"
	case KindStream:
		return "stream"
	default:
		return "unknown kind"
	}
}

// kindOf is the kind of the message in a frame.
func kindOf(t wire.Type) Kind {
	switch t {
	case wire.UTF8:
		return KindText
	case wire.Binary:
		return KindBinary
	default:
		return KindError
	}
}
