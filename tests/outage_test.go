package tests

import (
	"context"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// patient is how long something is waited for that has to come.
func patient(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	return ctx
}

// gate is a listener whose far side can go away for a while: its connections
// are cut, and new ones end as soon as they are there.
type gate struct {
	net.Listener

	mu     sync.Mutex
	away   bool
	conns  map[net.Conn]struct{}
	tries  int           // connections refused since it went away
	refuse chan struct{} // closed and replaced with each of them
}

func newGate(l net.Listener) *gate {
	return &gate{Listener: l, conns: make(map[net.Conn]struct{}), refuse: make(chan struct{})}
}

// Accept gives the next connection that comes while the far side is there.
func (g *gate) Accept() (net.Conn, error) {
	for {
		conn, err := g.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if c := g.admit(conn); c != nil {
			return c, nil
		}
		_ = conn.Close()
	}
}

func (g *gate) admit(conn net.Conn) net.Conn {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.away {
		g.tries++
		close(g.refuse)
		g.refuse = make(chan struct{})
		return nil
	}
	c := &gatedConn{Conn: conn, gate: g}
	g.conns[c] = struct{}{}
	return c
}

// goAway cuts what is connected, and lets nobody in.
func (g *gate) goAway() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.away, g.tries = true, 0
	for c := range g.conns {
		_ = c.(*gatedConn).Conn.Close()
	}
	clear(g.conns)
}

func (g *gate) comeBack() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.away = false
}

// wantTries waits until somebody has tried to connect so often while the far
// side is away.
func (g *gate) wantTries(t *testing.T, n int) {
	t.Helper()
	deadline := time.After(patience)
	for {
		g.mu.Lock()
		tries, refuse := g.tries, g.refuse
		g.mu.Unlock()
		if tries >= n {
			return
		}
		select {
		case <-refuse:
		case <-deadline:
			require.FailNow(t, "nobody tries to connect", "%d of %d", tries, n)
		}
	}
}

type gatedConn struct {
	net.Conn
	gate *gate
}

func (c *gatedConn) Close() error {
	c.gate.mu.Lock()
	delete(c.gate.conns, c)
	c.gate.mu.Unlock()
	return c.Conn.Close()
}
