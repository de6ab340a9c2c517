package cryo

import "github.com/cryo-connect/cryo-connect/internal/wire"

// MaxPayload is the maximum size of a message or of a stream's chunk: 16 MiB. Larger data
// must be sent as a stream.
const MaxPayload = wire.MaxPayload

// Kind is the kind of a message.
type Kind int

// The kinds of messages, and KindStream for [SessionOptions.OnReject].
const (
	KindText   Kind = iota + 1 // text (UTF8DATA)
	KindBinary                 // bytes (BINARYDATA)
	KindError                  // an error that the peer's application sent (ERROR); received only
	KindStream                 // a stream; no message has this kind
)

// String returns the kind's name.
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

// kindOf returns the kind of the message in a frame.
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
