package testkit

import (
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"testing"
)

// Listener is a listener of a service that can fail: its connections are closed then,
// and new ones as soon as they are accepted.
type Listener struct {
	net.Listener

	mu       sync.Mutex
	down     bool
	conns    map[net.Conn]struct{}
	attempts chan struct{} // one for each connection while the service is down
}

// NewListener wraps a listener. The service is up.
func NewListener(l net.Listener) *Listener {
	return &Listener{Listener: l, conns: make(map[net.Conn]struct{}), attempts: make(chan struct{}, 1000)}
}

// Accept returns the next connection that is made while the service is up.
func (l *Listener) Accept() (net.Conn, error) {
	for {
		conn, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		l.mu.Lock()
		if !l.down {
			c := &listenerConn{conn, l}
			l.conns[c] = struct{}{}
			l.mu.Unlock()
			return c, nil
		}
		l.mu.Unlock()
		_ = conn.Close()
		select {
		case l.attempts <- struct{}{}:
		default:
		}
	}
}

// SetDown takes the service down and closes its connections, or brings it up again.
func (l *Listener) SetDown(down bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.down = down
	if down {
		for len(l.attempts) > 0 { // of an earlier time
			<-l.attempts
		}
		for c := range l.conns {
			_ = c.(*listenerConn).Conn.Close()
		}
		clear(l.conns)
	}
}

// WantAttempt waits until a client has tried to connect while the service is down.
func (l *Listener) WantAttempt(tb testing.TB) {
	tb.Helper()
	Next(tb, l.attempts)
}

type listenerConn struct {
	net.Conn
	listener *Listener
}

func (c *listenerConn) Close() error {
	c.listener.mu.Lock()
	delete(c.listener.conns, c)
	c.listener.mu.Unlock()
	return c.Conn.Close()
}

// Proxy is a TCP proxy. It passes each connection to the next of its backends, and skips
// those that do not listen, as a load balancer does.
type Proxy struct {
	net.Listener
	backends []string
	turn     atomic.Int64
	running  sync.WaitGroup

	mu       sync.Mutex
	ended    bool
	clients  []net.Conn
	upstream []net.Conn // to the backends
}

// NewProxy runs a proxy until the test's end.
func NewProxy(tb testing.TB, backends ...string) *Proxy {
	tb.Helper()
	p := &Proxy{Listener: Listen(tb), backends: backends}
	p.running.Go(func() {
		for {
			client, err := p.Accept()
			if err != nil {
				return
			}
			p.running.Go(func() { p.pass(client) })
		}
	})
	tb.Cleanup(func() {
		_ = p.Close()
		p.mu.Lock()
		p.ended = true
		p.mu.Unlock()
		p.CutClients()
		p.CutBackends()
		p.running.Wait()
	})
	return p
}

// Address is where the proxy listens.
func (p *Proxy) Address() string { return p.Addr().String() }

// CutClients closes the connections to the clients. The backends do not notice: their
// connections stay open.
func (p *Proxy) CutClients() { p.cut(&p.clients) }

// CutBackends closes the connections to the backends, and so those of their clients.
func (p *Proxy) CutBackends() { p.cut(&p.upstream) }

func (p *Proxy) cut(conns *[]net.Conn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, c := range *conns {
		_ = c.Close()
	}
	*conns = nil
}

// pass passes data in both directions until the backend closes.
func (p *Proxy) pass(client net.Conn) {
	defer client.Close()
	backend := p.dial()
	if backend == nil {
		return
	}
	defer backend.Close()
	p.mu.Lock()
	ended := p.ended
	p.clients, p.upstream = append(p.clients, client), append(p.upstream, backend)
	p.mu.Unlock()
	if ended {
		return
	}
	p.running.Go(func() {
		if _, err := io.Copy(backend, client); !errors.Is(err, net.ErrClosed) { // or CutClients closed it
			_ = backend.(*net.TCPConn).CloseWrite()
		}
	})
	if _, err := io.Copy(client, backend); errors.Is(err, net.ErrClosed) { // CutClients closed it
		_, _ = io.Copy(io.Discard, backend)
	}
}

// dial connects to the next backend that listens; nil is none.
func (p *Proxy) dial() net.Conn {
	for range p.backends {
		if backend, err := net.Dial("tcp", p.backends[int(p.turn.Add(1))%len(p.backends)]); err == nil {
			return backend
		}
	}
	return nil
}
