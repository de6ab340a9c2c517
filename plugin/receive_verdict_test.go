package plugin

import (
	"context"
	"fmt"
	"runtime"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// A verdict on a batch of several says nothing about any one of them: the engine may
// have put it onto the wrong message.

const dropsDrop = `mapping: 'root = if content() == "drop" { deleted() }'`

// onceAgain makes a failed batch's messages pass the pipeline again, each alone: those
// that are to fail do, with both values of auto_replay_nacks.
func onceAgain(t *testing.T, texts []string, processor string, first func(e *engine)) {
	t.Helper()
	const bad = "A"
	for _, replay := range []bool{false, true} {
		t.Run(fmt.Sprintf("auto_replay_nacks %v", replay), func(t *testing.T) {
			inEngine(t, func(t *testing.T, e *engine) {
				_, sent := e.runWithBatch(fmt.Sprintf("auto_replay_nacks: %v", replay), texts, processor)
				first(e)
				failed := time.Now()
				kept := slices.DeleteFunc(slices.Clone(texts), func(text string) bool { return text == "drop" })
				for i := range sent {
					if texts[i] != "drop" {
						sent[i].wantPending(t, "nothing is known of "+texts[i])
					}
				}
				again := e.arrivalsOf(kept...)
				require.Equal(t, failed, time.Now(), "at once")
				for _, text := range kept {
					if text == bad {
						again[text].fail(errOutput)
					} else {
						again[text].deliver()
					}
				}
				for i, text := range texts {
					switch {
					case text != bad:
						sent[i].wantAcked(t, text+" was delivered alone, or dropped on purpose")
					case replay:
						sent[i].wantPending(t, "it failed")
						a := e.arrival()
						require.Equal(t, []string{bad}, a.texts())
						a.deliver()
						sent[i].wantAcked(t, "delivered in the end")
					default:
						sent[i].wantRejected(t, rejection)
					}
				}
				e.wantNoArrival("all is settled")
			})
		})
	}
}

func TestFailureAfterAFilterIsAttributedToTheFailedMessage(t *testing.T) {
	onceAgain(t, []string{"drop", "A", "B", "C"}, dropsDrop, func(e *engine) {
		a := e.arrival()
		require.Equal(e.t, []string{"A", "B", "C"}, a.texts())
		a.failSome(errOutput, "A")
	})
}

func TestFailureAfterASplitIsAttributedToTheFailedMessage(t *testing.T) {
	onceAgain(t, []string{"C", "B", "A"}, "split: { size: 1 }", func(e *engine) {
		got := e.arrivalsOf("C", "B", "A")
		got["C"].deliver()
		got["B"].deliver()
		got["A"].fail(errOutput)
	})
}

func TestFailureOfAGroupIsAttributedToItsMessages(t *testing.T) {
	onceAgain(t, []string{"C", "A", "B"}, `group_by_value: { value: '${! content() == "C" }' }`, func(e *engine) {
		for range 2 {
			if a := e.arrival(); slices.Contains(a.texts(), "A") {
				a.fail(errOutput)
			} else {
				a.deliver()
			}
		}
	})
}

func TestMessagesOfAFailedBatchAreRedeliveredInOrder(t *testing.T) {
	for _, replay := range []bool{false, true} {
		t.Run(fmt.Sprintf("auto_replay_nacks %v", replay), func(t *testing.T) {
			inEngine(t, func(t *testing.T, e *engine) {
				e.run(fromFeed, listenOutput) // while only an output listens, messages wait for an input
				peer := e.dial()
				sent := sendAll(peer, numbered("m%d", 5)...)
				e.run(with(listenInput, fmt.Sprintf("auto_replay_nacks: %v", replay)), toSerial)
				a := e.arrival()
				require.Equal(t, numbered("m%d", 5), a.texts())
				a.fail(errOutput)
				for i, text := range numbered("m%d", 5) {
					a := e.arrival()
					require.Equal(t, []string{text}, a.texts())
					a.deliver()
					sent[i].wantAcked(t, "delivered alone")
				}
			})
		})
	}
}

func TestFilteredStreamIsAcknowledgedWhenItsFailedLineIsDelivered(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(with(listenInput, "streams: { scanner: { lines: {} } }"), toSerial, dropsDrop)
		s := e.dial()
		for range runtime.GOMAXPROCS(0) + 10 { // more than the engine takes
			send(s, "busy")
			synctest.Wait()
		}
		var sent []*sending
		for _, text := range []string{"drop", "A", "B"} {
			sent = append(sent, sendStream(s, text, text+"\n"))
			synctest.Wait()
		}
		a := e.arrival()
		for ; !slices.Contains(a.texts(), "A"); a = e.arrival() {
			a.deliver()
		}
		require.Subset(t, a.texts(), []string{"A", "B"}, "lines that wait are handed over together")
		a.failSome(errOutput, "A")
		for _, stream := range sent[1:] {
			stream.wantPending(t, "nothing is known of either")
		}
		delivered := e.deliverAll()
		synctest.Wait()
		require.Subset(t, delivered(), []string{"A", "B"})
		wantAllAcked(t, sent, "delivered, or dropped on purpose")
	})
}

// An output that fails as a whole fails all that its batching has merged, also what a
// filter has put into the place of another. For an output that names single messages see
// TestEngineWithBatchingFailsTheWrongDeliveryAfterAFilter.
func TestFailureAfterAFilterWithBatchingFailsTheWholeBatch(t *testing.T) {
	batching := "batching: { count: 3, period: 1s, processors: [ " + dropsDrop + " ] }"
	texts := []string{"drop", "A", "B"}
	sendAll := func(e *engine) (sent []*sending) {
		peer := e.dial()
		for _, text := range texts {
			sent = append(sent, send(peer, text))
			synctest.Wait()
		}
		return sent
	}
	t.Run("another's output", func(t *testing.T) {
		inEngine(t, func(t *testing.T, e *engine) {
			e.run(with(listenInput, "auto_replay_nacks: false"), "probe: { "+batching+" }")
			sent := sendAll(e)
			a := e.arrival()
			require.Equal(t, []string{"A", "B"}, a.texts())
			a.fail(errOutput)
			for i := range sent {
				sent[i].wantRejected(t, rejection)
			}
		})
	})
	t.Run("cryo", func(t *testing.T) {
		inEngine(t, func(t *testing.T, e *engine) {
			serveAt(e, elsewhere, func(m *cryo.Message) error {
				if string(m.Payload) == "A" {
					return m.Reject("not now")
				}
				return m.Ack()
			})
			e.run(with(listenInput, "auto_replay_nacks: false"), with(cryoElsewhere, batching))
			sent := sendAll(e)
			for i := range sent {
				sent[i].wantRejected(t, rejection)
			}
		})
	})
}

const (
	elsewhere       = "192.0.2.3:80"
	cryoElsewhere   = "cryo: { url: ws://" + elsewhere + ", token: " + token + " }"
	serverElsewhere = "cryo_server: { address: '" + elsewhere + "', tokens: [ " + token + " ] }"
)

// serveAt runs a server that does with each message what the test wants, until the
// test's end.
func serveAt(e *engine, address string, act func(*cryo.Message) error) {
	e.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	var receiving sync.WaitGroup
	server := newServer(e.t, cryo.ServerOptions{Authorize: cryo.Tokens(token), OnSession: func(s *cryo.Session, _ *cryo.Upgrade) {
		receiving.Go(func() { receiveAll(ctx, s, act) })
	}})
	h := e.serveHTTP(address, server)
	e.t.Cleanup(func() {
		cancel()
		_ = server.Shutdown(ctx)
		_ = h.Close()
		receiving.Wait()
	})
}

// receiveAll takes a session's messages until it ends.
func receiveAll(ctx context.Context, s *cryo.Session, act func(*cryo.Message) error) {
	for {
		m, err := s.Receive(ctx)
		if err != nil {
			return
		}
		_ = act(m)
	}
}

// An engine's input retries what a BatchError names. After a filter it would name
// another message, so there is none.
func TestOutputAfterAFilterFailsTheWholeBatch(t *testing.T) {
	check := func(t *testing.T, e *engine, peer *cryo.Session) {
		f := e.produce("drop", "A", "B", "C")
		m := receiveTexts(t, peer, "A", "B", "C")
		require.NoError(t, m[0].Reject("not now"))
		require.NoError(t, m[1].Ack())
		require.NoError(t, m[2].Ack())
		f.wantPending(t, "A was rejected")
		for _, m := range receiveTexts(t, peer, "A", "B", "C") {
			require.NoError(t, m.Ack())
		}
		f.wantDelivered(t, "the peer has all of it")
	}
	t.Run("cryo", func(t *testing.T) {
		inEngine(t, func(t *testing.T, e *engine) {
			server := e.serve()
			e.run(fromFeed, dialOutput, dropsDrop)
			check(t, e, server.session())
		})
	})
	t.Run("cryo_server", func(t *testing.T) {
		inEngine(t, func(t *testing.T, e *engine) {
			e.run(fromFeed, listenOutput, dropsDrop)
			check(t, e, e.dial())
		})
	})
}

// A gateway's size limit, or a fault of the server. With one batch at a time: the engine
// holds a mutex while it dials again, and a second one that waits for it would stop
// virtual time.
func TestMessageThatEndsEverySessionIsReturnedToTheInput(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		var mu sync.Mutex
		ended := 0
		serveAt(e, somewhere, func(m *cryo.Message) error {
			if string(m.Payload) != "poison" {
				return m.Ack()
			}
			mu.Lock()
			ended++
			mu.Unlock()
			end(m.Session())
			return nil
		})
		e.run(fromOnce, with(dialOutput, "ack_timeout: 3s, max_in_flight: 1"))
		began := time.Now()
		poison := e.produce("poison")
		time.Sleep(time.Second)
		fine := e.produce("fine")
		select {
		case err := <-poison.verdict:
			require.Error(t, err)
		case <-time.After(10 * time.Minute):
			require.FailNow(t, "never given back")
		}
		require.Less(t, time.Since(began), time.Minute, "ten sessions at most, and ack_timeout from the first loss")
		mu.Lock()
		require.LessOrEqual(t, ended, 10)
		mu.Unlock()
		select {
		case err := <-fine.verdict:
			require.NoError(t, err)
		case <-time.After(time.Minute):
			require.FailNow(t, "the message behind it is not delivered")
		}
	})
}

// A message that fails repeatedly meets its neighbours again in an output's batch,
// so its waits have jitter.
func TestPoisonMessageDoesNotBlockTheRestOfAnOutputsBatch(t *testing.T) {
	const batching = "batching: { count: 8, period: 50ms }"
	isPoison := func(text string) bool { return text == "poison" }
	reject := func(m *cryo.Message) error {
		if isPoison(string(m.Payload)) {
			return m.Reject("never")
		}
		return m.Ack()
	}
	check := func(t *testing.T, e *engine) {
		peer := e.dial()
		texts := append(numbered("m%d", 7), "poison")
		began := time.Now()
		sent := sendAll(peer, texts...)
		for i := range 7 {
			sent[i].wantAcked(t, texts[i])
		}
		require.Less(t, time.Since(began), 10*time.Second)
		sent[7].wantPending(t, "never delivered")
	}
	t.Run("another's output", func(t *testing.T) {
		inEngine(t, func(t *testing.T, e *engine) {
			stop := make(chan struct{})
			var delivering sync.WaitGroup
			delivering.Go(func() {
				for {
					select {
					case a := <-e.probe.arrivals:
						if slices.ContainsFunc(a.texts(), isPoison) {
							a.fail(errOutput)
						} else {
							a.deliver()
						}
					case <-stop:
						return
					}
				}
			})
			e.t.Cleanup(func() { close(stop); delivering.Wait() })
			e.run(listenInput, "probe: { "+batching+" }")
			check(t, e)
		})
	})
	t.Run("cryo", func(t *testing.T) {
		inEngine(t, func(t *testing.T, e *engine) {
			serveAt(e, elsewhere, reject)
			e.run(listenInput, with(cryoElsewhere, batching))
			check(t, e)
		})
	})
	t.Run("cryo_server", func(t *testing.T) {
		inEngine(t, func(t *testing.T, e *engine) {
			e.run(listenInput, with(serverElsewhere, batching))
			s, err := cryo.Dial(context.Background(), "ws://"+elsewhere+"/", &cryo.DialOptions{Token: token, NetDial: e.net.Dial})
			require.NoError(t, err)
			var receiving sync.WaitGroup
			receiving.Go(func() { receiveAll(context.Background(), s, reject) })
			e.t.Cleanup(func() { end(s); receiving.Wait() })
			check(t, e)
		})
	})
}
