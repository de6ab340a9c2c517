package plugin

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/redpanda-data/benthos/v4/public/service"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// listener is the server on one address. All components with that address share it.
type listener struct {
	settings listenSettings
	log      *service.Logger
	listen   func(network, address string) (net.Listener, error)
	tls      *tls.Config // nil without TLS
	http     *http.Server
	server   *cryo.Server
	metrics  *listenMetrics
	inputs   *listenInputs

	openLog, failLog, acceptLog, pathLog, expiredLog, takenOverLog limitedLog

	// Guarded by the registry's mutex.
	users  []*serverComponent // empty while the listener starts or closes; the first one authorizes clients and reports the listener's metrics
	closed chan struct{}      // closed when the listener has started or failed to start, or when it has released its address
	kept   *time.Timer        // closes the listener; nil unless it waits for a component

	draining context.Context    //nolint:containedctx // done when the listener closes: drains end
	undrain  context.CancelFunc // ends draining
	drains   sync.WaitGroup

	ending chan struct{} // closed with refusing
	served chan struct{} // closed when run has returned

	mu       sync.Mutex
	first    *serverComponent // the first of users, which authorizes clients; nil: the listener closes, or is kept
	socket   net.Listener     // the last one that was opened
	address  net.Addr         // the actual address of socket, whose port differs from the configured one if that is 0
	failure  error            // why the listener is down; nil if it is not
	down     chan struct{}    // closed when the listener is down; replaced when it listens again
	refusing bool             // no further client is accepted; see refuse
	arrived  chan struct{}    // closed and replaced when a session connects
}

// newListener starts a listener with the settings of its first component.
func newListener(c *serverComponent, listen func(network, address string) (net.Listener, error)) (*listener, error) {
	settings, log := c.settings, c.log
	files, err := settings.tlsSettings.watch(0, log) // the engine calls Connect again
	if err != nil {
		return nil, err
	}
	ln := &listener{
		settings: settings, log: log, listen: listen, metrics: newListenMetrics(c.meter),
		openLog: newLimitedLog(log), failLog: newLimitedLog(log), acceptLog: newLimitedLog(log), pathLog: newLimitedLog(log), expiredLog: newLimitedLog(log), takenOverLog: newLimitedLog(log),
		users: []*serverComponent{c}, first: c, closed: make(chan struct{}), arrived: make(chan struct{}),
		ending: make(chan struct{}), served: make(chan struct{}),
	}
	if files != nil {
		ln.tls = &tls.Config{
			GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) { return files.current(), nil },
			MinVersion:         tls.VersionTLS12,
		}
	}
	ln.draining, ln.undrain = context.WithCancel(context.Background())
	if settings.DrainPeriod > 0 && shutdownDelay.Load() == nil {
		log.With(fieldDrainPeriod, settings.DrainPeriod).Warn("Field drain_period has no effect: this program must call plugin.SetShutdownDelay and plugin.DrainListeners")
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
		ErrorLog:          serverLog(log, func() { ln.metrics.failed(kindPanic) }),
		ConnState:         newConnLimit(settings.MaxSessions, log).changed,
	}
	// A client that is denied sends no further request. A peer that sends many requests and reads
	// no response could otherwise keep the connection, and the memory of its request, indefinitely.
	ln.http.SetKeepAlivesEnabled(false)
	ln.inputs = newListenInputs(settings.Address, log, ln.server.Sessions)
	socket, err := ln.open()
	if err != nil {
		ln.inputs.close()
		ln.metrics.close()
		ln.undrain()
		return nil, err
	}
	log.With("address", socket.Addr()).Info(listening)
	go ln.run(socket)
	return ln, nil
}

// ServeHTTP serves the configured path and returns 404 for all others. Such a request is logged and
// counted only if it is from a Cryo client, and without the path, which anyone can choose.
func (ln *listener) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	r.RemoteAddr = ln.settings.clientAddress(r)
	if r.URL.Path != ln.settings.Path {
		if r.URL.Query().Has(paramToken) {
			ln.metrics.denied(http.StatusNotFound)
			if log, ok := ln.pathLog.allow(); ok {
				log.With("remote", r.RemoteAddr, "status", http.StatusNotFound, "expected_path", ln.settings.Path).Warn("Denied a client: the path of its URL differs from the path field")
			}
		}
		http.NotFound(w, r)
		return
	}
	ln.server.ServeHTTP(w, r)
}

// close closes the listener after its last component has left: first the socket, so that no client
// connects, and then the sessions, once their acknowledgements have been written.
func (ln *listener) close(ctx context.Context) error {
	ln.inputs.close()
	ln.refuse()
	ln.undrain()
	ctx, cancel := context.WithTimeout(ctx, closeTime)
	defer cancel()
	err := ln.server.Shutdown(ctx) // also ends the sessions that a drain is closing
	ln.drains.Wait()
	err = errors.Join(err, ln.http.Close()) // closes the connections that are not sessions
	<-ln.served
	ln.log.With("address", ln.address).Info("Listener closed")
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
	switch {
	case errors.Is(s.Err(), cryo.ErrExpired):
		if log, ok := ln.expiredLog.allow(); ok {
			log.With("session", s.ID(), "error", s.Err(), "unacknowledged", s.Stats().UnsettledMessages).Info("Closed an expired session")
		}
	case errors.Is(s.Err(), cryo.ErrTakenOver):
		if log, ok := ln.takenOverLog.allow(); ok {
			log.With("session", s.ID(), "remote", identityOf(s).metadata[metaRemoteAddress]).Info("Session taken over: a client connected with the same session id")
		}
	}
}

// authorizeWith sets the component that authorizes clients, or nil if the listener closes or is kept.
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
		cause := "no pipeline uses the listener: it is being replaced or stopped"
		if ln.refusing {
			cause = "the listener is closing"
		}
		ln.mu.Unlock()
		return notNow(cause)
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
