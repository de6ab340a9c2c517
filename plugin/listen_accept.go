package plugin

import (
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"sync"
	"syscall"
	"time"
)

// How a listener keeps accepting clients. During a shortage, such as of file descriptors, it waits.
// After any other error the socket is closed, and another one opened.

const (
	minAcceptWait = 5 * time.Millisecond   // after the first error of a shortage; doubled with each further one
	maxAcceptWait = time.Second            // also between two attempts to open a socket
	minReopenWait = 100 * time.Millisecond // between the first two attempts
	stableTime    = 10 * time.Second       // after a socket has been open for this time, its failure counts as the first one
)

// Values of the label kind of cryo_listener_errors.
const (
	kindFiles  = "files"  // no file descriptor
	kindMemory = "memory" // no memory of the kernel
	kindSocket = "socket" // the listening socket failed, or cannot be opened
	kindPanic  = "panic"  // a handshake panicked
)

var listenerErrorKinds = []string{kindFiles, kindMemory, kindSocket, kindPanic}

// openFilesHint is advice for when the process has no free file descriptor.
const openFilesHint = "raise the limit of open files of the process (ulimit -n, LimitNOFILE= of systemd)"

// shortages are the temporary errors of accept, with their kinds and advice.
var shortages = map[syscall.Errno]struct{ kind, hint string }{
	syscall.EMFILE:  {kindFiles, openFilesHint},
	syscall.ENFILE:  {kindFiles, "raise the limit of open files of the system (sysctl fs.file-max)"},
	syscall.ENOBUFS: {kindMemory, "give the machine more memory, or raise the kernel's limits for sockets (sysctl net.ipv4.tcp_mem)"},
	syscall.ENOMEM:  {kindMemory, "give the machine or the container more memory"},
}

// shortageOf returns the kind of a shortage and advice; kind is empty if the error is none.
func shortageOf(err error) (kind, hint string) {
	if number, ok := errors.AsType[syscall.Errno](err); ok {
		return shortages[number].kind, shortages[number].hint
	}
	return "", ""
}

// withListenHint adds advice for the user to the error of opening a listener's socket.
func withListenHint(err error) error {
	if _, hint := shortageOf(err); hint != "" {
		return fmt.Errorf("%w: %s", err, hint)
	}
	var hint string
	var name *net.DNSError
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		hint = "another process listens there: stop it, or use another port"
	case errors.Is(err, syscall.EADDRNOTAVAIL):
		hint = "this machine has no such address: use one of its own, or 0.0.0.0 for all of them"
	case errors.Is(err, syscall.EACCES):
		hint = "the process is not permitted to use this port: use port 1024 or higher, or grant CAP_NET_BIND_SERVICE"
	case errors.As(err, &name):
		hint = "use a name that this machine can resolve, or an IP address"
	default:
		return err
	}
	return fmt.Errorf("field %s: %w: %s", fieldAddress, err, hint)
}

// acceptor is a listening socket whose Accept waits until a shortage is over.
type acceptor struct {
	net.Listener
	log       limitedLog
	short     func(kind string) // called for each error of a shortage
	over      func()            // called when a shortage is over
	recovered *time.Timer       // calls over; nil before the first shortage; only Accept uses it
	closed    chan struct{}
	closeOnce sync.Once
}

// Accept is called by one goroutine at a time.
func (a *acceptor) Accept() (net.Conn, error) {
	for wait := minAcceptWait; ; wait = min(2*wait, maxAcceptWait) {
		conn, err := a.Listener.Accept()
		kind, hint := shortageOf(err)
		if err == nil || kind == "" {
			if a.recovered != nil && a.recovered.Stop() {
				a.over()
			}
			return conn, err
		}
		a.short(kind)
		// Once accept has not failed for twice the wait between two attempts, it waits for a client.
		if a.recovered == nil {
			a.recovered = time.AfterFunc(2*maxAcceptWait, a.over)
		} else {
			a.recovered.Reset(2 * maxAcceptWait)
		}
		if log, ok := a.log.allow(); ok {
			log.With("error", fmt.Errorf("%w: %s", err, hint)).Warn("Cannot accept clients; retrying")
		}
		select {
		case <-time.After(wait):
		case <-a.closed:
			return nil, net.ErrClosed
		}
	}
}

func (a *acceptor) Close() error {
	a.closeOnce.Do(func() { close(a.closed) })
	return a.Listener.Close()
}

// listening is the log message of an open socket.
const listening = "Listening for Cryo clients"

// open opens the listener's socket. It returns nil without an error once the listener accepts no
// more clients.
func (ln *listener) open() (net.Listener, error) {
	socket, err := ln.listen("tcp", ln.settings.Address)
	ln.mu.Lock()
	defer ln.mu.Unlock()
	switch {
	case err != nil:
		ln.failure = withListenHint(err)
		return nil, ln.failure
	case ln.refusing:
		return nil, socket.Close()
	}
	ln.socket = &acceptor{Listener: socket, log: ln.acceptLog, short: ln.short, over: ln.shortageOver, closed: make(chan struct{})}
	ln.address, ln.failure, ln.down = socket.Addr(), nil, make(chan struct{})
	ln.metrics.listens(true)
	return ln.socket, nil
}

// socketAddr returns the address of the last socket that was opened.
func (ln *listener) socketAddr() net.Addr {
	ln.mu.Lock()
	defer ln.mu.Unlock()
	return ln.address
}

func (ln *listener) short(kind string) {
	ln.metrics.failed(kind)
	ln.metrics.listens(false)
}

func (ln *listener) shortageOver() {
	ln.mu.Lock()
	defer ln.mu.Unlock()
	ln.metrics.listens(!ln.refusing && ln.failure == nil)
}

// run accepts clients until the listener accepts no more. When the socket fails, run marks the
// listener as down, and opens another one. The inputs then report that they are not connected until
// it is open, so that the engine's /ready shows it. Sessions stay connected, and their messages wait.
func (ln *listener) run(socket net.Listener) {
	defer close(ln.served)
	for wait := time.Duration(0); socket != nil; {
		opened := time.Now()
		err := ln.serve(socket)
		if !ln.failed(err) {
			return
		}
		if time.Since(opened) >= stableTime {
			wait = 0
		}
		socket, wait = ln.reopen(wait)
	}
}

// serve accepts clients until the socket fails or is closed.
func (ln *listener) serve(socket net.Listener) error {
	if ln.settings.PROXY {
		socket = newProxyListener(socket, ln.settings, ln.log)
	}
	if ln.tls != nil {
		socket = tls.NewListener(socket, ln.tls)
	}
	return ln.http.Serve(socket) // also closes the socket
}

// failed marks the listener as down, unless it accepts no more clients.
func (ln *listener) failed(err error) bool {
	ln.mu.Lock()
	defer ln.mu.Unlock()
	if ln.refusing || errors.Is(err, http.ErrServerClosed) {
		return false
	}
	ln.failure = err
	close(ln.down)
	ln.metrics.failed(kindSocket)
	ln.metrics.listens(false)
	if log, ok := ln.failLog.allow(); ok {
		log.With("address", ln.address, "error", err).Error("Listener failed: reopening its address; sessions stay connected")
	}
	return true
}

// reopen opens a socket after a wait, and tries again until it succeeds or the listener accepts no
// more clients. It returns the wait for the next failure.
func (ln *listener) reopen(wait time.Duration) (net.Listener, time.Duration) {
	for {
		select {
		case <-time.After(wait):
		case <-ln.ending:
			return nil, 0
		}
		wait = min(max(2*wait, minReopenWait), maxAcceptWait)
		socket, err := ln.open()
		if socket != nil {
			if log, ok := ln.openLog.allow(); ok {
				log.With("address", socket.Addr()).Info(listening)
			}
		}
		if err == nil {
			return socket, wait
		}
		ln.metrics.failed(kindSocket)
		if log, ok := ln.failLog.allow(); ok {
			log.With("error", err).Error("Cannot listen; retrying")
		}
	}
}

// refuse closes the socket for good: no further client can connect. Sessions stay connected, and
// connections that are not sessions yet are denied by the server.
func (ln *listener) refuse() {
	ln.mu.Lock()
	defer ln.mu.Unlock()
	if ln.refusing {
		return
	}
	ln.refusing = true
	close(ln.ending)
	ln.metrics.listens(false)
	if ln.socket != nil {
		_ = ln.socket.Close() // or it has failed
	}
}

// outage returns a channel that is closed when the listener is down.
func (ln *listener) outage() <-chan struct{} {
	ln.mu.Lock()
	defer ln.mu.Unlock()
	return ln.down
}

// downError returns why the listener is down, or nil if it is not.
func (ln *listener) downError() error {
	ln.mu.Lock()
	defer ln.mu.Unlock()
	return ln.failure
}
