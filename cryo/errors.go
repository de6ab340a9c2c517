package cryo

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"time"
)

// Why a session ended. Every error that a session returns after its end wraps
// one of these, a [*PeerClosedError], a [*ProtocolError] or the network's own
// error, and satisfies errors.Is(err, net.ErrClosed).
var (
	// ErrClosed: this end called Close.
	ErrClosed = errors.New("closed by this end")
	// ErrSilent: the peer gave no sign of life for too long, not even an
	// answer to a WebSocket ping.
	ErrSilent = errors.New("no sign of life from the peer")
	// ErrSlow: a message of the peer took more than a minute to come in, while
	// others waited for the memory that is kept for it; see MaxBufferBytes in
	// [SessionOptions].
	ErrSlow = errors.New("a large message takes too long while others wait: send it as a stream")
	// ErrTakenOver: the client came back with the same session id, token and certificate,
	// so this session was a ghost.
	ErrTakenOver = errors.New("taken over by a newer connection of the same client")
)

// Why a server refused an upgrade. A [*HandshakeError] matches one of these
// with errors.Is.
var (
	// ErrSessionExists: the server still has a live session with this id. A
	// client that lost its connection meets its own ghost so; it passes by
	// itself within seconds.
	ErrSessionExists = errors.New("the server still has a session with this id")
	// ErrUnauthorized: the token was refused, or is missing.
	ErrUnauthorized = errors.New("the server refused the token")
)

// Why something can't be sent, whatever the peer does. Nothing of it was sent.
var (
	// ErrTooLarge: a message has more than [MaxPayload] bytes, a stream's name more than
	// 1,024, or a stream that the peer pulls 2 GiB or more.
	ErrTooLarge = errors.New("too large")
	// ErrInvalidUTF8: a text, or a stream's name, is not valid UTF-8.
	ErrInvalidUTF8 = errors.New("not valid UTF-8")
)

// HandshakeError is a server's refusal of the WebSocket upgrade.
type HandshakeError struct {
	StatusCode int    // the HTTP status
	Sentence   string // the body's text without markup and without the token
	// RetryAfter is the time that the server asks to wait before the next attempt, by
	// its header Retry-After. 0: it asks for none, or for what is over or malformed.
	RetryAfter time.Duration
	exists     bool // by the body, the refusal is that the session exists
}

func (e *HandshakeError) Error() string {
	msg := fmt.Sprintf("the server answered the upgrade with %d %s", e.StatusCode, http.StatusText(e.StatusCode))
	if e.Sentence != "" {
		msg += ": " + e.Sentence
	}
	return msg
}

// Is tells a ghost of one's own from a refused token: the status is 401 for
// both, only the sentence differs.
func (e *HandshakeError) Is(target error) bool {
	if e.StatusCode != http.StatusUnauthorized {
		return false
	}
	return target == ErrSessionExists && e.exists || target == ErrUnauthorized && !e.exists
}

// PeerClosedError is a normal end by the peer: it said BYE, or closed the
// WebSocket.
type PeerClosedError struct {
	Code   int    // the WebSocket close code; 0 when only BYE was seen
	Reason string // the reason in BYE, else the one in the close frame
}

func (e *PeerClosedError) Error() string {
	msg := "closed by the peer"
	if e.Code != 0 {
		msg += fmt.Sprintf(" with code %d", e.Code)
	}
	if e.Reason != "" {
		msg += fmt.Sprintf(": %q", e.Reason)
	}
	return msg
}

// ProtocolError is the end of a session whose peer broke the protocol. The
// WebSocket was closed with code 4001, or with one of its own where the peer
// broke the WebSocket's rules (1002) or sent more than any frame has (1009).
type ProtocolError struct {
	Problem string // what the peer did
	Err     error  // why a frame is malformed, or nil
}

func (e *ProtocolError) Error() string {
	if e.Err != nil {
		return "the peer broke the protocol: " + e.Err.Error()
	}
	return "the peer broke the protocol: " + e.Problem
}

func (e *ProtocolError) Unwrap() error { return e.Err }

// RejectedError is the peer's refusal of one message, by an ERROR frame that
// names its number.
type RejectedError struct {
	Text string // the peer's words
}

func (e *RejectedError) Error() string {
	return fmt.Sprintf("rejected by the peer: %q", e.Text)
}

// BatchError tells which messages of a batch were not acknowledged.
type BatchError struct {
	Errs []error // by index; nil where the peer has acknowledged
}

func (e *BatchError) Error() string {
	failed, first := 0, error(nil)
	for _, err := range e.Errs {
		if err == nil {
			continue
		}
		if failed++; first == nil {
			first = err
		}
	}
	if failed == 1 && len(e.Errs) == 1 {
		return first.Error()
	}
	return fmt.Sprintf("%d of %d messages not acknowledged, the first: %v", failed, len(e.Errs), first)
}

// Unwrap gives the messages' errors to errors.Is and errors.As.
func (e *BatchError) Unwrap() []error {
	var errs []error
	for _, err := range e.Errs {
		if err != nil {
			errs = append(errs, err)
		}
	}
	return errs
}

// endedError is what a session's methods return once it has ended.
type endedError struct{ cause error }

func (e *endedError) Error() string   { return "session ended: " + e.cause.Error() }
func (e *endedError) Unwrap() []error { return []error{e.cause, net.ErrClosed} }

// contextError is the error of a wait that its context has ended. It matches the context's
// cause and ctx.Err() with errors.Is.
func contextError(ctx context.Context) error {
	err, cause := ctx.Err(), context.Cause(ctx)
	if errors.Is(cause, err) {
		return cause
	}
	return &causedError{cause, err}
}

// causedError reads as the cause of a context's end.
type causedError struct{ cause, err error }

func (e *causedError) Error() string   { return e.cause.Error() }
func (e *causedError) Unwrap() []error { return []error{e.cause, e.err} }
