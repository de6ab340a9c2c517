package cryo

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/netip"
	"runtime"
	"sync"
	"sync/atomic"
	"time"
	"weak"

	"golang.org/x/time/rate"

	"github.com/cryo-connect/cryo-connect/internal/loglimit"
	"github.com/cryo-connect/cryo-connect/internal/ws"
)

// Defaults of [ServerOptions].
const (
	DefaultMaxSessions      = 10_000
	DefaultHandshakeTimeout = 10 * time.Second
)

// infoDelay is the time that a server waits for the client's ENDPOINT_INFO before
// it sends its own. cryo-client-node often loses one that directly follows the
// response to the upgrade.
const infoDelay = time.Second

// ServerOptions are the options of a [Server]. A zero value means its default, and a negative
// one is an error.
type ServerOptions struct {
	SessionOptions

	// Authorize decides whether a client may connect. Its error denies the client, and is
	// logged but not sent, unless it is an [*AdmissionError]. It runs on the request's
	// goroutine, so calls may be concurrent. There is no default: without it all clients are
	// denied. See [Tokens].
	Authorize func(*Upgrade) error
	// OnSession is called when a session is connected, on the goroutine of its request,
	// which ends when OnSession returns; the session stays open. OnSession may run until
	// the session has ended, at the cost of that goroutine. If it panics, the session's
	// connection is closed.
	OnSession func(*Session, *Upgrade)
	// OnSessionEnd is called once for each session that OnSession was called for, when
	// OnSession has returned and the session's Done is closed. The session's id may be
	// connected again by then. Until both handlers have returned, the session counts
	// for MaxSessions, and Shutdown waits. Neither of them may call Shutdown or Drain of
	// the Server.
	OnSessionEnd func(*Session)
	// OnDeny is called when a client is denied, with the HTTP status of the response, and
	// with 408 if it does not complete the handshake within HandshakeTimeout, though the
	// response was 101 then. It is not called for a request that has neither an upgrade nor
	// Cryo's token, such as that of a health check. Request's goroutine. Default: none.
	OnDeny func(status int)
	// MaxSessions bounds the sessions, including those in the handshake and those that
	// are closing; further clients are denied with 503. A client that takes over its own
	// session may exceed the bound, up to twice as many with those that are closing.
	// Default 10,000.
	MaxSessions int
	// MaxSessionsPerAddress bounds the sessions of one IP address, or of one
	// IPv6 network of 64 bits, by the request's RemoteAddr; further clients are denied
	// with 429. Behind a reverse proxy, RemoteAddr must be set to the client's address.
	// Default: no bound.
	MaxSessionsPerAddress int
	// MaxConnectsPerSecond limits the rate at which clients are accepted, up to one second's worth
	// at a time; further clients are denied with 503. Only clients that Authorize accepts count,
	// so those without a token cannot exhaust it. While it is exhausted, clients are denied
	// without a call to Authorize. Default: no limit.
	MaxConnectsPerSecond int
	// Full is called for each authorized client; if it returns true, the client is denied
	// with 503. It is for applications that keep state of ended sessions, such as messages
	// that are not processed yet. Request's goroutine, so calls may be concurrent. Default:
	// never full.
	Full func() bool
	// MaxSessionAge bounds the time for which a session is open. Between nine tenths and all of
	// it, at random so that sessions which began together do not end together, the session ends
	// as described at Expires of [Upgrade], but with close code 1013 and without BYE, so that a
	// client that reconnects automatically does so immediately. Default: no bound.
	MaxSessionAge time.Duration
	// ExpiryGrace is the time from Expires of [Upgrade] to the end of the session. A client can
	// use it to connect with a renewed token, and it tolerates clocks that differ. MaxSessionAge
	// and the check at the upgrade have no grace. Default: none.
	ExpiryGrace time.Duration
	// HandshakeTimeout bounds the time from the upgrade until the client has completed the
	// Cryo handshake: it has sent ENDPOINT_INFO, acknowledged the server's, which is sent
	// after a second at the latest, or begun to send data. A client that has not is disconnected,
	// with a line in the log. Default 10 s. The HTTP server's timeouts bound the time before
	// the upgrade.
	HandshakeTimeout time.Duration
	// CheckOrigin reports whether a browser may connect, by its Origin header. It is called before
	// Authorize. Default:
	// always, because a browser does not add Cryo's token automatically, unlike a cookie. Request's
	// goroutine, so calls may be concurrent.
	CheckOrigin func(*http.Request) bool
}

// Server accepts Cryo sessions. It is an [http.Handler] for any path of any
// HTTP/1.1 server.
type Server struct {
	opts     ServerOptions
	buffer   receiveBuffer
	connects *rate.Limiter    // clients that Authorize has accepted
	denials  loglimit.ByValue // of denied clients, by status

	mu      sync.Mutex
	entries map[uint64]*entry
	holders map[client]weak.Pointer[holder]
	perAddr map[netip.Prefix]int // number of entries; empty without MaxSessionsPerAddress
	slots   int                  // entries, plus sessions that were taken over or are still closing
	closed  bool
	idle    chan struct{} // closed when closed is set and slots is 0
}

var _ http.Handler = (*Server)(nil)

// entry is a session's entry in the table, added before the upgrade.
type entry struct {
	address     netip.Prefix // client's network; see MaxSessionsPerAddress
	credentials credentials  // a client with the same ones may take over the session
	session     *Session     // nil during the upgrade
	endsLeft    int          // 2, minus 1 each for the end of the session and of its request; OnSessionEnd at 0
	decided     bool         // connected is final
	connected   bool         // the handshake is done, and the session announced
}

func (o *ServerOptions) validate() error {
	return cmp.Or(
		o.SessionOptions.validate(),
		notNegative("MaxSessions", o.MaxSessions),
		notNegative("MaxSessionsPerAddress", o.MaxSessionsPerAddress),
		notNegative("MaxSessionAge", o.MaxSessionAge),
		notNegative("ExpiryGrace", o.ExpiryGrace),
		notNegative("MaxConnectsPerSecond", o.MaxConnectsPerSecond),
		notNegative("HandshakeTimeout", o.HandshakeTimeout),
	)
}

func (o ServerOptions) withDefaults() ServerOptions {
	o.SessionOptions = o.SessionOptions.withDefaults()
	if o.MaxSessions == 0 {
		o.MaxSessions = DefaultMaxSessions
	}
	if o.HandshakeTimeout == 0 {
		o.HandshakeTimeout = DefaultHandshakeTimeout
	}
	if o.Authorize == nil {
		o.Authorize = Tokens()
	}
	if o.Full == nil {
		o.Full = func() bool { return false }
	}
	if o.CheckOrigin == nil {
		o.CheckOrigin = func(*http.Request) bool { return true }
	}
	return o
}

// NewServer creates a server. All its sessions share MaxBufferBytes. Invalid options are an
// error. A server with nil options denies all clients, because Authorize is not set.
func NewServer(options *ServerOptions) (*Server, error) {
	var opts ServerOptions
	if options != nil {
		opts = *options
	}
	if err := opts.validate(); err != nil {
		return nil, fmt.Errorf("creating a server: %w", err)
	}
	opts = opts.withDefaults()
	connects := rate.NewLimiter(rate.Inf, 1)
	if opts.MaxConnectsPerSecond > 0 {
		connects = rate.NewLimiter(rate.Limit(opts.MaxConnectsPerSecond), opts.MaxConnectsPerSecond)
	}
	opts.logLimit = loglimit.New() // a client that violates the protocol may reconnect immediately
	opts.unwritten = new(atomic.Int64)
	return &Server{
		opts:     opts,
		buffer:   newReceiveBuffer(opts.MaxBufferBytes),
		connects: connects,
		entries:  make(map[uint64]*entry),
		holders:  make(map[client]weak.Pointer[holder]),
		perAddr:  make(map[netip.Prefix]int),
		idle:     make(chan struct{}),
	}, nil
}

// ServeHTTP accepts an upgrade, or responds with 426 to another request, 400 or 405 to an invalid
// upgrade, 401 if the token is invalid or has expired or the session id belongs to another client,
// 403 if the origin is not allowed, 429 if the address has reached its limit of sessions, and 503
// if the server is full or closing, or clients connect too fast. 429 and 503 have a Retry-After of
// a few seconds, which differs from client to client. What depends on the request alone is checked
// before the token, and everything else after it, except the rate of clients.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if invalid := ws.CheckUpgrade(r); invalid != nil {
		maps.Copy(w.Header(), invalid.Header)
		denied := &denial{status: invalid.Status, message: invalid.Message}
		if invalid.Status == http.StatusUpgradeRequired {
			denied.message, denied.reason = "This is a Cryo server: connect with a Cryo client, over WebSocket.", noUpgrade
			denied.stranger = !r.URL.Query().Has(paramAuthorization)
		}
		s.deny(w, r, denied)
		return
	}
	u, e, denied := s.admit(r)
	if denied != nil {
		s.deny(w, r, denied)
		return
	}
	session := s.open(w, u, e)
	if session == nil {
		return
	}
	defer s.leave(e)
	s.handshake(session, r.RemoteAddr)
	if !s.announce(e) {
		session.SetSendOnly(true) // its messages will not be received
		return
	}
	if s.opts.OnSession != nil {
		s.handOut(session, u)
	}
}

// handOut calls OnSession. If that panics, which the HTTP server recovers, no caller has the
// session, so it ends.
func (s *Server) handOut(session *Session, u *Upgrade) {
	returned := false
	defer func() {
		if !returned {
			session.fail(errHandlerPanicked)
		}
	}()
	s.opts.OnSession(session, u)
	returned = true
}

var errHandlerPanicked = errors.New("OnSession panicked")

// open upgrades the request and starts the session.
func (s *Server) open(w http.ResponseWriter, u *Upgrade, e *entry) *Session {
	conn, err := ws.Upgrade(w, u.Request)
	if err != nil {
		s.remove(u.SessionID, e)
		s.freeSlot()
		if failed, ok := errors.AsType[*ws.UpgradeError](err); ok {
			s.deny(w, u.Request, &denial{status: failed.Status, message: failed.Message, answered: failed.Answered})
		}
		return nil
	}
	id := u.SessionID // the session must not keep the request
	s.mu.Lock()
	e.endsLeft = 2
	e.session = newSession(id, false, u.Value, conn, s.bufferLocked(e), s.opts.SessionOptions, func(closeDone func()) { s.ended(id, e, closeDone) })
	closed := s.closed
	e.decided = closed // never announced
	s.mu.Unlock()
	e.session.setExpiry(s.opts.expiryOf(u))
	if closed {
		_ = e.session.close(u.Request.Context(), closeRestart, shutdownReason)
		s.leave(e)
		return nil
	}
	return e.session
}

// client identifies the sessions that are one holder of the receive buffer: those of an owner, or
// those without an owner that have the same token, certificate and address.
type client struct {
	credentials credentials
	address     netip.Prefix // zero for an owner
}

// bufferLocked returns the receive buffer for the session of an entry. The groups of a client exist
// as long as one of its sessions, or something that these have received.
func (s *Server) bufferLocked(e *entry) receiveBuffer {
	c := client{e.credentials, e.address}
	if c.credentials.owned {
		c.address = netip.Prefix{}
	}
	b := s.buffer
	if b.holder = s.holders[c].Value(); b.holder == nil {
		b.holder = &holder{owned: c.credentials.owned}
		known := weak.Make(b.holder)
		s.holders[c] = known
		runtime.AddCleanup(b.holder, func(c client) {
			s.mu.Lock()
			defer s.mu.Unlock()
			if s.holders[c] == known {
				delete(s.holders, c)
			}
		}, c)
	}
	return b
}

// handshake sends ENDPOINT_INFO, and waits until the client is known to speak Cryo. It returns
// early if the session ends.
func (s *Server) handshake(session *Session, remote string) {
	patience := time.NewTimer(infoDelay)
	defer patience.Stop()
	deadline := time.NewTimer(s.opts.HandshakeTimeout)
	defer deadline.Stop()
	sent := false
	for {
		select {
		case <-session.peerKnown:
			if !sent {
				session.sendEndpointInfo()
			}
			return
		case <-patience.C:
			session.sendEndpointInfo()
			sent = true
		case <-deadline.C:
			s.denyUnknown(session, remote)
			return
		case <-session.done:
			return
		}
	}
}

// denyUnknown ends the session of a client that has not completed the handshake in time.
func (s *Server) denyUnknown(session *Session, remote string) {
	err := &ProtocolError{Problem: fmt.Sprintf("no ENDPOINT_INFO, ACK or data received within %v", s.opts.HandshakeTimeout)}
	if !session.closeWith(err, closeClientError, err.Error()) {
		return // it is ending, for another reason
	}
	if s.opts.OnDeny != nil {
		s.opts.OnDeny(http.StatusRequestTimeout)
	}
	if suppressed, ok := s.denials.Allow(http.StatusRequestTimeout); ok {
		s.opts.Logger.Warn("A client did not complete the Cryo handshake", "remote", remote, "session", session.id,
			"missing", "ENDPOINT_INFO, an acknowledgement, or data",
			"timeout", s.opts.HandshakeTimeout, "suppressed", suppressed)
	}
}

// announce marks a session as connected if its client has completed the handshake and it was not
// taken over meanwhile, and reports whether it is connected. The result of the first call is
// final: OnSessionEnd is called only for sessions that OnSession is called for.
func (s *Server) announce(e *entry) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if e.decided {
		return e.connected
	}
	e.decided = true
	select {
	case <-e.session.peerKnown:
		e.connected = s.entries[e.session.id] == e
	default:
	}
	return e.connected
}

// ended is called at the end of a session. The session of a client that leaves immediately may
// end before its request has announced it: it is announced here, because its messages can still
// be received.
func (s *Server) ended(id uint64, e *entry, closeDone func()) {
	s.announce(e)
	s.remove(id, e)
	closeDone()
	s.leave(e)
}

// leave is called twice for a session: when it has ended, and when its request is done,
// including OnSession. The second call calls OnSessionEnd.
func (s *Server) leave(e *entry) {
	s.mu.Lock()
	e.endsLeft--
	last, announced := e.endsLeft == 0, e.connected
	s.mu.Unlock()
	if !last {
		return
	}
	defer s.freeSlot()
	if announced && s.opts.OnSessionEnd != nil {
		s.opts.OnSessionEnd(e.session)
	}
	if s.opts.OnSession == nil {
		e.session.Discard() // without OnSession, its messages are never received
	}
}

// remove makes an entry's id available again.
func (s *Server) remove(id uint64, e *entry) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.entries[id] == e {
		delete(s.entries, id)
		s.countAddress(e, -1)
	}
}

// freeSlot releases the slot of a removed entry. It is the last step: Shutdown waits for it.
func (s *Server) freeSlot() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.slots--
	s.idleLocked()
}

func (s *Server) idleLocked() {
	if !s.closed || s.slots > 0 {
		return
	}
	select {
	case <-s.idle:
	default:
		close(s.idle)
	}
}

// Session returns the connected session with this id, which may be ending.
func (s *Server) Session(id uint64) (*Session, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if e := s.entries[id]; e != nil && e.connected {
		return e.session, true
	}
	return nil, false
}

// Sessions returns the connected sessions, in no order. Some may be ending.
func (s *Server) Sessions() []*Session {
	s.mu.Lock()
	defer s.mu.Unlock()
	list := make([]*Session, 0, len(s.entries))
	for _, e := range s.entries {
		if e.connected {
			list = append(list, e.session)
		}
	}
	return list
}

const shutdownReason = "server is shutting down"

// Shutdown denies new clients, closes all sessions, and returns when they have ended, their
// goroutines are gone, and OnSession and OnSessionEnd have returned for each of them. Sessions
// are closed as by [Session.Close], but without BYE and with close code 1012 (service restart),
// after which clients that reconnect do so. When the context is done, it closes their connections
// without a close handshake, and returns without waiting for handlers that still run.
//
// Shutdown does not stop the HTTP server, and [net/http.Server.Shutdown] neither closes sessions nor
// waits for them: call it after this Shutdown, for connections that are not upgraded.
func (s *Server) Shutdown(ctx context.Context) error {
	return s.closeAll(ctx, 0, func(session *Session) error { return session.close(ctx, closeRestart, shutdownReason) })
}

// Drain is Shutdown with [Session.Drain] in place of Close: it waits until the received messages
// are acknowledged or rejected. When the context is done, sessions may still be open and drain;
// call Shutdown then.
func (s *Server) Drain(ctx context.Context) error {
	return s.closeAll(ctx, 0, func(session *Session) error {
		err := session.drain(ctx, closeRestart, shutdownReason)
		if ctx.Err() == nil {
			return nil // or the session ended on its own
		}
		return err
	})
}

// DrainOver is Drain with the sessions one after the other, spread evenly over a period, so that their
// clients do not all connect again in the same second. New clients are denied from the start. Until its
// turn, a session continues as before.
//
// Unlike Drain, DrainOver also waits until the sends of a session are acknowledged or have failed, before it
// closes that session: bound sends and streams by their contexts, and send nothing else on a session that is
// [Session.Draining]. When the context is done, DrainOver waits only for close handshakes that have begun: the
// other sessions stay open, and those whose turn has come drain. Call Shutdown then.
func (s *Server) DrainOver(ctx context.Context, period time.Duration) error {
	return s.closeAll(ctx, period, func(session *Session) error {
		err := session.settle(ctx, ErrClosed)
		if err == nil {
			err = session.awaitSends(ctx)
		}
		if err == nil {
			err = session.close(context.WithoutCancel(ctx), closeRestart, shutdownReason)
		}
		if ctx.Err() == nil {
			return nil // or the session ended on its own
		}
		return err
	})
}

// closeAll denies new clients, calls end for each session, spread over a period, and returns when all
// of these calls have returned and all slots are free.
func (s *Server) closeAll(ctx context.Context, period time.Duration, end func(*Session) error) error {
	s.mu.Lock()
	s.closed = true
	s.idleLocked()
	var sessions []*Session
	for _, e := range s.entries {
		if e.session != nil {
			sessions = append(sessions, e.session)
		}
	}
	s.mu.Unlock()
	var err error
	closed := make(chan error, len(sessions))
	begin, begun := time.Now(), 0
	for i, session := range sessions {
		turn := begin.Add(time.Duration(float64(period) * float64(i) / float64(len(sessions))))
		if err = sleepUntil(ctx, turn, session.done); err != nil {
			break
		}
		begun++
		go func() { closed <- end(session) }()
	}
	for range begun {
		err = cmp.Or(err, <-closed)
	}
	if err != nil {
		return err
	}
	select {
	case <-s.idle:
		return nil
	case <-ctx.Done():
		return contextError(ctx)
	}
}

// sleepUntil waits until a time, which may have passed, or until the channel enough is closed. It
// returns the context's error if that is done first.
func sleepUntil(ctx context.Context, t time.Time, enough <-chan struct{}) error {
	wait := time.Until(t)
	if wait <= 0 {
		return nil
	}
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-enough:
		return nil
	case <-ctx.Done():
		return contextError(ctx)
	}
}
