package plugin

import (
	"context"
	"net"
	"sync"
	"syscall"
	"time"

	"github.com/cryo-connect/cryo-connect/internal/cryotest"
)

// memoryNet is a network in memory: listeners by address. It works with virtual time, and can break
// or freeze its connections.
type memoryNet struct {
	mu        sync.Mutex
	listening map[string]*memoryListener
	conns     []net.Conn // of all who dialled
}

// memoryListener is a listener of a memoryNet.
type memoryListener struct {
	*cryotest.Listener
	net     *memoryNet
	address string
}

// Listen listens on an address, which must be free.
func (n *memoryNet) Listen(_, address string) (net.Listener, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.listening[address] != nil {
		return nil, &net.OpError{Op: "listen", Net: "tcp", Err: syscall.EADDRINUSE}
	}
	l := &memoryListener{cryotest.Listen(), n, address}
	n.listening[address] = l
	return l, nil
}

func (l *memoryListener) Close() error {
	l.net.mu.Lock()
	if l.net.listening[l.address] == l { // it may be closed again when the next one listens
		delete(l.net.listening, l.address)
	}
	l.net.mu.Unlock()
	return l.Listener.Close()
}

// Dial connects to an address on which something listens.
func (n *memoryNet) Dial(ctx context.Context, network, address string) (net.Conn, error) {
	n.mu.Lock()
	l := n.listening[address]
	n.mu.Unlock()
	if l == nil {
		return nil, &net.OpError{Op: "dial", Net: "tcp", Err: syscall.ECONNREFUSED}
	}
	c, err := l.Dial(ctx, network, address)
	if err == nil {
		n.mu.Lock()
		n.conns = append(n.conns, c)
		n.mu.Unlock()
	}
	return c, err
}

// cut breaks all connections.
func (n *memoryNet) cut() {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, c := range n.conns {
		c.(*cryotest.Conn).Cut()
	}
	n.conns = nil
}

// freeze makes all connections black holes: nothing arrives, and nothing fails.
func (n *memoryNet) freeze() {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, c := range n.conns {
		c.(*cryotest.Conn).Freeze()
	}
	n.conns = nil
}

// farAway is a dialer for connections with some latency.
func (e *engine) farAway(ctx context.Context, network, address string) (net.Conn, error) {
	c, err := e.net.Dial(ctx, network, address)
	return &farConn{c}, err
}

type farConn struct{ net.Conn }

func (c *farConn) Read(p []byte) (int, error) {
	time.Sleep(time.Millisecond)
	return c.Conn.Read(p)
}
