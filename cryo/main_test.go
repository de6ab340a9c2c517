package cryo_test

import (
	"context"
	"math"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/cryotest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	memoryURL = "ws://cryo.test"
	token     = "correct horse/battery+staple"
	sid       = uint64(math.MaxUint64 - 41)

	// The first of the numbers that each end may take. Where it begins among them, a
	// raw peer learns from its ENDPOINT_INFO.
	dialledFrom, acceptedFrom = uint32(0x40000000), uint32(0xC0000000)

	// instant is enough time for all that needs none, under synctest.
	instant = time.Nanosecond
)

// dialled returns a session that dialled, and the raw server that it talks to.
func dialled(t *testing.T, opts cryo.DialOptions) (*cryo.Session, *cryotest.Peer) {
	t.Helper()
	var s *cryo.Session
	peer, dial := diallingTo(t, opts, &s)
	peer.ServerHandshake()
	dial.wantSuccess(t)
	return s, peer
}

// serve runs a server in memory that knows the token. Its sessions come out of
// the channel.
func serve(t *testing.T, opts cryo.ServerOptions) (*cryo.Server, *cryotest.Listener, <-chan *cryo.Session) {
	t.Helper()
	sessions := make(chan *cryo.Session, 16)
	if opts.Authorize == nil {
		opts.Authorize = cryo.Tokens(token)
	}
	if opts.OnSession == nil {
		opts.OnSession = func(s *cryo.Session, _ *cryo.Upgrade) { sessions <- s }
	}
	server := newServer(t, opts)
	listener := cryotest.Serve(t, server)
	t.Cleanup(func() {
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		_ = server.Shutdown(ctx)
	})
	return server, listener, sessions
}

// join opens a connection to a server as a raw client that has sent nothing yet.
func join(t *testing.T, l *cryotest.Listener, id uint64) *cryotest.Peer {
	t.Helper()
	return cryotest.DialPeer(t, l.Dialer(), memoryURL, token, id)
}

// accepted returns a session that a server accepted, and its raw client.
func accepted(t *testing.T, opts cryo.ServerOptions) (*cryo.Session, *cryotest.Peer) {
	t.Helper()
	_, l, sessions := serve(t, opts)
	peer := join(t, l, sid)
	peer.ClientHandshake()
	return next(t, sessions), peer
}

// end is one of the two ends of a session: with which number its messages start.
type end struct {
	name    string
	dialled bool
	first   uint32
}

// atBothEnds runs a test with a session that dialled, and with one that a server
// accepted, each against a raw peer and in virtual time.
func atBothEnds(t *testing.T, opts cryo.SessionOptions, test func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer)) {
	t.Helper()
	t.Run("dialled", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			s, peer := dialled(t, cryo.DialOptions{SessionOptions: opts})
			test(t, end{"dialled", true, peer.First + 1}, s, peer)
		})
	})
	t.Run("accepted", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			s, peer := accepted(t, cryo.ServerOptions{SessionOptions: opts})
			test(t, end{"accepted", false, peer.First + 1}, s, peer)
		})
	})
}

// cut ends a session without ceremony, and waits for its goroutines.
func cut(s *cryo.Session) {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	_ = s.Close(ctx, "")
}

// next waits for a value.
func next[T any](t *testing.T, values <-chan T) T {
	t.Helper()
	select {
	case v := <-values:
		return v
	case <-time.After(cryotest.Patience):
		require.FailNow(t, "nothing came")
		panic("unreachable")
	}
}

// call is something that goes on while the test does.
type call struct{ done chan error }

func start(f func() error) *call {
	c := &call{make(chan error, 1)}
	go func() { c.done <- f() }()
	return c
}

// wantBlocked wants a call not to return by itself; under synctest.
func (c *call) wantBlocked(t *testing.T) {
	t.Helper()
	synctest.Wait()
	select {
	case err := <-c.done:
		require.FailNow(t, "returned", "with %v", err)
	default:
	}
}

// result waits for a call.
func (c *call) result(t *testing.T) error {
	t.Helper()
	return next(t, c.done)
}

func (c *call) wantSuccess(t *testing.T) {
	t.Helper()
	require.NoError(t, c.result(t))
}

// receive wants a message to be there already, or as good as.
func receive(t *testing.T, s *cryo.Session) *cryo.Message {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), cryotest.Patience)
	defer cancel()
	m, err := s.Receive(ctx)
	require.NoError(t, err)
	return m
}

// wantEnded wants a session to be over, or to be so at once.
func wantEnded(t *testing.T, s *cryo.Session) error {
	t.Helper()
	select {
	case <-s.Done():
	case <-time.After(cryotest.Patience):
		require.FailNow(t, "the session goes on")
	}
	return s.Err()
}

// newServer makes a server of valid options.
func newServer(tb testing.TB, opts cryo.ServerOptions) *cryo.Server {
	tb.Helper()
	server, err := cryo.NewServer(&opts)
	require.NoError(tb, err)
	return server
}
