package cryo

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"

	"github.com/cryo-connect/cryo-connect/internal/ws"
)

// Defaults of [ServerOptions].
const (
	DefaultMaxSessions      = 10_000
	DefaultHandshakeTimeout = 10 * time.Second
)

// infoPatience is how long a server waits for the client's ENDPOINT_INFO before
// it sends its own. cryo-client-node often loses one that travels right behind
// the upgrade's answer.
const infoPatience = time.Second

// ServerOptions are what a server can set. A zero value means its default, and a negative
// one is an error.
type ServerOptions struct {
	SessionOptions

	// Authorize decides who may come in; its error is a refusal and goes to
	// the log, not to the client, unless it is an [*AdmissionError]. It runs on the
	// request's goroutine. There is no default: without it everybody is refused.
	// See [Tokens].
	Authorize func(*Upgrade) error
	// OnSession is called when a session is connected, on the goroutine of its
	// request, which ends when it returns. The session goes on. It may run until the
	// session has ended, at the price of that goroutine. If it panics, the session's
	// connection is cut.
	OnSession func(*Session, *Upgrade)
	// OnSessionEnd is called once for each session that OnSession was called for, when
	// OnSession has returned and the session's Done is closed. The session's id may be
	// connected again by then. Until both handlers have returned, the session counts
	// for MaxSessions, and Shutdown waits. Neither of them may call Shutdown or Drain of
	// the Server.
	OnSessionEnd func(*Session)
	// OnDeny is called when a client is denied, with the HTTP status of the response,
	// on the request's goroutine. Default: none.
	OnDeny func(status int)
	// MaxSessions bounds the sessions, those in handshake and those whose connection
	// is still closing included; more are refused with 503. A client that takes its
	// own session over is let in by a full server too, until there are twice as many
	// with those that are closing. Default 10,000.
	MaxSessions int
	// MaxSessionsPerAddress bounds the sessions of one IP address, or of one
	// IPv6 network of 64 bits, by the request's RemoteAddr; more are refused
	// with 429. Behind a reverse proxy somebody has to put the client's address
	// there. Default: no such bound.
	MaxSessionsPerAddress int
	// Full is asked about each client that may come in; those that come while it
	// says true are refused with 503. It is for who keeps something of sessions
	// that have ended. Default: never.
	Full func() bool
	// HandshakeTimeout bounds the time from the upgrade to the client's
	// ENDPOINT_INFO. Default 10 s. The HTTP server's own time-outs bound what
	// comes before.
	HandshakeTimeout time.Duration
	// CheckOrigin decides about browsers by their Origin header. Default: all
	// may come, because Cryo's token is nothing that a browser adds by itself.
	CheckOrigin func(*http.Request) bool
}

// Server accepts Cryo sessions. It is an [http.Handler] for any path of any
// HTTP/1.1 server.
type Server struct {
	opts     ServerOptions
	buffer   receiveBuffer
	refusals rate.Sometimes // of log lines
	refused  atomic.Int64   // since the last of them

	mu      sync.Mutex
	entries map[uint64]*entry
	perAddr map[netip.Prefix]int // entries; empty without a bound
	places  int                  // entries, and ghosts that were taken over and have not ended yet
	closed  bool
	idle    chan struct{} // closed when closed and without places
}

var _ http.Handler = (*Server)(nil)

// entry is a session's place in the registry, taken before the upgrade.
type entry struct {
	address     netip.Prefix      // of the client; see MaxSessionsPerAddress
	credentials [sha256.Size]byte // who has the same may take the session over
	session     *Session          // nil during the upgrade
	left        int               // of the session's end and its request: who is last reports the end
	decided     bool              // whether the session is announced: once, for good
	connected   bool              // the handshake is done, and the session announced
}

func (o *ServerOptions) validate() error {
	return cmp.Or(
		o.SessionOptions.validate(),
		notNegative("MaxSessions", o.MaxSessions),
		notNegative("MaxSessionsPerAddress", o.MaxSessionsPerAddress),
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

// NewServer makes a server. MaxBufferBytes is shared by all its sessions. It returns what
// is wrong with the options; nil options are those of a server that denies everybody.
func NewServer(options *ServerOptions) (*Server, error) {
	var opts ServerOptions
	if options != nil {
		opts = *options
	}
	if err := opts.validate(); err != nil {
		return nil, fmt.Errorf("making a server: %w", err)
	}
	opts = opts.withDefaults()
	return &Server{
		opts:     opts,
		buffer:   newReceiveBuffer(opts.MaxBufferBytes),
		refusals: rate.Sometimes{First: 1, Interval: time.Second},
		entries:  make(map[uint64]*entry),
		perAddr:  make(map[netip.Prefix]int),
		idle:     make(chan struct{}),
	}, nil
}

// ServeHTTP answers an upgrade: 426 to a request that is none, 400 or 405 to one that is
// not valid, 401 without a valid token or with the id of another's session, 403 to an
// origin that is not allowed, 429 when there are too many from one address, 503 when the
// server is full or closing. Whatever is no part of the request is judged after the token.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if invalid := ws.CheckUpgrade(r); invalid != nil {
		maps.Copy(w.Header(), invalid.Header)
		if invalid.Status == http.StatusUpgradeRequired { // a browser, or a health check: nothing to log
			http.Error(w, "This is a Cryo server: connect with a Cryo client, over WebSocket.", invalid.Status)
			return
		}
		s.refuse(w, r, &refusal{status: invalid.Status, sentence: invalid.Sentence})
		return
	}
	u, e, refused := s.admit(r)
	if refused != nil {
		s.refuse(w, r, refused)
		return
	}
	session := s.open(w, u, e)
	if session == nil {
		return
	}
	defer s.leave(e)
	s.handshake(session)
	if !s.announce(e) {
		session.SetSendOnly(true) // nobody will take what it received
		return
	}
	if s.opts.OnSession != nil {
		s.handOut(session, u)
	}
}

// handOut calls OnSession. If that panics, which the HTTP server recovers, nobody has the
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

var errHandlerPanicked = errors.New("OnSession has panicked")

// open upgrades the request and starts the session.
func (s *Server) open(w http.ResponseWriter, u *Upgrade, e *entry) *Session {
	conn, err := ws.Upgrade(w, u.Request)
	if err != nil {
		s.remove(u.SessionID, e)
		s.free()
		if failed, ok := errors.AsType[*ws.UpgradeError](err); ok {
			s.refuse(w, u.Request, &refusal{status: failed.Status, sentence: failed.Sentence, answered: failed.Answered})
		}
		return nil
	}
	id := u.SessionID // the session must not keep the request
	s.mu.Lock()
	e.left = 2
	e.session = newSession(id, false, u.Value, conn, s.buffer, s.opts.SessionOptions, func(closeDone func()) { s.ended(id, e, closeDone) })
	closed := s.closed
	e.decided = closed // not announced, whatever it does until it has ended
	s.mu.Unlock()
	if closed {
		_ = e.session.Close(u.Request.Context(), shutdownReason)
		s.leave(e)
		return nil
	}
	return e.session
}

// handshake exchanges ENDPOINT_INFO, or waits for the session's end.
func (s *Server) handshake(session *Session) {
	patience := time.NewTimer(infoPatience)
	defer patience.Stop()
	deadline := time.NewTimer(s.opts.HandshakeTimeout)
	defer deadline.Stop()
	told := false
	for {
		select {
		case <-session.peerKnown:
			if !told {
				session.sayEndpointInfo()
			}
			return
		case <-patience.C:
			session.sayEndpointInfo()
			told = true
		case <-deadline.C:
			session.protocolError(&ProtocolError{Problem: fmt.Sprintf("no ENDPOINT_INFO within %v", s.opts.HandshakeTimeout)})
			return
		case <-session.done:
			return
		}
	}
}

// announce makes a session known whose client has said ENDPOINT_INFO, unless it
// was taken over meanwhile. The first call decides: a session that its request has
// dropped isn't reported as left either.
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

// ended is a session's end. A client that left as soon as it was connected may be
// ahead of its own request: its session is announced all the same, for what it sent
// is there to be taken.
func (s *Server) ended(id uint64, e *entry, closeDone func()) {
	s.announce(e)
	s.remove(id, e)
	closeDone()
	s.leave(e)
}

// leave is called twice for a session: when it has ended, and when its request is done
// with it, OnSession included. The second call reports the end.
func (s *Server) leave(e *entry) {
	s.mu.Lock()
	e.left--
	last, announced := e.left == 0, e.connected
	s.mu.Unlock()
	if !last {
		return
	}
	defer s.free()
	if announced && s.opts.OnSessionEnd != nil {
		s.opts.OnSessionEnd(e.session)
	}
	if s.opts.OnSession == nil {
		e.session.Discard() // nobody was given it to receive from
	}
}

// remove makes an entry's id available again.
func (s *Server) remove(id uint64, e *entry) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.entries[id] == e {
		delete(s.entries, id)
		s.count(e, -1)
	}
}

// free frees the slot of an entry that was removed, last of all: Shutdown waits for it.
func (s *Server) free() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.places--
	s.idleLocked()
}

func (s *Server) idleLocked() {
	if !s.closed || s.places > 0 {
		return
	}
	select {
	case <-s.idle:
	default:
		close(s.idle)
	}
}

// Session finds a connected session by its id.
func (s *Server) Session(id uint64) (*Session, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if e := s.entries[id]; e != nil && e.connected {
		return e.session, true
	}
	return nil, false
}

// Sessions lists the connected sessions, in no order.
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

// Shutdown denies new clients, closes all sessions, see [Session.Close], and returns when
// they have ended, their goroutines are gone, and OnSession and OnSessionEnd have returned
// for each of them. When the context is done, it closes their connections at once, and
// returns without waiting for handlers that still run. Connections that are no sessions
// are those of the HTTP server.
func (s *Server) Shutdown(ctx context.Context) error {
	return s.closeAll(ctx, func(session *Session) error { return session.Close(ctx, shutdownReason) })
}

// Drain is Shutdown that lets what was received be settled first: see [Session.Drain].
// When the context is done, sessions may still be open, and drain; call Shutdown then.
func (s *Server) Drain(ctx context.Context) error {
	return s.closeAll(ctx, func(session *Session) error {
		err := session.Drain(ctx, shutdownReason)
		if ctx.Err() == nil {
			return nil // or the session ended by itself
		}
		return err
	})
}

// closeAll denies new clients, and returns when end has returned for each session and
// nothing is left of them.
func (s *Server) closeAll(ctx context.Context, end func(*Session) error) error {
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
	closed := make(chan error, len(sessions))
	for _, session := range sessions {
		go func() { closed <- end(session) }()
	}
	var err error
	for range sessions {
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
