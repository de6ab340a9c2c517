package plugin

import (
	"errors"
	"fmt"
	"net/http"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
)

var listenEvents = with(listenInput, "message_types: [ utf8, binary, stream, session ], max_batch_count: 1")

// wantNext waits for the next message, in its own batch: an event of a session ("7 connected"),
// or a message of one ("7: text").
func (e *engine) wantNext(t *testing.T, want string) *arrival {
	t.Helper()
	a := e.arrival()
	require.Len(t, a.batch, 1)
	got := metadataOf(t, a.batch[0])
	text := fmt.Sprintf("%v: %s", got["cryo_session_id"], a.texts()[0])
	if got["cryo_message_type"] == "session" {
		require.Empty(t, a.texts()[0])
		text = fmt.Sprintf("%v %v", got["cryo_session_id"], got["cryo_session_event"])
	}
	require.Equal(t, want, text)
	return a
}

func TestEventsPrecedeAndFollowTheMessagesOfASession(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(with(listenInput, "message_types: [ utf8, session ], session_metadata: { query_parameters: [ room ] }"), toProbe)
		client, err := e.tryDial(cryo.DialOptions{Token: token, SessionID: 7, Query: map[string][]string{"room": {"5"}}})
		require.NoError(t, err)
		m := send(client, "hello")
		connected := e.wantNext(t, "7 connected")
		require.Equal(t, map[string]any{
			"cryo_message_type": "session", "cryo_session_event": "connected",
			"cryo_session_id": "7", "cryo_remote_address": "192.0.2.1:50000", "cryo_query_room": "5",
		}, metadataOf(t, connected.batch[0]))
		_, numbered := connected.batch[0].MetaGet("cryo_ack_id")
		require.False(t, numbered)
		e.wantNoArrival("connected is not delivered yet")
		connected.deliver()

		message := e.wantNext(t, "7: hello")
		end(client)
		require.Error(t, m.result(t))
		e.wantNoArrival("its message is in the pipeline")
		message.deliver()

		disconnected := e.wantNext(t, "7 disconnected")
		require.Equal(t, map[string]any{
			"cryo_message_type": "session", "cryo_session_event": "disconnected", "cryo_session_cause": "session ended: connection lost: unexpected EOF",
			"cryo_session_id": "7", "cryo_remote_address": "192.0.2.1:50000", "cryo_query_room": "5",
		}, metadataOf(t, disconnected.batch[0]))
		disconnected.deliver()
		e.wantNoArrival("no other event")
	})
}

func TestDisconnectedEventHasTheCause(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(listenEvents, toProbe)
		client := e.dialAs(7)
		e.wantNext(t, "7 connected").deliver()
		require.NoError(t, client.Close(t.Context(), "see you"))
		a := e.wantNext(t, "7 disconnected")
		cause, _ := a.batch[0].MetaGet("cryo_session_cause")
		require.Equal(t, `session ended: closed by the peer: "see you"`, cause)
		a.deliver()
	})
}

func TestFailedEventIsRedeliveredFirst(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(listenEvents, toProbe)
		client := e.dialAs(7)
		_ = send(client, "hello")
		e.wantNext(t, "7 connected").fail(errors.New("no"))
		e.wantNext(t, "7 connected").fail(errors.New("no"))
		synctest.Wait()
		end(client)
		e.wantNext(t, "7 connected").deliver()
		e.wantNext(t, "7: hello").deliver()
		e.wantNext(t, "7 disconnected").fail(errors.New("no"))
		e.wantNext(t, "7 disconnected").deliver()
		e.wantNoArrival("no other event")
	})
}

func TestDisconnectedFollowsTheSessionsStreams(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(with(listenEvents, "streams: { scanner: { lines: {} } }"), toProbe)
		client := e.dialAs(7)
		e.wantNext(t, "7 connected").deliver()
		sendStream(client, "lines", "one\ntwo\n")
		lines := e.arrivalsOf("one", "two")
		synctest.Wait()
		end(client)
		lines["one"].deliver()
		e.wantNoArrival("two is in the pipeline")
		lines["two"].deliver()
		e.wantNext(t, "7 disconnected").deliver()
	})
}

func TestDisconnectedDoesNotWaitForAMessageThatAlwaysFails(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(listenEvents, toProbe)
		client := e.dialAs(7)
		e.wantNext(t, "7 connected").deliver()
		_ = send(client, "poison")
		e.wantNext(t, "7: poison").fail(errors.New("no"))
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

func TestDisconnectedWaitsForAMessageWhileAnotherKeepsFailing(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(listenEvents, toProbe)
		client := e.dialAs(7)
		e.wantNext(t, "7 connected").deliver()
		sendAll(client, "poison", "slow")
		arrivals := e.arrivalsOf("poison", "slow")
		end(client)
		arrivals["poison"].fail(errOutput)
		for range 5 {
			e.wantNext(t, "7: poison").fail(errOutput)
		}
		last := e.wantNext(t, "7: poison")
		e.wantNoArrival("a message has had no verdict yet")
		arrivals["slow"].deliver()
		e.wantNext(t, "7 disconnected").deliver()
		last.deliver()
	})
}

func TestTakeoverEmitsDisconnectedThenConnected(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(listenEvents, toProbe)
		ghost := e.dialAs(7)
		e.wantNext(t, "7 connected").deliver()
		_ = send(ghost, "first")
		first := e.wantNext(t, "7: first")

		client := e.dialAs(7)
		second := send(client, "second")
		e.wantNoArrival("the ghost's message is in the pipeline")
		first.deliver()
		left := e.wantNext(t, "7 disconnected")
		cause, _ := left.batch[0].MetaGet("cryo_session_cause")
		require.Equal(t, "session ended: "+cryo.ErrTakenOver.Error(), cause)
		e.wantNoArrival("the ghost's end is not delivered")
		left.fail(errors.New("no"))
		e.wantNext(t, "7 disconnected").deliver()
		e.wantNext(t, "7 connected").deliver()
		e.wantNext(t, "7: second").deliver()
		second.wantAcked(t, "delivered")
	})
}

func TestTakeoverEmitsEventsInOrderWithTwoInputs(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(listenEvents, toProbe)
		e.run(listenEvents, toProbe)
		e.dialAs(7)
		e.wantNext(t, "7 connected").deliver()
		for range 3 {
			e.dialAs(7)
			e.wantNext(t, "7 disconnected").deliver()
			e.wantNext(t, "7 connected").deliver()
			e.wantNoArrival("no other event")
		}
	})
}

func TestStalledPipelineLosesNoEventsAndDeniesNewSessions(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(with(listenInput, "message_types: [ session ], max_batch_count: 1, max_sessions: 3"), toSerial)
		for id := range uint64(6) { // as many as may be connected, and have left
			visitor := e.dialAs(1 + id)
			synctest.Wait()
			end(visitor)
			synctest.Wait()
		}
		denied := e.wantDenied(cryo.DialOptions{Token: token}, http.StatusServiceUnavailable)
		require.Contains(t, denied.Message, "Overloaded")
		_, err := e.tryDial(cryo.DialOptions{Token: "wrong"})
		require.ErrorIs(t, err, cryo.ErrUnauthorized, "the token is judged first")

		events := map[string][]string{}
		for range 12 {
			a := e.arrival()
			got := metadataOf(t, a.batch[0])
			id := got["cryo_session_id"].(string)
			events[id] = append(events[id], got["cryo_session_event"].(string))
			a.deliver()
		}
		e.wantNoArrival("no other event")
		require.Len(t, events, 6)
		for id, events := range events {
			require.Equal(t, []string{"connected", "disconnected"}, events, id)
		}
		e.dialAs(10)
		e.wantNext(t, "10 connected").deliver()
	})
}

func TestUnacknowledgedEventsCountTowardMaxBufferBytes(t *testing.T) {
	for settings, settle := range map[string]func(a *arrival){
		"auto_replay_nacks: true":  func(a *arrival) { a.deliver() },
		"auto_replay_nacks: false": func(a *arrival) { a.fail(errors.New("no")) },
	} {
		inEngine(t, func(t *testing.T, e *engine) {
			e.run(with(listenEvents, "max_buffer_bytes: 4000, "+settings), toProbe)
			client := e.dialAs(1)
			e.wantNext(t, "1 connected").deliver()
			synctest.Wait()
			for id := range uint64(100) {
				visitor := e.dialAs(1000 + id)
				settle(e.arrival())
				end(visitor)
				settle(e.arrival())
			}
			m := send(client, "below the limit")
			e.wantNext(t, "1: below the limit").deliver()
			m.wantAcked(t, "delivered")

			var waiting []*arrival
			for id := range uint64(30) { // each at least 256 bytes
				e.dialAs(2000 + id)
				waiting = append(waiting, e.arrival())
			}
			for range 2 { // one may come late
				_ = send(client, "above the limit")
			}
			synctest.Wait()
			require.LessOrEqual(t, len(e.probe.arrivals), 1, "reads are paused")
			for _, a := range waiting {
				a.deliver()
			}
			for range 2 {
				e.wantNext(t, "1: above the limit").deliver()
			}
		})
	}
}

func TestNextInputEmitsConnectedForHandedOverSessions(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		first := e.run(listenEvents, toProbe)
		client, leaves := e.dialAs(7), e.dialAs(8)
		for range 2 {
			e.arrival().deliver()
		}
		e.run(listenEvents, toProbe)
		synctest.Wait()
		end(leaves)
		e.wantNext(t, "8 disconnected") // which gets no verdict
		first.kill()
		events := map[string]bool{}
		for range 3 {
			a := e.arrival()
			got := metadataOf(t, a.batch[0])
			events[fmt.Sprint(got["cryo_session_id"], " ", got["cryo_session_event"])] = true
			a.deliver()
		}
		require.Equal(t, map[string]bool{"7 connected": true, "8 connected": true, "8 disconnected": true}, events)
		end(client)
		e.wantNext(t, "7 disconnected").deliver()
	})
}

func TestLaterInputEmitsConnectedForEachSession(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(fromOnce, listenOutput)
		first := e.dialAs(7)
		e.dialAs(8)
		time.Sleep(2 * noInputTimeout)
		e.run(listenEvents, toProbe)
		events := make(map[string]bool)
		for range 2 {
			a := e.arrival()
			got := metadataOf(t, a.batch[0])
			events[fmt.Sprint(got["cryo_session_id"], " ", got["cryo_session_event"])] = true
			a.deliver()
		}
		require.Equal(t, map[string]bool{"7 connected": true, "8 connected": true}, events)
		e.wantNoArrival("each session is connected once")
		end(first)
		e.wantNext(t, "7 disconnected").deliver()
	})
}

func TestStopEmitsNoDisconnectedEvent(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		p := e.run(listenEvents, toProbe)
		e.dialAs(7)
		e.wantNext(t, "7 connected").deliver()
		synctest.Wait()
		p.stop()
		e.wantNoArrival("the input has stopped")
	})
	inEngine(t, func(t *testing.T, e *engine) {
		p := e.run(listenEvents, toProbe)
		e.dialAs(7)
		e.wantNext(t, "7 connected")
		begin := time.Now()
		p.kill()
		require.Zero(t, time.Since(begin), "nothing waits for an event that is not delivered")
	})
}

func TestNoEventsAreEmittedUnlessConfigured(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(listenInput, toProbe)
		end(e.dialAs(7))
		e.wantNoArrival("not asked for")
	})
}
