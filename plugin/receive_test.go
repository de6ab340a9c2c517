package plugin

import (
	"bytes"
	"fmt"
	"net"
	"slices"
	"strconv"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/cryotest"
)

func TestNothingIsAcknowledgedBeforeDelivery(t *testing.T) {
	atBothInputs(t, "", func(t *testing.T, e *engine, _ *pipeline, peer *cryo.Session) {
		first := send(peer, "first")
		a := e.arrival()
		second := send(peer, "second")
		b := e.arrival()
		require.Equal(t, []string{"first"}, a.texts())
		require.Equal(t, []string{"second"}, b.texts())
		first.wantPending(t, "in the pipeline")
		second.wantPending(t, "in the pipeline")

		b.deliver()
		second.wantAcked(t, "delivered")
		first.wantPending(t, "still in the pipeline")
		a.deliver()
		first.wantAcked(t, "delivered")
	})
}

func TestFailedMessageIsRedeliveredUntilDelivered(t *testing.T) {
	atBothInputs(t, "", func(t *testing.T, e *engine, _ *pipeline, peer *cryo.Session) {
		m := send(peer, "poison")
		for _, wait := range []float64{10, 20, 40, 80, 160, 320, 640, 1000, 1000, 1000} {
			e.arrival().fail(errOutput)
			failed := time.Now()
			m.wantPending(t, "waiting to be delivered again")
			a := e.arrival()
			require.Equal(t, []string{"poison"}, a.texts())
			require.InDelta(t, wait, time.Since(failed).Seconds()*1000, wait/2, "spread by a half")
			e.probe.arrivals <- a // looked at only

			other := send(peer, "another")
			b := <-e.probe.arrivals
			require.Equal(t, a, b)
			c := e.arrival()
			require.Equal(t, []string{"another"}, c.texts(), "the input goes on")
			c.deliver()
			other.wantAcked(t, "delivered")
			synctest.Wait() // until the input knows of it, which ends the waits
			e.probe.arrivals <- b
		}
		e.arrival().deliver()
		m.wantAcked(t, "delivered in the end")
	})
}

func TestRedeliveriesBackOffUntilADeliverySucceeds(t *testing.T) {
	atBothInputs(t, "", func(t *testing.T, e *engine, _ *pipeline, peer *cryo.Session) {
		var sent []*sending
		for i := range 100 {
			sent = append(sent, send(peer, fmt.Sprint(i)))
		}
		tries := func(d time.Duration) (n int) {
			for end := time.After(d); ; {
				select {
				case a := <-e.probe.arrivals:
					n += len(a.batch)
					a.fail(errOutput)
				case <-end:
					return n
				}
			}
		}
		tries(10 * time.Minute)
		n := tries(10 * time.Minute)
		require.Less(t, n, 100*40, "about every half minute each")
		require.Greater(t, n, 100*15)
		e.log.want(t, "A message has failed repeatedly", "error=the disk is full")

		for i := range sent {
			e.arrival().deliver()
			synctest.Wait()
			if i == 0 {
				require.Len(t, e.probe.arrivals, len(sent)-1, "the first had to be waited for, not the others")
			}
		}
		wantAllAcked(t, sent, "delivered")
	})
}

func TestMessageThatFailsAloneIsRedeliveredAtMostTwiceASecond(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(listenInput, toProbe)
		client := e.dial()
		send(client, "poison")
		poison := 0
		for range 600 {
			_ = send(client, "fine")
			for end := time.After(100 * time.Millisecond); ; {
				select {
				case a := <-e.probe.arrivals:
					if slices.Contains(a.texts(), "poison") {
						poison++
						a.fail(errOutput)
					} else {
						a.deliver()
					}
					continue
				case <-end:
				}
				break
			}
		}
		require.Greater(t, poison, 40, "in a minute")
		require.Less(t, poison, 150, "in a minute")
	})
}

func TestRejectionHasAFixedText(t *testing.T) {
	atBothInputs(t, "auto_replay_nacks: false", func(t *testing.T, e *engine, _ *pipeline, peer *cryo.Session) {
		bad := send(peer, "bad")
		e.arrival().fail(errOutput)
		good := send(peer, "good")
		e.arrival().deliver()
		bad.wantRejected(t, "the message could not be delivered")
		good.wantAcked(t, "delivered")
		e.wantNoArrival("it is not tried again")
		e.log.want(t, "Rejected messages that were not delivered", "messages=1", "error=the disk is full")
	})
}

func TestAcknowledgementsAndRejectionsCarryTheMessageNumber(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(with(listenInput, "auto_replay_nacks: false"), toProbe)
		peer := e.rawClient()
		peer.WriteFrames(cryotest.Text(1234, "bad"))
		e.arrival().fail(errOutput)
		peer.WantFrame("a refusal", cryotest.Error(1234, "the message could not be delivered"))
		peer.WriteFrames(cryotest.Binary(0, "good"))
		e.arrival().deliver()
		peer.WantFrame("an acknowledgement", cryotest.Acked(0))
	})
}

func TestEachMessageOfABatchThatFailsIsRedeliveredAlone(t *testing.T) {
	for name, err := range map[string]func(a *arrival){
		"with an error that names no message": func(a *arrival) { a.fail(errOutput) },
		"with an error that names one":        func(a *arrival) { a.failSome(errOutput, "m1") },
	} {
		for _, fields := range []string{"", "auto_replay_nacks: false"} {
			t.Run(name+" "+fields, func(t *testing.T) {
				inEngine(t, func(t *testing.T, e *engine) {
					_, sent := e.runWithBatchTo(toSerial, fields, numbered("m%d", 5))
					a := e.arrival()
					require.Equal(t, numbered("m%d", 5), a.texts())
					failed := time.Now()
					err(a)
					for i := range sent {
						sent[i].wantPending(t, "nothing is known of it")
					}
					for i := range sent {
						b := e.arrival()
						require.Equal(t, numbered("m%d", 5)[i:i+1], b.texts(), "in order")
						b.deliver()
						sent[i].wantAcked(t, "delivered")
					}
					require.Equal(t, failed, time.Now(), "at once")
					e.wantNoArrival("each comes once")
				})
			})
		}
	}
}

func TestPoisonMessageDoesNotDelayTheRestOfItsBatch(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		peer, sent := e.runWithBatch("", numbered("m%d", 5))
		e.arrival().failSome(errOutput, "m1", "m3")
		again := e.arrivalsOf(numbered("m%d", 5)...)
		for _, i := range []int{0, 2, 4} {
			again[fmt.Sprintf("m%d", i)].deliver()
			sent[i].wantAcked(t, "delivered beside a poison message")
		}
		for range 3 {
			synctest.Wait() // until the input has counted the last delivery, which expedites redeliveries
			again["m1"].fail(errOutput)
			again["m3"].fail(errOutput)
			next := send(peer, "next")
			d := e.arrival()
			require.Equal(t, []string{"next"}, d.texts(), "the input goes on meanwhile")
			d.deliver()
			next.wantAcked(t, "delivered")
			again = e.arrivalsOf("m1", "m3")
		}
		sent[1].wantPending(t, "not delivered yet")
		again["m1"].deliver()
		again["m3"].deliver()
		sent[1].wantAcked(t, "delivered in the end")
		sent[3].wantAcked(t, "delivered in the end")
	})
}

func TestPoisonMessageOfABatchIsRejectedAlone(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		_, sent := e.runWithBatch("auto_replay_nacks: false", numbered("m%d", 5))
		e.arrival().failSome(errOutput, "m1")
		again := e.arrivalsOf(numbered("m%d", 5)...)
		for text, a := range again {
			if text == "m1" {
				a.fail(errOutput)
			} else {
				a.deliver()
			}
		}
		sent[1].wantRejected(t, "the message could not be delivered")
		for _, i := range []int{0, 2, 3, 4} {
			sent[i].wantAcked(t, "delivered beside a poison message")
		}
		e.wantNoArrival("nothing is delivered again")
	})
}

func TestBatchOfOneIsProcessedOnce(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		_, sent := e.runWithBatch("auto_replay_nacks: false, max_batch_count: 1", numbered("m%d", 3))
		for text, a := range e.arrivalsOf(numbered("m%d", 3)...) {
			if text == "m1" {
				a.fail(errOutput)
			} else {
				a.deliver()
			}
		}
		sent[0].wantAcked(t, "delivered")
		sent[1].wantRejected(t, "the message could not be delivered")
		sent[2].wantAcked(t, "delivered")
		e.wantNoArrival("nothing runs twice")
	})
}

func TestMaxInFlightOneKeepsTheOrderOfRedeliveredMessages(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(with(listenInput, "max_in_flight: 1"), toSerial)
		client := e.dial()
		sent := make([]*sending, 9)
		for i := range sent {
			sent[i] = send(client, fmt.Sprint(i))
			synctest.Wait()
		}
		for i := range sent {
			for range i % 3 {
				a := e.arrival()
				require.Equal(t, []string{fmt.Sprint(i)}, a.texts())
				a.fail(errOutput)
			}
			a := e.arrival()
			require.Equal(t, []string{fmt.Sprint(i)}, a.texts())
			a.deliver()
			sent[i].wantAcked(t, "delivered")
		}
	})
}

func TestMergedMessagesFailTogether(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		_, sent := e.runWithBatch("", numbered("m%d", 3), "archive: { format: lines }")
		a := e.arrival()
		require.Equal(t, []string{"m0\nm1\nm2"}, a.texts())
		a.failSome(errOutput, "m0\nm1\nm2") // a BatchError that names the first message only
		for i := range sent {
			sent[i].wantPending(t, "the archive was not delivered")
		}
		again := e.arrivalsOf("m0", "m1", "m2")
		for i := range sent {
			again[fmt.Sprintf("m%d", i)].deliver()
			sent[i].wantAcked(t, "delivered by itself")
		}
	})
}

func TestMessagesMergedByAnOutputsBatchingFailTogether(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(listenInput, `probe:
  batching:
    count: 4
    processors:
      - group_by_value: { value: '${! content().slice(0, 1) }' }
      - archive: { format: lines }
`)
		peer := e.dial()
		var sent []*sending
		for _, text := range []string{"a1", "a2", "b1", "b2"} {
			sent = append(sent, send(peer, text))
			synctest.Wait()
		}
		a := e.arrival()
		require.Equal(t, []string{"a1\na2", "b1\nb2"}, a.texts())
		a.failSome(errOutput, "b1\nb2")
		sent[2].wantPending(t, "the archive was not delivered")
		sent[3].wantPending(t, "the archive was not delivered")
	})
}

func TestSplitMessageIsDeliveredWhenAllPartsAre(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		_, sent := e.runWithBatch("auto_replay_nacks: false", []string{"a\nb", "c\nd"}, "unarchive: { format: lines }")
		a := e.arrival()
		require.Equal(t, []string{"a", "b", "c", "d"}, a.texts())
		a.failSome(errOutput, "a")
		a, b := e.arrival(), e.arrival()
		if a.texts()[0] == "c" { // they are delivered side by side
			a, b = b, a
		}
		require.Equal(t, []string{"a", "b"}, a.texts())
		require.Equal(t, []string{"c", "d"}, b.texts())
		a.failSome(errOutput, "a")
		b.deliver()
		sent[0].wantRejected(t, "the message could not be delivered")
		sent[1].wantAcked(t, "both halves were delivered")
	})
}

func TestMessageDroppedByAMappingIsAcknowledged(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		_, sent := e.runWithBatch("", []string{"keep", "drop"}, `mapping: 'root = if content() == "drop" { deleted() }'`)
		a := e.arrival()
		require.Equal(t, []string{"keep"}, a.texts())
		a.deliver()
		sent[0].wantAcked(t, "delivered")
		sent[1].wantAcked(t, "dropped on purpose")
	})
}

func TestAcknowledgeReceivedDoesNotWaitForThePipeline(t *testing.T) {
	atBothInputs(t, "acknowledge: received", func(t *testing.T, e *engine, _ *pipeline, peer *cryo.Session) {
		m := send(peer, "early")
		m.wantAcked(t, "handed to the pipeline")
		a := e.arrival()
		a.fail(errOutput)
		b := e.arrival()
		require.Equal(t, []string{"early"}, b.texts(), "tried again all the same")
		b.deliver()
		send(peer, "next").wantAcked(t, "the session lives, and got no acknowledgement twice")
		e.arrival().deliver()
	})
}

func TestAcknowledgeReceivedLogsLostMessages(t *testing.T) {
	atBothInputs(t, "acknowledge: received, auto_replay_nacks: false", func(t *testing.T, e *engine, _ *pipeline, peer *cryo.Session) {
		m := send(peer, "early")
		m.wantAcked(t, "handed to the pipeline")
		e.arrival().fail(errOutput)
		e.wantNoArrival("not tried again")
		e.log.want(t, "Lost messages that were acknowledged on receipt", "messages=1", "error=the disk is full")
	})
}

func TestMessagesOfOtherTypesAreAcknowledgedAndDropped(t *testing.T) {
	atBothInputs(t, "message_types: [ binary ]", func(t *testing.T, e *engine, _ *pipeline, peer *cryo.Session) {
		send(peer, "text").wantAcked(t, "dropped on purpose")
		send(peer, "text").wantAcked(t, "dropped on purpose")
		require.Equal(t, int64(2), e.metrics.value("cryo_messages_filtered{message_type=utf8}"))
		e.wantNoArrival("text is not asked for")
		m := sendAny(func() error { return peer.SendBinary(t.Context(), []byte{0xff, 0}) })
		a := e.arrival()
		require.Equal(t, []string{"\xff\x00"}, a.texts())
		a.deliver()
		m.wantAcked(t, "delivered")
	})
}

func TestApplicationErrorIsReceivedIfConfigured(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(with(listenInput, "message_types: [ error ]"), toProbe)
		peer := e.rawClient()
		peer.WriteFrames(cryotest.Error(5, "sensor 3 is on fire\x00"))
		a := e.arrival()
		require.Equal(t, []string{"sensor 3 is on fire"}, a.texts())
		kind, _ := a.batch[0].MetaGet("cryo_message_type")
		require.Equal(t, "error", kind)
		a.deliver()
		peer.WantFrame("acknowledged as cryo-server does", cryotest.Acked(5))
	})
}

func TestApplicationErrorIsLoggedUnlessItIsReceived(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(listenInput, toProbe)
		peer := e.rawClient()
		peer.WriteFrames(cryotest.Error(5, "fire\n"+string(bytes.Repeat([]byte("!"), 5000))))
		peer.WantFrame("acknowledged as cryo-server does", cryotest.Acked(5))
		e.wantNoArrival("it is not asked for")
		e.log.want(t, "The peer's application reported an error", `text="fire\n!!!`)
		for _, line := range e.log.all() {
			require.Less(t, len(line), 2000)
		}
	})
}

func TestMetadataMatchesTheDocumentation(t *testing.T) {
	metadata := func(a *arrival) map[string]any {
		all := make(map[string]any)
		_ = a.batch[0].MetaWalkMut(func(key string, value any) error { all[key] = value; return nil })
		return all
	}
	atBothInputs(t, "", func(t *testing.T, e *engine, _ *pipeline, peer *cryo.Session) {
		text := send(peer, "text")
		a := e.arrival()
		want := map[string]any{
			"cryo_message_type": "utf8",
			"cryo_session_id":   strconv.FormatUint(peer.ID(), 10),
		}
		got := metadata(a)
		number, _ := got["cryo_ack_id"].(int64)
		want["cryo_ack_id"] = number
		if t.Name() == "TestMetadataMatchesTheDocumentation/cryo_server" {
			want["cryo_remote_address"] = "192.0.2.1:50000"
			require.Equal(t, int64(0x40000000), number&^(1<<30-1), "one of a client's")
		} else {
			require.Equal(t, int64(0xC0000000), number&^(1<<30-1), "one of a server's")
		}
		require.Equal(t, want, got)
		a.deliver()
		text.wantAcked(t, "delivered")

		bin := sendAny(func() error { return peer.SendBinary(t.Context(), nil) })
		a = e.arrival()
		want["cryo_message_type"] = "binary"
		want["cryo_ack_id"] = number + 1
		require.Equal(t, want, metadata(a))
		require.Equal(t, []string{""}, a.texts())
		a.deliver()
		bin.wantAcked(t, "delivered")
	})
}

func TestAcknowledgementNeverGoesToAnotherConnection(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		server := e.serve()
		e.run(dialInput, toProbe)
		old := server.session()
		first := send(old, "first") // has the same number as "second"
		a := e.arrival()
		e.net.cut()
		require.ErrorIs(t, first.result(t), net.ErrClosed)
		again := server.session()
		require.Equal(t, old.ID(), again.ID(), "the client keeps its id")
		second := send(again, "second")
		b := e.arrival()
		require.Equal(t, []string{"second"}, b.texts())

		a.deliver()
		second.wantPending(t, "only the first is delivered")
		b.deliver()
		second.wantAcked(t, "delivered")
	})
}

func TestMessagesReceivedBeforeADisconnectAreDelivered(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		server := e.serve()
		e.run(with(dialInput, "max_in_flight: 1"), toProbe)
		peer := server.session()
		for i := range 10 {
			_ = send(peer, fmt.Sprint(i))
			synctest.Wait()
		}
		server.shutdown() // and nobody takes its place
		time.Sleep(time.Minute)
		for i := range 10 {
			a := e.arrival()
			require.Equal(t, []string{fmt.Sprint(i)}, a.texts())
			a.deliver()
		}
	})
}

// The engine doesn't wait for the second output when the first has failed to deliver a
// part of a batch, and reports only that part as failed.
func TestFailFastBrokerLosesNothing(t *testing.T) {
	for _, pattern := range []string{"fan_out_fail_fast", "fan_out_sequential_fail_fast"} {
		t.Run(pattern, func(t *testing.T) {
			inEngine(t, func(t *testing.T, e *engine) {
				_, sent := e.runWithBatchTo("broker: { pattern: "+pattern+", outputs: [ { probe: {} }, { probe: {} } ] }", "", []string{"good", "bad"})
				e.arrival().failSome(errOutput, "bad")

				alone := make(map[string]int) // deliveries
				for alone["good"] < 2 || alone["bad"] < 2 {
					a := e.arrival()
					if len(a.batch) == 1 {
						text := a.texts()[0]
						sent[map[string]int{"good": 0, "bad": 1}[text]].wantPending(t, "not both outputs have it")
						alone[text]++
					}
					a.deliver()
				}
				wantAllAcked(t, sent, "both outputs have it")
			})
		})
	}
}
