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

// Having sessions by listening. Components of one process that name the same
// address share its listener and its sessions.

const (
	// noInputPatience is how long messages wait for an input of the same
	// listener to start before they are rejected.
	noInputPatience = 5 * time.Second
	// nextInputPatience is how long they wait for another input when the last one
	// has closed: while its pipeline is replaced, or stops for good, which takes the
	// engine's shutdown_timeout (20 s by default) at most.
	nextInputPatience = time.Minute
)

// listener is one address with its server, for one or more components.
type listener struct {
	settings listenSettings
	address  net.Addr // as it is, where the settings leave the port open
	log      *service.Logger
	metrics  listenMetrics
	http     *http.Server
	server   *cryo.Server
	served   chan struct{} // closed when the HTTP server has ended
	patience *time.Timer   // runs rejectWithoutInput

	// Guarded by the registry's mutex.
	users  []*serverComponent // with none left it is closing
	closed chan struct{}      // closed when the address is free again

	mu       sync.Mutex
	inputs   []*receiver
	next     int           // the input that gets the next session
	waiting  []*handover   // for an input …
	until    time.Time     // … to start
	refusing bool          // there is no input: messages are rejected
	closing  bool          // the last component has left: nothing is rejected any more
	arrived  chan struct{} // closed and replaced when a session is connected
}

// listeners are those of one engine, by address.
type listeners struct {
	listen func(network, address string) (net.Listener, error)

	mu     sync.Mutex
	byAddr map[string]*listener
	tested map[string]*serverComponent // the first of each address
}

// listenersKey finds them in the engine's resources, so that pipelines of one
// process share them, and tests don't.
type listenersKey struct{}

func newListeners(listen func(network, address string) (net.Listener, error)) *listeners {
	return &listeners{listen: listen, byAddr: make(map[string]*listener), tested: make(map[string]*serverComponent)}
}

func listenersOf(res *service.Resources) *listeners {
	all, _ := res.GetOrSetGeneric(listenersKey{}, newListeners(net.Listen))
	return all.(*listeners)
}

// open gives the listener of an address, and starts it for the first component.
// One that is closing is waited for.
func (l *listeners) open(ctx context.Context, c *serverComponent) (*listener, error) {
	for {
		ln, closing, err := l.join(c)
		if closing == nil {
			return ln, err
		}
		select {
		case <-closing:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

func (l *listeners) join(c *serverComponent) (ln *listener, closing <-chan struct{}, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	ln = l.byAddr[c.settings.Address]
	switch {
	case ln == nil:
		if ln, err = l.start(c); err != nil {
			return nil, nil, err
		}
		l.byAddr[c.settings.Address] = ln
		delete(l.tested, c.settings.Address)
	case len(ln.users) == 0:
		return nil, ln.closed, nil
	default:
		if err = ln.users[0].agree(c); err != nil {
			return nil, nil, err
		}
	}
	ln.users = append(ln.users, c)
	return ln, nil, nil
}

// test tells why a component could not listen. An address on which another
// component of this process listens already is as good, if they agree; so they
// have to where both are only tested.
func (l *listeners) test(c *serverComponent) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if ln := l.byAddr[c.settings.Address]; ln != nil {
		if len(ln.users) == 0 {
			return nil
		}
		return ln.users[0].agree(c)
	}
	if first := l.tested[c.settings.Address]; first == nil {
		l.tested[c.settings.Address] = c
	} else if err := first.agree(c); err != nil {
		return err
	}
	if _, err := newTLSFiles(c.settings.tlsSettings, c.log); err != nil {
		return err
	}
	socket, err := l.listen("tcp", c.settings.Address)
	if err != nil {
		return err
	}
	return socket.Close()
}

// leave takes a component off its listener; in is its receiving half, if it has
// one. Behind the last component the listener closes: new clients are refused,
// the others get their acknowledgements and BYE.
func (l *listeners) leave(ctx context.Context, ln *listener, c *serverComponent, in *receiver) error {
	l.mu.Lock()
	ln.users = slices.DeleteFunc(ln.users, func(user *serverComponent) bool { return user == c })
	last := len(ln.users) == 0
	l.mu.Unlock()
	if in != nil {
		ln.removeInput(in, last)
	}
	if !last {
		return nil
	}
	err := ln.close(ctx)
	l.mu.Lock()
	delete(l.byAddr, ln.settings.Address)
	l.mu.Unlock()
	close(ln.closed)
	return err
}

func (l *listeners) start(c *serverComponent) (*listener, error) {
	settings, log := c.settings, c.log
	files, err := newTLSFiles(settings.tlsSettings, log)
	if err != nil {
		return nil, err
	}
	socket, err := l.listen("tcp", settings.Address)
	if err != nil {
		return nil, err
	}
	address := socket.Addr()
	if files != nil {
		socket = tls.NewListener(socket, &tls.Config{GetConfigForClient: files.configure, MinVersion: tls.VersionTLS12})
	}
	ln := &listener{
		settings: settings, address: address, log: log, metrics: newListenMetrics(c.meter),
		served: make(chan struct{}), closed: make(chan struct{}), arrived: make(chan struct{}),
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
		Full:                  ln.full,
	}
	ln.metrics.watch(opts)
	if ln.server, err = cryo.NewServer(opts); err != nil {
		return nil, errors.Join(err, socket.Close())
	}
	ln.http = &http.Server{
		Handler: ln,
		// Of TLS, of requests and between them; a session's connection is out of
		// the HTTP server's hands.
		ReadHeaderTimeout: settings.HandshakeTimeout,
		ReadTimeout:       settings.HandshakeTimeout,
		IdleTimeout:       settings.HandshakeTimeout,
		MaxHeaderBytes:    settings.MaxHeaderBytes,
		ErrorLog:          serverLog(log),
		ConnState:         newPending(settings.MaxSessions, log).changed,
	}
	ln.until = time.Now().Add(noInputPatience)
	ln.patience = time.AfterFunc(noInputPatience, ln.rejectWithoutInput)
	go func() {
		defer close(ln.served)
		if err := ln.http.Serve(socket); !errors.Is(err, http.ErrServerClosed) {
			log.Errorf("The listener on %s has ended: %v", address, err)
		}
	}()
	log.Infof("Listening for Cryo clients on %s", address)
	return ln, nil
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

func (ln *listener) close(ctx context.Context) error {
	ln.mu.Lock()
	ln.closing = true
	ln.patience.Stop()
	reportLeft(ln.log, ln.waiting)
	ln.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, closeTime)
	defer cancel()
	err := ln.server.Shutdown(ctx)
	err = errors.Join(err, ln.http.Close()) // what is left are requests that are no sessions yet
	<-ln.served
	ln.log.Infof("Closed the listener on %s", ln.address)
	return err
}

// connected hands a new session to an input, if there is one, and wakes outputs
// that wait for one.
func (ln *listener) connected(s *cryo.Session) {
	ln.metrics.sessions.add(1)
	ln.mu.Lock()
	defer ln.mu.Unlock()
	ln.log.Debugf("Session %d connected from %v", s.ID(), identityOf(s).metadata[metaRemoteAddress])
	switch {
	case slices.ContainsFunc(ln.inputs, func(in *receiver) bool { return in.has(s) }):
		// An input that has started meanwhile has found it.
	case len(ln.inputs) > 0:
		ln.inputFor(s).receiveFrom(&handover{session: s})
	case ln.refusing:
		s.SetSendOnly(true)
	default:
		ln.waiting = append(ln.waiting, &handover{session: s})
	}
	close(ln.arrived)
	ln.arrived = make(chan struct{})
}

// disconnected is told of the end of each of them.
func (ln *listener) disconnected(s *cryo.Session) {
	ln.metrics.sessions.add(-1)
	ln.log.Debugf("Session %d disconnected: %v", s.ID(), s.Err())
}

// inputFor gives each input its turn, unless one has yet to tell of the session
// that this one has taken over.
func (ln *listener) inputFor(s *cryo.Session) *receiver {
	id := identityOf(s).id
	for _, in := range ln.inputs {
		if in.follows(id) {
			return in
		}
	}
	ln.next++
	return ln.inputs[(ln.next-1)%len(ln.inputs)]
}

// full tells whether as many sessions are kept as may be: those that are connected,
// and once more as many that have left behind what the pipeline doesn't take.
func (ln *listener) full() bool {
	ln.mu.Lock()
	defer ln.mu.Unlock()
	kept := len(ln.waiting)
	for _, in := range ln.inputs {
		kept += in.keeps()
	}
	return kept >= 2*ln.settings.MaxSessions
}

// addInput lets an input receive: the first from all sessions that are there,
// and what others left behind; later ones from their share of those to come.
func (ln *listener) addInput(r *receiver) {
	ln.mu.Lock()
	defer ln.mu.Unlock()
	ln.inputs = append(ln.inputs, r)
	ln.refusing = false
	if len(ln.inputs) > 1 {
		return
	}
	for _, h := range ln.waiting {
		r.receiveFrom(h)
	}
	ln.waiting = nil
	for _, s := range ln.server.Sessions() {
		s.SetSendOnly(false)
		r.receiveFrom(&handover{session: s})
	}
}

// removeInput closes an input and hands its sessions, with all that is not settled of
// them, to another. Without one they wait, and go on reading, which acknowledgements
// for an output need. At the end of the listener nothing is sent: a client may send
// again, to another server, what it saw neither acknowledged nor rejected.
func (ln *listener) removeInput(r *receiver, last bool) {
	ln.mu.Lock()
	defer ln.mu.Unlock()
	ln.inputs = slices.DeleteFunc(ln.inputs, func(in *receiver) bool { return in == r })
	left := r.close()
	switch {
	case last:
		reportLeft(r.log, left)
	case len(ln.inputs) > 0:
		for _, h := range left {
			ln.inputs[0].receiveFrom(h)
		}
	default:
		ln.waiting = left
		ln.until = time.Now().Add(nextInputPatience)
		ln.patience.Reset(nextInputPatience)
	}
}

// rejectWithoutInput rejects what sessions have sent, and send from now on.
func (ln *listener) rejectWithoutInput() {
	ln.mu.Lock()
	defer ln.mu.Unlock()
	if len(ln.inputs) > 0 || ln.closing || time.Now().Before(ln.until) { // an earlier timer may fire late
		return
	}
	ln.refusing = true
	rejected, lost := 0, 0
	for _, h := range ln.waiting {
		h.session.SetSendOnly(true) // one that has ended may have left messages behind
		n, m := h.reject()
		rejected, lost = rejected+n, lost+m
	}
	ln.waiting = nil
	for _, s := range ln.server.Sessions() {
		s.SetSendOnly(true)
	}
	if rejected > 0 {
		ln.log.Warnf("Rejected %d messages that an input on %s has left: no other has followed it for %v", rejected, ln.address, nextInputPatience)
	}
	if lost > 0 {
		ln.log.Errorf("Lost %d messages that were acknowledged when they were received: no input on %s has followed theirs for %v", lost, ln.address, nextInputPatience)
	}
}

// sessions are those that can be sent to.
func (ln *listener) sessions() []*cryo.Session {
	return slices.DeleteFunc(ln.server.Sessions(), func(s *cryo.Session) bool { return s.Err() != nil })
}

// session finds one of them.
func (ln *listener) session(id uint64) (*cryo.Session, bool) {
	s, ok := ln.server.Session(id)
	return s, ok && s.Err() == nil
}

// arrival is closed when the next session connects. Ask for it before looking.
func (ln *listener) arrival() <-chan struct{} {
	ln.mu.Lock()
	defer ln.mu.Unlock()
	return ln.arrived
}
