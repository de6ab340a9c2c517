package plugin

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"slices"
	"sync"
	"syscall"

	"github.com/redpanda-data/benthos/v4/public/service"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// listener is the server on one address. All components with that address share it.
type listener struct {
	settings listenSettings
	log      *service.Logger
	expired  limitedLog
	listen   func(network, address string) (net.Listener, error)
	tls      *tls.Config // nil without TLS
	http     *http.Server
	server   *cryo.Server
	metrics  *listenMetrics
	pathLog  limitedLog // of clients that request another path
	inputs   *listenInputs

	// Guarded by the registry's mutex.
	users  []*serverComponent // empty while the listener starts or closes; the first one authorizes clients and reports the listener's metrics
	closed chan struct{}      // closed when the listener has started or failed to start, or when it has released its address

	mu      sync.Mutex
	first   *serverComponent // the first of users, which authorizes clients; nil: the listener closes
	address net.Addr         // the actual address, whose port differs from the configured one if that is 0
	down    chan struct{}    // closed when accepting has failed
	served  chan struct{}    // closed when the socket has been closed and serve has returned
	arrived chan struct{}    // closed and replaced when a session connects
}

// newListener starts a listener with the settings of its first component.
func newListener(c *serverComponent, listen func(network, address string) (net.Listener, error)) (*listener, error) {
	settings, log := c.settings, c.log
	files, err := settings.tlsSettings.watch(log)
	if err != nil {
		return nil, err
	}
	ln := &listener{
		settings: settings, log: log, expired: newLimitedLog(log), pathLog: newLimitedLog(log), listen: listen, metrics: newListenMetrics(c.meter),
		users: []*serverComponent{c}, first: c, closed: make(chan struct{}), arrived: make(chan struct{}),
	}
	if files != nil {
		ln.tls = &tls.Config{
			GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) { return files.current(), nil },
			MinVersion:         tls.VersionTLS12,
		}
	}
	opts := &cryo.ServerOptions{
		SessionOptions: cryo.SessionOptions{
			HeartbeatInterval:    settings.HeartbeatInterval,
			MaxBufferBytes:       settings.MaxBufferBytes,
			MaxMessagesPerSecond: settings.MaxMessagesPerSecond,
			MaxBytesPerSecond:    settings.MaxBytesPerSecond,
			Logger:               libraryLogger(log),
		},
		Authorize:             ln.authorize,
		OnSession:             func(s *cryo.Session, _ *cryo.Upgrade) { ln.connected(s) },
		OnSessionEnd:          ln.disconnected,
		MaxSessions:           settings.MaxSessions,
		MaxSessionsPerAddress: settings.MaxSessionsPerAddress,
		MaxSessionAge:         settings.MaxSessionAge,
		ExpiryGrace:           settings.SessionExpiryGrace,
		MaxConnectsPerSecond:  settings.MaxConnectsPerSecond,
		HandshakeTimeout:      settings.HandshakeTimeout,
		CheckOrigin:           settings.allowsOrigin,
		Full:                  func() bool { return ln.inputs.full(settings.MaxSessions) },
	}
	ln.metrics.watch(opts)
	if ln.server, err = cryo.NewServer(opts); err != nil {
		return nil, err
	}
	ln.http = &http.Server{
		Handler: ln,
		// The timeouts apply only to TLS and HTTP, because the connection of a session is hijacked.
		ReadHeaderTimeout: settings.HandshakeTimeout,
		ReadTimeout:       settings.HandshakeTimeout,
		MaxHeaderBytes:    settings.MaxHeaderBytes,
		ErrorLog:          serverLog(log),
		ConnState:         newConnLimit(settings.MaxSessions, log).changed,
	}
	// A client that is denied has no further request. A peer that sends many and reads no response
	// would keep the connection, and the memory of its request, for as long as it likes.
	ln.http.SetKeepAlivesEnabled(false)
	ln.inputs = newListenInputs(settings.Address, log, ln.server.Sessions)
	if err := ln.start(); err != nil {
		ln.inputs.close()
		return nil, err
	}
	return ln, nil
}

// start opens the socket. It is called again after accepting has failed, with the registry's
// mutex held.
func (ln *listener) start() error {
	socket, err := ln.listen("tcp", ln.settings.Address)
	if err != nil {
		return withListenHint(err)
	}
	down, served := make(chan struct{}), make(chan struct{})
	ln.mu.Lock()
	ln.address, ln.down, ln.served = socket.Addr(), down, served
	ln.mu.Unlock()
	ln.log.With("address", socket.Addr()).Info("Listening for Cryo clients")
	go func() {
		defer close(served)
		ln.serve(socket, down)
	}()
	return nil
}

// serve accepts clients until the listener closes. If that fails with an error that the HTTP
// server does not retry, serve marks the listener as down. The components then report that they
// are not connected, so the engine calls their Connect, which opens a new socket. Sessions and
// inputs are not affected.
func (ln *listener) serve(socket net.Listener, down chan struct{}) {
	accepting := socket
	if ln.settings.PROXY {
		accepting = newProxyListener(accepting, ln.settings, ln.log)
	}
	if ln.tls != nil {
		accepting = tls.NewListener(accepting, ln.tls)
	}
	err := ln.http.Serve(accepting) // also closes the socket
	if errors.Is(err, http.ErrServerClosed) {
		return
	}
	ln.log.With("address", socket.Addr(), "error", withListenHint(err)).Error("Listener failed: listening again; sessions stay connected")
	close(down)
}

// outage returns a channel that is closed when the listener is down.
func (ln *listener) outage() <-chan struct{} {
	ln.mu.Lock()
	defer ln.mu.Unlock()
	return ln.down
}

func (ln *listener) isDown() bool {
	select {
	case <-ln.outage():
		return true
	default:
		return false
	}
}

// openFilesHint is advice for when the process has no free file descriptor.
const openFilesHint = "raise the limit of open files of the process (ulimit -n)"

// withListenHint adds advice for the user to the error of opening a listener's socket.
func withListenHint(err error) error {
	var hint string
	var name *net.DNSError
	switch {
	case errors.Is(err, syscall.EMFILE), errors.Is(err, syscall.ENFILE):
		return fmt.Errorf("%w: %s", err, openFilesHint)
	case errors.Is(err, syscall.EADDRINUSE):
		hint = "another process listens there: end it, or use another port"
	case errors.Is(err, syscall.EADDRNOTAVAIL):
		hint = "this machine has no such address: use one of its own, or 0.0.0.0 for all of them"
	case errors.Is(err, syscall.EACCES):
		hint = "the process must not use this port: use one from 1024 on, or grant CAP_NET_BIND_SERVICE"
	case errors.As(err, &name):
		hint = "use a name that this machine can resolve, or an IP address"
	default:
		return err
	}
	return fmt.Errorf("field %s: %w: %s", fieldAddress, err, hint)
}

// ServeHTTP serves the configured path and returns 404 for all others. That is logged and counted
// only for Cryo clients, and without the path, which a stranger chooses.
func (ln *listener) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	r.RemoteAddr = ln.settings.clientAddress(r)
	if r.URL.Path != ln.settings.Path {
		if r.URL.Query().Has(paramToken) {
			ln.metrics.denied(http.StatusNotFound)
			if log, ok := ln.pathLog.allow(); ok {
				log.With("remote", r.RemoteAddr, "status", http.StatusNotFound, "path", ln.settings.Path).Warn("Denied a client: the path of its URL is not the listener's")
			}
		}
		http.NotFound(w, r)
		return
	}
	ln.server.ServeHTTP(w, r)
}

// close closes the listener after its last component has left: new clients are denied, and
// sessions are closed once their acknowledgements have been written.
func (ln *listener) close(ctx context.Context) error {
	ln.inputs.close()
	ctx, cancel := context.WithTimeout(ctx, closeTime)
	defer cancel()
	err := ln.server.Shutdown(ctx)
	err = errors.Join(err, ln.http.Close()) // closes the connections that are not sessions
	ln.mu.Lock()
	address, served := ln.address, ln.served
	ln.mu.Unlock()
	<-served
	ln.log.With("address", address).Info("Listener closed")
	return err
}

// connected is the server's OnSession. It assigns the session to an input, if there is one,
// and wakes outputs that wait for a session.
func (ln *listener) connected(s *cryo.Session) {
	ln.metrics.connected()
	ln.log.With("session", s.ID(), "remote", identityOf(s).metadata[metaRemoteAddress]).Debug("Session connected")
	ln.inputs.assign(s)
	ln.mu.Lock()
	defer ln.mu.Unlock()
	close(ln.arrived)
	ln.arrived = make(chan struct{})
}

// disconnected is the server's OnSessionEnd.
func (ln *listener) disconnected(s *cryo.Session) {
	ln.metrics.disconnected(s.Err())
	ln.log.With("session", s.ID(), "error", s.Err()).Debug("Session disconnected")
	if !errors.Is(s.Err(), cryo.ErrExpired) {
		return
	}
	if log, ok := ln.expired.allow(); ok {
		log.With("session", s.ID(), "error", s.Err(), "unacknowledged", s.Stats().UnsettledMessages).Info("Closed an expired session")
	}
}

// authorizeWith sets the component that authorizes clients, or nil if the listener closes.
func (ln *listener) authorizeWith(c *serverComponent) {
	ln.mu.Lock()
	defer ln.mu.Unlock()
	ln.first = c
}

// authorize is the server's Authorize. A component that leaves waits for the authorizations that
// have begun with it before it closes its processors.
func (ln *listener) authorize(u *cryo.Upgrade) error {
	ln.mu.Lock()
	c := ln.first
	if c == nil {
		ln.mu.Unlock()
		return notNow("the listener closes")
	}
	c.processors.running.Add(1)
	ln.mu.Unlock()
	defer c.processors.running.Done()
	if err := c.authorize(u); err != nil {
		return err
	}
	if client := u.Value.(*identity).client(); ln.inputs.clientFull(client, ln.settings.MaxSessions) {
		return &cryo.AdmissionError{
			StatusCode: http.StatusServiceUnavailable,
			Message:    "Overloaded: closed sessions of this client are still draining.",
		}
	}
	return nil
}

// sessions returns the sessions to which messages can be sent.
func (ln *listener) sessions() []*cryo.Session {
	return slices.DeleteFunc(ln.server.Sessions(), isEnding)
}

// session returns the session with an id, if messages can be sent to it. ok reports whether
// there is one.
func (ln *listener) session(id uint64) (*cryo.Session, bool) {
	s, ok := ln.server.Session(id)
	return s, ok && !isEnding(s)
}

// isOwner reports whether a message with this owner, as in the metadata, may be sent to a session.
// Without session_owner, no session has an owner, and that of a message is of another listener.
func (ln *listener) isOwner(s *cryo.Session, owner string) bool {
	return ln.settings.SessionOwner == "" || identityOf(s).owner == owner
}

// isEnding reports whether a session has begun to end, or has expired: then only the messages
// that it has received are still in flight.
func isEnding(s *cryo.Session) bool { return s.Err() != nil || s.Draining() }

// arrival returns a channel that is closed when the next session connects. Call it before
// sessions, so that a session that connects in between is not missed.
func (ln *listener) arrival() <-chan struct{} {
	ln.mu.Lock()
	defer ln.mu.Unlock()
	return ln.arrived
}
