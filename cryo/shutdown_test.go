package cryo_test

import (
	"context"
	"net"
	"net/url"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/cryotest"
)

func TestShutdownSendsTheCloseFrameToAllAndWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server, l, sessions := serve(t, cryo.ServerOptions{})
		var peers []*cryotest.Peer
		for i := range uint64(3) {
			peer := join(t, l, 1+i)
			peer.ClientHandshake()
			peers = append(peers, peer)
		}
		early := join(t, l, 9) // in its handshake
		synctest.Wait()
		shutdown := start(func() error { return server.Shutdown(t.Context()) })
		for _, peer := range peers {
			peer.WantClose("the end, without BYE", 1012, "server is shutting down")
		}
		early.WantClose("the end, without BYE", 1012, "server is shutting down")
		shutdown.wantBlocked(t)

		status, _, body := knock(t, l, "x-cryo-sid=5&authorization="+url.QueryEscape("Bearer "+token), upgrade())
		require.Equal(t, 503, status)
		require.Equal(t, "The server is shutting down.", body)

		for _, peer := range append(peers, early) {
			shutdown.wantBlocked(t)
			require.NoError(t, peer.WS.Close())
		}
		shutdown.wantSuccess(t)
		for range peers {
			select {
			case <-next(t, sessions).Done():
			default:
				require.FailNow(t, "Shutdown came back too early")
			}
		}
		require.Empty(t, server.Sessions())
		require.NoError(t, server.Shutdown(t.Context()), "again")
	})
}

func TestShutdownWaitsForSessionsThatWereTakenOver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sessions := make(chan *cryo.Session, 2)
		server := newServer(t, cryo.ServerOptions{
			Authorize: cryo.Tokens(token),
			OnSession: func(s *cryo.Session, _ *cryo.Upgrade) { sessions <- s },
		})
		l := &slowListener{Listener: cryotest.Listen(), slow: 1, closing: make(chan struct{})}
		defer l.release()
		cryotest.ServeOn(t, l, server)
		join(t, l.Listener, sid).ClientHandshake()
		old := next(t, sessions)
		peer := join(t, l.Listener, sid)
		peer.ClientHandshake()
		<-old.Context().Done()

		shutdown := start(func() error { return server.Shutdown(t.Context()) })
		peer.WantClose("the end, without BYE", 1012, "server is shutting down")
		peer.WriteClose(1012, "")
		shutdown.wantBlocked(t)
		l.release()
		shutdown.wantSuccess(t)
		wantEnded(t, old)
	})
}

func TestShutdownWaitsForOnSessionEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ending, mayReturn := make(chan *cryo.Session, 1), make(chan struct{})
		server, l, sessions := serve(t, cryo.ServerOptions{OnSessionEnd: func(s *cryo.Session) {
			ending <- s
			<-mayReturn
		}})
		peer := join(t, l, sid)
		peer.ClientHandshake()
		s := next(t, sessions)
		peer.Conn().Cut()
		require.Same(t, s, next(t, ending))
		_, known := server.Session(sid)
		require.False(t, known)

		shutdown := start(func() error { return server.Shutdown(t.Context()) })
		shutdown.wantBlocked(t)
		close(mayReturn)
		shutdown.wantSuccess(t)
	})
}

// slowListener has first connections whose Close hangs, as that of TLS can.
type slowListener struct {
	*cryotest.Listener
	slow     int // connections
	closing  chan struct{}
	accepted int
	once     sync.Once
}

func (l *slowListener) release() { l.once.Do(func() { close(l.closing) }) }

func (l *slowListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if l.accepted++; l.accepted <= l.slow {
		c = &slowConn{c, l.closing}
	}
	return c, err
}

type slowConn struct {
	net.Conn
	closing chan struct{}
}

func (c *slowConn) Close() error {
	<-c.closing
	return c.Conn.Close()
}

func TestShutdownIsBoundedByItsContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server, l, sessions := serve(t, cryo.ServerOptions{})
		for i := range uint64(3) {
			peer := join(t, l, 1+i)
			peer.ClientHandshake()
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		begin := time.Now()
		require.Equal(t, context.DeadlineExceeded, server.Shutdown(ctx))
		require.Equal(t, time.Second, time.Since(begin))
		for range 3 {
			select {
			case <-next(t, sessions).Done():
			default:
				require.FailNow(t, "Shutdown came back too early")
			}
		}
	})
}

func TestServerWithoutSessionsShutsDownImmediately(t *testing.T) {
	require.NoError(t, newServer(t, cryo.ServerOptions{}).Shutdown(t.Context()))
}
