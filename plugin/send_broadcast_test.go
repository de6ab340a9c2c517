package plugin

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gorilla/websocket"
	"github.com/redpanda-data/benthos/v4/public/service"
	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/cryotest"
	"github.com/cryo-connect/cryo-connect/internal/wire"
)

func TestBroadcastIsDeliveredWhenAllClientsHaveAcknowledged(t *testing.T) {
	toAll(t, "", 3, func(t *testing.T, e *engine, clients []*cryo.Session) {
		f := e.produce("m0", "m1")
		var got []*cryo.Message
		for _, c := range clients {
			got = append(got, receiveTexts(t, c, "m0", "m1")...)
		}
		for _, m := range got {
			f.wantPending(t, "not all have acknowledged")
			require.NoError(t, m.Ack())
		}
		f.wantDelivered(t, "all have")
	})
}

func TestDisconnectedClientDoesNotDelayABroadcast(t *testing.T) {
	toAll(t, "", 2, func(t *testing.T, e *engine, clients []*cryo.Session) {
		f := e.produce("m")
		receiveTexts(t, clients[0], "m")
		m := receiveTexts(t, clients[1], "m")[0]
		end(clients[0])
		f.wantPending(t, "one is left")
		require.NoError(t, m.Ack())
		f.wantDelivered(t, "it has acknowledged")
	})
}

func TestClientThatConnectsDuringABroadcastReceivesTheNext(t *testing.T) {
	toAll(t, "", 1, func(t *testing.T, e *engine, clients []*cryo.Session) {
		f := e.produce("first")
		m := receiveTexts(t, clients[0], "first")[0]
		late := e.dial()
		require.NoError(t, m.Ack())
		f.wantDelivered(t, "all who were there have acknowledged")
		wantNothing(t, late)
		f = e.produce("second")
		for _, c := range []*cryo.Session{clients[0], late} {
			require.NoError(t, receiveTexts(t, c, "second")[0].Ack())
		}
		f.wantDelivered(t, "both have")
	})
}

func TestLateClientOfABroadcastIsClosed(t *testing.T) {
	toAll(t, "ack_timeout: 3s", 2, func(t *testing.T, e *engine, clients []*cryo.Session) {
		f := e.produce("m")
		require.NoError(t, receiveTexts(t, clients[0], "m")[0].Ack())
		receiveTexts(t, clients[1], "m")
		begin := time.Now()
		f.wantDelivered(t, "one has acknowledged")
		require.Equal(t, 3*time.Second, time.Since(begin))
		synctest.Wait()
		require.NoError(t, clients[0].Err())
		require.Error(t, clients[1].Err())
		e.log.want(t, "WARN Closing session: acknowledgement timed out", "timed out after ack_timeout (3s)", fmt.Sprintf("session=%d", clients[1].ID()))
	})
}

// The close code lets the published client for browsers connect again. What others are sent waits
// for none of the close handshake, which takes its whole timeout here.
func TestLateClientIsClosedForARetryWithoutDelayingOthers(t *testing.T) {
	for name, fields := range map[string]string{"broadcast": "send_to: all", "work queue": toAny, "streams": "message_type: stream"} {
		t.Run(name, func(t *testing.T) {
			toAll(t, fields+", ack_timeout: 3s", 0, func(t *testing.T, e *engine, _ []*cryo.Session) {
				late := e.rawClient()
				late.WS.SetCloseHandler(func(int, string) error { return nil }) // it never answers
				synctest.Wait()
				f := e.produce("m")
				synctest.Wait()
				other := e.dial()
				acknowledgeAll(other)
				begin := time.Now()
				if name == "work queue" {
					f.wantDelivered(t, "by the other")
				} else {
					require.ErrorIs(t, next(t, f.verdict), errLate)
				}
				e.produce("n").wantDelivered(t, "by the other alone")
				require.Equal(t, 3*time.Second, time.Since(begin))
				late.Next("what it does not acknowledge")
				late.WantClose("it may connect again", websocket.CloseTryAgainLater, "acknowledgement timed out")
				synctest.Wait()
				require.Equal(t, 3*time.Second, time.Since(begin))
				time.Sleep(5 * time.Second)
				e.wantMetrics("the close timeout has passed", map[string]int64{"cryo_sessions": 1})
			})
		})
	}
}

func TestOutputClosesWithItsLateClient(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(listenInput, toProbe) // its listener stays
		p := e.run(fromOnce, with(listenOutput, "ack_timeout: 3s"))
		e.rawClient() // never answers
		synctest.Wait()
		require.ErrorIs(t, next(t, e.produce("m").verdict), errLate)
		begin := time.Now()
		p.stop()
		require.Equal(t, cryo.DefaultCloseTimeout, time.Since(begin))
	})
}

func TestStreamsOfALateClientAreCancelledBeforeItIsClosed(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(listenInput, toProbe)
		e.run(fromOnce, with(listenOutput, "ack_timeout: 3s"))
		late := e.rawClient()
		late.WriteFrames(wire.Frame{Type: wire.TxStart, Ack: 1, Tx: 5, Size: -1, Payload: []byte("endless")})
		late.WantFrame("the stream is accepted", cryotest.Acked(1))
		f := e.produce("m")
		late.WantType("a message, which it does not acknowledge", wire.UTF8)
		require.ErrorIs(t, next(t, f.verdict), errLate)
		cancel := late.WantType("the stream is cancelled first", wire.TxCancel)
		late.WriteFrames(wire.Frame{Type: wire.TxChunk, Tx: 5, Payload: []byte("meanwhile")})
		late.WantIdle("until that is acknowledged", 2*time.Second)
		late.Ack(cancel)
		late.WantClose("then it is closed", websocket.CloseTryAgainLater, "acknowledgement timed out")
	})
}

func TestBroadcastThatSomeClientsRejectIsDelivered(t *testing.T) {
	toAll(t, "", 2, func(t *testing.T, e *engine, clients []*cryo.Session) {
		f := e.produce("m")
		require.NoError(t, receiveTexts(t, clients[0], "m")[0].Reject("no"))
		require.NoError(t, receiveTexts(t, clients[1], "m")[0].Ack())
		f.wantDelivered(t, "one has acknowledged")
		require.NoError(t, clients[0].Err())
	})
}

func TestBroadcastThatNoClientAcknowledgesFails(t *testing.T) {
	toAll(t, "batching: { count: 2 }", 2, func(t *testing.T, e *engine, clients []*cryo.Session) {
		f := e.produceEach(batchOf("good", "bad"))
		for i, c := range clients {
			m := receiveTexts(t, c, "good", "bad")
			require.NoError(t, m[0].Ack())
			require.NoError(t, m[1].Reject("reason "+strconv.Itoa(i)))
		}
		f[0].wantDelivered(t, "both have acknowledged it")
		require.ErrorContains(t, next(t, f[1].verdict), `not acknowledged by any of 2 sessions: rejected by the peer: "reason `)
	})
}

func TestNoSessionAppliesToABroadcastWithoutClients(t *testing.T) {
	t.Run("a message waits for one", func(t *testing.T) {
		toAll(t, "", 0, func(t *testing.T, e *engine, _ []*cryo.Session) {
			f := e.produce("m")
			time.Sleep(29 * time.Second)
			f.wantPending(t, "nobody is there")
			require.NoError(t, receiveTexts(t, e.dial(), "m")[0].Ack())
			f.wantDelivered(t, "somebody came")
		})
	})
	t.Run("a message fails at ack_timeout", func(t *testing.T) {
		toAll(t, "", 0, func(t *testing.T, e *engine, _ []*cryo.Session) {
			begin := time.Now()
			require.ErrorContains(t, next(t, e.produce("m").verdict), "no client is connected")
			require.Equal(t, 30*time.Second, time.Since(begin))
		})
	})
	t.Run("a message is dropped", func(t *testing.T) {
		toAll(t, "no_session: drop", 0, func(t *testing.T, e *engine, _ []*cryo.Session) {
			begin := time.Now()
			e.produce("m").wantDelivered(t, "as if")
			require.Zero(t, time.Since(begin))
		})
	})
	t.Run("a message is rejected", func(t *testing.T) {
		toAll(t, "no_session: reject", 0, func(t *testing.T, e *engine, _ []*cryo.Session) {
			begin := time.Now()
			require.ErrorContains(t, next(t, e.produce("m").verdict), "no client is connected")
			require.Zero(t, time.Since(begin))
		})
	})
	t.Run("a message that can't be sent isn't counted as dropped", func(t *testing.T) {
		toAll(t, "no_session: drop, message_type: '${! content() }'", 0, func(t *testing.T, e *engine, _ []*cryo.Session) {
			require.ErrorContains(t, next(t, e.produce("text").verdict), `unknown message type "text"`)
		})
	})
}

// addressed makes a batch of messages for sessions: "id text".
func addressed(ids ...any) service.MessageBatch {
	var batch service.MessageBatch
	for i, id := range ids {
		m := service.NewMessage([]byte("m" + strconv.Itoa(i)))
		m.MetaSetMut("to", id)
		batch = append(batch, m)
	}
	return batch
}

const toOne = "send_to: session, session_id: '${! @to }'"

func TestMessageIsSentToTheSessionWithItsSessionID(t *testing.T) {
	toAll(t, toOne, 3, func(t *testing.T, e *engine, clients []*cryo.Session) {
		a, b := fmt.Sprint(clients[0].ID()), fmt.Sprint(clients[1].ID())
		f := e.produceBatch(addressed(a, b, a, b, a))
		for _, m := range receiveTexts(t, clients[0], "m0", "m2", "m4") {
			require.NoError(t, m.Ack())
		}
		f.wantPending(t, "the other has not acknowledged")
		for _, m := range receiveTexts(t, clients[1], "m1", "m3") {
			require.NoError(t, m.Ack())
		}
		f.wantDelivered(t, "all are acknowledged")
		wantNothing(t, clients[2])
	})
}

func TestMessageRejectedByItsSessionFails(t *testing.T) {
	toAll(t, toOne+", batching: { count: 3 }", 2, func(t *testing.T, e *engine, clients []*cryo.Session) {
		a, b := fmt.Sprint(clients[0].ID()), fmt.Sprint(clients[1].ID())
		f := e.produceEach(addressed(a, b, a))
		m := receiveTexts(t, clients[0], "m0", "m2")
		require.NoError(t, m[0].Ack())
		require.NoError(t, m[1].Reject("no"))
		require.NoError(t, receiveTexts(t, clients[1], "m1")[0].Ack())
		f.wantFailed(t, map[int]string{2: `rejected by the peer: "no"`})
	})
}

func TestNoSessionAppliesToAMessageForAnUnknownSession(t *testing.T) {
	t.Run("waits for it", func(t *testing.T) {
		toAll(t, toOne, 1, func(t *testing.T, e *engine, clients []*cryo.Session) {
			f := e.produceBatch(addressed("4711"))
			time.Sleep(10 * time.Second)
			other := e.dial()
			f.wantPending(t, "another came")
			wantNothing(t, other)
			s, err := e.tryDial(cryo.DialOptions{Token: token, SessionID: 4711})
			require.NoError(t, err)
			require.NoError(t, receiveTexts(t, s, "m0")[0].Ack())
			f.wantDelivered(t, "it came")
		})
	})
	t.Run("fails its batch at ack_timeout, when all others are acknowledged", func(t *testing.T) {
		toAll(t, toOne, 1, func(t *testing.T, e *engine, clients []*cryo.Session) {
			begin := time.Now()
			f := e.produceBatch(addressed("4711", fmt.Sprint(clients[0].ID())))
			require.NoError(t, receiveTexts(t, clients[0], "m1")[0].Ack())
			require.Zero(t, time.Since(begin))
			f.wantFailed(t, "1 of 2 messages were not acknowledged, first error: session 4711 is not connected")
			require.Equal(t, 30*time.Second, time.Since(begin))
		})
	})
	t.Run("is dropped", func(t *testing.T) {
		toAll(t, toOne+", no_session: drop", 1, func(t *testing.T, e *engine, _ []*cryo.Session) {
			e.produceBatch(addressed("4711")).wantDelivered(t, "as if")
		})
	})
	t.Run("is rejected", func(t *testing.T) {
		toAll(t, toOne+", no_session: reject", 1, func(t *testing.T, e *engine, _ []*cryo.Session) {
			err := next(t, e.produceBatch(addressed("4711")).verdict)
			require.ErrorContains(t, err, "session 4711 is not connected")
		})
	})
}

func TestInvalidSessionIDFailsAfterAllOtherMessagesAreAcknowledged(t *testing.T) {
	toAll(t, "send_to: session, session_id: '${! @to.string() }', batching: { count: 5 }", 1, func(t *testing.T, e *engine, clients []*cryo.Session) {
		f := e.produceEach(addressed("someone", "-1", "", fmt.Sprint(clients[0].ID()), map[string]any{}))
		require.NoError(t, receiveTexts(t, clients[0], "m3")[0].Ack())
		f.wantFailed(t, map[int]string{
			0: `field session_id: "someone" is not a session id`,
			1: `field session_id: "-1" is not a session id`,
			2: `field session_id: "" is not a session id`,
			4: `field session_id: "{}" is not a session id`,
		})
	})
}

func TestNothingIsSentToAnEndingSession(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(fromOnce, with(listenOutput, "no_session: reject"))
		peer := e.rawClient()
		peer.Read()
		peer.WriteFrames(cryotest.Bye(1, "bye")) // and keeps the connection open
		synctest.Wait()
		begin := time.Now()
		require.ErrorContains(t, next(t, e.produce("m").verdict), "no client is connected")
		require.Zero(t, time.Since(begin))
	})
}

func TestStopClosesTheSessionsOfAnOutput(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		p := e.run(fromOnce, listenOutput)
		s := e.dial()
		p.stop()
		var closed *cryo.PeerClosedError
		require.ErrorAs(t, s.Err(), &closed)
		require.Equal(t, "server is shutting down", closed.Reason)
		_, err := e.tryDial(cryo.DialOptions{Token: token})
		require.ErrorIs(t, err, syscall.ECONNREFUSED)
	})
}

func TestWriteBatchBeforeConnectReturnsErrNotConnected(t *testing.T) {
	conf, err := specs()["output cryo_server"].ParseYAML("{ address: 127.0.0.1:0, tokens: [ a ] }", nil)
	require.NoError(t, err)
	out, _, _, err := newServerOutput(conf, service.MockResources())
	require.NoError(t, err)
	require.ErrorIs(t, out.WriteBatch(context.Background(), batchOf("m")), service.ErrNotConnected)
	require.NoError(t, out.Close(context.Background()))
}

// 1.5 MB at 30 kB/s take 50 s, and ack_timeout is 30 s.
func TestLargeMessageIsDeliveredOverASlowConnection(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(fromOnce, listenOutput)
		peer := e.rawClient()
		peer.AnswerPings()
		peer.Conn().ReadSlowly(30_000)
		f := e.produce(strings.Repeat("x", 1_500_000))
		time.Sleep(45 * time.Second)
		f.wantPending(t, "it takes 50 s")
		time.Sleep(10 * time.Second)
		peer.Ack(peer.WantType("all of it", wire.UTF8))
		f.wantDelivered(t, "acknowledged")
		peer.Conn().ReadSlowly(0)
		time.Sleep(time.Minute) // until its last slow read is over
	})
}

func TestLateClientIsClosedWhileASlowClientStillReceives(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(fromOnce, listenOutput)
		slow := e.rawClient()
		slow.AnswerPings()
		slow.Conn().ReadSlowly(30_000)
		var late []*cryo.Session // several, because the slow one may be the last that is waited for
		for range 4 {
			late = append(late, e.dial())
		}
		f := e.produce(strings.Repeat("x", 1_500_000))
		time.Sleep(31 * time.Second)
		for _, client := range late {
			require.Error(t, client.Err(), "after ack_timeout, whatever the others do")
		}
		f.wantPending(t, "one still receives it")
		time.Sleep(24 * time.Second)
		slow.Ack(slow.WantType("all of it", wire.UTF8))
		f.wantDelivered(t, "acknowledged by one")
		slow.Conn().ReadSlowly(0)
		time.Sleep(time.Minute) // until its last slow read is over
	})
}
