package plugin

import (
	"context"
	"fmt"
	"net"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

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
		time.Sleep(nextInputPatience - time.Second)
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
		require.Equal(t, 1, e.log.count("received messages were not delivered before the stop and stay unacknowledged"))
		for i := range sent {
			if i < delivered {
				sent[i].wantAcked(t, "delivered")
			} else {
				require.ErrorIs(t, sent[i].result(t), net.ErrClosed)
			}
		}
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
		e.log.want(t, "WARN Rejected 2 messages that an input on")
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
		require.Zero(t, e.log.count("Lost"))
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
		e.log.want(t, "ERROR Lost 2 messages that were acknowledged when they were received: the pipeline has stopped before it delivered them")
	})
}
