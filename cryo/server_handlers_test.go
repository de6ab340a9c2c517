package cryo_test

import (
	"context"
	"net/http"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/cryotest"
	"github.com/cryo-connect/cryo-connect/internal/wire"
)

// handlers are those of a server, whose OnSession returns when it may.
type handlers struct {
	server  *cryo.Server
	began   chan *cryo.Session // OnSession was called
	finish  chan struct{}      // lets OnSession return
	ended   chan *cryo.Session // OnSessionEnd was called
	release chan struct{}      // lets OnSessionEnd return
}

func serveHandlers(t *testing.T) (*handlers, *cryotest.Listener) {
	t.Helper()
	h := &handlers{began: make(chan *cryo.Session, 1), finish: make(chan struct{}), ended: make(chan *cryo.Session, 9), release: make(chan struct{})}
	server, l, _ := serve(t, cryo.ServerOptions{
		SessionOptions: quiet,
		OnSession: func(s *cryo.Session, _ *cryo.Upgrade) {
			h.began <- s
			<-h.finish
		},
		OnSessionEnd: func(s *cryo.Session) {
			h.ended <- s
			<-h.release
		},
	})
	h.server = server
	return h, l
}

func TestOnSessionEndIsCalledOnceAfterOnSessionAndDone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h, l := serveHandlers(t)
		peer := join(t, l, sid)
		peer.ClientHandshake()
		s := next(t, h.began)
		peer.Conn().Cut()
		wantEnded(t, s)
		synctest.Wait()
		require.Empty(t, h.ended, "OnSession has not returned")
		_, known := h.server.Session(sid)
		require.False(t, known)
		h.finish <- struct{}{}
		require.Same(t, s, next(t, h.ended))

		again := join(t, l, sid) // while OnSessionEnd runs
		again.ClientHandshake()
		s = next(t, h.began)
		h.finish <- struct{}{}
		synctest.Wait()
		require.Empty(t, h.ended, "the session lives")
		again.Conn().Cut()
		require.Same(t, s, next(t, h.ended))
		wantEnded(t, s)
		close(h.release)
		synctest.Wait()
		require.Empty(t, h.ended)
	})
}

func TestShutdownWaitsForBothHandlers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h, l := serveHandlers(t)
		peer := join(t, l, sid)
		peer.ClientHandshake()
		s := next(t, h.began)
		shutdown := start(func() error { return h.server.Shutdown(t.Context()) })
		peer.WantClose("the end, without BYE", 1012, "server is shutting down")
		peer.WriteClose(1012, "")
		wantEnded(t, s)
		shutdown.wantBlocked(t)
		close(h.finish)
		require.Same(t, s, next(t, h.ended))
		shutdown.wantBlocked(t)
		close(h.release)
		shutdown.wantSuccess(t)
	})
}

func TestShutdownWaitsForHandlersNoLongerThanItsContextLasts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h, l := serveHandlers(t)
		peer := join(t, l, sid)
		peer.ClientHandshake()
		s := next(t, h.began)
		peer.Conn().Cut()
		wantEnded(t, s)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		begin := time.Now()
		require.Equal(t, context.DeadlineExceeded, h.server.Shutdown(ctx))
		require.Equal(t, time.Second, time.Since(begin))
		close(h.finish)
		close(h.release)
		require.NoError(t, h.server.Shutdown(t.Context()), "again")
	})
}

func TestServerDrainsAllItsSessions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server, l, sessions := serve(t, cryo.ServerOptions{SessionOptions: quiet})
		busy, lost, idle := join(t, l, 1), join(t, l, 2), join(t, l, 3)
		var messages []*cryo.Message
		for _, peer := range []*cryotest.Peer{busy, lost} {
			peer.ClientHandshake()
			peer.WriteFrames(cryotest.Text(1, ""))
			messages = append(messages, receive(t, next(t, sessions)))
		}
		idle.ClientHandshake()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		drain := start(func() error { return server.Drain(ctx) })
		idle.WantClose("the end, without BYE", 1012, "server is shutting down")
		idle.WriteClose(1012, "")
		drain.wantBlocked(t)
		require.ErrorIs(t, drain.result(t), context.DeadlineExceeded)
		require.Len(t, server.Sessions(), 2, "they are open")

		drain = start(func() error { return server.Drain(t.Context()) })
		drain.wantBlocked(t)
		lost.Conn().Cut()
		drain.wantBlocked(t)
		require.NoError(t, messages[0].Ack())
		busy.WantFrame("ACK", cryotest.Acked(1))
		busy.WantClose("the end, without BYE", 1012, "server is shutting down")
		busy.WriteClose(1012, "")
		drain.wantSuccess(t)
		require.Error(t, messages[1].Ack())
	})
}

func TestSessionsAreDrainedOneByOne(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const n = 5
		server, l, sessions := serve(t, cryo.ServerOptions{SessionOptions: quiet})
		begin := time.Now()
		ended := make(chan time.Duration, n)
		for i := range uint64(n) {
			peer := join(t, l, 1+i)
			peer.ClientHandshake()
			s := next(t, sessions)
			go func() {
				m, err := s.Receive(context.Background())
				if err == nil {
					_ = m.Ack()
				}
			}()
			go func() {
				time.Sleep(500 * time.Millisecond) // until after the first turn
				if s.Err() == nil {
					peer.WriteFrames(cryotest.Text(1, ""))
					peer.WantFrame("it goes on as before", cryotest.Acked(1))
				}
				peer.WantClose("the end, without BYE", 1012, "server is shutting down")
				ended <- time.Since(begin)
				peer.WriteClose(1012, "")
			}()
		}
		drain := start(func() error { return server.DrainOver(t.Context(), n*time.Second) })
		drain.wantBlocked(t)
		status, _, _ := knock(t, l, queryOf(9, token), upgrade())
		require.Equal(t, 503, status)
		drain.wantSuccess(t)
		turn := time.Duration(0)
		for range n {
			require.Equal(t, max(turn, 500*time.Millisecond), <-ended)
			turn += time.Second
		}
	})
}

func TestDrainOverWaitsForNoSessionThatHasEnded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server, l, sessions := serve(t, cryo.ServerOptions{SessionOptions: quiet})
		var peers []*cryotest.Peer
		for i := range uint64(10) {
			peer := join(t, l, 1+i)
			peer.ClientHandshake()
			next(t, sessions)
			peers = append(peers, peer)
		}
		begin := time.Now()
		drain := start(func() error { return server.DrainOver(t.Context(), time.Hour) })
		drain.wantBlocked(t)
		time.Sleep(time.Second)
		for _, peer := range peers {
			peer.Conn().Cut()
		}
		drain.wantSuccess(t)
		require.Less(t, time.Since(begin), 2*time.Second)
	})
}

func TestDrainOverWaitsForReceivedAndSentMessages(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server, l, sessions := serve(t, cryo.ServerOptions{SessionOptions: quiet})
		peer := join(t, l, 1)
		peer.ClientHandshake()
		s := next(t, sessions)
		peer.WriteFrames(cryotest.Text(1, ""))
		received := receive(t, s)
		sent := start(func() error { return s.SendText(t.Context(), "sent") })
		frame := peer.WantType("the message", wire.UTF8)
		drain := start(func() error { return server.DrainOver(t.Context(), time.Minute) })
		drain.wantBlocked(t)
		require.True(t, s.Draining())
		require.NoError(t, received.Ack())
		peer.WantFrame("ACK", cryotest.Acked(1))
		time.Sleep(time.Hour)
		drain.wantBlocked(t)
		require.NoError(t, s.Err(), "the message may still be acknowledged")
		peer.Ack(frame)
		sent.wantSuccess(t)
		peer.WantClose("the end, without BYE", 1012, "server is shutting down")
		peer.WriteClose(1012, "")
		drain.wantSuccess(t)
	})
}

func TestDrainOverWaitsForStreamsThatAreSent(t *testing.T) {
	for name, end := range map[string]func(st *cryo.OutgoingStream, peer *cryotest.Peer) error{
		"finished": func(st *cryo.OutgoingStream, peer *cryotest.Peer) error {
			go func() { peer.Ack(peer.WantType("TX_FINISH", wire.TxFinish)) }()
			return st.Finish()
		},
		"abandoned": func(st *cryo.OutgoingStream, _ *cryotest.Peer) error {
			_ = st.Close()
			return nil
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				server, l, sessions := serve(t, cryo.ServerOptions{SessionOptions: quiet})
				peer := join(t, l, 1)
				peer.ClientHandshake()
				s := next(t, sessions)
				go func() { peer.Ack(peer.WantType("TX_START", wire.TxStart)) }()
				st, err := s.OpenStream(t.Context(), nil)
				require.NoError(t, err)
				drain := start(func() error { return server.DrainOver(t.Context(), time.Minute) })
				drain.wantBlocked(t)
				time.Sleep(time.Hour)
				_, err = st.Write([]byte("goes on"))
				require.NoError(t, err)
				peer.WantType("the chunk", wire.TxChunk)
				require.NoError(t, end(st, peer))
				peer.WantClose("the end, without BYE", 1012, "server is shutting down")
				peer.WriteClose(1012, "")
				drain.wantSuccess(t)
			})
		})
	}
}

func TestDrainOverEndsWithItsContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server, l, sessions := serve(t, cryo.ServerOptions{SessionOptions: quiet})
		var open []*cryo.Session
		for i := range uint64(2) {
			peer := join(t, l, 1+i)
			peer.ClientHandshake()
			s := next(t, sessions)
			sending := start(func() error { return s.SendText(context.Background(), "never acknowledged") })
			peer.WantType("the message", wire.UTF8)
			defer func() { require.ErrorIs(t, sending.result(t), cryo.ErrClosed) }()
			open = append(open, s)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 29*time.Second)
		defer cancel()
		begin := time.Now()
		require.ErrorIs(t, server.DrainOver(ctx, time.Minute), context.DeadlineExceeded)
		require.Equal(t, 29*time.Second, time.Since(begin))
		draining := 0
		for _, s := range open {
			require.NoError(t, s.Err())
			if s.Draining() {
				draining++
			}
		}
		require.Equal(t, 1, draining, "the turn of the other one has not come")
		require.NoError(t, server.Shutdown(t.Context()))
	})
}

// A stop ends the sends that a drain waits for, and soon after the drain itself.
func TestEndOfADrainInterruptsNoCloseHandshake(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server, l, sessions := serve(t, cryo.ServerOptions{SessionOptions: quiet})
		peer := join(t, l, 1)
		peer.ClientHandshake()
		s := next(t, sessions)
		sendCtx, cancelSend := context.WithCancel(t.Context())
		sending := start(func() error { return s.SendText(sendCtx, "never acknowledged") })
		peer.WantType("the message", wire.UTF8)
		ctx, cancel := context.WithCancel(t.Context())
		drain := start(func() error { return server.DrainOver(ctx, time.Minute) })
		drain.wantBlocked(t)
		cancelSend()
		require.ErrorIs(t, sending.result(t), context.Canceled)
		synctest.Wait()
		cancel()
		shutdown := start(func() error { return server.Shutdown(t.Context()) })
		peer.WantClose("the close frame of a connection that is open", 1012, "server is shutting down")
		drain.wantBlocked(t)
		shutdown.wantBlocked(t)
		peer.WriteClose(1012, "")
		shutdown.wantSuccess(t)
		if err := drain.result(t); err != nil { // all sessions have ended, and the context too
			require.ErrorIs(t, err, context.Canceled)
		}
	})
}

func TestNegativeOptionsAreErrors(t *testing.T) {
	negative := map[string]cryo.SessionOptions{
		"HeartbeatInterval is -1s":    {HeartbeatInterval: -time.Second},
		"MaxBufferBytes is -1":        {MaxBufferBytes: -1},
		"CloseTimeout is -1ns":        {CloseTimeout: -1},
		"StreamIdleTimeout is -1m0s":  {StreamIdleTimeout: -time.Minute},
		"ConnectTimeout is -2s":       {},
		"MaxSessions is -3":           {},
		"MaxSessionsPerAddress is -4": {},
		"MaxConnectsPerSecond is -5":  {},
		"MaxMessagesPerSecond is -6":  {MaxMessagesPerSecond: -6},
		"MaxBytesPerSecond is -7":     {MaxBytesPerSecond: -7},
		"HandshakeTimeout is -500ms":  {},
	}
	const rule = ": it must be positive, or 0 for its default"
	for what, session := range negative {
		dial, server := cryo.DialOptions{SessionOptions: session}, cryo.ServerOptions{SessionOptions: session}
		dials, serves := true, true
		switch what {
		case "ConnectTimeout is -2s":
			dial.ConnectTimeout, serves = -2*time.Second, false
		case "MaxSessions is -3":
			server.MaxSessions, dials = -3, false
		case "MaxSessionsPerAddress is -4":
			server.MaxSessionsPerAddress, dials = -4, false
		case "MaxConnectsPerSecond is -5":
			server.MaxConnectsPerSecond, dials = -5, false
		case "HandshakeTimeout is -500ms":
			server.HandshakeTimeout, dials = -500*time.Millisecond, false
		}
		if dials {
			_, err := cryo.Dial(t.Context(), memoryURL, &dial)
			require.EqualError(t, err, "dialling: "+what+rule)
			_, err = cryo.NewClient(memoryURL, &cryo.ClientOptions{DialOptions: dial})
			require.EqualError(t, err, "creating a client: "+what+rule)
		}
		if serves {
			_, err := cryo.NewServer(&server)
			require.EqualError(t, err, "creating a server: "+what+rule)
		}
	}
	synctest.Test(t, func(t *testing.T) {
		s, _ := dialled(t, cryo.DialOptions{})
		_, err := s.OpenStream(t.Context(), &cryo.StreamOptions{StepTimeout: -1})
		require.EqualError(t, err, "StepTimeout is -1ns"+rule)
		_, err = s.OpenStream(t.Context(), &cryo.StreamOptions{ChunkBytes: -1})
		require.Error(t, err)
	})
}

func TestServerWithoutOptionsDeniesAllClients(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server, err := cryo.NewServer(nil)
		require.NoError(t, err)
		status, _, _ := knock(t, cryotest.Serve(t, server), "x-cryo-sid=1&authorization=Bearer+a", upgrade())
		require.Equal(t, 401, status)
	})
}

func TestSessionEndsWithThePanicOfOnSession(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ended := make(chan *cryo.Session, 1)
		server, l, _ := serve(t, cryo.ServerOptions{
			OnSession:    func(*cryo.Session, *cryo.Upgrade) { panic(http.ErrAbortHandler) },
			OnSessionEnd: func(s *cryo.Session) { ended <- s },
		})
		peer := join(t, l, sid)
		peer.WriteFrames(cryotest.EndpointInfo(0))
		require.EqualError(t, next(t, ended).Err(), "session ended: OnSession panicked")
		require.Empty(t, server.Sessions())
		require.NoError(t, server.Shutdown(t.Context()))
	})
}
