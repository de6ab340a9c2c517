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

// listener is one address with its server, for the components that share it.
type listener struct {
	settings listenSettings
	log      *service.Logger
	listen   func(network, address string) (net.Listener, error)
	tls      *tls.Config // nil without TLS
	http     *http.Server
	server   *cryo.Server
	metrics  *listenMetrics
	inputs   *listenInputs

	// Guarded by the registry's mutex.
	users  []*serverComponent // the first one opened it, or has followed one that did; none: it is closing
	closed chan struct{}      // closed when the address is free again

	mu      sync.Mutex
	address net.Addr      // actual address, where the settings leave the port open
	down    chan struct{} // closed when no client can connect any more
	served  chan struct{} // closed when the socket and its goroutine are gone
	arrived chan struct{} // closed and replaced when a session is connected
}

// newListener starts a listener for its first component.
func newListener(c *serverComponent, listen func(network, address string) (net.Listener, error)) (*listener, error) {
	settings, log := c.settings, c.log
	files, err := newTLSFiles(settings.tlsSettings, log)
	if err != nil {
		return nil, err
	}
	ln := &listener{
		settings: settings, log: log, listen: listen, metrics: newListenMetrics(c.meter),
		users: []*serverComponent{c}, closed: make(chan struct{}), arrived: make(chan struct{}),
	}
	if files != nil {
		ln.tls = &tls.Config{GetConfigForClient: files.configure, MinVersion: tls.VersionTLS12}
	}
	opts := &cryo.ServerOptions{
		SessionOptions: cryo.SessionOptions{
			HeartbeatInterval: settings.HeartbeatInterval,
			MaxBufferBytes:    settings.MaxBufferBytes,
			Logger:            libraryLogger(log),
		},
		Authorize:             c.authorize,
		OnSession:             func(s *cryo.Session, _ *cryo.Upgrade) { ln.connected(s) },
		OnSessionEnd:          ln.disconnected,
		MaxSessions:           settings.MaxSessions,
		MaxSessionsPerAddress: settings.MaxSessionsPerAddress,
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
		// Of TLS, of requests and between them; the connection of a session is no longer
		// the HTTP server's.
		ReadHeaderTimeout: settings.HandshakeTimeout,
		ReadTimeout:       settings.HandshakeTimeout,
		IdleTimeout:       settings.HandshakeTimeout,
		MaxHeaderBytes:    settings.MaxHeaderBytes,
		ErrorLog:          serverLog(log),
		ConnState:         newConnLimit(settings.MaxSessions, log).changed,
	}
	ln.inputs = newListenInputs(settings.Address, log, ln.server.Sessions)
	if err := ln.start(); err != nil {
		ln.inputs.close()
		return nil, err
	}
	return ln, nil
}

// start listens, at first and again after accepting clients has failed. The registry's
// mutex is held.
func (ln *listener) start() error {
	socket, err := ln.listen("tcp", ln.settings.Address)
	if err != nil {
		return withOpenFilesHint(err)
	}
	down, served := make(chan struct{}), make(chan struct{})
	ln.mu.Lock()
	ln.address, ln.down, ln.served = socket.Addr(), down, served
	ln.mu.Unlock()
	ln.log.Infof("Listening for Cryo clients on %s", socket.Addr())
	go func() {
		defer close(served)
		ln.serve(socket, down)
	}()
	return nil
}

// serve accepts clients. When that fails for good, which no retry on the same socket mends, it
// reports the listener down: the components are not connected then, and the engine lets them
// connect, which listens again. The sessions do not need the socket. They and the inputs stay as
// they are, so nothing is lost and nothing is handed over.
func (ln *listener) serve(socket net.Listener, down chan struct{}) {
	accepting := socket
	if ln.tls != nil {
		accepting = tls.NewListener(socket, ln.tls)
	}
	err := ln.http.Serve(accepting) // closes the socket
	if errors.Is(err, http.ErrServerClosed) {
		return
	}
	ln.log.Errorf("New clients can't connect to %s, and are listened for again; sessions stay connected: %v", socket.Addr(), withOpenFilesHint(err))
	close(down)
}

// outage returns a channel that is closed when no client can connect until start is called.
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

// openFilesHint is what to do when a process has as many sockets as it may have.
const openFilesHint = "raise the limit of open files of the process (ulimit -n)"

func withOpenFilesHint(err error) error {
	if errors.Is(err, syscall.EMFILE) || errors.Is(err, syscall.ENFILE) {
		return fmt.Errorf("%w: %s", err, openFilesHint)
	}
	return err
}

// ServeHTTP serves the one path.
func (ln *listener) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.URL.Path != ln.settings.Path {
		http.NotFound(w, r)
		return
	}
	r.RemoteAddr = ln.settings.clientAddress(r)
	ln.server.ServeHTTP(w, r)
}

// close closes the listener when its last component has left: new clients are denied, the
// others get their acknowledgements and BYE.
func (ln *listener) close(ctx context.Context) error {
	ln.inputs.close()
	ctx, cancel := context.WithTimeout(ctx, closeTime)
	defer cancel()
	err := ln.server.Shutdown(ctx)
	err = errors.Join(err, ln.http.Close()) // the rest are requests that are no sessions yet
	ln.mu.Lock()
	address, served := ln.address, ln.served
	ln.mu.Unlock()
	<-served
	ln.log.Infof("Closed the listener on %s", address)
	return err
}

// connected is the server's OnSession. It assigns the session to an input, if there is one, and
// wakes outputs that wait for one.
func (ln *listener) connected(s *cryo.Session) {
	ln.metrics.countSession(1)
	ln.log.Debugf("Session %d connected from %v", s.ID(), identityOf(s).metadata[metaRemoteAddress])
	ln.inputs.assign(s)
	ln.mu.Lock()
	defer ln.mu.Unlock()
	close(ln.arrived)
	ln.arrived = make(chan struct{})
}

// disconnected is the server's OnSessionEnd.
func (ln *listener) disconnected(s *cryo.Session) {
	ln.metrics.countSession(-1)
	ln.log.Debugf("Session %d disconnected: %v", s.ID(), s.Err())
}

// sessions returns the sessions that can be sent to.
func (ln *listener) sessions() []*cryo.Session {
	return slices.DeleteFunc(ln.server.Sessions(), func(s *cryo.Session) bool { return s.Err() != nil })
}

// session returns one of them.
func (ln *listener) session(id uint64) (*cryo.Session, bool) {
	s, ok := ln.server.Session(id)
	return s, ok && s.Err() == nil
}

// arrival is closed when the next session connects. Call it before sessions, or one that connects
// in between is missed.
func (ln *listener) arrival() <-chan struct{} {
	ln.mu.Lock()
	defer ln.mu.Unlock()
	return ln.arrived
}
