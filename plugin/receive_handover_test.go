package plugin

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
)

func TestReplacedInputHandsOverAllUndeliveredMessages(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(fromOnce, listenOutput) // it holds the listener
		in := e.run(listenInput, toSerial)
		client := e.dial()
		texts := numbered("%02d", 20)
		sent := sendAll(client, texts...)
		var delivered []string
		in.stopWhile(func(a *arrival) {
			delivered = append(delivered, a.texts()...)
			a.deliver()
		})
		first := len(delivered)
		require.Less(t, first, 20)
		for i := range first {
			sent[i].wantAcked(t, "delivered")
		}
		time.Sleep(nextInputTimeout - time.Second)
		for i := first; i < 20; i++ {
			sent[i].wantPending(t, "another input may follow")
		}
		sent = append(sent, send(client, "while there is no input"))

		e.run(listenInput, toSerial)
		delivered = append(delivered, e.deliverNext(21-first)...)
		require.Equal(t, append(texts, "while there is no input"), delivered, "once, and in order")
		wantAllAcked(t, sent[first:], "delivered")
	})
}

func TestInputLeavingASharedListenerHandsOverToTheOther(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		first := e.run(listenInput, toSerial)
		client := e.dial()
		sent := sendAll(client, numbered("%d", 9)...)
		e.run(listenInput, toSerial)
		first.kill()
		require.Equal(t, []string{"0"}, e.arrival().texts(), "of the pipeline that was killed")
		require.Equal(t, numbered("%d", 9), e.deliverNext(9), "what it may have delivered comes again")
		wantAllAcked(t, sent, "delivered")
	})
}

func TestMessagesAwaitingRedeliveryAreHandedOver(t *testing.T) {
	for _, fields := range []string{"", "auto_replay_nacks: false, max_batch_count: 2"} {
		inEngine(t, func(t *testing.T, e *engine) {
			e.run(fromOnce, listenOutput)
			client := e.dial()
			sent := sendAll(client, "a", "b")
			in := e.run(with(listenInput, fields), toProbe)
			in.stopWhile(func(a *arrival) {
				require.Equal(t, []string{"a", "b"}, a.texts())
				a.fail(errOutput)
			})
			sent[0].wantPending(t, "a stop is no verdict")
			sent[1].wantPending(t, "a stop is no verdict")

			e.run(listenInput, toProbe)
			require.ElementsMatch(t, []string{"a", "b"}, e.deliverNext(2))
			sent[0].wantAcked(t, "delivered")
			sent[1].wantAcked(t, "delivered")
		})
	}
}

func TestStoppingProcessRejectsNothing(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		out := e.run(fromOnce, listenOutput)
		in := e.run(listenInput, toSerial)
		client := e.dial()
		sent := sendAll(client, numbered("%d", 100)...)
		delivered := 0
		in.stopWhile(func(a *arrival) {
			delivered += len(a.batch)
			a.deliver()
		})
		out.stop()
		require.Equal(t, 1, e.log.count("Undelivered messages stay unacknowledged"))
		for i := range sent {
			if i < delivered {
				sent[i].wantAcked(t, "delivered")
			} else {
				require.ErrorIs(t, sent[i].result(t), net.ErrClosed)
			}
		}
	})
}

// The last component closes the listener while an input is still closing.
func TestMessagesLeftAfterTheListenerClosesAreLogged(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		in := e.bareServerInput("")
		defer func() { require.NoError(t, in.Close(context.Background())) }()
		require.NoError(t, in.Connect(t.Context()))
		send(e.dial(), "hello")
		_, _, err := in.ReadBatch(t.Context())
		require.NoError(t, err)
		in.listener.inputs.close()
		in.listener.inputs.remove(in.receiver, false)
		e.log.want(t, "Undelivered messages stay unacknowledged", "messages=1")
	})
}

func TestUndeliveredMessagesAreRejectedAfterAMinuteWithoutAnInput(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(fromOnce, listenOutput)
		in := e.run(listenInput, toProbe)
		client := e.dial()
		sent := sendAll(client, "in the pipeline", "there too")
		e.arrival()
		e.arrival()
		in.kill()
		killed := time.Now()
		queued := send(client, "not taken")
		sent[0].wantRejected(t, rejection)
		require.Equal(t, time.Minute, time.Since(killed))
		sent[1].wantRejected(t, rejection)
		queued.wantRejected(t, receivesNothing)
		synctest.Wait()
		e.log.want(t, "WARN Rejected messages of a closed input", "messages=2")
		send(client, "later").wantRejected(t, receivesNothing)

		e.wantSends(t, client, "acknowledged")
	})
}

func TestUnreadStreamsAreHandedOver(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(fromOnce, listenOutput)
		in := e.run(with(listenInput, "streams: { max_open: 1 }"), toProbe)
		client := e.dial()
		var sent []*sending
		for i := range 3 {
			sent = append(sent, sendStream(client, "", fmt.Sprint("stream ", i)))
			synctest.Wait()
		}
		in.stopWhile(func(a *arrival) {
			require.Equal(t, []string{"stream 0"}, a.texts())
			a.deliver()
		})
		sent[0].wantAcked(t, "delivered")
		sent[1].wantPending(t, "it has not begun")
		sent[2].wantPending(t, "it has not begun")

		e.run(listenInput, toProbe)
		require.ElementsMatch(t, []string{"stream 1", "stream 2"}, e.deliverNext(2))
		sent[1].wantAcked(t, "delivered")
		sent[2].wantAcked(t, "delivered")
	})
}

func TestPartsOfACompleteStreamAreHandedOver(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(fromOnce, listenOutput)
		const lines = "streams: { scanner: { lines: {} } }"
		in := e.run(with(listenInput, lines), toProbe)
		client := e.dial()
		sent := sendStream(client, "", "a\nb\nc\n")
		synctest.Wait()
		in.stopWhile(func(a *arrival) {
			if slices.Contains(a.texts(), "b") {
				a.fail(errOutput)
			} else {
				a.deliver()
			}
		})
		sent.wantPending(t, "a part of it is not delivered")

		e.run(with(listenInput, lines), toProbe)
		for {
			synctest.Wait()
			if len(e.probe.arrivals) == 0 {
				break
			}
			sent.wantPending(t, "a part of it is not delivered")
			(<-e.probe.arrivals).deliver()
		}
		sent.wantAcked(t, "all parts are delivered, by one input or the other")
		require.NoError(t, client.Err())
	})
}

func TestAcknowledgeReceivedAcknowledgesOnlyMessagesInThePipeline(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		in := e.run(with(listenInput, "acknowledge: received, max_batch_count: 1"), toSerial)
		client := e.dial()
		sent := sendAll(client, numbered("%d", 10)...)
		var delivered []string
		in.stopWhile(func(a *arrival) {
			delivered = append(delivered, a.texts()...)
			a.deliver()
		})
		for i := range sent {
			if err := sent[i].result(t); err == nil {
				require.Contains(t, delivered, fmt.Sprint(i), "acknowledged, so it has to be delivered by a stop in good order")
			}
		}
		require.NotEmpty(t, delivered)
		require.Zero(t, e.log.count("acknowledged on receipt"))
	})
}

func TestAcknowledgeReceivedLogsMessagesLostInAHardStop(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		in := e.run(with(listenInput, "acknowledge: received"), toProbe)
		client := e.dial()
		sent := sendAll(client, "a", "b", "c")
		wantAllAcked(t, sent, "the pipeline has it")
		e.deliverNext(1)
		in.kill()
		e.log.want(t, "ERROR Messages that were acknowledged on receipt may be lost", "messages=2")
	})
}

// The next input receives them in one batch with messages that were acknowledged on receipt.
func TestUnacknowledgedMessagesAreAcknowledgedAfterHandover(t *testing.T) {
	for _, next := range []string{"acknowledge: received", ""} {
		t.Run("to "+next, func(t *testing.T) {
			inEngine(t, func(t *testing.T, e *engine) {
				e.run(fromOnce, listenOutput)
				in := e.run(with(listenInput, "acknowledge: received, max_batch_count: 1"), toSerial)
				client := e.dial()
				sent := sendAll(client, numbered("%d", 10)...)
				in.kill()
				acked := 0
				for acked < len(sent) && sent[acked].isAcked(t) {
					acked++
				}
				require.NotZero(t, acked)
				require.Less(t, acked, 10)
				e.dropArrivals()
				e.run(with(listenInput, next), toProbe)
				e.deliverNext(10)
				synctest.Wait()
				time.Sleep(time.Minute)
				for i := acked; i < 10; i++ {
					sent[i].wantAcked(t, fmt.Sprint("delivered ", i))
				}
			})
		})
	}
}

func TestUnacknowledgedMessagesAreRejectedAfterHandover(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(fromOnce, listenOutput)
		in := e.run(with(listenInput, "acknowledge: received, max_batch_count: 1"), toSerial)
		client := e.dial()
		sent := sendAll(client, numbered("%d", 10)...)
		in.kill()
		acked := 0
		for acked < len(sent) && sent[acked].isAcked(t) {
			acked++
		}
		in2 := e.run(listenInput, toProbe) // acknowledge: delivered
		synctest.Wait()
		in2.kill()
		time.Sleep(2 * time.Minute)
		for i := acked; i < 10; i++ {
			sent[i].wantRejected(t, rejection)
		}
	})
}

func TestStreamPartsAcknowledgedOnReceiptAreHandedOver(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(fromOnce, listenOutput)
		const conf = "acknowledge: received, streams: { scanner: { lines: {} } }"
		in := e.run(with(listenInput, conf), toProbe)
		client := e.dial()
		sent := sendStream(client, "", "a\nb\nc\n")
		sent.wantAcked(t, "the pipeline has all parts")
		synctest.Wait()
		e.dropArrivals()
		in.kill()
		e.run(with(listenInput, conf), toProbe)
		synctest.Wait()
		require.ElementsMatch(t, []string{"a", "b", "c"}, e.deliverNext(3))
	})
}

func TestHardStopDuringAResponseLogsAcknowledgedMessagesAsLost(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		in := e.run(with(listenInput, "acknowledge: received"), answering)
		client := e.dial()
		sent := send(client, "hello")
		sent.wantAcked(t, "on receipt")
		receiveTexts(t, client, "hello") // and never acknowledges the answer
		in.kill()
		require.Zero(t, e.log.count("stay unacknowledged"))
		e.log.want(t, "acknowledged on receipt may be lost", "messages=1")
	})
}

func TestFailingMessagesLeaveHalfOfASlowOutputForOthers(t *testing.T) {
	for _, poison := range []int{20, 200} {
		t.Run(fmt.Sprint(poison), func(t *testing.T) {
			inEngine(t, func(t *testing.T, e *engine) {
				e.run(with(listenInput, "max_batch_count: 1"), toSerial)
				done := make(chan struct{})
				t.Cleanup(func() { close(done); time.Sleep(time.Second) })
				var delivered atomic.Int64
				go func() {
					for {
						select {
						case a := <-e.probe.arrivals:
							time.Sleep(10 * time.Millisecond)
							if strings.HasPrefix(a.texts()[0], "poison") {
								a.fail(errPoison)
							} else {
								delivered.Add(1)
								a.deliver()
							}
						case <-done:
							return
						}
					}
				}()
				bad, good := e.dialAs(1), e.dialAs(2)
				for i := range poison {
					send(bad, fmt.Sprint("poison ", i))
				}
				time.Sleep(time.Minute)
				before := delivered.Load()
				for i := range 500 {
					send(good, fmt.Sprint("good ", i))
				}
				time.Sleep(time.Minute)
				require.Equal(t, int64(500), delivered.Load()-before, "of 6,000 that the output could take")
			})
		})
	}
}

func TestStreamThatArrivesDuringAStopWaitsForTheNextInput(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(fromOnce, listenOutput)
		in := e.run(with(listenInput, "max_batch_count: 1"), toSerial)
		client := e.dial()
		sendAll(client, numbered("%d", 5)...)
		stopped := sendAny(func() error { in.stop(); return nil })
		synctest.Wait()
		st := sendStream(client, "", "stream")
		synctest.Wait()
		e.deliverArrived()
		require.NoError(t, stopped.result(t))
		st.wantPending(t, "nothing was read of it before the stop; another input may follow")
	})
}

func TestHardStopRejectsNothing(t *testing.T) {
	rejected := 0
	for i := range 40 {
		var processors []string
		if i%2 == 0 {
			processors = []string{"sleep: { duration: 1h }"}
		}
		inEngine(t, func(t *testing.T, e *engine) {
			e.run(fromOnce, listenOutput)
			in := e.run(with(listenInput, "auto_replay_nacks: false, max_batch_count: 1"), toProbe, processors...)
			client := e.dial()
			sent := sendAll(client, numbered("%d", 20)...)
			in.kill()
			synctest.Wait()
			for i := range sent {
				select {
				case err := <-sent[i].done:
					if _, ok := errors.AsType[*cryo.RejectedError](err); ok {
						rejected++
					} else {
						require.NoError(t, err)
					}
				default:
				}
			}
		})
	}
	require.Zero(t, rejected)
}

// The engine's own hard stop mostly ends before the verdict; so the test gives it.
func TestHardStopErrorIsNotAVerdict(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(fromOnce, listenOutput)
		in := e.bareServerInput("auto_replay_nacks: false")
		defer func() { require.NoError(t, in.Close(context.Background())) }()
		require.NoError(t, in.Connect(t.Context()))
		m := send(e.dial(), "hello")
		_, ack, err := in.ReadBatch(t.Context())
		require.NoError(t, err)
		hardStop, stop := context.WithCancel(t.Context())
		stop()
		require.NoError(t, ack(hardStop, hardStop.Err()))
		m.wantPending(t, "another input may follow")
		require.NoError(t, in.Close(t.Context()))
		e.run(listenInput, toProbe)
		e.arrival().deliver()
		m.wantAcked(t, "delivered")
	})
}

func TestOrderIsPreservedAcrossTwoHandovers(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(fromOnce, listenOutput)
		const conf = "max_batch_count: 1, max_in_flight: 2"
		in := e.run(with(listenInput, "max_batch_count: 4"), toSerial)
		client := e.dial()
		sendAll(client, numbered("%02d", 12)...)
		in.kill()
		e.dropArrivals()
		// The second takes some, and has numbered others before.
		in = e.run(with(listenInput, conf), toSerial)
		synctest.Wait()
		in.kill()
		e.dropArrivals()
		e.run(with(listenInput, conf), toSerial)
		require.Equal(t, numbered("%02d", 12), e.deliverNext(12))
	})
}

func TestOrderIsPreservedAcrossTwoHandoversToABusyInput(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(fromOnce, listenOutput)
		const conf = "max_batch_count: 1, max_in_flight: 2"
		in := e.run(with(listenInput, "max_batch_count: 4"), toSerial) // gets the first session
		client := e.dial()
		second := e.run(with(listenInput, conf), toProbe)
		other := e.dial() // of the second input: round robin
		for range 50 {
			e.wantReceives(t, other, "delivered")
		}
		sendAll(client, numbered("%02d", 12)...)
		in.kill()
		synctest.Wait()
		e.dropArrivals()
		synctest.Wait()
		second.kill()
		e.dropArrivals()
		e.run(with(listenInput, conf), toSerial)
		require.Equal(t, numbered("%02d", 12), e.deliverNext(12))
	})
}

func TestMessagesOfAnEndedSessionDoNotWaitForItsSuccessor(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(fromOnce, listenOutput)
		in := e.run(listenEvents, toProbe)
		first := e.dialAs(7)
		e.wantNext(t, "7 connected").deliver()
		send(first, "received")
		e.wantNext(t, "7: received").fail(errOutput)
		end(first)
		for { // disconnected, and the message again
			a := e.arrival()
			if a.texts()[0] == "" {
				a.deliver()
				break
			}
			a.fail(errOutput)
		}
		e.run(listenEvents, toProbe)
		e.dialAs(8) // round robin: the other input gets one of these two
		e.dialAs(9)
		second := e.dialAs(7)
		e.deliverFor(10*time.Second, "received")
		in.kill()
		require.Contains(t, e.deliverFor(time.Hour), "received", "the output works")
		require.NoError(t, second.Err())
	})
}

// A verdict may come while its input closes: the message is settled all the same.
func TestFailureDuringCloseLeavesTheMessageForTheNextInput(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(fromOnce, listenOutput)
		client := e.dial()
		in := e.bareServerInput("")
		require.NoError(t, in.Connect(t.Context()))
		m := send(client, "hello")
		_, ack, err := in.ReadBatch(t.Context())
		require.NoError(t, err)
		e.log.onLine("Redelivering a message", func() { require.NoError(t, in.Close(t.Context())) })
		require.NoError(t, ack(t.Context(), errors.New("failed")))
		m.wantPending(t, "another input may follow")
		m.wantRejected(t, rejection)
	})
}
