package plugin

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
)

var telling = with(listenInput, "message_types: [ utf8, binary, stream, session ], max_batch_count: 1")

// told waits for the next message, about a session or of one, in a batch of its
// own, and wants it to be this one: "7 connected", or "7: text".
func (e *engine) told(t *testing.T, want string) *arrival {
	t.Helper()
	a := e.arrival()
	require.Len(t, a.batch, 1)
	got := metadataOf(t, a.batch[0])
	words := fmt.Sprintf("%v: %s", got["cryo_session_id"], a.texts()[0])
	if got["cryo_message_type"] == "session" {
		require.Empty(t, a.texts()[0])
		words = fmt.Sprintf("%v %v", got["cryo_session_id"], got["cryo_session_event"])
	}
	require.Equal(t, want, words)
	return a
}

// visit connects a client with an id.
func (e *engine) visit(t *testing.T, id uint64) *cryo.Session {
	t.Helper()
	s, err := e.tryDial(cryo.DialOptions{Token: token, SessionID: id})
	require.NoError(t, err)
	return s
}

func TestEventsComeBeforeAndAfterTheMessagesOfASession(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(with(listenInput, "message_types: [ utf8, session ], session_metadata: { query_parameters: [ room ] }"), toProbe)
		client, err := e.tryDial(cryo.DialOptions{Token: token, SessionID: 7, Query: map[string][]string{"room": {"5"}}})
		require.NoError(t, err)
		m := send(client, "hello")
		connected := e.told(t, "7 connected")
		require.Equal(t, map[string]any{
			"cryo_message_type": "session", "cryo_session_event": "connected",
			"cryo_session_id": "7", "cryo_remote_address": "192.0.2.1:50000", "cryo_query_room": "5",
		}, metadataOf(t, connected.batch[0]))
		_, numbered := connected.batch[0].MetaGet("cryo_ack_id")
		require.False(t, numbered)
		e.wantNoArrival("connected is not delivered yet")
		connected.deliver()

		message := e.told(t, "7: hello")
		end(client)
		require.Error(t, m.result(t))
		e.wantNoArrival("its message is in the pipeline")
		message.deliver()

		disconnected := e.told(t, "7 disconnected")
		require.Equal(t, map[string]any{
			"cryo_message_type": "session", "cryo_session_event": "disconnected", "cryo_session_cause": "session ended: connection lost: unexpected EOF",
			"cryo_session_id": "7", "cryo_remote_address": "192.0.2.1:50000", "cryo_query_room": "5",
		}, metadataOf(t, disconnected.batch[0]))
		disconnected.deliver()
		e.wantNoArrival("all is told")
	})
}

func TestDisconnectedCarriesTheCause(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(telling, toProbe)
		client := e.visit(t, 7)
		e.told(t, "7 connected").deliver()
		require.NoError(t, client.Close(t.Context(), "see you"))
		a := e.told(t, "7 disconnected")
		cause, _ := a.batch[0].MetaGet("cryo_session_cause")
		require.Equal(t, `session ended: closed by the peer: "see you"`, cause)
		a.deliver()
	})
}

func TestFailedEventIsRedeliveredBeforeAllThatFollows(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(telling, toProbe)
		client := e.visit(t, 7)
		_ = send(client, "hello")
		e.told(t, "7 connected").fail(errors.New("no"))
		e.told(t, "7 connected").fail(errors.New("no"))
		synctest.Wait()
		end(client)
		e.told(t, "7 connected").deliver()
		e.told(t, "7: hello").deliver()
		e.told(t, "7 disconnected").fail(errors.New("no"))
		e.told(t, "7 disconnected").deliver()
		e.wantNoArrival("all is told")
	})
}

func TestDisconnectedComesAfterTheStreamsOfTheSession(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(with(telling, "streams: { scanner: { lines: {} } }"), toProbe)
		client := e.visit(t, 7)
		e.told(t, "7 connected").deliver()
		_ = sendAny(func() error {
			return client.SendStream(t.Context(), strings.NewReader("one\ntwo\n"), &cryo.StreamOptions{Name: "lines"})
		})
		lines := e.arrivalsOf("one", "two")
		synctest.Wait()
		end(client)
		lines["one"].deliver()
		e.wantNoArrival("two is in the pipeline")
		lines["two"].deliver()
		e.told(t, "7 disconnected").deliver()
	})
}

func TestDisconnectedDoesNotWaitForAMessageThatAlwaysFails(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(telling, toProbe)
		client := e.visit(t, 7)
		e.told(t, "7 connected").deliver()
		_ = send(client, "poison")
		e.told(t, "7: poison").fail(errors.New("no"))
		synctest.Wait()
		end(client)
		seen := map[string]bool{}
		for !seen["disconnected"] {
			a := e.arrival()
			event, _ := a.batch[0].MetaGet("cryo_session_event")
			seen[event] = true
			if event == "" {
				a.fail(errors.New("no"))
			} else {
				a.deliver()
			}
		}
	})
}

func TestDisconnectedWaitsForEachMessageWhileAnotherFailsAgainAndAgain(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(telling, toProbe)
		client := e.visit(t, 7)
		e.told(t, "7 connected").deliver()
		sendAll(client, "poison", "slow")
		arrivals := e.arrivalsOf("poison", "slow")
		end(client)
		arrivals["poison"].fail(errOutput)
		for range 5 {
			e.told(t, "7: poison").fail(errOutput)
		}
		last := e.told(t, "7: poison")
		e.wantNoArrival("a message has had no verdict yet")
		arrivals["slow"].deliver()
		e.told(t, "7 disconnected").deliver()
		last.deliver()
	})
}

func TestTakeoverEmitsDisconnectedThenConnected(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(telling, toProbe)
		ghost := e.visit(t, 7)
		e.told(t, "7 connected").deliver()
		_ = send(ghost, "first")
		first := e.told(t, "7: first")

		client := e.visit(t, 7)
		second := send(client, "second")
		e.wantNoArrival("the ghost's message is in the pipeline")
		first.deliver()
		left := e.told(t, "7 disconnected")
		cause, _ := left.batch[0].MetaGet("cryo_session_cause")
		require.Equal(t, "session ended: "+cryo.ErrTakenOver.Error(), cause)
		e.wantNoArrival("the ghost's end is not delivered")
		left.fail(errors.New("no"))
		e.told(t, "7 disconnected").deliver()
		e.told(t, "7 connected").deliver()
		e.told(t, "7: second").deliver()
		second.wantAcked(t, "delivered")
	})
}

func TestTakeoverEmitsInOrderWhereInputsShareTheSessions(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(telling, toProbe)
		e.run(telling, toProbe)
		e.visit(t, 7)
		e.told(t, "7 connected").deliver()
		for range 3 {
			e.visit(t, 7)
			e.told(t, "7 disconnected").deliver()
			e.told(t, "7 connected").deliver()
			e.wantNoArrival("all is told")
		}
	})
}

func TestStalledPipelineLosesNoEventAndNewSessionsAreDenied(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(with(listenInput, "message_types: [ session ], max_batch_count: 1, max_sessions: 3"), "serial: {}")
		for id := range uint64(6) { // as many as may be connected, and have left
			visitor := e.visit(t, 1+id)
			synctest.Wait()
			end(visitor)
			synctest.Wait()
		}
		_, err := e.tryDial(cryo.DialOptions{Token: token})
		require.ErrorContains(t, err, "503 Service Unavailable: Overloaded: closed sessions are still draining.")
		_, err = e.tryDial(cryo.DialOptions{Token: "wrong"})
		require.ErrorIs(t, err, cryo.ErrUnauthorized, "the token is judged first")

		told := map[string][]string{}
		for range 12 {
			a := e.arrival()
			got := metadataOf(t, a.batch[0])
			id := got["cryo_session_id"].(string)
			told[id] = append(told[id], got["cryo_session_event"].(string))
			a.deliver()
		}
		e.wantNoArrival("all is told")
		require.Len(t, told, 6)
		for id, events := range told {
			require.Equal(t, []string{"connected", "disconnected"}, events, id)
		}
		e.visit(t, 10)
		e.told(t, "10 connected").deliver()
	})
}

func TestEventsCountAsReceivedUntilTheyAreSettled(t *testing.T) {
	for settings, settle := range map[string]func(a *arrival){
		"auto_replay_nacks: true":  func(a *arrival) { a.deliver() },
		"auto_replay_nacks: false": func(a *arrival) { a.fail(errors.New("no")) },
	} {
		inEngine(t, func(t *testing.T, e *engine) {
			e.run(with(telling, "max_buffer_bytes: 4000, "+settings), toProbe)
			client := e.visit(t, 1)
			e.told(t, "1 connected").deliver()
			synctest.Wait()
			for id := range uint64(100) {
				visitor := e.visit(t, 1000+id)
				settle(e.arrival())
				end(visitor)
				settle(e.arrival())
			}
			m := send(client, "there is room")
			e.told(t, "1: there is room").deliver()
			m.wantAcked(t, "delivered")

			var waiting []*arrival
			for id := range uint64(30) { // each at least 256 bytes
				e.visit(t, 2000+id)
				waiting = append(waiting, e.arrival())
			}
			for range 2 { // one may come late
				_ = send(client, "there is none")
			}
			synctest.Wait()
			require.LessOrEqual(t, len(e.probe.arrivals), 1, "reading pauses")
			for _, a := range waiting {
				a.deliver()
			}
			for range 2 {
				e.told(t, "1: there is none").deliver()
			}
		})
	}
}

func TestNextInputEmitsConnectedForTheSessionsThatItGets(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		first := e.run(telling, toProbe)
		client, leaves := e.visit(t, 7), e.visit(t, 8)
		for range 2 {
			e.arrival().deliver()
		}
		e.run(telling, toProbe)
		synctest.Wait()
		end(leaves)
		e.told(t, "8 disconnected") // which gets no verdict
		first.kill()
		told := map[string]bool{}
		for range 3 {
			a := e.arrival()
			got := metadataOf(t, a.batch[0])
			told[fmt.Sprint(got["cryo_session_id"], " ", got["cryo_session_event"])] = true
			a.deliver()
		}
		require.Equal(t, map[string]bool{"7 connected": true, "8 connected": true, "8 disconnected": true}, told)
		end(client)
		e.told(t, "7 disconnected").deliver()
	})
}

func TestInputThatStartsLaterEmitsConnectedForEachSession(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(fromOnce, listenOutput)
		client := e.visit(t, 7)
		time.Sleep(2 * noInputTimeout)
		e.run(telling, toProbe)
		e.told(t, "7 connected").deliver()
		end(client)
		e.told(t, "7 disconnected").deliver()
	})
}

func TestStopEmitsNoDisconnected(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		p := e.run(telling, toProbe)
		e.visit(t, 7)
		e.told(t, "7 connected").deliver()
		synctest.Wait()
		p.stop()
		e.wantNoArrival("the input has stopped")
	})
	inEngine(t, func(t *testing.T, e *engine) {
		p := e.run(telling, toProbe)
		e.visit(t, 7)
		e.told(t, "7 connected")
		begin := time.Now()
		p.kill()
		require.Less(t, time.Since(begin), time.Minute, "nothing waits for an event that is not delivered")
	})
}

func TestWithoutSessionInMessageTypesThereAreNoEvents(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(listenInput, toProbe)
		end(e.visit(t, 7))
		e.wantNoArrival("not asked for")
	})
}
