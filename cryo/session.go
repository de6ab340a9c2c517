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

	"github.com/gorilla/websocket"

	"github.com/cryo-connect/cryo-connect/internal/loglimit"
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

// SessionOptions are the settings of a session at either end. A zero value means its
// default, and a negative one is an error.
type SessionOptions struct {
	// HeartbeatInterval is the interval between heartbeats: a WebSocket ping, and from
	// a server a Cryo ping too. The session ends with ErrPeerTimeout when, for two
	// intervals, nothing at all was received and no backlog moved, so that a lost peer
	// is detected within three. The backlog is the data in the kernel's send buffer, such
	// as a large message on a slow connection; it moves when the peer's kernel acknowledges
	// 4 KiB of it, or all, within an interval. On systems other than Linux, and for
	// connections other than TCP, only a write in progress is known as backlog: a message
	// that fits the send buffer must be transmitted within two intervals. Time does not
	// count while reads are paused (backpressure). Default 15 s.
	HeartbeatInterval time.Duration
	// MaxBufferBytes bounds the receive buffer: the payloads of unsettled messages and unread
	// chunks, plus 256 bytes per message and 128 bytes per chunk. When it is full, reads are paused
	// (backpressure) at the next data frame; frames before it are still read. Default 32 MiB.
	//
	// The sessions of a server share it: each, or all with the same Owner (see [Upgrade]),
	// may hold up to eight times the free capacity.
	//
	// Incomplete messages of more than 64 KiB use memory outside the buffer: as much again, plus
	// two messages. The next one is read when one of them is complete. A message in fragments counts
	// as 1 MiB, and a larger one as 16 MiB, one at a time. Each client may hold one message, or up to
	// eight times the free capacity, and clients are served in turn. A client is all sessions of a
	// server with the same Owner or, without one, with the same token, certificate and address.
	//
	// A session whose message takes more than a minute, or would at its rate after 5 s or
	// more, ends with ErrReceiveTimeout at its next heartbeat, if another one has waited for 5 s:
	// one of the same client, or of a client that receives no such message.
	//
	// When a send waits for its acknowledgement, which may be behind unread data, reads
	// continue after 10 s: until the session holds no more than the free capacity,
	// messages without capacity are rejected, and chunks without it end their stream with
	// ErrBufferFull.
	MaxBufferBytes int
	// CloseTimeout bounds the close handshake: the time to write queued acknowledgements
	// and to wait until the peer closes. Default 5 s.
	CloseTimeout time.Duration
	// StreamIdleTimeout is the time without a byte after which an open received stream is
	// cancelled. Time does not count while bytes of the stream are unread, reads are
	// paused (backpressure), or a message or chunk of more than 64 KiB is being received.
	// Default 60 s. See [IncomingStream.SetIdleTimeout].
	StreamIdleTimeout time.Duration
	// MaxMessagesPerSecond and MaxBytesPerSecond limit the rates at which a session receives
	// messages and streams, and bytes of their payloads. While a rate is exceeded, reads are paused
	// (backpressure), and nothing is rejected. A session never receives more than its rate since
	// its start, so its first message is received after the time that it takes at the rate; after a
	// second without messages, one second's worth is received without a wait. A stream is one
	// message, and a message, stream or chunk has at least 64 bytes. A payload larger than the
	// bytes of a second is received after the time that it takes at the rate; of a message in
	// fragments, the first one is, and the time for the others is added to the wait of the next
	// message. All other frames, such as pings, data that is rejected or ignored, and chunks and
	// fragments of less than 1 KiB, have a separate limit: four for each message or, without a
	// limit of messages, one for each 256 bytes, and at least 100 per second. Bytes that are
	// ignored count. Answers to frames of this end are not limited. They are behind the data that
	// the peer has sent before, so a peer that exceeds a rate may acknowledge messages late.
	// Default: no limit.
	MaxMessagesPerSecond int
	MaxBytesPerSecond    int
	// SendOnly rejects received messages with an ERROR and streams with
	// TX_CANCEL, from the start; see [Session.SetSendOnly].
	SendOnly bool
	// Logger receives events that are not returned as errors. Default: none.
	Logger *slog.Logger
	// OnLateAck is called when the peer acknowledges or rejects a frame after its send was
	// cancelled: the frame has arrived, but its send has returned an error.
	// OnReject is called when the session itself rejects a message or, with KindStream, a
	// stream; it is not called for [Message.Reject]. OnIgnore is called for each received
	// frame of an unknown type, which is ignored. All are for counting, and must not wait. They
	// are called without a lock held, on the session's reading goroutine; OnReject also on the
	// goroutines of SetSendOnly, Close, Drain and an expiry. At a server they may be called before
	// OnSession. Default: none.
	OnLateAck func(*Session)
	OnReject  func(*Session, Kind)
	OnIgnore  func(*Session)
	// OnThrottle is called after each pause of reads because of MaxMessagesPerSecond or
	// MaxBytesPerSecond, with its duration, under the same conditions; not for the first pauses of a
	// session, up to a second of them in all. Default: none.
	OnThrottle func(*Session, time.Duration)

	secrets   *redact.Secrets // kept out of what is repeated of the peer's texts; nil at a listening end
	logLimit  *loglimit.Limit // shared by all sessions of a server; nil at a dialling end
	unwritten *atomic.Int64   // also shared by them, and nil at a dialling end; see writer.total
}

func (o *SessionOptions) validate() error {
	return cmp.Or(
		notNegative("HeartbeatInterval", o.HeartbeatInterval),
		notNegative("MaxBufferBytes", o.MaxBufferBytes),
		notNegative("CloseTimeout", o.CloseTimeout),
		notNegative("StreamIdleTimeout", o.StreamIdleTimeout),
		notNegative("MaxMessagesPerSecond", o.MaxMessagesPerSecond),
		notNegative("MaxBytesPerSecond", o.MaxBytesPerSecond),
	)
}

// notNegative returns an error if the value of an option is negative.
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
	if o.OnIgnore == nil {
		o.OnIgnore = func(*Session) {}
	}
	if o.OnThrottle == nil {
		o.OnThrottle = func(*Session, time.Duration) {}
	}
	return o
}

// Session is one Cryo connection, from its handshake to its end; a client that
// reconnects gets a new one, optionally with the same id. All methods may be
// called from any goroutine.
//
// A session has one goroutine that reads, and one that writes while there is
// something to write. They never wait for each other.
type Session struct {
	id      uint64
	dialing bool // this end dialled
	value   any  // Value of the Upgrade; not modified
	opts    SessionOptions
	log     *slog.Logger

	conn      *ws.Conn
	writer    *writer
	acks      *ackTable
	inbox     *inbox
	unsettled *unsettledMessages
	limit     *receiveLimit
	incoming  *incomingStreams
	outgoing  *outgoingStreams

	logLimit   *loglimit.Limit
	sendOnly   atomic.Bool            // received messages and streams are rejected
	peerKnown  chan struct{}          // closed by setPeerKnown
	peerAcked  atomic.Bool            // the peer has acknowledged a frame; at a dialling end, other than ENDPOINT_INFO
	streamless atomic.Bool            // the peer's last ENDPOINT_INFO announces no streams
	ignored    atomic.Int64           // received frames of unknown types
	onEnd      func(closeDone func()) // callback of the server; nil at a dialling end
	keepalive  keepalive

	ctx  context.Context         // done with the first cause of the end; nothing new starts then
	end  context.CancelCauseFunc // called by setCause only
	done chan struct{}           // closed when the goroutines are gone

	unreadable chan struct{}  // closed when nothing more is read
	closers    sync.WaitGroup // goroutines of endViolation and expire; none is started once stopped is set

	mu         sync.Mutex
	stopped    bool        // no timer may be set, and no goroutine of closers started, any more
	closeTimer *time.Timer // bounds the close handshake; nil before it
	expiry     expiry      // set once, at a server; its timer is nil if the session does not expire
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
		conn: conn, acks: numbers, inbox: newInbox(),
		logLimit:  cmp.Or(opts.logLimit, loglimit.New()),
		peerKnown: make(chan struct{}), done: make(chan struct{}), unreadable: make(chan struct{}),
		unsettled: newUnsettled(),
	}
	s.ctx, s.end = context.WithCancelCause(context.Background())
	s.writer = newWriter(conn, id, numbers, s.fail)
	if opts.unwritten != nil {
		s.writer.total = opts.unwritten
	}
	s.limit = newReceiveLimit(conn, buffer, s.ctx.Done(), numbers.hasWaiters, s.wants, s.early)
	conn.Start(s.writer.webSocketPong, s.limit.continued)
	s.limit.rates.limit(opts.MaxMessagesPerSecond, opts.MaxBytesPerSecond)
	s.limit.rates.begin = s.reportThrottled
	s.limit.rates.end = func(d time.Duration) { opts.OnThrottle(s, d) }
	// Unsettled messages and streams refer to their session. When the session is garbage,
	// they can't be settled any more, and their reservations are released.
	runtime.AddCleanup(s, releaseAll, s.limit.bytes)
	s.incoming = newIncomingStreams(s)
	s.outgoing = newOutgoingStreams()
	s.sendOnly.Store(opts.SendOnly)
	s.keepalive = keepalive{
		conn: conn, dialing: dialing, interval: opts.HeartbeatInterval,
		paused: s.limit.paused.Load, resumed: s.limit.resumedAt,
		ping: s.writer.ping, pong: s.writer.pong,
		onHeartbeat: s.checkIncoming, onTimeout: s.peerTimedOut,
	}
	s.keepalive.start()
	go s.read()
	return s
}

// ID returns the session's id, which the client chose.
func (s *Session) ID() uint64 { return s.id }

// Value returns the Value that Authorize set in [Upgrade]; nil if this end dialled.
func (s *Session) Value() any { return s.value }

// RemoteAddr returns the peer's network address.
func (s *Session) RemoteAddr() net.Addr { return s.conn.RemoteAddr() }

// Done returns a channel that is closed when the session is over and its goroutines are gone,
// except the one that calls a server's OnSessionEnd. Received messages can still be received
// then.
func (s *Session) Done() <-chan struct{} { return s.done }

// Context returns a context that is done as soon as the session begins to end: nothing can be
// sent any more. Its cause is the error of Err.
func (s *Session) Context() context.Context { return s.ctx }

// Err returns nil while the session is open, and then the cause of its end; see [ErrClosed].
// Use it in place of the error of Context, which is always [context.Canceled].
func (s *Session) Err() error { return context.Cause(s.ctx) }

// Stats is a snapshot of a session. Its numbers are read one after the other.
type Stats struct {
	// Paused reports whether reads are paused: by backpressure, by a rate (see Throttled), or
	// for up to a second by a chunk of a stream that is not accepted yet. Received
	// acknowledgements may be unread then.
	Paused bool
	// Throttled reports whether reads were paused within the last second because the peer
	// exceeds MaxMessagesPerSecond or MaxBytesPerSecond. Received acknowledgements may be
	// unread then.
	Throttled bool
	// HeldBytes counts against MaxBufferBytes: messages that are not settled, bytes of
	// streams that are not read, and what Reserve has counted.
	HeldBytes int64
	// UnsettledMessages is the number of received messages that are neither acknowledged
	// nor rejected, in the queue or with the application.
	UnsettledMessages int
	// AwaitingAcks is the number of unacknowledged messages and stream frames that this end
	// has sent or queued.
	AwaitingAcks int
	// QueuedBytes is the number of unwritten bytes: payloads, and small frames with their
	// overhead.
	QueuedBytes int64
	// OpenStreams is the number of received streams that are announced or open, at most 256.
	OpenStreams int
	// IgnoredFrames is the number of received frames of unknown types, which are ignored.
	IgnoredFrames int64
}

// Stats returns a snapshot for metrics, and for decisions about a slow peer. After the end it
// counts the messages that are still unacknowledged.
func (s *Session) Stats() Stats {
	held, _ := s.limit.bytes.Usage()
	return Stats{
		Paused:            s.limit.paused.Load(),
		Throttled:         s.limit.rates.recent(),
		HeldBytes:         held,
		UnsettledMessages: int(s.unsettled.n.Load()),
		AwaitingAcks:      s.acks.count(),
		QueuedBytes:       s.writer.queuedBytes(),
		OpenStreams:       s.incoming.count(),
		IgnoredFrames:     s.ignored.Load(),
	}
}

// Close ends the session: incoming streams are cancelled, queued acknowledgements are written, BYE
// carries the reason (truncated to 123 bytes), and the WebSocket is closed with code 4000. Data
// that still arrives is discarded until the peer closes too. CloseTimeout and the context bound all
// of it; then the connection is closed. Close returns when the session's goroutines are gone, and
// may be called more than once. Its error is the context's.
//
// BYE waits until the peer has acknowledged each TX_CANCEL and for another 500 ms has sent
// nothing more of its streams, or for half of CloseTimeout: the published server, while it sends a
// stream, does not survive the end of its session. The 500 ms are left out if no stream was
// accepted, and no chunk has come. It waits as well for the TX_FINISH of a pulled stream that was
// acknowledged ahead of that.
//
// Messages in the queue can still be received; otherwise call [Session.Discard], or they count
// against the MaxBufferBytes of a server permanently.
func (s *Session) Close(ctx context.Context, reason string) error {
	return s.close(ctx, closeGraceful, reason)
}

// CloseForRetry is Close for a session whose client may connect again: the WebSocket is closed
// with code 1013 (try again later), and without BYE. The published client for browsers connects
// again after that, and never after a Close.
func (s *Session) CloseForRetry(ctx context.Context, reason string) error {
	return s.close(ctx, closeTryAgain, reason)
}

// close is Close with a close code. BYE is sent with closeGraceful only.
func (s *Session) close(ctx context.Context, code int, reason string) error {
	s.sendClose(ErrClosed, code, reason, ctx.Done())
	select {
	case <-s.done:
		return nil
	case <-ctx.Done():
		_ = s.conn.Close()
		<-s.done
		return contextError(ctx)
	}
}

// sendClose begins the close handshake, unless the session is ending already. It does not wait for
// the peer to close. When the channel enough is closed, it no longer waits for the acknowledgements
// of cancelled streams either.
func (s *Session) sendClose(cause error, code int, reason string, enough <-chan struct{}) {
	if !s.beginClosing(cause) {
		return
	}
	f := closeFrame{code: code, reason: closeReason(reason)}
	if code == closeGraceful {
		f.bye = &wire.Frame{SID: s.id, Type: wire.Bye, Ack: s.acks.number(), Payload: []byte(f.reason)}
	}
	s.cancelIncoming()
	s.incoming.awaitCancels(s.opts.CloseTimeout, enough, s.unreadable)
	s.writer.queueClose(f)
}

// CloseNow ends the session by closing its connection without a close handshake: nothing more
// is sent, not even queued acknowledgements. It returns nil when the session's goroutines are
// gone. It may be called while Close or Drain waits, which then returns. Otherwise it is like
// Close.
func (s *Session) CloseNow() error {
	s.fail(ErrClosed)
	<-s.done
	return nil
}

// Drain waits until all received messages and streams are settled (acknowledged or rejected), and
// then closes the session.
// Incomplete streams are cancelled and new ones rejected; later messages are discarded, neither
// acknowledged nor rejected, so that the peer sends them again on another session. Receive
// returns messages that were received before, and everything can be sent, such as responses.
// When each message is acknowledged or rejected, and each complete stream settled, Drain closes
// the session as Close does, without waiting for sends.
//
// When the context is done before that, Drain returns its error, and the session is still open
// and drains: call Drain again, Close or CloseNow. If the session ends first, Drain returns the
// cause, because nothing can be settled any more.
func (s *Session) Drain(ctx context.Context, reason string) error {
	return s.drain(ctx, closeGraceful, reason)
}

// drain is Drain with the close code of close.
func (s *Session) drain(ctx context.Context, code int, reason string) error {
	if err := s.settle(ctx, ErrClosed); err != nil {
		return err
	}
	return s.close(ctx, code, reason)
}

// settle is the part of Drain before Close. cause is that of the session's end.
func (s *Session) settle(ctx context.Context, cause error) error {
	settled := s.unsettled.drain()
	s.limit.recheck() // discarded frames need no capacity
	s.incoming.cancelIncomplete(&endedError{cause})
	s.incoming.awaitCancels(s.opts.CloseTimeout, ctx.Done(), s.ctx.Done())
	select {
	case <-settled:
	case <-s.ctx.Done():
	case <-ctx.Done():
		return contextError(ctx)
	}
	return s.incoming.awaitSettled(ctx, s.ctx)
}

// awaitSends waits until all that this end has sent is answered or cancelled. It returns the cause if the
// session ends first.
func (s *Session) awaitSends(ctx context.Context) error {
	// Between TX_START and TX_FINISH, no frame of a stream waits for an answer.
	for _, whenEmpty := range []func() <-chan struct{}{s.outgoing.whenEmpty, s.acks.whenEmpty} {
		select {
		case <-whenEmpty():
		case <-s.ctx.Done():
			return s.Err()
		case <-ctx.Done():
			return contextError(ctx)
		}
	}
	return s.Err()
}

// Draining reports whether the session drains, or has drained, by Drain or because it has
// expired; see [Upgrade]. It may still be open, so that responses to received messages can be sent
// before these are settled. Send other messages on another session.
func (s *Session) Draining() bool { return s.unsettled.draining.Load() }

// maxControlText bounds the text of a WebSocket close frame, and so of BYE, in bytes.
const maxControlText = 123

// Close codes of the WebSocket (protocol, "Closing").
const (
	closeGraceful    = 4000
	closeClientError = 4001
	// Codes of RFC 6455 and its registry. cryo-client-browser connects again after every
	// code but 4000, and after BYE only if the server has sent its close frame by then.
	closeRestart  = websocket.CloseServiceRestart
	closeTryAgain = websocket.CloseTryAgainLater
)

// setCause records the cause of the session's end, and reports whether it is the first one.
func (s *Session) setCause(cause error) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.isEnding() {
		return false
	}
	s.end(&endedError{cause})
	return true
}

// beginClosing is setCause for an end with a close handshake, which CloseTimeout bounds.
func (s *Session) beginClosing(cause error) bool {
	return s.beginClosingWithin(s.opts.CloseTimeout, cause)
}

func (s *Session) beginClosingWithin(timeout time.Duration, cause error) bool {
	if !s.setCause(cause) {
		return false
	}
	s.mu.Lock()
	if !s.stopped {
		s.closeTimer = time.AfterFunc(timeout, func() { _ = s.conn.Close() })
	}
	s.mu.Unlock()
	s.limit.interruptLarge() // the rest is discarded, and its memory released for others
	return true
}

// cancelIncoming is the first step of an end by this end's decision. The next one, awaitCancels
// and the close frame, must follow.
func (s *Session) cancelIncoming() {
	s.writer.rejectData() // queued frames are written before the close frame, however long the peer takes to cancel
	s.incoming.cancelIncomplete(s.Err())
}

// endTakenOver ends a session that a newer connection of the same client has taken over. Its own
// connection is probably lost, so the close handshake is short. If it is not, another client has
// the same session id: with code 4000 the published clients do not connect again, and so do not
// take it over in turn.
func (s *Session) endTakenOver() {
	timeout := min(s.opts.CloseTimeout, takeOverTimeout)
	if !s.beginClosingWithin(timeout, ErrTakenOver) {
		return
	}
	s.acks.end(s.Err()) // the senders need not wait for the end of a lost connection
	s.cancelIncoming()
	s.incoming.awaitCancels(timeout, nil, s.unreadable)
	s.writer.queueClose(closeFrame{code: closeGraceful, reason: ErrTakenOver.Error()})
}

// takeOverTimeout bounds the close handshake of a session that was taken over.
const takeOverTimeout = time.Second

// closeWith ends the session with a close handshake, without BYE: the writer writes queued
// frames and the close frame, and half-closes; the reader discards data until the peer closes.
// If Close is waiting for the acknowledgement of a TX_CANCEL, this close frame is sent instead of
// Close's, because only the first one is sent. closeWith reports whether its cause is the first.
func (s *Session) closeWith(cause error, code int, reason string) bool {
	first := s.beginClosing(cause)
	s.writer.queueClose(closeFrame{code: code, reason: closeReason(reason)})
	return first
}

// closeReason returns a reason as valid UTF-8, truncated to the size of a close frame.
func closeReason(reason string) string {
	return redact.Cut(strings.ToValidUTF8(reason, "\uFFFD"), maxControlText)
}

// fail ends the session without a close handshake.
func (s *Session) fail(cause error) {
	s.setCause(cause)
	_ = s.conn.Close()
}

// finish is called by the reading goroutine after the last frame. All acknowledgements that
// arrived before the end are processed by then; the remaining sends fail with the cause.
func (s *Session) finish() {
	s.mu.Lock()
	s.stopped = true
	if s.closeTimer != nil {
		s.closeTimer.Stop()
	}
	if s.expiry.timer != nil {
		s.expiry.timer.Stop()
	}
	s.mu.Unlock()
	close(s.unreadable)
	s.closers.Wait()
	s.keepalive.stop()
	s.writer.abort()
	_ = s.conn.Close()
	s.writer.wait()
	err := s.Err()
	s.acks.end(err)
	s.inbox.end()
	s.incoming.stopTimers()
	closeDone := func() { close(s.done) }
	if s.onEnd == nil {
		closeDone()
	} else {
		s.onEnd(closeDone)
	}
}

// peerTimedOut ends the session of a peer that was not alive for this time.
func (s *Session) peerTimedOut(d time.Duration) {
	cause := fmt.Errorf("%w after %v", ErrPeerTimeout, d)
	if s.writer.overLimit() != nil {
		cause = fmt.Errorf("%w: the peer sends, but does not read acknowledgements", cause)
	}
	s.fail(cause)
}

// checkIncoming ends the session if its incomplete message makes others wait for too long.
func (s *Session) checkIncoming() {
	if !s.isEnding() && s.limit.starvesOthers() && s.endViolation(ErrReceiveTimeout) {
		s.report("Closing a session", "error", ErrReceiveTimeout)
	}
}
