package cryo_test

import (
	"crypto/tls"
	"crypto/x509"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/cryotest"
	"github.com/cryo-connect/cryo-connect/internal/wire"
)

// The send buffer of a real socket takes a message of megabytes at once, and a slow line
// needs many heartbeats for it: 1.5 MB at 30 kB/s are 50 s. Here all of it is 15 times as
// fast, so that a busy machine may pass on nothing for almost two seconds.
const (
	slowHeartbeat = 15 * time.Second / 15
	slowRate      = 30_000 * 15
	slowMessage   = 1_500_000
)

// line passes TCP connections on to a target, each direction at a rate in bytes a second;
// 0 is as fast as can be. It holds little of what it passes on.
type line struct {
	up, down int
	hold     chan struct{} // nothing is passed on any more when it is closed
}

func (l *line) to(t *testing.T, target string) (address string) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	var passing sync.WaitGroup
	over := make(chan struct{})
	passing.Go(func() {
		for {
			client, err := listener.Accept()
			if err != nil {
				return
			}
			server, err := net.Dial("tcp", target)
			if err != nil {
				t.Error(err)
				return
			}
			passing.Go(func() { l.pass(server, client, l.up, over) })
			passing.Go(func() { l.pass(client, server, l.down, over) })
			passing.Go(func() { <-over; _ = client.Close(); _ = server.Close() })
		}
	})
	t.Cleanup(func() { close(over); _ = listener.Close(); passing.Wait() })
	return listener.Addr().String()
}

func (l *line) pass(to, from net.Conn, rate int, over <-chan struct{}) {
	_ = from.(*net.TCPConn).SetReadBuffer(64 << 10)
	piece := make([]byte, 8<<10)
	for {
		n, err := from.Read(piece)
		select {
		case <-l.hold:
			<-over
		default:
		}
		if rate > 0 {
			time.Sleep(time.Duration(n) * time.Second / time.Duration(rate))
		}
		if _, failed := to.Write(piece[:n]); failed != nil || err != nil {
			_ = to.(*net.TCPConn).CloseWrite()
			return
		}
	}
}

// endpoint is a server of one of both kinds, with TLS or without.
type endpoint struct {
	scheme, address string
	tls             *tls.Config
}

func (e *endpoint) over(t *testing.T, l *line) string {
	t.Helper()
	return e.scheme + "://" + l.to(t, e.address)
}

func serveHandler(t *testing.T, handler http.Handler, secure bool) *endpoint {
	t.Helper()
	server := httptest.NewUnstartedServer(handler)
	t.Cleanup(server.Close)
	if !secure {
		server.Start()
		return &endpoint{"ws", strings.TrimPrefix(server.URL, "http://"), nil}
	}
	server.StartTLS()
	roots := x509.NewCertPool()
	roots.AddCert(server.Certificate())
	return &endpoint{"wss", strings.TrimPrefix(server.URL, "https://"), &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12}}
}

func serveSessions(t *testing.T, opts cryo.SessionOptions, secure bool) (*endpoint, <-chan *cryo.Session) {
	t.Helper()
	sessions := make(chan *cryo.Session, 1)
	server := newServer(t, cryo.ServerOptions{
		SessionOptions: opts,
		Authorize:      cryo.Tokens(token),
		OnSession:      func(s *cryo.Session, _ *cryo.Upgrade) { sessions <- s },
	})
	e := serveHandler(t, server, secure)
	t.Cleanup(func() {
		for _, s := range server.Sessions() {
			cut(s)
		}
	})
	return e, sessions
}

func dialOver(t *testing.T, e *endpoint, l *line, opts cryo.SessionOptions) *cryo.Session {
	t.Helper()
	s, err := cryo.Dial(t.Context(), e.over(t, l), &cryo.DialOptions{SessionOptions: opts, Token: token, TLS: e.tls, SessionID: sid})
	require.NoError(t, err)
	t.Cleanup(func() { cut(s) })
	return s
}

// slowEnds opens a session whose data goes over a line. The other end acknowledges so many
// messages when all of them have come, and sends nothing by itself.
var slowEnds = map[string]func(t *testing.T, l *line, secure bool) (s *cryo.Session, acknowledge func(t *testing.T, n int)){
	"to a raw client": func(t *testing.T, l *line, secure bool) (*cryo.Session, func(*testing.T, int)) {
		e, sessions := serveSessions(t, cryo.SessionOptions{HeartbeatInterval: slowHeartbeat}, secure)
		peer := cryotest.DialPeer(t, &websocket.Dialer{TLSClientConfig: e.tls}, e.over(t, l), token, sid)
		peer.ClientHandshake()
		peer.AnswerPings()
		return next(t, sessions), func(t *testing.T, n int) { acknowledgeAll(peer, n) }
	},
	"to a raw server": func(t *testing.T, l *line, secure bool) (*cryo.Session, func(*testing.T, int)) {
		server := cryotest.NewServer(t)
		e := serveHandler(t, server, secure)
		s := make(chan *cryo.Session, 1)
		dialling := start(func() error {
			s <- dialOver(t, e, l, cryo.SessionOptions{HeartbeatInterval: slowHeartbeat})
			return nil
		})
		peer := server.NextPeer()
		peer.ServerHandshake()
		peer.AnswerPings()
		dialling.wantSuccess(t)
		return <-s, func(t *testing.T, n int) { acknowledgeAll(peer, n) }
	},
	"to a client that does not ping": func(t *testing.T, l *line, secure bool) (*cryo.Session, func(*testing.T, int)) {
		e, sessions := serveSessions(t, cryo.SessionOptions{HeartbeatInterval: slowHeartbeat}, secure)
		client := dialOver(t, e, l, cryo.SessionOptions{HeartbeatInterval: time.Hour})
		return next(t, sessions), func(t *testing.T, n int) { receiveAll(t, client, n) }
	},
	"to a server that pings rarely": func(t *testing.T, l *line, secure bool) (*cryo.Session, func(*testing.T, int)) {
		e, sessions := serveSessions(t, cryo.SessionOptions{HeartbeatInterval: time.Hour}, secure)
		client := dialOver(t, e, l, cryo.SessionOptions{HeartbeatInterval: slowHeartbeat})
		server := next(t, sessions)
		return client, func(t *testing.T, n int) { receiveAll(t, server, n) }
	},
}

func acknowledgeAll(peer *cryotest.Peer, n int) {
	var frames []wire.Frame
	for range n {
		frames = append(frames, peer.WantType("all that was sent", wire.Binary))
	}
	peer.Ack(frames...)
}

func receiveAll(t *testing.T, s *cryo.Session, n int) {
	t.Helper()
	var messages []*cryo.Message
	for range n {
		messages = append(messages, receive(t, s))
	}
	require.NoError(t, cryo.AckBatch(messages))
}

func TestLargeMessageGetsOverASlowLine(t *testing.T) {
	run := func(name string, secure bool) func(t *testing.T) {
		return func(t *testing.T) {
			t.Parallel()
			s, acknowledge := slowEnds[name](t, &line{up: slowRate, down: slowRate}, secure)
			send := start(func() error { return s.SendBinary(t.Context(), make([]byte, slowMessage)) })
			acknowledge(t, 1)
			send.wantSuccess(t)
			require.NoError(t, s.Err())
		}
	}
	for name := range slowEnds {
		t.Run(name, run(name, false))
		if strings.HasPrefix(name, "to a raw") {
			t.Run(name+" with TLS", run(name, true))
		}
	}
}

// Small messages wait in the send buffer too, when a line is slower than their sender.
// With TLS each is larger there than it was here.
func TestManySmallMessagesCrossASlowConnection(t *testing.T) {
	const count = 20_000
	s, acknowledge := slowEnds["to a raw client"](t, &line{down: slowRate}, true)
	sent := make([]*cryo.Pending, count)
	for i := range sent {
		sent[i] = s.Queue([]cryo.OutMessage{cryo.Binary(make([]byte, 50))})
	}
	acknowledge(t, count)
	for _, sending := range sent {
		require.NoError(t, sending.Wait(t.Context()))
	}
	require.NoError(t, s.Err())
}

// A line on which nothing moves any more is as dead with much in the send buffer as with
// nothing in it.
func TestBacklogThatDoesNotMoveIsAPeerTimeout(t *testing.T) {
	for name, secure := range map[string]bool{"TCP": false, "TLS": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l := &line{down: slowRate, hold: make(chan struct{})}
			s, _ := slowEnds["to a raw client"](t, l, secure)
			send := start(func() error { return s.SendBinary(t.Context(), make([]byte, slowMessage)) })
			close(l.hold)
			require.ErrorIs(t, wantEnded(t, s), cryo.ErrPeerTimeout)
			require.ErrorIs(t, send.result(t), cryo.ErrPeerTimeout)
		})
	}
}

// A process that hangs has a system that still acknowledges what little it is sent.
func TestTrickleToAHungPeerIsAPeerTimeout(t *testing.T) {
	for name, secure := range map[string]bool{"TCP": false, "TLS": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			e, sessions := serveSessions(t, cryo.SessionOptions{HeartbeatInterval: slowHeartbeat}, secure)
			peer := cryotest.DialPeer(t, &websocket.Dialer{TLSClientConfig: e.tls}, e.scheme+"://"+e.address, token, sid)
			peer.WriteFrames(cryotest.EndpointInfo(0))
			s := next(t, sessions) // and nothing is read
			trickle := start(func() error {
				for {
					select {
					case <-s.Context().Done():
						return nil
					case <-time.After(5 * time.Millisecond):
						go func() { _ = s.SendText(t.Context(), "drop by drop") }()
					}
				}
			})
			require.ErrorIs(t, wantEnded(t, s), cryo.ErrPeerTimeout)
			trickle.wantSuccess(t)
		})
	}
}
