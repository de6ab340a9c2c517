package plugin

import (
	"context"
	"errors"
	"net"
	"net/http"
	"slices"
	"strings"
	"syscall"
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
		out, server, s := e.connectedOutput("")
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
		in := e.bareInput("")
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

// outputOfRawServer connects an output to a raw server.
func (e *engine) outputOfRawServer(t *testing.T) (*output, *cryotest.Server, *cryotest.Peer) {
	t.Helper()
	server := cryotest.NewServer(t)
	e.dialer = server.Dial
	out := e.bareOutput("")
	connecting := sendAny(func() error { return out.Connect(context.Background()) })
	peer := server.NextPeer()
	peer.ServerHandshake()
	connecting.wantAcked(t, "connected")
	return out, server, peer
}

func TestConnectWaitsForThePreviousSessionToClose(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		out, server, peer := e.outputOfRawServer(t)

		// A server that says BYE and doesn't close, as cryo-server at times.
		peer.WriteFrames(cryotest.Bye(1, "bye"))
		peer.WantFrame("the acknowledgement", cryotest.Acked(1))
		peer.WantClose("the client's close frame", 4000, "")
		synctest.Wait()
		require.ErrorIs(t, out.WriteBatch(t.Context(), batchOf("m")), service.ErrNotConnected)
		require.Equal(t, 1, e.log.count("INFO Disconnected"), "while the server keeps the connection open")
		begin := time.Now()
		connecting := sendAny(func() error { return out.Connect(context.Background()) })
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

func TestOutputCloseWaitsForTheEndingSession(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		out, _, peer := e.outputOfRawServer(t)
		peer.WriteFrames(cryotest.Bye(1, "bye"))
		synctest.Wait()
		closing := sendAny(func() error { return out.Close(context.Background()) })
		closing.wantPending(t, "the server has not closed the connection")
		require.NoError(t, peer.WS.Close())
		closing.wantAcked(t, "closed")
	})
}

func TestCancelledWriteDoesNotEndTheSession(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		out, _, peer := e.connectedOutput("")
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
func TestNextConnectUsesTheSessionOfACancelledConnect(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		server := cryotest.NewServer(t)
		e.dialer = server.Dial
		in := e.bareInput("")
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

func TestConnectThatSucceedsDuringCloseLeavesNoSession(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		server := e.serve()
		dialled := make(chan struct{})
		e.dialer = func(ctx context.Context, network, address string) (net.Conn, error) {
			close(dialled)
			return e.net.Dial(ctx, network, address)
		}
		out := e.bareOutput("")
		go func() { _ = out.Connect(context.Background()) }()
		<-dialled
		require.NoError(t, out.Close(t.Context()))
		synctest.Wait()
		require.Empty(t, server.cryo.Sessions())
	})
}

func TestConnectionTestDialsAndDisconnects(t *testing.T) {
	for _, kind := range []string{"input", "output"} {
		t.Run(kind, func(t *testing.T) {
			inEngine(t, func(t *testing.T, e *engine) {
				test := func(token string) error {
					var c service.ConnectionTestable
					if kind == "input" {
						in := e.bareInput("")
						in.attempt.token, _ = parseInterpolated("field token", token)
						c = in
					} else {
						out := e.bareOutput("")
						out.attempt.token, _ = parseInterpolated("field token", token)
						c = out
					}
					results := c.ConnectionTest(t.Context())
					require.Len(t, results, 1)
					return results[0].Err
				}
				require.ErrorIs(t, test(token), syscall.ECONNREFUSED)
				server := e.serve()
				require.NoError(t, test(token))
				require.ErrorIs(t, test("wrong"), cryo.ErrUnauthorized)
				synctest.Wait()
				require.Empty(t, server.cryo.Sessions())
			})
		})
	}
}

func TestConnectionTestLeavesQueuedMessagesForOthers(t *testing.T) {
	for _, kind := range []string{"input", "output"} {
		t.Run(kind, func(t *testing.T) {
			toAll(t, toAny, 0, func(t *testing.T, e *engine, _ []*cryo.Session) {
				f := e.produce("job")
				f.wantPending(t, "nobody is there")
				e.dialer = e.farAway
				var c service.ConnectionTestable = e.bareInput("")
				if kind == "output" {
					c = e.bareOutput("")
				}
				require.NoError(t, c.ConnectionTest(t.Context())[0].Err)
				f.wantPending(t, "neither acknowledged nor rejected")
				require.Equal(t, 1, e.log.count("DEBUG Sending an unacknowledged message to another session"), "it was sent to the test's session")
				require.NoError(t, receiveTexts(t, e.dial(), "job")[0].Ack())
				f.wantDelivered(t, "by a worker")
			})
		})
	}
}

func TestConnectionTestNeitherAcknowledgesNorRejectsMessages(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		server := cryotest.NewServer(t)
		e.dialer = server.Dial
		in := e.bareInput("")
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
		in := e.bareInput("auto_replay_nacks: false, max_in_flight: 1")
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
		rejections, ended := 0, 0
		for _, m := range []*sending{first, second, third} {
			err := m.result(t)
			switch {
			case errors.Is(err, net.ErrClosed):
				ended++
			default:
				var rejected *cryo.RejectedError
				require.ErrorAs(t, err, &rejected)
				rejections++
			}
		}
		require.Equal(t, 1, rejections)
		require.Equal(t, 2, ended)
	})
}

func TestFailedAttemptNamesTheFieldToChange(t *testing.T) {
	for answer, want := range map[string]string{
		"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n":                                                 "404 Not Found (check the path of the field url)",
		"HTTP/1.1 308 Permanent Redirect\r\nLocation: https://h/feed?key=s3cret\r\nContent-Length: 0\r\n\r\n": "308 Permanent Redirect: redirect to https://h/feed (redirects are not followed: set the field url to the target)",
		"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n":                                              "401 Unauthorized (check the field token; retrying in 30s)",
	} {
		inEngine(t, func(t *testing.T, e *engine) {
			e.answer(func(*http.Request) string { return answer })
			e.run(dialInput, toProbe)
			time.Sleep(time.Millisecond)
			synctest.Wait()
			e.log.want(t, "Failed to connect to cryo", want)
		})
	}
}

func TestLastConnectionLogLineIsAccurateAfterRepeatedLosses(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		server := e.serve()
		e.run(fromFeed, dialOutput)
		end(server.session())
		for suppressed := false; !suppressed; {
			synctest.Wait()
			logged := e.log.count("Disconnected")
			e.produce("m")
			require.NoError(t, receive(t, server.session()).Ack())
			synctest.Wait()
			e.net.cut()
			synctest.Wait()
			suppressed = e.log.count("Disconnected") == logged
		}
		last := func() string {
			for _, line := range slices.Backward(e.log.all()) {
				if strings.Contains(line, "connected") {
					return line
				}
			}
			return ""
		}
		require.Contains(t, last(), "INFO Reconnected")
		time.Sleep(time.Second)
		synctest.Wait()
		require.Contains(t, last(), "WARN Disconnected", "it has nothing to write, and so is not connected")
		e.produce("m")
		require.NoError(t, receive(t, server.session()).Ack())
		synctest.Wait()
		require.Contains(t, last(), "INFO Reconnected")
	})
}
