package cryo

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"

	"github.com/cryo-connect/cryo-connect/internal/redact"
	"github.com/cryo-connect/cryo-connect/internal/wire"
	"github.com/cryo-connect/cryo-connect/internal/ws"
)

// Defaults of [SessionOptions].
const (
	DefaultHeartbeatInterval = 15 * time.Second
	DefaultMaxBufferBytes    = 32 << 20
	DefaultStreamIdleTimeout = 60 * time.Second
	DefaultCloseTimeout      = 5 * time.Second
)

// SessionOptions are what both ends of a session can set. A zero value means its
// default, and a negative one is an error.
type SessionOptions struct {
	// HeartbeatInterval is the interval between heartbeats: a WebSocket ping, and from
	// a server a Cryo ping too. The session ends with ErrPeerTimeout when, for two
	// intervals, nothing at all was received and no backlog moved, so a peer that is
	// lost is noticed within three. A backlog is what waits in the send buffer, as on a
	// slow line that a large message occupies; it moves when the peer's system
	// acknowledges 4 KiB of it, or all, within an interval. On systems other than
	// Linux, and for connections other than TCP, the backlog in the send buffer is not
	// known, only that of a write that waits for it: a message that fits the send
	// buffer must get through within two intervals. Time does not count while
	// MaxBufferBytes keeps the session from reading. Default 15 s.
	HeartbeatInterval time.Duration
	// MaxBufferBytes bounds what is received and not yet settled: payloads, 256 bytes a
	// message, and 128 bytes a chunk. When it is reached, data is no longer read; other
	// frames are until then. A server's sessions share it: each may hold up to eight
	// times what is left.
	// As much again, and two messages, may be taken by messages of more than 64 KiB that
	// are still coming in: a further one is read when one of them is whole. A message in
	// fragments takes 1 MiB, and one that gets larger the largest, one at a time. A
	// session that keeps others waiting with one for more than a minute ends with
	// ErrReceiveTimeout, at its next heartbeat.
	// When a send waits for its acknowledgement, which may be behind what is not
	// read, reading continues after 10 s: messages without capacity are rejected then,
	// and chunks without it end their stream, with ErrBufferFull, until the session
	// holds no more than is still free. Default 32 MiB.
	MaxBufferBytes int
	// CloseTimeout bounds the goodbye: how long the end of a session waits for
	// queued acknowledgements to be written and for the peer to close. Default
	// 5 s.
	CloseTimeout time.Duration
	// StreamIdleTimeout is after how long without a byte an open received stream is
	// cancelled. Time does not count while bytes of it wait to be read, reading is
	// paused, or a message or chunk of more than 64 KiB is coming in. Default 60 s.
	// See [IncomingStream.SetIdleTimeout].
	StreamIdleTimeout time.Duration
	// SendOnly rejects received messages with an ERROR and streams with
	// TX_CANCEL, from the start; see [Session.SetSendOnly].
	SendOnly bool
	// Logger receives events that are not returned as errors. Default: none.
	Logger *slog.Logger
	// OnLateAck is called when the peer acknowledges or rejects a frame whose send has
	// ended before: it has arrived, but counted as not acknowledged.
	// OnReject is called when the session itself rejects what it received: a message, or
	// for KindStream a stream; not for [Message.Reject]. Both are for counting: they run on
	// the session's reading goroutine, OnReject on those of SetSendOnly, Close and Drain too,
	// without a lock, and must not wait. At a server they may run before OnSession does. Default:
	// none.
	OnLateAck func(*Session)
	OnReject  func(*Session, Kind)

	token *redact.Secret // that the peer's words are not repeated with; nil is none
}

func (o *SessionOptions) validate() error {
	return cmp.Or(
		notNegative("HeartbeatInterval", o.HeartbeatInterval),
		notNegative("MaxBufferBytes", o.MaxBufferBytes),
		notNegative("CloseTimeout", o.CloseTimeout),
		notNegative("StreamIdleTimeout", o.StreamIdleTimeout),
	)
}

// notNegative returns an error if the value of an option is.
func notNegative[T int | time.Duration](option string, value T) error {
	if value < 0 {
		return fmt.Errorf("%s is %v: it must be positive, or 0 for its default", option, value)
	}
	return nil
}

func (o SessionOptions) withDefaults() SessionOptions {
	if o.HeartbeatInterval == 0 {
		o.HeartbeatInterval = DefaultHeartbeatInterval
	}
	if o.MaxBufferBytes == 0 {
		o.MaxBufferBytes = DefaultMaxBufferBytes
	}
	if o.CloseTimeout == 0 {
		o.CloseTimeout = DefaultCloseTimeout
	}
	if o.StreamIdleTimeout == 0 {
		o.StreamIdleTimeout = DefaultStreamIdleTimeout
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.OnLateAck == nil {
		o.OnLateAck = func(*Session) {}
	}
	if o.OnReject == nil {
		o.OnReject = func(*Session, Kind) {}
	}
	return o
}

// Session is one Cryo connection, from its handshake to its end; a client that
// reconnects gets a new one, with the same id if it wants. All methods may be
// called from any goroutine.
//
// A session has one goroutine that reads, and one that writes while there is
// something to write. They never wait for each other.
type Session struct {
	id      uint64
	dialing bool // this end dialled
	value   any  // the Upgrade's; never changes
	opts    SessionOptions
	log     *slog.Logger

	conn      *ws.Conn
	out       *writer
	pend      *ackTable
	inbox     *inbox
	unsettled *unsettledMessages
	limit     *receiveLimit
	incoming  *incomingStreams
	outgoing  *outgoingStreams

	reports    rate.Sometimes         // of log lines
	sendOnly   atomic.Bool            // received messages and streams are rejected
	peerKnown  chan struct{}          // closed when the peer's ENDPOINT_INFO has come
	acked      atomic.Bool            // the peer has acknowledged something; of a dialling end, besides ENDPOINT_INFO
	streamless atomic.Bool            // the peer's last ENDPOINT_INFO announces no streams
	onEnd      func(closeDone func()) // the server's; nil: none
	keepalive  keepalive

	ctx  context.Context         // done with the first cause of the end: nothing new starts
	end  context.CancelCauseFunc // called by begin alone
	done chan struct{}           // closed when the goroutines are gone

	mu      sync.Mutex
	stopped bool        // no timer must be set any more
	cut     *time.Timer // bounds the close handshake; nil before it
}

// newSession starts a session over an upgraded connection.
func newSession(id uint64, dialing bool, value any, conn *ws.Conn, buffer receiveBuffer, opts SessionOptions, onEnd func(closeDone func())) *Session {
	base := listeningNumbers
	if dialing {
		base = dialingNumbers
	}
	numbers := newAckTable(base, rand.Uint32()&numberMask) //nolint:gosec // not a secret
	s := &Session{
		id: id, dialing: dialing, value: value, opts: opts, onEnd: onEnd, log: opts.Logger,
		conn: conn, pend: numbers, inbox: newInbox(),
		reports:   rate.Sometimes{First: 1, Interval: time.Second},
		peerKnown: make(chan struct{}), done: make(chan struct{}), unsettled: newUnsettled(),
	}
	s.ctx, s.end = context.WithCancelCause(context.Background())
	s.out = newWriter(conn, id, numbers, s.fail)
	conn.Start(s.out.answerWebSocketPing)
	s.limit = newReceiveLimit(conn, buffer, s.ctx.Done(), numbers.awaited, s.wants)
	// What the messages and streams hold that nobody has settled, nobody can settle any
	// more when there is no session that they lead to.
	runtime.AddCleanup(s, releaseAll, s.limit.bytes)
	s.incoming = newIncomingStreams(s)
	s.outgoing = newOutgoingStreams()
	s.sendOnly.Store(opts.SendOnly)
	s.keepalive = keepalive{
		conn: conn, dialing: dialing, interval: opts.HeartbeatInterval,
		paused: s.limit.paused.Load, resumed: s.limit.resumedAt,
		ping: s.out.ping, pong: s.out.pong,
		check: s.checkIncoming, timedOut: s.peerTimedOut,
	}
	s.keepalive.start()
	go s.read()
	return s
}

// ID is the session's id, chosen by the client.
func (s *Session) ID() uint64 { return s.id }

// Value is what Authorize kept of the client in [Upgrade]; nil of a session that
// this end dialled.
func (s *Session) Value() any { return s.value }

// RemoteAddr is the peer's network address.
func (s *Session) RemoteAddr() net.Addr { return s.conn.RemoteAddr() }

// Done is closed when the session is over and its goroutines are gone, but for what
// calls a server's OnSessionEnd.
// Received messages can still be taken then.
func (s *Session) Done() <-chan struct{} { return s.done }

// Context is done as soon as the session has a reason to end: nothing can be sent any
// more. Its cause is Err.
func (s *Session) Context() context.Context { return s.ctx }

// Err is nil while the session lives, and then says why it ended; see
// [ErrClosed]. Use it in place of the error of Context, which is always
// [context.Canceled].
func (s *Session) Err() error { return context.Cause(s.ctx) }

// Stats is a snapshot of a session. Its numbers are read one after the other.
type Stats struct {
	// Paused reports whether MaxBufferBytes keeps the session from reading, so that
	// acknowledgements may have come that it has not read.
	Paused bool
	// HeldBytes counts against MaxBufferBytes: messages that are not settled, bytes of
	// streams that are not read, and what Reserve has counted.
	HeldBytes int64
	// UnsettledMessages are received, and neither acknowledged nor rejected: in the queue
	// or with the application.
	UnsettledMessages int
	// AwaitingAcks are sent messages and frames of streams for whose acknowledgement
	// somebody waits.
	AwaitingAcks int
	// QueuedBytes are payloads, and small frames with their overhead, that wait to be
	// written.
	QueuedBytes int64
	// OpenStreams are received streams that are announced or open, at most 256.
	OpenStreams int
}

// Stats returns how the session is doing, for metrics and decisions about a slow peer.
// After the end it tells what is still to be settled.
func (s *Session) Stats() Stats {
	held, _ := s.limit.bytes.Usage()
	return Stats{
		Paused:            s.limit.paused.Load(),
		HeldBytes:         held,
		UnsettledMessages: int(s.unsettled.n.Load()),
		AwaitingAcks:      s.pend.count(),
		QueuedBytes:       s.out.queuedBytes(),
		OpenStreams:       s.incoming.count(),
	}
}

// Close ends the session: streams that are coming in are cancelled, queued
// acknowledgements are written, BYE carries the reason (cut to 123 bytes), and the
// WebSocket is closed with code 4000. What still arrives is discarded until the peer
// closes too. All of it takes CloseTimeout at most, and ends with the context; then the
// connection is cut. Close returns when the session's goroutines are gone, and may be
// called more than once. Its error is the context's.
//
// BYE waits until the peer has acknowledged each TX_CANCEL, or for half of CloseTimeout:
// the published server, while it sends a stream, does not survive the end of its session. It
// waits as well for the TX_FINISH of a pulled stream that was acknowledged ahead of that.
//
// Messages that were received can still be taken; if nobody does, call Discard, or they
// count against the MaxBufferBytes of a server for good.
func (s *Session) Close(ctx context.Context, reason string) error {
	if s.beginClosing(ErrClosed) {
		s.out.endData() // the rest goes out before BYE, however long the peer takes to cancel
		s.incoming.stop(s.Err())
		s.incoming.awaitCancels(ctx.Done(), s.done)
		reason = closeReason(reason)
		bye := &wire.Frame{SID: s.id, Type: wire.Bye, Ack: s.pend.number(), Payload: []byte(reason)}
		s.out.queueClose(closeFrame{bye: bye, code: closeGraceful, reason: reason})
	}
	select {
	case <-s.done:
		return nil
	case <-ctx.Done():
		_ = s.conn.Close()
		<-s.done
		return contextError(ctx)
	}
}

// CloseNow ends the session by cutting its connection: nothing more is sent, not even
// acknowledgements that are queued. It returns nil, when the session's goroutines are
// gone, and may be called while Close or Drain waits, which returns then. Otherwise like
// Close.
func (s *Session) CloseNow() error {
	s.fail(ErrClosed)
	<-s.done
	return nil
}

// Drain lets what was received be settled, and closes the session then: streams that are
// coming in are cancelled and new ones rejected; messages that come from now on are
// discarded, neither acknowledged nor rejected, so that the peer sends them again on
// another session. Receive returns what was received before, and everything can be sent,
// such as responses. When each message is acknowledged or rejected, and each stream that
// had come whole settled, Drain closes the session as Close does, without waiting for
// what is being sent.
//
// When the context is done before that, Drain returns its error, and the session is
// still open, and drains: call Drain again, Close or CloseNow. If the session ends
// first, Drain returns why, as what is not settled can't be any more.
func (s *Session) Drain(ctx context.Context, reason string) error {
	settled := s.unsettled.drain()
	s.limit.reconsider() // what is discarded needs no capacity
	s.incoming.stop(&endedError{ErrClosed})
	s.incoming.awaitCancels(ctx.Done(), s.ctx.Done())
	select {
	case <-settled:
	case <-s.ctx.Done():
	case <-ctx.Done():
		return contextError(ctx)
	}
	if err := s.incoming.awaitSettled(ctx, s.ctx); err != nil {
		return err
	}
	return s.Close(ctx, reason)
}

// maxControlText bounds the text of a WebSocket close frame, and so of BYE, in bytes.
const maxControlText = 123

// Close codes of the WebSocket (protocol, "Closing").
const (
	closeGraceful    = 4000
	closeClientError = 4001
)

// begin records the first cause, and reports whether this is it.
func (s *Session) begin(cause error) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.isEnding() {
		return false
	}
	s.end(&endedError{cause})
	return true
}

// beginClosing is begin for an end in good order, which CloseTimeout bounds.
func (s *Session) beginClosing(cause error) bool {
	if !s.begin(cause) {
		return false
	}
	s.mu.Lock()
	if !s.stopped {
		s.cut = time.AfterFunc(s.opts.CloseTimeout, func() { _ = s.conn.Close() })
	}
	s.mu.Unlock()
	s.limit.interruptLarge() // it is discarded as it comes, and its memory is free for others
	return true
}

// goodbye ends the session in good order and without BYE: the writer sends what is queued,
// then the close frame, and half-closes; the reader discards data until the peer closes.
// While Close waits for the peer to cancel, this takes its place: what comes first is
// queued, and nothing behind it.
func (s *Session) goodbye(cause error, code int, reason string) {
	s.beginClosing(cause)
	s.out.queueClose(closeFrame{code: code, reason: closeReason(reason)})
}

// closeReason is a reason as it fits into a close frame.
func closeReason(reason string) string {
	return redact.Cut(strings.ToValidUTF8(reason, "\uFFFD"), maxControlText)
}

// fail ends the session at once.
func (s *Session) fail(cause error) {
	s.begin(cause)
	_ = s.conn.Close()
}

// finish is the reading goroutine's last act, after the last frame was read.
// Acknowledgements that arrived before the end have been counted by then; who
// still waits learns the cause.
func (s *Session) finish() {
	s.mu.Lock()
	s.stopped = true
	if s.cut != nil {
		s.cut.Stop()
	}
	s.mu.Unlock()
	s.keepalive.stop()
	s.out.abort()
	_ = s.conn.Close()
	s.out.wait()
	err := s.Err()
	s.pend.end(err)
	s.inbox.end()
	s.incoming.end()
	closeDone := func() { close(s.done) }
	if s.onEnd == nil {
		closeDone()
	} else {
		s.onEnd(closeDone)
	}
}

// peerTimedOut ends the session of a peer that was not alive for so long.
func (s *Session) peerTimedOut(d time.Duration) {
	cause := fmt.Errorf("%w after %v", ErrPeerTimeout, d)
	if s.out.crowded() != nil {
		cause = fmt.Errorf("%w: it sends, and does not read our answers", cause)
	}
	s.fail(cause)
}

// checkIncoming ends the session if a message of it keeps others waiting.
func (s *Session) checkIncoming() {
	if !s.isEnding() && s.limit.keepsOthersOut() {
		s.goodbye(ErrReceiveTimeout, closeClientError, ErrReceiveTimeout.Error())
	}
}
