package cryo_test

import (
	"context"
	"net"
	"net/http/httptest"
	"runtime"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/cryotest"
	"github.com/cryo-connect/cryo-connect/internal/wire"
)

func TestServerSendsEndpointInfoAfterTheClient(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server, l, sessions := serve(t, cryo.ServerOptions{})
		peer := join(t, l, sid)
		peer.WantIdle("nothing right behind the upgrade's answer", 999*time.Millisecond)
		require.Empty(t, server.Sessions())
		require.Empty(t, sessions)

		// As cryo-client-node does: data right behind, without waiting.
		peer.WriteFrames(cryotest.EndpointInfo(0), cryotest.Text(1, "first"), cryotest.Text(2, "second"))
		peer.WantFrame("the acknowledgement", cryotest.Acked(0))
		peer.WantEndpointInfo("the server's own")
		s := next(t, sessions)
		require.Equal(t, []*cryo.Session{s}, server.Sessions())
		require.Equal(t, "first", string(receive(t, s).Payload))
		require.Equal(t, "second", string(receive(t, s).Payload))
		peer.WantIdle("and no other, whether or not it was acknowledged", 14*time.Second)
		require.NoError(t, s.Err())
	})
}

func TestServerSendsEndpointInfoAfterASecondOnlyOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, l, sessions := serve(t, cryo.ServerOptions{})
		peer := join(t, l, sid)
		begin := time.Now()
		peer.WantEndpointInfo("the server's ENDPOINT_INFO")
		require.Equal(t, time.Second, time.Since(begin))
		peer.WantIdle("it again", 5*time.Second)
		require.Empty(t, sessions)

		peer.WriteFrames(cryotest.EndpointInfo(0))
		peer.WantFrame("the acknowledgement", cryotest.Acked(0))
		peer.WantIdle("it again", time.Second)
		require.NoError(t, next(t, sessions).Err())
	})
}

func TestClientWithoutEndpointInfoIsDisconnected(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server, l, sessions := serve(t, cryo.ServerOptions{HandshakeTimeout: 3 * time.Second})
		peer := join(t, l, sid)
		begin := time.Now()
		peer.WantEndpointInfo("the server's ENDPOINT_INFO")
		peer.WantClose("the end", 4001, "protocol violation: no ENDPOINT_INFO, ACK or data received within 3s")
		require.Equal(t, 3*time.Second, time.Since(begin))
		require.Empty(t, sessions)
		_, known := server.Session(sid)
		require.False(t, known)
	})
}

func TestClientThatLeavesBeforeEndpointInfoIsNotAnnounced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, l, sessions := serve(t, cryo.ServerOptions{MaxSessions: 1})
		for range 3 {
			peer := join(t, l, sid)
			peer.Conn().Cut()
			synctest.Wait()
		}
		join(t, l, sid+1).ClientHandshake()
		require.Equal(t, sid+1, next(t, sessions).ID())
	})
}

func TestClientThatLeavesImmediatelyIsAnnounced(t *testing.T) {
	// On one processor, its session has ended before its request goes on.
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	ended := make(chan *cryo.Session, 1)
	sessions := make(chan *cryo.Session, 1)
	server := httptest.NewServer(newServer(t, cryo.ServerOptions{
		Authorize:    cryo.Tokens(token),
		OnSession:    func(s *cryo.Session, _ *cryo.Upgrade) { sessions <- s },
		OnSessionEnd: func(s *cryo.Session) { ended <- s },
	}))
	defer server.Close()
	for range 20 {
		peer := cryotest.DialPeer(t, websocket.DefaultDialer, strings.Replace(server.URL, "http", "ws", 1), token, sid)
		peer.WriteFrames(cryotest.EndpointInfo(0), cryotest.Text(1, "that's all"))
		// Without a reset, which would end the session at its next write, maybe before it reads the text.
		require.NoError(t, peer.WS.NetConn().(*net.TCPConn).CloseWrite())
		s := next(t, sessions)
		require.Equal(t, "that's all", string(receive(t, s).Payload))
		wantEnded(t, s)
		require.Same(t, s, next(t, ended))
		require.NoError(t, peer.WS.Close())
	}
	require.Empty(t, ended, "each was reported once")
}

func TestAnotherVersionEndsTheSession(t *testing.T) {
	info := cryotest.EndpointInfo(0)
	info.Version = 2
	const reason = "protocol violation: unsupported protocol version 2: only 1 is supported"

	t.Run("of a client", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			_, l, sessions := serve(t, cryo.ServerOptions{})
			peer := join(t, l, sid)
			peer.WriteFrames(info)
			peer.WantClose("the end, without BYE", 4001, reason)
			require.Empty(t, sessions)
		})
	})
	t.Run("of a server", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			peer, dial := dialling(t, cryo.DialOptions{})
			peer.WantEndpointInfo("the client's ENDPOINT_INFO")
			peer.WriteFrames(info)
			peer.WantClose("the end, without BYE", 4001, reason)
			require.NoError(t, peer.WS.Close())
			err := dial.result(t)
			require.EqualError(t, err, "dialling ws://cryo.test: protocol handshake: session ended: "+reason)
			require.ErrorAs(t, err, new(*cryo.ProtocolError))
		})
	})
}

func TestUnknownFeatureIsIgnored(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, l, sessions := serve(t, cryo.ServerOptions{})
		peer := join(t, l, sid)
		info := cryotest.EndpointInfo(0)
		info.Features = 1<<63 | 2
		peer.WriteFrames(info)
		peer.WantFrame("the acknowledgement", cryotest.Acked(0))
		next(t, sessions)
	})
}

func TestDialReturnsWhenTheServerHasAcknowledgedEndpointInfo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var s *cryo.Session
		peer, dial := diallingTo(t, cryo.DialOptions{}, &s)
		peer.WantEndpointInfo("the client's ENDPOINT_INFO")

		peer.WriteFrames(cryotest.EndpointInfo(0))
		peer.WantFrame("the acknowledgement", cryotest.Acked(0))
		dial.wantBlocked(t)
		peer.WriteFrames(cryotest.Acked(peer.First))
		dial.wantSuccess(t)

		peer.WriteFrames(cryotest.EndpointInfo(2))
		peer.WantFrame("the acknowledgement of one that comes again", cryotest.Acked(2))
		peer.WantIdle("and nothing else", time.Second)
	})
}

func TestMessagesBeforeTheHandshakeIsAcknowledgedAreReceived(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var s *cryo.Session
		peer, dial := diallingTo(t, cryo.DialOptions{}, &s)
		peer.WantEndpointInfo("the client's ENDPOINT_INFO")
		// cryo-server acknowledges data before it has dealt with ENDPOINT_INFO,
		// and its applications may send before.
		peer.WriteFrames(cryotest.Text(1, "early"), txStart(2, 5, -1, "early"))
		dial.wantBlocked(t)
		peer.WantIdle("nothing", instant)
		peer.WriteFrames(cryotest.Acked(peer.First))
		dial.wantSuccess(t)
		require.Equal(t, "early", string(receive(t, s).Payload))
		st := acceptStream(t, s)
		read := start(func() error { return wantRest(t, st, "x") })
		peer.WantFrame("TX_START acknowledged", cryotest.Acked(2))
		peer.WriteFrames(txChunk(5, 0, "x"), txFinish(3, 5))
		read.wantSuccess(t)
	})
}

func TestDialDoesNotRequireTheServersEndpointInfo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		peer, dial := dialling(t, cryo.DialOptions{})
		peer.WantEndpointInfo("the client's ENDPOINT_INFO")
		peer.WriteFrames(cryotest.Acked(peer.First))
		dial.wantSuccess(t)
	})
}

func TestDialGivesUpWithoutAnAcknowledgement(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		begin := time.Now()
		peer, dial := dialling(t, cryo.DialOptions{ConnectTimeout: 3 * time.Second})
		peer.WantEndpointInfo("the client's ENDPOINT_INFO")
		err := dial.result(t)
		require.Equal(t, 3*time.Second, time.Since(begin))
		require.EqualError(t, err, "dialling ws://cryo.test: timed out after 3s: context deadline exceeded")
		require.ErrorIs(t, err, context.DeadlineExceeded)
		peer.WantLost("the end of the connection")
	})
}

func TestDialEndsWithItsContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server := cryotest.NewServer(t)
		ctx, cancel := context.WithCancel(t.Context())
		dial := start(func() error {
			_, err := cryo.Dial(ctx, memoryURL, &cryo.DialOptions{NetDial: server.Dial})
			return err
		})
		peer := server.NextPeer()
		dial.wantBlocked(t)
		cancel()
		err := dial.result(t)
		require.ErrorIs(t, err, context.Canceled)
		require.EqualError(t, err, "dialling ws://cryo.test: context canceled")
		peer.WantType("the client's ENDPOINT_INFO", wire.EndpointInfo)
		peer.WantLost("the end of the connection")
	})
}

func TestContextOfDialDoesNotBoundTheSession(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		server := cryotest.NewServer(t)
		var s *cryo.Session
		dial := start(func() (err error) {
			s, err = cryo.Dial(ctx, memoryURL, &cryo.DialOptions{NetDial: server.Dial})
			return err
		})
		peer := server.NextPeer()
		peer.ServerHandshake()
		dial.wantSuccess(t)
		defer cut(s)
		cancel()
		peer.WriteFrames(cryotest.Text(1, "alive"))
		require.Equal(t, "alive", string(receive(t, s).Payload))
		time.Sleep(time.Hour)
		require.NoError(t, s.Err())
	})
}

func TestSessionThatEndsDuringTheHandshakeFailsDial(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		peer, dial := dialling(t, cryo.DialOptions{})
		peer.WriteClose(4002, "go away")
		err := dial.result(t)
		require.EqualError(t, err, `dialling ws://cryo.test: protocol handshake: session ended: closed by the peer with code 4002: "go away"`)
		require.ErrorIs(t, err, net.ErrClosed)
	})
}

// dialling begins to dial a raw server, and returns its peer, before any frame.
func dialling(t *testing.T, opts cryo.DialOptions) (*cryotest.Peer, *call) {
	t.Helper()
	return diallingTo(t, opts, new(*cryo.Session))
}

func diallingTo(t *testing.T, opts cryo.DialOptions, s **cryo.Session) (*cryotest.Peer, *call) {
	t.Helper()
	server := cryotest.NewServer(t)
	opts.NetDial, opts.Token, opts.SessionID = server.Dial, token, sid
	dial := start(func() (err error) {
		*s, err = cryo.Dial(t.Context(), memoryURL, &opts)
		return err
	})
	t.Cleanup(func() {
		if *s != nil {
			cut(*s)
		}
	})
	return server.NextPeer(), dial
}

func TestSessionThatEndsDuringTheHandshakeIsNotATimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log lines
		denied := make(chan int, 1)
		_, l, _ := serve(t, cryo.ServerOptions{
			SessionOptions:   cryo.SessionOptions{Logger: log.logger()},
			HandshakeTimeout: 3 * time.Second,
			OnDeny:           func(status int) { denied <- status },
		})
		peer := join(t, l, sid)
		peer.WriteBytes([]byte("half"))
		peer.WantClose("the end", 4001, "protocol violation: malformed frame of 4 bytes: shorter than session id and type")
		time.Sleep(4 * time.Second) // the client does not close
		log.want(t, "Closing a session because of a protocol violation")
		require.Empty(t, denied)
	})
}
