package tests

import (
	"bytes"
	"context"
	"crypto/tls"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/testkit"
)

// crowd is a number of clients that acknowledge every message.
type crowd struct {
	tb       testing.TB
	sessions []*cryo.Session
	conns    []*countingConn
	got      atomic.Int64 // messages that were the expected one
	running  sync.WaitGroup
}

// countingConn counts its reads: without messages, the server's heartbeats.
type countingConn struct {
	net.Conn
	reads atomic.Int64
}

func (c *countingConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.reads.Add(1)
	return n, err
}

// join connects n clients, 64 at a time, with TLS if secure is not nil.
func join(tb testing.TB, address string, secure *tls.Config, n int, expected []byte) *crowd {
	tb.Helper()
	c := &crowd{tb: tb, sessions: make([]*cryo.Session, n), conns: make([]*countingConn, n)}
	tb.Cleanup(c.leave)
	var (
		next    atomic.Int64
		errs    = make([]error, n)
		dialers sync.WaitGroup
	)
	for range 64 {
		dialers.Go(func() {
			for i := int(next.Add(1)) - 1; i < n; i = int(next.Add(1)) - 1 {
				if errs[i] = c.dial(i, address, secure); errs[i] != nil {
					return
				}
				c.running.Go(func() { c.receive(c.sessions[i], expected) })
			}
		})
	}
	dialers.Wait()
	for _, err := range errs {
		require.NoError(tb, err)
	}
	return c
}

// dial connects the client with index i.
func (c *crowd) dial(i int, address string, secure *tls.Config) (err error) {
	scheme := "ws://"
	if secure != nil {
		scheme = "wss://"
	}
	// From several addresses: one has too few ports for many thousands.
	from := &net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, byte(1+i%8))}}
	c.sessions[i], err = cryo.Dial(context.Background(), scheme+address, &cryo.DialOptions{
		Token:          token,
		TLS:            secure,
		ConnectTimeout: testkit.Patience,
		NetDial: func(ctx context.Context, network, address string) (net.Conn, error) {
			conn, err := from.DialContext(ctx, network, address)
			c.conns[i] = &countingConn{Conn: conn}
			return c.conns[i], err
		},
	})
	return err
}

// receive acknowledges the messages of a session, and counts the expected ones.
func (c *crowd) receive(s *cryo.Session, expected []byte) {
	for {
		m, err := s.Receive(context.Background())
		if err != nil {
			return
		}
		if bytes.Equal(m.Payload, expected) {
			c.got.Add(1)
		}
		_ = m.Ack() // wantAlive reports a session that has ended
	}
}

// send sends a message from each client, 64 at a time, and waits for the
// acknowledgements.
func (c *crowd) send(message []byte) {
	c.tb.Helper()
	var (
		next    atomic.Int64
		errs    = make([]error, len(c.sessions))
		senders sync.WaitGroup
	)
	for range 64 {
		senders.Go(func() {
			for i := int(next.Add(1)) - 1; i < len(errs); i = int(next.Add(1)) - 1 {
				errs[i] = c.sessions[i].SendBinary(context.Background(), message)
			}
		})
	}
	senders.Wait()
	for _, err := range errs {
		require.NoError(c.tb, err)
	}
}

// wantHeartbeats waits until each client has read n more heartbeats.
func (c *crowd) wantHeartbeats(n int64, longest time.Duration) {
	c.tb.Helper()
	before := make([]int64, len(c.conns))
	for i, conn := range c.conns {
		before[i] = conn.reads.Load()
	}
	deadline := time.Now().Add(longest)
	for i := 0; i < len(c.conns); {
		if c.conns[i].reads.Load() >= before[i]+n {
			i++
			continue
		}
		require.True(c.tb, time.Now().Before(deadline), "client %d: too few heartbeats in %v", i, longest)
		time.Sleep(10 * time.Millisecond)
	}
}

// wantAlive wants every session to be open.
func (c *crowd) wantAlive() {
	c.tb.Helper()
	for _, s := range c.sessions {
		require.NoError(c.tb, s.Err())
	}
}

// leave closes the sessions without waiting for the server.
func (c *crowd) leave() {
	for _, s := range c.sessions {
		if s != nil {
			now, cancel := context.WithTimeout(context.Background(), 0)
			_ = s.Close(now, "")
			cancel()
		}
	}
	c.running.Wait()
}
