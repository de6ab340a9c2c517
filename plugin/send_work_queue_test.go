package plugin

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
)

const (
	toAny      = "send_to: any"
	toAnyOfOne = toAny + ", max_in_flight_per_session: 1"
)

// held takes what has come to a client by now.
func held(t *testing.T, s *cryo.Session) (messages []*cryo.Message, texts []string) {
	t.Helper()
	synctest.Wait()
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	messages, err := s.ReceiveBatch(ctx, 1000)
	if err != nil {
		require.ErrorIs(t, err, context.Canceled)
	}
	for i := range messages {
		texts = append(texts, string(messages[i].Payload))
	}
	return messages, texts
}

// holderOf finds the one client that holds something.
func holderOf(t *testing.T, clients []*cryo.Session) (holder *cryo.Session, messages []*cryo.Message, texts []string) {
	t.Helper()
	for _, c := range clients {
		if m, words := held(t, c); len(m) > 0 {
			require.Nil(t, holder, "two clients hold something")
			holder, messages, texts = c, m, words
		}
	}
	require.NotNil(t, holder, "nobody holds anything")
	return holder, messages, texts
}

func TestMessagesAreSentToWorkersInTurn(t *testing.T) {
	toAll(t, toAny, 3, func(t *testing.T, e *engine, clients []*cryo.Session) {
		f := e.produce(numbered("m%d", 6)...)
		got := make(map[string]int)
		for _, c := range clients {
			messages, texts := held(t, c)
			require.Len(t, texts, 2)
			first := texts[0]
			require.Equal(t, []string{"m0 m3", "m1 m4", "m2 m5"}[first[1]-'0'], strings.Join(texts, " "))
			got[first]++
			f.wantPending(t, "not all are acknowledged")
			ackAll(t, messages)
		}
		require.Len(t, got, 3)
		f.wantDelivered(t, "all are")
		for _, c := range clients {
			wantNothing(t, c)
		}
	})
}

func TestMessagesOfOneWorkerKeepTheirOrder(t *testing.T) {
	toAll(t, toAny+", max_in_flight_per_session: 100", 1, func(t *testing.T, e *engine, clients []*cryo.Session) {
		texts := numbered("m%d", 100)
		f := e.produce(texts...)
		messages, got := held(t, clients[0])
		require.Equal(t, texts, got)
		ackAll(t, messages)
		f.wantDelivered(t, "all are acknowledged")
	})
}

func TestSlowWorkerReceivesAtMostMaxInFlightPerSession(t *testing.T) {
	toAll(t, toAny+", max_in_flight_per_session: 3", 2, func(t *testing.T, e *engine, clients []*cryo.Session) {
		var batches []*produced
		for i := range 10 {
			batches = append(batches, e.produce(numbered(fmt.Sprint(i)+":%d", 2)...))
		}
		slow, quick := clients[0], clients[1]
		heldBySlow, _ := held(t, slow)
		require.Len(t, heldBySlow, 3)
		for taken := 0; taken < 17; {
			messages, _ := held(t, quick)
			require.NotEmpty(t, messages)
			require.LessOrEqual(t, len(messages), 3)
			taken += len(messages)
			ackAll(t, messages)
		}
		wantNothing(t, slow)
		wantNothing(t, quick)
		ackAll(t, heldBySlow)
		for _, f := range batches {
			f.wantDelivered(t, "acknowledged")
		}
	})
}

func TestMessagesOfADisconnectedWorkerAreSentToAnother(t *testing.T) {
	toAll(t, toAnyOfOne, 2, func(t *testing.T, e *engine, clients []*cryo.Session) {
		f := e.produce("m0", "m1")
		first, goneWith := held(t, clients[0])
		second, _ := held(t, clients[1])
		end(clients[0])
		wantNothing(t, clients[1])
		f.wantPending(t, "the other is busy")
		ackAll(t, second)
		again, texts := held(t, clients[1])
		require.Equal(t, goneWith, texts)
		require.Len(t, first, 1)
		ackAll(t, again)
		f.wantDelivered(t, "acknowledged by the other")
	})
}

func TestMessagesAcknowledgedBeforeADisconnectAreNotResent(t *testing.T) {
	toAll(t, toAny, 1, func(t *testing.T, e *engine, clients []*cryo.Session) {
		f := e.produce("m0", "m1", "m2")
		messages, _ := held(t, clients[0])
		ackAll(t, messages[:1])
		synctest.Wait()
		end(clients[0])
		f.wantPending(t, "nobody is there")
		time.Sleep(29 * time.Second)
		another := e.dial()
		messages, texts := held(t, another)
		require.ElementsMatch(t, []string{"m1", "m2"}, texts)
		ackAll(t, messages)
		f.wantDelivered(t, "acknowledged by another")
	})
}

func TestRejectedMessageIsNotSentToAnotherWorker(t *testing.T) {
	toAll(t, toAny+", batching: { count: 2 }", 2, func(t *testing.T, e *engine, clients []*cryo.Session) {
		f := e.produceEach(batchOf("m0", "m1"))
		failed := make(map[int]string)
		for i, c := range clients {
			m := receive(t, c)
			if i == 1 {
				require.NoError(t, m.Ack())
				continue
			}
			require.NoError(t, m.Reject("no"))
			failed[int(m.Payload[1]-'0')] = `rejected by the peer: "no"`
		}
		f.wantFailed(t, failed)
		wantNothing(t, clients[1])
	})
}

func TestLateWorkerIsClosedAndItsMessageSentToAnother(t *testing.T) {
	toAll(t, toAny+", ack_timeout: 3s", 2, func(t *testing.T, e *engine, clients []*cryo.Session) {
		begin := time.Now()
		f := e.produce("m")
		late, _, _ := holderOf(t, clients)
		other := clients[0]
		if late == other {
			other = clients[1]
		}
		m := receiveTexts(t, other, "m")[0]
		require.Equal(t, 3*time.Second, time.Since(begin))
		require.NoError(t, m.Ack())
		f.wantDelivered(t, "acknowledged by the other")
		synctest.Wait()
		require.Error(t, late.Err())
		e.log.want(t, "WARN Closing session: acknowledgement timed out", "timed out after ack_timeout (3s)", fmt.Sprintf("session=%d", late.ID()))
	})
}

func TestMessageLostByTenWorkersFails(t *testing.T) {
	toAll(t, toAny, 0, func(t *testing.T, e *engine, _ []*cryo.Session) {
		f := e.produce("poison")
		for range maxLostSessions {
			f.wantPending(t, "there may be another")
			c := e.dial()
			receiveTexts(t, c, "poison")
			end(c)
		}
		require.ErrorContains(t, next(t, f.verdict), "not acknowledged by 10 sessions in a row; last error: session ended: ")
	})
}

func TestNoSessionAppliesToAWorkQueueWithoutWorkers(t *testing.T) {
	t.Run("waits for one", func(t *testing.T) {
		toAll(t, toAny, 0, func(t *testing.T, e *engine, _ []*cryo.Session) {
			f := e.produce("m0", "m1")
			time.Sleep(29 * time.Second)
			f.wantPending(t, "nobody is there")
			messages, texts := held(t, e.dial())
			require.Equal(t, []string{"m0", "m1"}, texts)
			ackAll(t, messages)
			f.wantDelivered(t, "somebody came")
		})
	})
	t.Run("fails at ack_timeout, as a whole", func(t *testing.T) {
		toAll(t, toAny, 0, func(t *testing.T, e *engine, _ []*cryo.Session) {
			begin := time.Now()
			e.produce("m0", "m1").wantFailed(t, "2 of 2 messages were not acknowledged, first error: no client is connected")
			require.Equal(t, 30*time.Second, time.Since(begin))
		})
	})
	t.Run("waits beyond ack_timeout while the only worker is busy", func(t *testing.T) {
		toAll(t, toAnyOfOne+", ack_timeout: 3s", 0, func(t *testing.T, e *engine, _ []*cryo.Session) {
			f := e.produce(numbered("m%d", 5)...)
			c := e.dial()
			for range 5 {
				m := receive(t, c)
				time.Sleep(2 * time.Second)
				require.NoError(t, m.Ack())
			}
			f.wantDelivered(t, "one after the other")
		})
	})
	t.Run("drops", func(t *testing.T) {
		toAll(t, toAny+", no_session: drop", 0, func(t *testing.T, e *engine, _ []*cryo.Session) {
			begin := time.Now()
			e.produce("m0", "m1").wantDelivered(t, "as if")
			require.Zero(t, time.Since(begin))
		})
	})
	t.Run("rejects unacknowledged messages when the last worker disconnects", func(t *testing.T) {
		toAll(t, toAny+", no_session: reject", 1, func(t *testing.T, e *engine, clients []*cryo.Session) {
			begin := time.Now()
			f := e.produce("m")
			receiveTexts(t, clients[0], "m")
			end(clients[0])
			require.ErrorContains(t, next(t, f.verdict), "no client is connected")
			e.produce("m").wantFailed(t, "no client is connected")
			require.Zero(t, time.Since(begin))
		})
	})
}

func TestWaitingBatchesAreSentToWorkersInOrderOfArrival(t *testing.T) {
	toAll(t, toAnyOfOne, 1, func(t *testing.T, e *engine, clients []*cryo.Session) {
		var waiting []*produced
		for i := range 20 {
			f := e.produce(fmt.Sprint(i, "a"), fmt.Sprint(i, "b"))
			f.wantPending(t, "one message is sent, and the next of each batch waits")
			waiting = append(waiting, f)
		}
		want := append([]string{"0a", "0b"}, numbered("%da", 20)[1:]...)
		want = append(want, numbered("%db", 20)[1:]...) // each began to wait when the one before it was sent
		for _, text := range want {
			messages, texts := held(t, clients[0])
			require.Equal(t, []string{text}, texts)
			ackAll(t, messages)
		}
		for _, f := range waiting {
			f.wantDelivered(t, "acknowledged")
		}
	})
}

func TestBatchesWithoutAWorkerWaitConcurrently(t *testing.T) {
	toAll(t, toAny, 0, func(t *testing.T, e *engine, _ []*cryo.Session) {
		begin := time.Now()
		first := e.produce("m0", "m1")
		time.Sleep(10 * time.Second)
		second, third := e.produce("m2"), e.produce("m3")
		require.Error(t, next(t, first.verdict))
		require.Equal(t, 30*time.Second, time.Since(begin))
		second.wantPending(t, "it came later")
		require.ErrorIs(t, next(t, second.verdict), errNoClient)
		require.ErrorIs(t, next(t, third.verdict), errNoClient)
		require.Equal(t, 40*time.Second, time.Since(begin))
	})
}

func TestWaitForAWorkerBeginsWhenTheLastOneDisconnects(t *testing.T) {
	toAll(t, toAnyOfOne+", ack_timeout: 30s", 1, func(t *testing.T, e *engine, clients []*cryo.Session) {
		busy, waiting := e.produce("m0"), e.produce("m1")
		receive(t, clients[0])
		time.Sleep(20 * time.Second)
		end(clients[0])
		begin := time.Now()
		require.ErrorIs(t, next(t, waiting.verdict), errNoClient)
		require.ErrorIs(t, next(t, busy.verdict), errNoClient)
		require.Equal(t, 30*time.Second, time.Since(begin))

		// Another one begins another wait, for those that have waited for its slot too.
		busy, waiting = e.produce("m2"), e.produce("m3")
		time.Sleep(20 * time.Second)
		another := e.dial()
		receive(t, another)
		time.Sleep(20 * time.Second)
		end(another)
		begin = time.Now()
		time.Sleep(29 * time.Second)
		waiting.wantPending(t, "its time began with the end of the other")
		require.ErrorIs(t, next(t, waiting.verdict), errNoClient)
		require.ErrorIs(t, next(t, busy.verdict), errNoClient)
		require.Equal(t, 30*time.Second, time.Since(begin))
	})
}

func TestStreamIsResentToAnotherWorkerWhenASessionIsLost(t *testing.T) {
	toAll(t, toAnyOfOne+", "+asStream, 1, func(t *testing.T, e *engine, clients []*cryo.Session) {
		text := strings.Repeat("abc", 100_000)
		f := e.produce(text)
		worker := clients[0]
		for range 2 {
			_, err := acceptStream(t, worker).Read(make([]byte, 10)) // a part
			require.NoError(t, err)
			e.net.cut() // a client that closes its session cancels the stream first
			synctest.Wait()
			worker = e.dial()
		}
		st, content := readStream(t, worker)
		require.Equal(t, text, content)
		f.wantPending(t, "not acknowledged")
		require.NoError(t, st.Ack())
		f.wantDelivered(t, "acknowledged")
	})
}

func TestPipelineStopsWhileItsWorkersAreBusy(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		p := e.run(fromOnce, with(listenOutput, toAnyOfOne))
		c := e.dial()
		e.produce("m0", "m1")
		receiveTexts(t, c, "m0")
		begin := time.Now()
		p.kill()
		require.Less(t, time.Since(begin), closeTime+time.Second)
	})
}

func TestWorkQueueRemovesDisconnectedWorkers(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		out := e.bareServerOutput(toAny)
		require.NoError(t, out.Connect(t.Context()))
		var stay []*cryo.Session
		for range 5 {
			stay = append(stay, e.dial())
		}
		work := func() {
			writing := sendAny(func() error { return out.WriteBatch(context.Background(), batchOf("m")) })
			_, messages, _ := holderOf(t, stay)
			ackAll(t, messages)
			writing.wantAcked(t, "acknowledged by one that stays")
		}
		work() // they are known from now on, and it is their turn first
		for range stay[1:] {
			passing := e.dial()
			work()
			end(passing)
			synctest.Wait()
		}
		require.Len(t, out.queue.workers, len(stay)+1, "and the last one that passed")
		require.Len(t, out.queue.ready, len(stay)+1)
		require.NoError(t, out.Close(t.Context()))
	})
}
