package plugin

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/internal/cryotest"
	"github.com/cryo-connect/cryo-connect/internal/wire"
)

// Sessions of the output cryo that end in the middle of a batch.

func TestOnlyUnacknowledgedMessagesAreSentOnTheNextSession(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		server := e.serve()
		e.run(fromOnce, dialOutput) // the output does it, not the input
		peer := server.session()
		f := e.produce(numbered("m%d", 4)...)
		m := receiveTexts(t, peer, numbered("m%d", 4)...)
		require.NoError(t, m[1].Ack())
		require.NoError(t, m[3].Ack())
		synctest.Wait()
		e.net.cut()

		again := server.session()
		require.Equal(t, peer.ID(), again.ID())
		for _, m := range receiveTexts(t, again, "m0", "m2") {
			f.wantPending(t, "not all are acknowledged")
			require.NoError(t, m.Ack())
		}
		f.wantDelivered(t, "acknowledged on one session or the other")
		wantNothing(t, again)
		require.Equal(t, 1, e.log.count("WARN Disconnected"))
		require.Equal(t, 1, e.log.count("INFO Reconnected"))
		require.Zero(t, e.metrics.value("output_connection_lost"), "the engine has not noticed")
		require.Zero(t, e.metrics.value("output_error"))
	})
}

func TestBatchIsDeliveredAcrossSeveralLostSessions(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		server := e.serve()
		e.run(fromOnce, with(dialOutput, `message_type: '${! if content().has_prefix("s") { "stream" } else { "utf8" } }'`))
		f := e.produce("m0", "s1", "m2", "s3")
		for _, text := range []string{"m0", "s1", "m2"} {
			peer := server.session()
			if text[0] == 's' {
				st, content := readStream(t, peer)
				require.Equal(t, text, content)
				require.NoError(t, st.Ack())
			} else {
				require.NoError(t, receiveTexts(t, peer, text)[0].Ack())
			}
			time.Sleep(2 * time.Second)
			f.wantPending(t, "not all are acknowledged")
			end(peer)
		}
		st, content := readStream(t, server.session())
		require.Equal(t, "s3", content)
		require.NoError(t, st.Ack())
		f.wantDelivered(t, "each on another session")
	})
}

func TestRejectedAndLateMessagesAreNotSentOnTheNextSession(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		server := e.serve()
		e.run(fromOnce, with(dialOutput, `ack_timeout: 10s, message_type: '${! if content().has_prefix("s") { "stream" } else { "utf8" } }', batching: { count: 4 }`))
		peer := server.session()
		f := e.produceEach(batchOf("m0", "s1", "s2", "m3"))
		require.NoError(t, receiveTexts(t, peer, "m0")[0].Reject("no"))
		acceptStream(t, peer) // and does not read it
		time.Sleep(10 * time.Second)
		acceptStream(t, peer)
		receiveTexts(t, peer, "m3")
		e.net.cut()

		again := server.session()
		st, content := readStream(t, again)
		require.Equal(t, "s2", content)
		require.NoError(t, st.Ack())
		require.NoError(t, receiveTexts(t, again, "m3")[0].Ack())
		require.ErrorContains(t, next(t, f[0].verdict), `rejected by the peer: "no"`)
		require.ErrorContains(t, next(t, f[1].verdict), "timed out after ack_timeout (10s)")
		f[2].wantDelivered(t, "on the next session")
		f[3].wantDelivered(t, "on the next session")
	})
}

func TestBatchFailsWithoutANewSessionWithinAckTimeout(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		server := e.serve()
		e.run(fromOnce, with(dialOutput, "ack_timeout: 10s"))
		peer := server.session()
		f := e.produce("m0", "m1", "m2")
		require.NoError(t, receiveTexts(t, peer, "m0", "m1", "m2")[1].Ack())
		time.Sleep(5 * time.Second)
		server.shutdown()
		begin := time.Now()
		err := next(t, f.verdict)
		require.Equal(t, 10*time.Second, time.Since(begin))
		requirePlain(t, err)
		require.NotErrorIs(t, err, net.ErrClosed, "it wraps none of the messages' errors")
		require.ErrorContains(t, err, "2 of 3 messages were not acknowledged, first error: session ended: ")
		require.ErrorContains(t, err, ", and no other session connected within ack_timeout (10s): dialling ws://"+somewhere+": dial tcp: connection refused")
		e.log.want(t, "WARN Reconnecting failed", "url=ws://"+somewhere, "error=dialling")

		// The engine keeps the next one until there is a session.
		f = e.produce("next")
		time.Sleep(time.Hour)
		f.wantPending(t, "nothing of it was sent")
		require.NoError(t, receiveTexts(t, e.serve().session(), "next")[0].Ack())
		f.wantDelivered(t, "acknowledged")
	})
}

func TestReconnectTimeoutStartsAtTheFirstLoss(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		server := e.serve()
		e.run(fromOnce, with(dialOutput, "ack_timeout: 10s"))
		f := e.produce("m0", "m1")
		var begin time.Time
		for i := range 3 {
			peer := server.session()
			receiveTexts(t, peer, "m0", "m1")
			time.Sleep(7 * time.Second)
			if i == 0 {
				begin = time.Now()
			}
			f.wantPending(t, "within 10 s after the first loss")
			end(peer)
		}
		require.ErrorContains(t, next(t, f.verdict), "no other session connected within ack_timeout (10s)")
		took := time.Since(begin)
		require.GreaterOrEqual(t, took, 14*time.Second, "at the first loss after that time")
		require.Less(t, took, 16*time.Second+maxResendWait, "two waits of up to 1 s before the attempts to connect")
	})
}

func TestBatchIsSentOnAtMostTenSessions(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		server := e.serve()
		e.run(fromOnce, dialOutput)
		f := e.produce("m0", "m1")
		for i := range 10 {
			f.wantPending(t, "there may be another")
			peer := server.session()
			begin := time.Now()
			receiveTexts(t, peer, "m0", "m1")
			if wait := time.Since(begin); i < 2 {
				require.Zero(t, wait)
			} else {
				require.Positive(t, wait, "others go first at times")
				require.LessOrEqual(t, wait, maxResendWait)
			}
			time.Sleep(time.Second) // long enough for the next to be dialled at once
			end(peer)
		}
		err := next(t, f.verdict)
		requirePlain(t, err)
		require.ErrorContains(t, err, "2 of 2 messages were not acknowledged, first error: not acknowledged by 10 sessions in a row; last error: session ended: ")
	})
}

// poison ends each session that brings a message "poison", and acknowledges all
// others, until the test's end.
func (s *server) poison(t *testing.T) {
	t.Helper()
	serving := sendAny(func() error {
		for session := range s.sessions {
			for {
				m, err := session.Receive(context.Background())
				if err != nil {
					break
				}
				if string(m.Payload) == "poison" {
					end(session)
				} else {
					_ = m.Ack()
				}
			}
		}
		return nil
	})
	t.Cleanup(func() {
		s.shutdown()
		close(s.sessions)
		require.NoError(t, serving.result(t))
	})
}

func TestMessageThatDisconnectsEveryServerFails(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.serve().poison(t)
		e.run(fromOnce, dialOutput)
		begin := time.Now()
		f := e.produce("poison")
		err := next(t, f.verdict)
		requirePlain(t, err)
		require.ErrorContains(t, err, "session ended: ")
		require.LessOrEqual(t, time.Since(begin), 30*time.Second+maxResendWait, "the wait for a session, and the last pause")
		e.produce("later").wantDelivered(t, "without the poison")
	})
}

// They are sent in another order on each session, so all others should pass it. By
// chance few may not.
func TestBatchesOvertakeOneThatDisconnectsEveryServer(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		server := e.serve()
		e.run(fromOnce, dialOutput)
		peer := server.session()
		poison := e.produce("poison")
		receiveTexts(t, peer, "poison")
		var others []*produced
		for i := range 50 {
			others = append(others, e.produce(fmt.Sprint(i)))
			receive(t, peer)
		}
		server.poison(t)
		end(peer)
		require.Error(t, next(t, poison.verdict))
		delivered := 0
		for _, f := range others {
			if next(t, f.verdict) == nil {
				delivered++
			}
		}
		require.Greater(t, delivered, 10)
	})
}

func TestBatchesThatLostTheirSessionShareReconnectAttempts(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		server := e.serveDenying(0, http.StatusServiceUnavailable, "No room")
		e.run(fromOnce, dialOutput)
		peer := server.session()
		var fed []*produced
		for i := range 20 {
			fed = append(fed, e.produce(fmt.Sprint(i, "a"), fmt.Sprint(i, "b")))
			m := receive(t, peer)
			require.NoError(t, m.Ack())
			receive(t, peer)
		}
		time.Sleep(time.Second)
		server.deny(3)
		e.net.cut()
		synctest.Wait()
		fed = append(fed, e.produce("20b")) // for this the engine connects
		again := server.session()
		require.Len(t, server.waits(), 4)
		wantGrowing(t, server.waits()[1:], 3)
		var texts []string
		for range 21 {
			m := receive(t, again)
			texts = append(texts, string(m.Payload))
			require.NoError(t, m.Ack())
		}
		require.ElementsMatch(t, numbered("%db", 21), texts)
		wantNothing(t, again)
		for _, f := range fed {
			f.wantDelivered(t, "acknowledged")
		}
		require.Empty(t, server.sessions, "one session for all")
		require.Equal(t, 1, e.log.count("INFO Reconnected"))
	})
}

func TestOutputRetriesARejectedTokenWithinAckTimeout(t *testing.T) {
	for _, tt := range []struct {
		ackTimeout string
		delivered  bool
	}{{"40s", true}, {"20s", false}} {
		t.Run(tt.ackTimeout, func(t *testing.T) {
			inEngine(t, func(t *testing.T, e *engine) {
				server := e.serveDenying(0, http.StatusUnauthorized, "Invalid token")
				e.run(fromOnce, with(dialOutput, "ack_timeout: "+tt.ackTimeout))
				f := e.produce("m")
				receiveTexts(t, server.session(), "m")
				time.Sleep(time.Second)
				server.deny(1)
				e.net.cut()
				begin := time.Now()
				if !tt.delivered {
					require.ErrorContains(t, next(t, f.verdict), "no other session connected within ack_timeout (20s): dialling ws://"+somewhere+": the server responded to the upgrade with 401 Unauthorized: Invalid token (check the field token; retrying in 30s)")
					require.Equal(t, 20*time.Second, time.Since(begin))
					f = e.produce("m")
				}
				require.NoError(t, receiveTexts(t, server.session(), "m")[0].Ack())
				require.Less(t, time.Since(begin), 31*time.Second, "nobody waits twice")
				f.wantDelivered(t, "the token is taken again")
				require.Len(t, server.waits(), 2)
				require.Equal(t, 30*time.Second, server.waits()[1])
			})
		})
	}
}

func TestBatchWaitingForAHangingServerFailsAfterAckTimeout(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		server := cryotest.NewServer(t)
		e.dialer = server.Dial
		e.run(fromOnce, with(dialOutput, "ack_timeout: 10s, connect_timeout: 25s"))
		peer := server.NextPeer()
		peer.ServerHandshake()
		f := e.produce("m")
		peer.WantType("the message", wire.UTF8)
		peer.Conn().Cut()
		begin := time.Now()
		hanging := server.NextPeer() // its handshake does not begin
		f.wantFailed(t, "session ended: connection lost: read tcp 192.0.2.1:50000->192.0.2.2:80: connection reset by peer, and no other session connected within ack_timeout (10s)")
		require.Equal(t, 10*time.Second, time.Since(begin))

		f = e.produce("next")
		f.wantPending(t, "the attempt goes on")
		time.Sleep(10 * time.Second)
		hanging.ServerHandshake()
		m := hanging.WantType("the next message", wire.UTF8)
		require.Equal(t, "next", string(m.Payload))
		hanging.Ack(m)
		f.wantDelivered(t, "on the session of that attempt")
		hanging.Conn().Cut()
	})
}

func TestStopInterruptsTheWaitForASession(t *testing.T) {
	for name, hang := range map[string]func(e *engine){
		"between attempts": func(e *engine) {},
		"in an attempt": func(e *engine) {
			_, err := e.net.Listen("tcp", somewhere) // which never accepts
			require.NoError(e.t, err)
		},
	} {
		lose := func(t *testing.T, e *engine) (*output, func(ctx context.Context) *sending) {
			out, server, peer := e.connectedOutput("connect_timeout: 20s")
			return out, func(ctx context.Context) *sending {
				writing := sendAny(func() error { return out.WriteBatch(ctx, batchOf("m0", "m1")) })
				require.NoError(t, receiveTexts(t, peer, "m0", "m1")[0].Ack())
				synctest.Wait()
				server.shutdown()
				hang(e)
				time.Sleep(5 * time.Second)
				writing.wantPending(t, "it waits for a session")
				return writing
			}
		}
		t.Run("Close "+name, func(t *testing.T) {
			inEngine(t, func(t *testing.T, e *engine) {
				out, write := lose(t, e)
				writing := write(t.Context())
				begin := time.Now()
				require.NoError(t, out.Close(t.Context()))
				err := writing.result(t)
				require.Zero(t, time.Since(begin))
				requirePlain(t, err)
				require.ErrorContains(t, err, "1 of 2 messages were not acknowledged, first error: session ended: ")
				require.ErrorContains(t, err, ", and the component is closed")
				require.ErrorIs(t, out.Connect(t.Context()), errDialerClosed)
			})
		})
		t.Run("a hard stop "+name, func(t *testing.T) {
			inEngine(t, func(t *testing.T, e *engine) {
				out, write := lose(t, e)
				ctx, cancel := context.WithCancel(t.Context())
				writing := write(ctx)
				begin := time.Now()
				cancel()
				require.Equal(t, context.Canceled, writing.result(t))
				require.NoError(t, out.Close(t.Context()))
				require.Zero(t, time.Since(begin))
			})
		})
		t.Run("the engine's "+name, func(t *testing.T) {
			inEngine(t, func(t *testing.T, e *engine) {
				server := e.serve()
				p := e.run(fromOnce, with(dialOutput, "connect_timeout: 20s"))
				e.produce("m")
				receiveTexts(t, server.session(), "m")
				server.shutdown()
				hang(e)
				time.Sleep(5 * time.Second)
				begin := time.Now()
				p.kill()
				require.Zero(t, time.Since(begin))
			})
		})
	}
}

func TestFailedAttemptIsLoggedOnceForAllWaitingBatches(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		server := e.serveDenying(0, http.StatusServiceUnavailable, "No room")
		e.run(fromOnce, with(dialOutput, "ack_timeout: 10s"))
		peer := server.session()
		var fed []*produced
		for i := range 10 {
			fed = append(fed, e.produce(fmt.Sprint(i)))
			receive(t, peer)
		}
		time.Sleep(time.Second)
		server.deny(1000)
		e.net.cut()
		for _, f := range fed {
			require.ErrorContains(t, next(t, f.verdict), "503 Service Unavailable")
		}
		attempts := len(server.waits())
		require.Greater(t, attempts, 4)
		lines := 0
		for _, line := range e.log.all() {
			if strings.Contains(line, "Reconnecting failed") && strings.Contains(line, "error=dialling ws://"+somewhere+": the server responded to the upgrade with 503") {
				lines++
				_, suppressed, _ := strings.Cut(line, "suppressed=")
				suppressed, _, _ = strings.Cut(suppressed, " ")
				n, _ := strconv.Atoi(suppressed)
				lines += n
			}
		}
		require.Equal(t, attempts, lines, "with those that were left out")
	})
}

func TestServerThatAcknowledgesOneMessagePerSessionReceivesTheBatch(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		server := e.serve()
		e.run(fromFeed, dialOutput)
		f := e.produce(numbered("m%d", 15)...)
		count := 0
		for deadline := time.Now().Add(time.Hour); time.Now().Before(deadline) && len(f.verdict) == 0; {
			peer := server.session()
			m := receive(t, peer)
			count++
			require.NoError(t, m.Ack())
			time.Sleep(1100 * time.Millisecond)
			end(peer)
			synctest.Wait()
		}
		f.wantDelivered(t, "every session has acknowledged some of it")
		require.Equal(t, 15, count, "none twice")
	})
}

// A session that acknowledges something is no failed attempt, however short it is.
func TestReconnectionDoesNotBackOffAfterAnAcknowledgement(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		server := e.serve()
		e.run(fromFeed, dialOutput)
		begin := time.Now()
		f := e.produce(numbered("m%d", 30)...)
		for range 30 {
			peer := server.session()
			require.NoError(t, receive(t, peer).Ack())
			synctest.Wait()
			end(peer)
		}
		f.wantDelivered(t, "every session has acknowledged some of it")
		require.Less(t, time.Since(begin), 30*500*time.Millisecond)
	})
}
