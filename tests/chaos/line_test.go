//go:build linux

package chaos

import (
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/internal/testkit"
)

// line is a network line to a server. Its faults begin and end while it is in use.
type line struct {
	name, address, upstream string
	rate                    atomic.Int64 // bytes per second and direction; 0 is no limit
	running                 sync.WaitGroup

	mu       sync.Mutex
	listener net.Listener // nil while the line is down
	ended    bool
	conns    map[*lineConn]struct{}
}

// lineConn is a connection on a line.
type lineConn struct {
	client, server *net.TCPConn
	silent         atomic.Bool // data is dropped, and an end does not notice the other's end
}

// newLine makes a line to a server, which need not listen yet, until the test's end.
func newLine(tb testing.TB, name, upstream string) *line {
	tb.Helper()
	l := &line{name: name, address: testkit.ReserveAddress(tb), upstream: upstream, conns: make(map[*lineConn]struct{})}
	require.NoError(tb, l.setUp())
	tb.Cleanup(func() {
		l.mu.Lock()
		l.ended = true
		l.mu.Unlock()
		l.setDown()
		l.running.Wait()
	})
	return l
}

// setUp accepts connections.
func (l *line) setUp() error {
	listener, err := net.Listen("tcp", l.address)
	if err != nil {
		return err
	}
	l.mu.Lock()
	l.listener = listener
	l.mu.Unlock()
	l.running.Go(func() {
		for {
			client, err := listener.Accept()
			if err != nil {
				return
			}
			l.running.Go(func() { l.pass(client.(*net.TCPConn)) })
		}
	})
	return nil
}

// setDown refuses connections, and closes those that there are.
func (l *line) setDown() {
	l.mu.Lock()
	if l.listener != nil {
		_ = l.listener.Close()
		l.listener = nil
	}
	l.mu.Unlock()
	l.cut()
}

// pass passes the data of a connection in both directions.
func (l *line) pass(client *net.TCPConn) {
	server, err := net.Dial("tcp", l.upstream)
	if err != nil {
		_ = client.Close()
		return
	}
	c := &lineConn{client: client, server: server.(*net.TCPConn)}
	l.mu.Lock()
	l.conns[c] = struct{}{}
	if l.ended || l.listener == nil {
		c.close()
	}
	l.mu.Unlock()
	var passing sync.WaitGroup
	passing.Go(func() { l.pump(c, c.server, c.client) })
	passing.Go(func() { l.pump(c, c.client, c.server) })
	passing.Wait()
	l.mu.Lock()
	delete(l.conns, c)
	l.mu.Unlock()
}

// pump passes data in one direction.
func (l *line) pump(c *lineConn, to, from *net.TCPConn) {
	buffer := make([]byte, 2048)
	for {
		n, err := from.Read(buffer)
		if err != nil {
			break
		}
		if rate := l.rate.Load(); rate > 0 {
			time.Sleep(time.Duration(n) * time.Second / time.Duration(rate))
		}
		if c.silent.Load() {
			continue
		}
		if _, err := to.Write(buffer[:n]); err != nil && !c.silent.Load() {
			break
		}
	}
	if c.silent.Load() {
		_ = from.Close()
	} else {
		c.close()
	}
}

func (c *lineConn) close() {
	_ = c.client.Close()
	_ = c.server.Close()
}

// each does something with every connection, and returns how many there are.
func (l *line) each(do func(c *lineConn)) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	for c := range l.conns {
		do(c)
	}
	return len(l.conns)
}

// cut closes the connections at both ends.
func (l *line) cut() int {
	return l.each((*lineConn).close)
}

// reset resets the connections at both ends.
func (l *line) reset() int {
	return l.each(func(c *lineConn) {
		_ = c.client.SetLinger(0)
		_ = c.server.SetLinger(0)
		c.close()
	})
}

// halfOpen closes the connections at one end; the other end is not notified.
func (l *line) halfOpen(atClient bool) int {
	return l.each(func(c *lineConn) {
		c.silent.Store(true)
		if atClient {
			_ = c.client.Close()
		} else {
			_ = c.server.Close()
		}
	})
}

// blackHole drops all further data of the connections; neither end is notified.
func (l *line) blackHole() int {
	return l.each(func(c *lineConn) { c.silent.Store(true) })
}
