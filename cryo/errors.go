package cryo

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"time"
)

// Causes of the end of a session. Every error that a session returns after its end wraps
// one of these, a [*PeerClosedError], a [*ProtocolError] or the error of the network
// connection, and satisfies errors.Is(err, net.ErrClosed).
var (
	// ErrClosed: this end called Close or a method like it, such as Drain, CloseForRetry or
	// Shutdown of the Server.
	ErrClosed = errors.New("closed by this end")
	// ErrPeerTimeout: nothing was received from the peer for two heartbeat intervals, not
	// even a pong, and no backlog moved; see HeartbeatInterval in [SessionOptions].
	ErrPeerTimeout = errors.New("peer timeout")
	// ErrReceiveTimeout: a message took more than a minute to be received, or would have, while others
	// waited for the capacity that is reserved for it; see MaxBufferBytes in
	// [SessionOptions].
	ErrReceiveTimeout = errors.New("receive timeout: a large message was received too slowly while others waited: send it as a stream")
	// ErrExpired: the session of a server has expired, or reached its maximum age; see Expires
	// of [Upgrade], and MaxSessionAge of [ServerOptions].
	ErrExpired = errors.New("session expired")
	// ErrTakenOver: the client has connected again with the same session id, and with the same
	// owner or, without one, the same token and certificate.
	ErrTakenOver = errors.New("taken over by a newer connection of the same client")
)

// Causes of a rejected upgrade. A [*HandshakeError] with status 401 matches one of these
// with errors.Is.
var (
	// ErrSessionExists: the server still has an open session with this id. After a lost
	// connection it is the client's own last session, until the server detects the loss
	// within seconds.
	ErrSessionExists = errors.New("the server still has a session with this id")
	// ErrUnauthorized: the token is missing, or was rejected.
	ErrUnauthorized = errors.New("the server rejected the token")
)

// Errors of messages and streams that can't be sent. Nothing of them was sent.
var (
	// ErrTooLarge: a message has more than [MaxPayload] bytes, a stream's name more than
	// 1,024, or a stream that the peer pulls 2 GiB or more.
	ErrTooLarge = errors.New("too large")
	// ErrInvalidUTF8: a text, or a stream's name, is not valid UTF-8.
	ErrInvalidUTF8 = errors.New("not valid UTF-8")
)

// HandshakeError is a server's rejection of the WebSocket upgrade.
type HandshakeError struct {
	StatusCode int // the HTTP status
	// Message is the body's text without markup, of at most 200 bytes; for a redirect its
	// target without the query. If that may contain the token, a header or a part of the query
	// (see [Session.Redact]), it is the body's type and length.
	Message string
	// RetryAfter is the time to wait before the next attempt, from the response header
	// Retry-After; 0 if the header is missing, malformed, or in the past.
	RetryAfter time.Duration
	exists     bool // the body reports that the session exists
}

func (e *HandshakeError) Error() string {
	msg := fmt.Sprintf("the server responded to the upgrade with %d %s", e.StatusCode, http.StatusText(e.StatusCode))
	if e.Message != "" {
		msg += ": " + e.Message
	}
	return msg
}

// Is distinguishes a session that exists from a rejected token: the status is 401 for
// both, only the message differs.
func (e *HandshakeError) Is(target error) bool {
	if e.StatusCode != http.StatusUnauthorized {
		return false
	}
	return target == ErrSessionExists && e.exists || target == ErrUnauthorized && !e.exists
}

// PeerClosedError is the normal end of a session by the peer, which sent BYE or closed the
// WebSocket.
type PeerClosedError struct {
	Code   int    // the WebSocket close code; 0 when only BYE was seen
	Reason string // the reason in BYE, else the one in the close frame, as [Session.Redact] returns it
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

// ProtocolError is the end of a session by a protocol violation of the peer. The
// WebSocket was closed with code 4001, or with 1002 if the peer violated the WebSocket
// protocol, or 1009 if a message was too large for a frame.
type ProtocolError struct {
	Problem string // description of the violation; empty if Err is set
	Err     error  // error of a malformed frame; nil for another violation
}

func (e *ProtocolError) Error() string {
	if e.Err != nil {
		return "protocol violation: " + e.Err.Error()
	}
	return "protocol violation: " + e.Problem
}

func (e *ProtocolError) Unwrap() error { return e.Err }

// RejectedError is the peer's rejection of one message, by an ERROR frame with its
// number.
type RejectedError struct {
	Text string // text of the ERROR as [Session.Redact] returns it
}

func (e *RejectedError) Error() string {
	return fmt.Sprintf("rejected by the peer: %q", e.Text)
}

// BatchError reports which messages of a batch were not acknowledged.
type BatchError struct {
	Errs []error // by index; nil for an acknowledged message
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

// Unwrap returns the messages' errors, for errors.Is and errors.As.
func (e *BatchError) Unwrap() []error {
	var errs []error
	for _, err := range e.Errs {
		if err != nil {
			errs = append(errs, err)
		}
	}
	return errs
}

// endedError is the error of a session's methods after its end.
type endedError struct{ cause error }

func (e *endedError) Error() string   { return "session ended: " + e.cause.Error() }
func (e *endedError) Unwrap() []error { return []error{e.cause, net.ErrClosed} }

// contextError returns the error of a wait whose context is done. It matches the context's
// cause and ctx.Err() with errors.Is.
func contextError(ctx context.Context) error {
	err, cause := ctx.Err(), context.Cause(ctx)
	if errors.Is(cause, err) {
		return cause
	}
	return &causedError{cause, err}
}

// causedError is the error of a done context; its text is that of the cause.
type causedError struct{ cause, err error }

func (e *causedError) Error() string   { return e.cause.Error() }
func (e *causedError) Unwrap() []error { return []error{e.cause, e.err} }
