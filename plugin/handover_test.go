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

	"github.com/redpanda-data/benthos/v4/public/service"
	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// sendAll sends messages one after the other.
func sendAll(client *cryo.Session, texts ...string) []*sending {
	var sent []*sending
	for _, text := range texts {
		sent = append(sent, send(client, text))
		synctest.Wait()
	}
	return sent
}

// deliverAll delivers what comes until so many messages have, and returns them.
func (e *engine) deliverNext(n int) (texts []string) {
	e.t.Helper()
	for len(texts) < n {
		a := e.arrival()
		texts = append(texts, a.texts()...)
		a.deliver()
		synctest.Wait()
	}
	return texts
}

// stopWhile stops a pipeline in good order. What its output gets meanwhile is for
// handle.
func (p *pipeline) stopWhile(handle func(a *arrival)) {
	p.e.t.Helper()
	stopped := sendAny(func() error { p.stop(); return nil })
	synctest.Wait()
	for {
		select {
		case a := <-p.e.probe.arrivals:
			handle(a)
		case <-stopped.done:
			return
		}
	}
}

func TestAnInputThatIsReplacedHandsOverAllThatItHasNotDelivered(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(fromOnce, listenOutput) // it holds the listener
		in := e.run(listenInput, "serial: {}")
		client := e.dial()
		texts := words("%02d", 20)
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

		e.run(listenInput, "serial: {}")
		delivered = append(delivered, e.deliverNext(21-first)...)
		require.Equal(t, append(texts, "while there is no input"), delivered, "once, and in order")
		for i := first; i < len(sent); i++ {
			sent[i].wantAcked(t, "delivered")
		}
	})
}

func TestAnInputThatLeavesASharedListenerHandsOverToTheOther(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		first := e.run(listenInput, "serial: {}")
		client := e.dial()
		sent := sendAll(client, words("%d", 9)...)
		e.run(listenInput, "serial: {}")
		first.kill()
		require.Equal(t, []string{"0"}, e.arrival().texts(), "of the pipeline that was killed")
		require.Equal(t, words("%d", 9), e.deliverNext(9), "what it may have delivered comes again")
		for i := range sent {
			sent[i].wantAcked(t, "delivered")
		}
	})
}

func TestWhatWaitsToBeRedeliveredIsHandedOver(t *testing.T) {
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

func TestAProcessThatStopsRejectsNothing(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		out := e.run(fromOnce, listenOutput)
		in := e.run(listenInput, "serial: {}")
		client := e.dial()
		sent := sendAll(client, words("%d", 100)...)
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
func TestWhatAnInputLeavesBehindTheListenersEndIsLogged(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		in := e.aloneServerInput(t, "")
		defer func() { require.NoError(t, in.Close(context.Background())) }()
		in.receiver.log = service.NewLoggerFromSlog(e.log.logger())
		require.NoError(t, in.Connect(t.Context()))
		send(e.dial(), "hello")
		_, _, err := in.ReadBatch(t.Context())
		require.NoError(t, err)
		in.listener.inputs.close()
		in.listener.inputs.remove(in.receiver, false)
		e.log.want(t, "Undelivered messages stay unacknowledged", "messages=1")
	})
}

func TestWithoutAnotherInputWhatIsLeftIsRejectedAfterAMinute(t *testing.T) {
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
		sent[0].wantRefused(t, rejection)
		require.Equal(t, time.Minute, time.Since(killed))
		sent[1].wantRefused(t, rejection)
		queued.wantRefused(t, receivesNothing)
		synctest.Wait()
		e.log.want(t, "WARN Rejected messages of a closed input", "messages=2")
		send(client, "later").wantRefused(t, receivesNothing)

		f := e.give("the session goes on")
		require.NoError(t, receiveTexts(t, client, "the session goes on")[0].Ack())
		f.wantDelivered(t, "acknowledged")
	})
}

func TestStreamsThatWereNotBegunAreHandedOver(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(fromOnce, listenOutput)
		in := e.run(with(listenInput, "streams: { max_open: 1 }"), toProbe)
		client := e.dial()
		var sent []*sending
		for i := range 3 {
			sent = append(sent, sendAny(func() error {
				return client.SendStream(context.Background(), strings.NewReader(fmt.Sprint("stream ", i)), nil)
			}))
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

func TestPartsOfAStreamThatWasReadToItsEndAreHandedOver(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(fromOnce, listenOutput)
		const lines = "streams: { scanner: { lines: {} } }"
		in := e.run(with(listenInput, lines), toProbe)
		client := e.dial()
		sent := sendAny(func() error {
			return client.SendStream(context.Background(), strings.NewReader("a\nb\nc\n"), nil)
		})
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

func TestAcknowledgeReceivedAcknowledgesOnlyWhatThePipelineHas(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		in := e.run(with(listenInput, "acknowledge: received, max_batch_count: 1"), "serial: {}")
		client := e.dial()
		sent := sendAll(client, words("%d", 10)...)
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

func TestAcknowledgeReceivedLogsWhatAHardStopHasLost(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		in := e.run(with(listenInput, "acknowledge: received"), toProbe)
		client := e.dial()
		sent := sendAll(client, "a", "b", "c")
		for i := range sent {
			sent[i].wantAcked(t, "the pipeline has it")
		}
		e.deliverNext(1)
		in.kill()
		e.log.want(t, "ERROR Messages that were acknowledged on receipt may be lost", "messages=2")
	})
}

// What was acknowledged on receipt and what was not come to the next input in one batch.
func TestWhatIsHandedOverIsAcknowledgedBesideWhatWasBefore(t *testing.T) {
	for _, next := range []string{"acknowledge: received", ""} {
		t.Run("to "+next, func(t *testing.T) {
			inEngine(t, func(t *testing.T, e *engine) {
				e.run(fromOnce, listenOutput)
				in := e.run(with(listenInput, "acknowledge: received, max_batch_count: 1"), "serial: {}")
				client := e.dial()
				sent := sendAll(client, words("%d", 10)...)
				in.kill()
				acked := 0
				for i := range sent {
					select {
					case err := <-sent[i].done:
						require.NoError(t, err)
						acked++
					default:
					}
				}
				require.NotZero(t, acked)
				require.Less(t, acked, 10)
				for len(e.probe.arrivals) > 0 {
					<-e.probe.arrivals
				}
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

func TestWhatIsHandedOverIsRejectedBesideWhatWasAcknowledged(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(fromOnce, listenOutput)
		in := e.run(with(listenInput, "acknowledge: received, max_batch_count: 1"), "serial: {}")
		client := e.dial()
		sent := sendAll(client, words("%d", 10)...)
		in.kill()
		acked := 0
		for i := range sent {
			select {
			case err := <-sent[i].done:
				require.NoError(t, err)
				acked++
			default:
			}
		}
		in2 := e.run(listenInput, toProbe) // acknowledge: delivered
		synctest.Wait()
		in2.kill()
		time.Sleep(2 * time.Minute)
		for i := acked; i < 10; i++ {
			sent[i].wantRefused(t, rejection)
		}
	})
}

func TestPartsThatWereAcknowledgedOnReceiptAreHandedOver(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(fromOnce, listenOutput)
		const conf = "acknowledge: received, streams: { scanner: { lines: {} } }"
		in := e.run(with(listenInput, conf), toProbe)
		client := e.dial()
		sent := sendAny(func() error {
			return client.SendStream(context.Background(), strings.NewReader("a\nb\nc\n"), nil)
		})
		sent.wantAcked(t, "the pipeline has all parts")
		synctest.Wait()
		for len(e.probe.arrivals) > 0 {
			<-e.probe.arrivals
		}
		in.kill()
		e.run(with(listenInput, conf), toProbe)
		synctest.Wait()
		require.ElementsMatch(t, []string{"a", "b", "c"}, e.deliverNext(3))
	})
}

func TestHardStopDuringAResponseLogsWhatWasAcknowledgedAsLost(t *testing.T) {
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

func TestMessagesThatFailLeaveHalfOfASlowOutputToOthers(t *testing.T) {
	for _, poison := range []int{20, 200} {
		t.Run(fmt.Sprint(poison), func(t *testing.T) {
			inEngine(t, func(t *testing.T, e *engine) {
				e.run(with(listenInput, "max_batch_count: 1"), "serial: {}")
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
				bad, good := e.visit(t, 1), e.visit(t, 2)
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

func TestAStreamThatComesDuringAStopWaitsForTheNextInput(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(fromOnce, listenOutput)
		in := e.run(with(listenInput, "max_batch_count: 1"), "serial: {}")
		client := e.dial()
		sendAll(client, words("%d", 5)...)
		stopped := sendAny(func() error { in.stop(); return nil })
		synctest.Wait()
		st := sendAny(func() error {
			return client.SendStream(context.Background(), strings.NewReader("stream"), nil)
		})
		synctest.Wait()
		for {
			synctest.Wait()
			select {
			case a := <-e.probe.arrivals:
				a.deliver()
				continue
			default:
			}
			break
		}
		require.NoError(t, stopped.result(t))
		st.wantPending(t, "nothing was read of it before the stop; another input may follow")
	})
}

func TestAHardStopRejectsNothing(t *testing.T) {
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
			sent := sendAll(client, words("%d", 20)...)
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
func TestErrorOfAHardStopIsNoVerdict(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(fromOnce, listenOutput)
		in := e.aloneServerInput(t, ", auto_replay_nacks: false")
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

func TestTheOrderIsKeptOverTwoHandovers(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(fromOnce, listenOutput)
		const conf = "max_batch_count: 1, max_in_flight: 2"
		in := e.run(with(listenInput, "max_batch_count: 4"), "serial: {}")
		client := e.dial()
		sendAll(client, words("%02d", 12)...)
		in.kill()
		for len(e.probe.arrivals) > 0 {
			<-e.probe.arrivals
		}
		// The second takes some, and has numbered others before.
		in = e.run(with(listenInput, conf), "serial: {}")
		synctest.Wait()
		in.kill()
		for len(e.probe.arrivals) > 0 {
			<-e.probe.arrivals
		}
		e.run(with(listenInput, conf), "serial: {}")
		require.Equal(t, words("%02d", 12), e.deliverNext(12))
	})
}

func TestTheOrderIsKeptOverTwoHandoversToABusyInput(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(fromOnce, listenOutput)
		const conf = "max_batch_count: 1, max_in_flight: 2"
		in := e.run(with(listenInput, "max_batch_count: 4"), "serial: {}") // gets the first session
		client := e.dial()
		second := e.run(with(listenInput, conf), toProbe)
		// another client for the second input: round robin
		var others []*cryo.Session
		others = append(others, e.dial())
		for range 50 {
			for _, o := range others {
				s := send(o, "other")
				for {
					synctest.Wait()
					select {
					case a := <-e.probe.arrivals:
						a.deliver()
						continue
					default:
					}
					break
				}
				s.wantAcked(t, "")
			}
		}
		sendAll(client, words("%02d", 12)...)
		in.kill()
		synctest.Wait()
		for len(e.probe.arrivals) > 0 {
			<-e.probe.arrivals
		}
		synctest.Wait()
		second.kill()
		for len(e.probe.arrivals) > 0 {
			<-e.probe.arrivals
		}
		e.run(with(listenInput, conf), "serial: {}")
		require.Equal(t, words("%02d", 12), e.deliverNext(12))
	})
}

func TestMessagesOfAnEndedSessionDoNotWaitForTheNextSessionWithItsID(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(fromOnce, listenOutput)
		a := e.run(telling, toProbe)
		first := e.visit(t, 7)
		e.told(t, "7 connected").deliver()
		send(first, "received")
		e.told(t, "7: received").fail(errOutput)
		end(first)
		for { // disconnected, and the message again
			arr := e.arrival()
			if len(arr.texts()[0]) > 0 {
				arr.fail(errOutput)
				continue
			}
			arr.deliver()
			break
		}
		e.run(telling, toProbe) // B
		// Round robin: the other input gets one of the next two.
		e.visit(t, 8)
		e.visit(t, 9)
		second := e.visit(t, 7)
		deadline := time.After(10 * time.Second)
	drain:
		for {
			select {
			case arr := <-e.probe.arrivals:
				if arr.texts()[0] == "received" {
					arr.fail(errOutput)
				} else {
					arr.deliver()
				}
			case <-deadline:
				break drain
			}
		}
		a.kill()
		got := false
		deadline = time.After(time.Hour)
	look:
		for {
			select {
			case arr := <-e.probe.arrivals:
				got = got || arr.texts()[0] == "received"
				arr.deliver()
			case <-deadline:
				break look
			}
		}
		require.NoError(t, second.Err())
		require.True(t, got, "received, and the output works: not delivered within an hour")
	})
}
