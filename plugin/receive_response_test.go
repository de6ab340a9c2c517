package plugin

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/redpanda-data/benthos/v4/public/service"
	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/cryotest"
)

const (
	answering = "sync_response: {}"
	inCapital = "mapping: 'root = content().uppercase()'"

	numbersOfBatch = "mapping: 'root = \"%s of %v\".format(content(), batch_size())'"
)

// answeredBy runs a test with each of the inputs in a pipeline that answers with
// what these processors make of a message, and with its peer's session.
func answeredBy(t *testing.T, fields string, processors []string, test func(t *testing.T, e *engine, p *pipeline, peer *cryo.Session)) {
	t.Helper()
	t.Run("cryo", func(t *testing.T) {
		inEngine(t, func(t *testing.T, e *engine) {
			server := e.serve()
			p := e.run(with(dialInput, fields), answering, processors...)
			test(t, e, p, server.session())
		})
	})
	t.Run("cryo_server", func(t *testing.T) {
		inEngine(t, func(t *testing.T, e *engine) {
			p := e.run(with(listenInput, fields), answering, processors...)
			test(t, e, p, e.dial())
		})
	})
}

func TestMessageIsAcknowledgedWhenItsResponseIs(t *testing.T) {
	answeredBy(t, "", []string{inCapital}, func(t *testing.T, e *engine, _ *pipeline, peer *cryo.Session) {
		for _, text := range []string{"hello", "world"} {
			sent := send(peer, text)
			answer := receiveTexts(t, peer, strings.ToUpper(text))[0]
			require.Equal(t, cryo.KindText, answer.Kind)
			sent.wantPending(t, "the answer is not acknowledged")
			require.NoError(t, answer.Ack())
			sent.wantAcked(t, "and now it is")
		}
		require.EqualValues(t, 2, e.metrics.value("cryo_messages_sent{message_type=utf8}"))
	})
}

func TestResponseHasTheTypeOfItsMessage(t *testing.T) {
	answeredBy(t, "", []string{`mapping: 'root = if content() == "ff00" { content().decode("hex") }'`}, func(t *testing.T, e *engine, _ *pipeline, peer *cryo.Session) {
		for _, c := range []struct {
			sent    string
			as      cryo.Kind
			want    string
			wanted  cryo.Kind
			because string
		}{
			{"text", cryo.KindText, "text", cryo.KindText, "text to text"},
			{"bytes", cryo.KindBinary, "bytes", cryo.KindBinary, "bytes to bytes, even if they are text"},
			{"ff00", cryo.KindText, "\xff\x00", cryo.KindBinary, "what is no text can't go as text"},
		} {
			sent := sendAny(func() error {
				return peer.SendBatch(t.Context(), []cryo.OutMessage{{Kind: c.as, Payload: []byte(c.sent)}})
			})
			answer := receiveTexts(t, peer, c.want)[0]
			require.Equal(t, c.wanted, answer.Kind, c.because)
			require.NoError(t, answer.Ack())
			sent.wantAcked(t, c.because)
		}
	})
}

func TestResponseToAPartOfAStreamIsAStream(t *testing.T) {
	answeredBy(t, "streams: { scanner: { lines: {} } }", []string{inCapital}, func(t *testing.T, e *engine, _ *pipeline, peer *cryo.Session) {
		sent := sendStream(peer, "log", "a\nb\nc\n")
		var got []string // in the order of their delivery, which is any
		for range 3 {
			st, content := readStream(t, peer)
			got = append(got, content+" in "+st.Name())
			sent.wantPending(t, "not all answers are acknowledged")
			require.NoError(t, st.Ack())
		}
		require.ElementsMatch(t, []string{"A in log", "B in log", "C in log"}, got)
		sent.wantAcked(t, "all are")
	})
}

func TestStreamIsCancelledWhenItsResponseIsRejected(t *testing.T) {
	answeredBy(t, "", nil, func(t *testing.T, e *engine, _ *pipeline, peer *cryo.Session) {
		sent := sendStream(peer, "file", "content")
		require.NoError(t, acceptStream(t, peer).Close())
		sent.wantCancelled(t, "it was not delivered")
	})
}

// batched makes one batch of what some clients send, in a pipeline that answers.
func (e *engine) batched(fields string, texts []string, processors ...string) (clients []*cryo.Session, sent []*sending) {
	e.t.Helper()
	// The first message is held up, the second one waits for it, and so all others
	// are there when the input reads on.
	const holdUp = "processors: [ { sleep: { duration: 1s } }, { mapping: 'root = if content() == \"first\" { deleted() }' } ]"
	e.run(with(listenInput, fields)+"\n"+holdUp, answering, processors...)
	busy := e.dial()
	for range texts {
		clients = append(clients, e.dial())
	}
	for range 2 {
		send(busy, "first")
		synctest.Wait()
	}
	for i, text := range texts {
		sent = append(sent, send(clients[i], text))
		synctest.Wait()
	}
	return clients, sent
}

func TestEachClientOfABatchReceivesItsOwnResponse(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		clients, sent := e.batched("", []string{"a", "b", "c"}, numbersOfBatch)
		for i, c := range clients {
			m := receiveTexts(t, c, string(rune('a'+i))+" of 3")[0]
			sent[i].wantPending(t, "not acknowledged")
			require.NoError(t, m.Ack())
			sent[i].wantAcked(t, "acknowledged, whatever the others do")
		}
	})
}

func TestSlowAcknowledgementOfAResponseDoesNotDelayOtherClients(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		clients, sent := e.batched("", []string{"a", "b"}, numbersOfBatch)
		receiveTexts(t, clients[0], "a of 2")
		begin := time.Now()
		require.NoError(t, receiveTexts(t, clients[1], "b of 2")[0].Ack())
		sent[1].wantAcked(t, "at once")
		require.Zero(t, time.Since(begin))
		sent[0].wantRejected(t, rejection)
		require.Equal(t, 30*time.Second, time.Since(begin))
	})
}

func TestMessageCanHaveSeveralResponsesOrNone(t *testing.T) {
	answeredBy(t, "", []string{"unarchive: { format: lines }", "mapping: 'root = if content() == \"\" { deleted() }'"}, func(t *testing.T, e *engine, _ *pipeline, peer *cryo.Session) {
		sent := send(peer, "one\ntwo\nthree")
		for _, m := range receiveTexts(t, peer, "one", "two", "three") {
			sent.wantPending(t, "not all are acknowledged")
			require.NoError(t, m.Ack())
		}
		sent.wantAcked(t, "all are")
		send(peer, "").wantAcked(t, "without an answer")
		wantNothing(t, peer)
	})
}

func TestRejectedResponseRejectsItsMessageWithoutRedelivery(t *testing.T) {
	for _, replay := range []bool{true, false} {
		answeredBy(t, fmt.Sprintf("auto_replay_nacks: %v", replay), nil, func(t *testing.T, e *engine, _ *pipeline, peer *cryo.Session) {
			sent := send(peer, "hello")
			require.NoError(t, receive(t, peer).Reject("no"))
			sent.wantRejected(t, rejection)
			wantNothing(t, peer)
			e.log.want(t, "WARN Rejected a message: its response was not acknowledged", `error=rejected by the peer: "no"`)
		})
	}
}

func TestMessageIsRejectedWhenItsResponseTimesOut(t *testing.T) {
	answeredBy(t, "ack_timeout: 3s", nil, func(t *testing.T, e *engine, _ *pipeline, peer *cryo.Session) {
		begin := time.Now()
		sent := send(peer, "hello")
		m := receive(t, peer)
		sent.wantRejected(t, rejection)
		require.Equal(t, 3*time.Second, time.Since(begin))
		require.NoError(t, m.Ack(), "too late, and nothing more comes of it")
		wantNothing(t, peer)
		require.NoError(t, peer.Err())
	})
}

func TestEndedSessionReleasesMessagesAwaitingResponses(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(with(listenInput, "max_in_flight: 1"), answering, inCapital)
		leaves := e.dial()
		sent := send(leaves, "hello")
		receive(t, leaves)
		end(leaves)
		require.Error(t, sent.result(t))
		stays := e.dial()
		begin := time.Now()
		sent = send(stays, "next")
		require.NoError(t, receiveTexts(t, stays, "NEXT")[0].Ack())
		sent.wantAcked(t, "its place is free")
		require.Zero(t, time.Since(begin))
	})
}

func TestResponseIsSentOnlyWhenTheMessageIsDelivered(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(listenInput, toProbe, "sync_response: {}")
		client := e.dial()
		sent := send(client, "hello")
		e.arrival().fail(errors.New("not now"))
		again := e.arrival()
		wantNothing(t, client)
		again.deliver()
		m := receiveTexts(t, client, "hello")[0]
		wantNothing(t, client)
		sent.wantPending(t, "the answer is not acknowledged")
		require.NoError(t, m.Ack())
		sent.wantAcked(t, "delivered and answered")
	})
}

func TestOnlyDeliveredMessagesGetResponses(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		s, sent := e.runWithBatch("", []string{"good", "bad"}, "sync_response: {}")
		e.arrival().failSome(errors.New("not now"), "bad")
		wantNothing(t, s)
		again := e.arrivalsOf("good", "bad")
		again["good"].deliver()
		again["bad"].fail(errors.New("not now"))
		require.NoError(t, receiveTexts(t, s, "good")[0].Ack())
		sent[0].wantAcked(t, "delivered and answered")
		sent[1].wantPending(t, "not delivered")
		e.arrival().deliver()
		require.NoError(t, receiveTexts(t, s, "bad")[0].Ack())
		sent[1].wantAcked(t, "delivered and answered")
	})
}

func TestMessagesWithAmbiguousResponsesAreRedeliveredAlone(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		clients, sent := e.batched("", []string{"a", "b", "c", "d"}, inCapital, "mapping: 'meta = deleted()'")
		for i, c := range clients {
			require.NoError(t, receiveTexts(t, c, string(rune('A'+i)))[0].Ack())
			sent[i].wantAcked(t, "answered")
			wantNothing(t, c)
		}
		e.log.want(t, "WARN Redelivering the messages of a batch one by one", "messages=4", "error=ambiguous synchronous response: keep the metadata cryo_session_id, cryo_ack_id and cryo_tx_id, and use no batching in an output that responds")
	})
}

func TestEventsGetNoResponses(t *testing.T) {
	for name, processors := range map[string][]string{"as it is": nil, "without metadata": {"mapping: 'meta = deleted()'"}} {
		t.Run(name, func(t *testing.T) {
			inEngine(t, func(t *testing.T, e *engine) {
				e.run(with(listenInput, "message_types: [ utf8, session ]"), answering, processors...)
				client := e.dial()
				wantNothing(t, client)
				sent := send(client, "hello")
				require.NoError(t, receiveTexts(t, client, "hello")[0].Ack())
				sent.wantAcked(t, "answered")
			})
		})
	}
}

func TestResponseNeverGoesToAnotherClient(t *testing.T) {
	// The engine gives all responses of a batch to the first of its messages.
	const merging = "broker: { outputs: [ { sync_response: {} } ], batching: { count: 3, period: 1s } }"
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(listenInput, merging)
		var clients []*cryo.Session
		for i := range 3 {
			clients = append(clients, e.dial())
			send(clients[i], fmt.Sprint(i))
			synctest.Wait()
		}
		time.Sleep(time.Second)
		for i, c := range clients {
			messages, texts := held(t, c)
			for _, text := range texts {
				require.Equal(t, fmt.Sprint(i), text)
			}
			ackAll(t, messages)
		}
		e.log.want(t, "use no batching in an output that responds")
	})
}

func TestReconnectedClientGetsNoResponseFromItsPreviousConnection(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(listenInput, toProbe, "sync_response: {}")
		ghost := e.dialAs(5)
		first := send(ghost, "first")
		a := e.arrival()
		client := e.dialAs(5)
		require.Error(t, first.result(t))
		a.deliver()
		wantNothing(t, client)
	})
}

func TestMessagesAcknowledgedOnReceiptGetResponses(t *testing.T) {
	answeredBy(t, "acknowledge: received", []string{inCapital}, func(t *testing.T, e *engine, _ *pipeline, peer *cryo.Session) {
		send(peer, "hello").wantAcked(t, "received")
		require.NoError(t, receiveTexts(t, peer, "HELLO")[0].Ack())
		send(peer, "again").wantAcked(t, "received")
		require.NoError(t, receiveTexts(t, peer, "AGAIN")[0].Reject("no"))
		wantNothing(t, peer)
	})
}

func TestStopWaitsForTheAcknowledgementOfAResponse(t *testing.T) {
	answeredBy(t, "", nil, func(t *testing.T, e *engine, p *pipeline, peer *cryo.Session) {
		sent := send(peer, "hello")
		m := receive(t, peer)
		stopped := sendAny(func() error { p.stop(); return nil })
		stopped.wantPending(t, "the answer is not acknowledged")
		require.NoError(t, m.Ack())
		sent.wantAcked(t, "answered")
		stopped.wantAcked(t, "stopped")
	})
}

func TestHardStopDuringAResponseLeavesTheMessageUnacknowledged(t *testing.T) {
	answeredBy(t, "", nil, func(t *testing.T, e *engine, p *pipeline, peer *cryo.Session) {
		sent := send(peer, "hello")
		receive(t, peer)
		p.kill()
		err := sent.result(t)
		var rejected *cryo.RejectedError
		require.Error(t, err)
		require.NotErrorAs(t, err, &rejected, "it may be sent again, elsewhere")
	})
}

// The first verdict has yet to settle the message when the second comes.
func TestOnlyTheFirstVerdictOnADeliveryCounts(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		in := e.bareServerInput("")
		require.NoError(t, in.Connect(t.Context()))
		client := e.dial()
		m := send(client, "hello")
		batch, ack, err := in.ReadBatch(t.Context())
		require.NoError(t, err)
		require.NoError(t, batch[0].AddSyncResponse())
		first := sendAny(func() error { return ack(t.Context(), nil) })
		response := receive(t, client)
		require.NoError(t, ack(t.Context(), errOutput))
		require.NoError(t, response.Ack())
		require.NoError(t, first.result(t))
		m.wantAcked(t, "delivered")

		short, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		_, _, err = in.ReadBatch(short)
		require.ErrorIs(t, err, context.DeadlineExceeded, "it is not delivered again")
		require.NoError(t, in.Close(t.Context()))
	})
}

// The messages of both connections have the same session id and number.
func TestResponseToTwoConnectionsOfAClientIsAmbiguous(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(fromOnce, listenOutput)
		for _, text := range []string{"first", "second"} {
			e.rawClient().WriteFrames(cryotest.Text(7, text))
			synctest.Wait()
		}
		in := e.bareServerInput("")
		require.NoError(t, in.Connect(t.Context()))
		synctest.Wait()
		read := func() (texts []string, batch service.MessageBatch, ack service.AckFunc) {
			batch, ack, err := in.ReadBatch(t.Context())
			require.NoError(t, err)
			return (&arrival{batch: batch}).texts(), batch, ack
		}
		texts, batch, ack := read()
		require.ElementsMatch(t, []string{"first", "second"}, texts)
		require.NoError(t, batch[1].AddSyncResponse())
		require.NoError(t, ack(t.Context(), nil))
		for _, text := range texts {
			alone, _, ack := read()
			require.Equal(t, []string{text}, alone)
			require.NoError(t, ack(t.Context(), nil))
		}
		require.NoError(t, in.Close(t.Context()))
	})
}
