package plugin

import (
	"context"
	"errors"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"github.com/redpanda-data/benthos/v4/public/service"
	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/cryotest"
	"github.com/cryo-connect/cryo-connect/internal/wire"
)

func TestConnectingTwiceKeepsTheSession(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		server := e.serve()
		out := e.alone(t, "")
		require.NoError(t, out.Connect(t.Context()))
		s := server.session()
		require.NoError(t, out.Connect(t.Context()))
		require.Equal(t, []*cryo.Session{s}, server.cryo.Sessions())
		require.NoError(t, out.Close(t.Context()))
		require.NoError(t, out.Close(t.Context()), "twice")
		require.Empty(t, server.sessions)
	})
}

func TestConnectingAnInputTwiceReceivesFromItsSessionOnce(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		server := e.serve()
		in := e.aloneInput(t, "")
		require.NoError(t, in.Connect(t.Context()))
		peer, lost := server.session(), in.lost
		require.NoError(t, in.Connect(t.Context()))
		require.Equal(t, lost, in.lost, "one goroutine receives")
		m := send(peer, "m")
		batch, ack, err := in.ReadBatch(t.Context())
		require.NoError(t, err)
		require.Len(t, batch, 1)
		require.NoError(t, ack(t.Context(), nil))
		m.wantAcked(t, "delivered")
		end(peer)
		_, _, err = in.ReadBatch(t.Context())
		require.ErrorIs(t, err, service.ErrNotConnected)
		require.NoError(t, in.Close(t.Context()))
	})
}

func TestConnectingAgainWaitsUntilTheLastSessionIsGone(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		server := cryotest.NewServer(t)
		e.dialer = server.Dial
		out := e.alone(t, "")
		connecting := sendAny(func() error { return out.Connect(context.Background()) })
		peer := server.NextPeer()
		peer.ServerHandshake()
		connecting.wantAcked(t, "connected")

		// A server that says BYE and doesn't close, as cryo-server at times.
		peer.WriteFrames(cryotest.Bye(1, "bye"))
		peer.WantFrame("the acknowledgement", cryotest.Acked(1))
		peer.WantClose("the client's close frame", 4000, "")
		synctest.Wait()
		require.ErrorIs(t, out.WriteBatch(t.Context(), batchOf("m")), service.ErrNotConnected)
		require.Equal(t, 1, e.log.count("INFO Disconnected"), "while the server keeps the connection open")
		begin := time.Now()
		connecting = sendAny(func() error { return out.Connect(context.Background()) })
		again := server.NextPeer()
		require.Equal(t, cryo.DefaultCloseTimeout, time.Since(begin), "not while the server has our session")
		require.Equal(t, peer.SID, again.SID)
		again.ServerHandshake()
		connecting.wantAcked(t, "connected")

		closing := sendAny(func() error { return out.Close(context.Background()) })
		again.WantType("BYE", wire.Bye)
		again.WantClose("the client's close frame", 4000, "")
		require.NoError(t, again.WS.Close())
		closing.wantAcked(t, "closed")
	})
}

func TestAnOutputsCloseWaitsForASessionThatIsEnding(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		server := cryotest.NewServer(t)
		e.dialer = server.Dial
		out := e.alone(t, "")
		connecting := sendAny(func() error { return out.Connect(context.Background()) })
		peer := server.NextPeer()
		peer.ServerHandshake()
		connecting.wantAcked(t, "connected")
		peer.WriteFrames(cryotest.Bye(1, "bye"))
		synctest.Wait()
		closing := sendAny(func() error { return out.Close(context.Background()) })
		closing.wantPending(t, "the server has not closed the connection")
		require.NoError(t, peer.WS.Close())
		closing.wantAcked(t, "closed")
	})
}

func TestACallersContextEndsTheWaitAndNotTheSession(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		server := e.serve()
		out := e.alone(t, "")
		require.NoError(t, out.Connect(t.Context()))
		peer := server.session()
		ctx, cancel := context.WithCancel(t.Context())
		writing := sendAny(func() error { return out.WriteBatch(ctx, batchOf("m")) })
		receiveTexts(t, peer, "m")
		cancel()
		err := writing.result(t)
		require.ErrorIs(t, err, context.Canceled)
		require.NotErrorIs(t, err, net.ErrClosed)
		require.NoError(t, peer.Err())
		require.NoError(t, out.Close(t.Context()))
	})
}

// Nobody waits any more for the session of this attempt, and it is not lost.
func TestTheSessionOfAnAttemptThatNobodyWaitedForIsTakenByTheNextConnect(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		server := cryotest.NewServer(t)
		e.dialer = server.Dial
		in := e.aloneInput(t, "")
		ctx, cancel := context.WithCancel(t.Context())
		connecting := sendAny(func() error { return in.Connect(ctx) })
		peer := server.NextPeer()
		cancel()
		require.ErrorIs(t, connecting.result(t), context.Canceled)
		peer.ServerHandshake()
		synctest.Wait()
		peer.WriteFrames(cryotest.Text(1, "m"))
		require.NoError(t, in.Connect(t.Context()))
		ctx, cancel = context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		batch, _, err := in.ReadBatch(ctx)
		require.NoError(t, err)
		require.Len(t, batch, 1)
		peer.Conn().Cut()
		require.NoError(t, in.Close(t.Context()))
	})
}

func TestAnAttemptThatSucceedsDuringCloseLeavesNoSession(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		server := e.serve()
		dialled := make(chan struct{})
		e.dialer = func(ctx context.Context, network, address string) (net.Conn, error) {
			close(dialled)
			return e.net.Dial(ctx, network, address)
		}
		out := e.alone(t, "")
		go func() { _ = out.Connect(context.Background()) }()
		<-dialled
		require.NoError(t, out.Close(t.Context()))
		synctest.Wait()
		require.Empty(t, server.cryo.Sessions())
	})
}

// aloneInput makes an input without an engine around it.
func (e *engine) aloneInput(t *testing.T, fields string) *input {
	t.Helper()
	conf, err := specs()["input cryo"].ParseYAML("{ url: ws://"+somewhere+", token: "+token+fields+" }", nil)
	require.NoError(t, err)
	in, err := newInput(conf, service.MockResources(), cryo.DialOptions{NetDial: e.dialer})
	require.NoError(t, err)
	return in
}

func TestAConnectionTestDialsAndHangsUp(t *testing.T) {
	for _, kind := range []string{"input", "output"} {
		t.Run(kind, func(t *testing.T) {
			inEngine(t, func(t *testing.T, e *engine) {
				test := func(token string) error {
					var c service.ConnectionTestable
					if kind == "input" {
						in := e.aloneInput(t, "")
						in.opts.Token = token
						c = in
					} else {
						out := e.alone(t, "")
						out.opts.Token = token
						c = out
					}
					results := c.ConnectionTest(t.Context())
					require.Len(t, results, 1)
					return results[0].Err
				}
				require.ErrorContains(t, test(token), "connection refused")
				server := e.serve()
				require.NoError(t, test(token))
				require.ErrorContains(t, test("wrong"), "401 Unauthorized")
				synctest.Wait()
				require.Empty(t, server.cryo.Sessions())
			})
		})
	}
}

func TestAConnectionTestLeavesAWaitingMessageToOthers(t *testing.T) {
	for _, kind := range []string{"input", "output"} {
		t.Run(kind, func(t *testing.T) {
			toAll(t, toAny, 0, func(t *testing.T, e *engine, _ []*cryo.Session) {
				f := e.give("job")
				f.wantPending(t, "nobody is there")
				e.dialer = e.farAway
				var c service.ConnectionTestable = e.aloneInput(t, "")
				if kind == "output" {
					c = e.alone(t, "")
				}
				require.NoError(t, c.ConnectionTest(t.Context())[0].Err)
				f.wantPending(t, "neither taken nor refused")
				require.Equal(t, 1, e.log.count("DEBUG Sending an unacknowledged message to another session"), "it was sent to the test's session")
				require.NoError(t, receiveTexts(t, e.dial(), "job")[0].Ack())
				f.wantDelivered(t, "by a worker")
			})
		})
	}
}

// farAway dials over a line with some latency.
func (e *engine) farAway(ctx context.Context, network, address string) (net.Conn, error) {
	c, err := e.net.Dial(ctx, network, address)
	return &farConn{c}, err
}

type farConn struct{ net.Conn }

func (c *farConn) Read(p []byte) (int, error) {
	time.Sleep(time.Millisecond)
	return c.Conn.Read(p)
}

func TestAConnectionTestNeitherTakesNorRefusesMessages(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		server := cryotest.NewServer(t)
		e.dialer = server.Dial
		in := e.aloneInput(t, "")
		testing := sendAny(func() error { return in.ConnectionTest(context.Background())[0].Err })
		peer := server.NextPeer()
		peer.WantEndpointInfo("the client's ENDPOINT_INFO")
		peer.WriteFrames(cryotest.EndpointInfo(0), cryotest.Text(1, "not for a test"))
		peer.WantFrame("the acknowledgement", cryotest.Acked(0))
		peer.WriteFrames(cryotest.Acked(peer.First))
		bye := peer.WantType("BYE", wire.Bye)
		require.Equal(t, "connection test", string(bye.Payload))
		peer.WantClose("the client's close frame", 4000, "connection test")
		require.NoError(t, peer.WS.Close())
		testing.wantAcked(t, "passed")
	})
}

func TestOnlyTheFirstVerdictOnABatchCounts(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		server := e.serve()
		in := e.aloneInput(t, ", auto_replay_nacks: false, max_in_flight: 1")
		require.NoError(t, in.Connect(t.Context()))
		peer := server.session()
		first, second, third := send(peer, "first"), send(peer, "second"), send(peer, "third")
		read := func() service.AckFunc {
			_, ack, err := in.ReadBatch(t.Context())
			require.NoError(t, err)
			return ack
		}
		ack := read()
		for _, verdict := range []error{errOutput, nil, errOutput} {
			require.NoError(t, ack(t.Context(), verdict))
		}
		read() // and no more, one is in flight
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		_, _, err := in.ReadBatch(ctx)
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.NoError(t, in.Close(t.Context()))
		refused, ended := 0, 0
		for _, m := range []*sending{first, second, third} {
			err := m.result(t)
			switch {
			case errors.Is(err, net.ErrClosed):
				ended++
			default:
				var rejected *cryo.RejectedError
				require.ErrorAs(t, err, &rejected)
				refused++
			}
		}
		require.Equal(t, 1, refused)
		require.Equal(t, 2, ended)
	})
}
