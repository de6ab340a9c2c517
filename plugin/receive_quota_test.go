package plugin

import (
	"bufio"
	"cmp"
	"context"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/redpanda-data/benthos/v4/public/service"
	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
)

func TestFailingMessagesLeaveCapacityForOtherClients(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(with(listenInput, "max_in_flight: 16, max_batch_count: 1"), toProbe)
		bad := e.dialAs(1)
		for i := range 100 {
			send(bad, fmt.Sprint("poison ", i))
		}
		require.Empty(t, e.deliverFor(10*time.Second, "poison"))
		good := send(e.dialAs(2), "of another")
		require.Equal(t, []string{"of another"}, e.deliverFor(time.Second, "poison"))
		good.wantAcked(t, "delivered")

		// Its session ends, and what has failed is redelivered; it reconnects and sends
		// more: it has the same share.
		end(bad)
		bad = e.dialAs(1)
		for i := range 100 {
			send(bad, fmt.Sprint("poison again ", i))
		}
		require.Empty(t, e.deliverFor(10*time.Second, "poison"))
		good = send(e.dialAs(3), "of a third")
		require.Equal(t, []string{"of a third"}, e.deliverFor(time.Second, "poison"))
		good.wantAcked(t, "delivered")
	})
}

// A client may choose any number of session ids. Its owner is verified.
func TestSessionsOfOneOwnerShareItsQuotas(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(claiming+"  max_in_flight: 16\n  max_batch_count: 1\n  streams: { max_open: 4, scanner: { lines: {} } }\n", toProbe)
		for id := range uint64(5) {
			bad := e.join(claims("ann", time.Hour), 1+id)
			sendStream(bad, "bad", "poison\n")
			for i := range 20 {
				send(bad, fmt.Sprint("poison ", i))
			}
			require.Empty(t, e.deliverFor(time.Second, "poison"))
			e.wantMetrics("half of the slots at most", map[string]int64{"cryo_streams_open": min(1+int64(id), 2)})
		}
		other := e.join(claims("bob", time.Hour), 9)
		message, stream := send(other, "of bob"), sendStream(other, "of bob", "his stream\n")
		require.ElementsMatch(t, []string{"of bob", "his stream"}, e.deliverFor(time.Second, "poison"))
		message.wantAcked(t, "delivered")
		stream.wantAcked(t, "delivered")
	})
}

func TestUnacknowledgedResponsesLeaveCapacityForOtherClients(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(with(listenInput, "max_in_flight: 16"), answering)
		deaf := e.dial()
		for i := range 100 {
			send(deaf, fmt.Sprint(i))
		}
		synctest.Wait()
		begin := time.Now()
		other := e.dial()
		for range 100 {
			m := send(other, "hello")
			require.NoError(t, receiveTexts(t, other, "hello")[0].Ack())
			m.wantAcked(t, "with its answer")
		}
		require.Zero(t, time.Since(begin))
	})
}

func TestStreamsOfAClientStayWithinItsQuotaOfMaxInFlight(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(with(listenInput, "max_in_flight: 4, max_batch_count: 1, streams: { scanner: { lines: {} } }"), toProbe)
		client := e.dial()
		sending := sendAny(func() error {
			return client.SendStream(t.Context(), strings.NewReader("1\n2\n3\n4\n5\n"), nil)
		})
		arrivals := e.arrivalsOf("1", "2", "3")
		e.wantNoArrival("the rest of max_in_flight is for others")
		for _, a := range arrivals {
			a.deliver()
		}
		for range 2 {
			e.arrival().deliver()
		}
		sending.wantAcked(t, "all of it")
	})
}

func TestMessagesAndStreamsOfAClientShareOneQuota(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(with(listenInput, "max_in_flight: 4, max_batch_count: 1, streams: { scanner: { lines: {} } }"), toProbe)
		client := e.dial()
		sending := sendAny(func() error {
			return client.SendStream(t.Context(), strings.NewReader("1\n2\n3\n"), nil)
		})
		arrivals := e.arrivalsOf("1", "2", "3")
		message := send(client, "4")
		e.wantNoArrival("the rest of max_in_flight is for others")
		other := send(e.dial(), "of another")
		e.arrivalsOf("of another")["of another"].deliver()
		other.wantAcked(t, "delivered")
		for _, a := range arrivals {
			a.deliver()
		}
		sending.wantAcked(t, "all of it")
		e.arrivalsOf("4")["4"].deliver()
		message.wantAcked(t, "delivered")
	})
}

// Each message that waits holds the memory of its session.
func TestNewSessionsAreDeniedWhileTooManyEndedOnesAreDraining(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(with(listenInput, "max_in_flight: 1, max_sessions: 3"), toProbe)
		for id := range uint64(1 + 6) { // one is in the pipeline, and as many wait as may be connected, and have left
			visitor := e.dialAs(1 + id)
			send(visitor, fmt.Sprint(id))
			synctest.Wait()
			end(visitor)
			synctest.Wait()
		}
		denied := e.wantDenied(cryo.DialOptions{Token: token}, http.StatusServiceUnavailable)
		require.Contains(t, denied.Message, "Overloaded")
		for range 1 + 6 {
			e.arrival().deliver()
		}
		e.dial()
	})
}

// A client may choose any number of session ids. Its owner is verified.
func TestSessionsOfOneOwnerShareTheReceiveBuffer(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(claiming+"  max_batch_count: 1\n  max_buffer_bytes: 1000000\n", toProbe)
		for id := range uint64(12) {
			bad := e.join(claims("ann", time.Hour), 1+id)
			for range 300 {
				send(bad, "poison "+strings.Repeat("x", 4000))
			}
			require.Empty(t, e.deliverFor(time.Second, "poison"))
		}
		good := send(e.join(claims("bob", time.Hour), 99), "of another")
		require.Equal(t, []string{"of another"}, e.deliverFor(time.Second, "poison"))
		good.wantAcked(t, "delivered")
	})
}

// A client whose messages fail can leave any number of sessions behind that wait for its quota.
func TestAbandonedSessionsOfAClientDenyNoOtherClient(t *testing.T) {
	for name, reconnect := range map[string]func(e *engine, i int) (*cryo.Session, error){
		"with one id": func(e *engine, _ int) (*cryo.Session, error) {
			return e.tryDial(cryo.DialOptions{Token: claims("ann", time.Hour), SessionID: 1})
		},
		"with ids of its own": func(e *engine, i int) (*cryo.Session, error) {
			return e.tryDial(cryo.DialOptions{Token: claims("ann", time.Hour), SessionID: uint64(100 + i)})
		},
	} {
		t.Run(name, func(t *testing.T) {
			inEngine(t, func(t *testing.T, e *engine) {
				e.run(claiming+"  max_in_flight: 16\n  max_batch_count: 1\n  max_sessions: 40\n", toProbe)
				bad := e.join(claims("ann", time.Hour), 1)
				for i := range 20 {
					send(bad, fmt.Sprint("poison ", i))
				}
				require.Empty(t, e.deliverFor(time.Second, "poison"))
				end(bad)
				denied := &cryo.HandshakeError{}
				for i := range 100 {
					s, err := reconnect(e, i)
					if err != nil {
						require.ErrorAs(t, err, &denied)
						continue
					}
					send(s, "poison")
					synctest.Wait()
					end(s)
					synctest.Wait()
				}
				require.Equal(t, http.StatusServiceUnavailable, denied.StatusCode)
				require.Contains(t, denied.Message, "Overloaded")
				good := send(e.join(claims("bob", time.Hour), 2), "of another")
				require.Equal(t, []string{"of another"}, e.deliverFor(time.Second, "poison"))
				good.wantAcked(t, "delivered")
			})
		})
	}
}

// A stream holds its slot until its messages are delivered, whatever becomes of its session.
func TestReconnectedClientKeepsItsStreamQuota(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(with(listenInput, "max_in_flight: 16, max_batch_count: 1, streams: { max_open: 4, scanner: { lines: {} } }"), toProbe)
		for range 3 {
			bad := e.dialAs(1)
			for range 4 {
				sendStream(bad, "bad", "poison\n")
			}
			require.Empty(t, e.deliverFor(time.Second, "poison"))
			e.wantMetrics("half of the slots", map[string]int64{"cryo_streams_open": 2})
			end(bad)
			synctest.Wait()
		}
		good := sendStream(e.dialAs(2), "good", "of another\n")
		require.Equal(t, []string{"of another"}, e.deliverFor(time.Second, "poison"))
		good.wantAcked(t, "delivered")
	})
}

func TestReconnectedClientKeepsItsQuota(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(with(listenInput, "max_in_flight: 4, max_batch_count: 1"), toProbe)
		client := e.dialAs(1)
		sendAll(client, "1", "2", "3")
		arrivals := e.arrivalsOf("1", "2", "3")
		end(client)
		synctest.Wait()

		client = e.dialAs(1)
		fourth := send(client, "4")
		e.wantNoArrival("what the client sent before is in flight")
		other := send(e.dialAs(2), "of another")
		e.arrivalsOf("of another")["of another"].deliver()
		other.wantAcked(t, "delivered")
		arrivals["1"].deliver()
		e.arrivalsOf("4")["4"].deliver()
		fourth.wantAcked(t, "delivered")
	})
}

// wordScanners are scanners that make a batch of the words of each line.
type wordScanners struct{ closed atomic.Int64 }

func (w *wordScanners) Create(stream io.ReadCloser, ack service.AckFunc, _ *service.ScannerSourceDetails) (service.BatchScanner, error) {
	return service.AutoAggregateBatchScannerAcks(&wordScan{stream, bufio.NewScanner(stream)}, ack), nil
}

func (w *wordScanners) Close(context.Context) error { w.closed.Add(1); return nil }

type wordScan struct {
	stream io.ReadCloser
	lines  *bufio.Scanner
}

func (w *wordScan) NextBatch(context.Context) (service.MessageBatch, error) {
	if !w.lines.Scan() {
		return nil, cmp.Or(w.lines.Err(), io.EOF)
	}
	return batchOf(strings.Fields(w.lines.Text())...), nil
}

func (w *wordScan) Close(context.Context) error { return w.stream.Close() }

const byWords = "streams: { scanner: { words: {} } }"

// scanWords registers the scanner of byWords.
func (e *engine) scanWords() *wordScanners {
	e.t.Helper()
	scanners := &wordScanners{}
	require.NoError(e.t, e.env.RegisterBatchScannerCreator("words", service.NewConfigSpec(), func(*service.ParsedConfig, *service.Resources) (service.BatchScannerCreator, error) {
		return scanners, nil
	}))
	return scanners
}

func TestScannerBatchOverAClientsQuotaIsDeliveredInParts(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.scanWords()
		e.run(with(listenInput, "max_in_flight: 4, "+byWords), toProbe)
		client := e.dial()
		stream := sendStream(client, "numbers", "1 2 3 4 5 6 7\n")
		for _, part := range [][]string{{"1", "2", "3"}, {"4", "5", "6"}, {"7"}} {
			a := e.arrival()
			require.Equal(t, part, a.texts())
			e.wantNoArrival("one is for other clients")
			e.wantMetrics("at most", map[string]int64{"cryo_messages_unacknowledged": int64(len(part)), "cryo_streams_open": 1})
			a.deliver()
		}
		stream.wantAcked(t, "delivered")
		e.wantMetrics("delivered", map[string]int64{"cryo_messages_unacknowledged": 0, "cryo_streams_open": 0})
	})
}

func TestMessagesOfClientsAreDeliveredInOrderOfArrival(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(with(listenInput, "max_in_flight: 1"), toProbe)
		clients := []*cryo.Session{e.dial(), e.dial(), e.dial()}
		var sent []*sending
		texts := numbered("%d", 9)
		for i, text := range texts[:6] {
			sent = append(sent, sendAll(clients[i%3], text)...)
		}
		for i, text := range texts {
			a := e.arrival()
			require.Equal(t, []string{text}, a.texts())
			if i < 3 {
				sent = append(sent, sendAll(clients[i], texts[6+i])...)
			}
			synctest.Wait() // the client's next message waits for its turn
			a.deliver()
		}
		wantAllAcked(t, sent, "delivered")
	})
}

func TestSessionEventsDoNotWaitForMaxInFlight(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(with(listenEvents, "max_in_flight: 1"), toProbe)
		first := e.dialAs(1)
		e.wantNext(t, "1 connected").deliver()
		sent := send(first, "hello")
		message := e.wantNext(t, "1: hello")
		second := e.dialAs(2)
		event := e.wantNext(t, "2 connected")
		e.wantMetrics("a message and an event", map[string]int64{"cryo_messages_unacknowledged": 2})
		event.deliver()
		_ = send(second, "waits")
		e.wantNoArrival("the message of the first client is in flight")
		message.deliver()
		sent.wantAcked(t, "delivered")
		e.wantNext(t, "2: waits").deliver()
		e.wantMetrics("settled", map[string]int64{"cryo_messages_unacknowledged": 0})
	})
}

func TestHandedOverMessagesCountAsInFlight(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(fromOnce, listenOutput)
		in := e.run(with(listenInput, "max_batch_count: 1"), toProbe)
		client := e.dial()
		sent := sendAll(client, numbered("%d", 7)...)
		in.kill()
		for len(e.probe.arrivals) > 0 {
			<-e.probe.arrivals
		}
		e.run(with(listenInput, "max_in_flight: 4, max_batch_count: 1"), toProbe)
		arrivals := e.arrivalsOf("0", "1", "2")
		e.wantNoArrival("one is for other clients")
		e.wantMetrics("in flight", map[string]int64{"cryo_messages_unacknowledged": 3})
		for _, a := range arrivals {
			a.deliver()
		}
		require.ElementsMatch(t, numbered("%d", 7)[3:], e.deliverNext(4))
		wantAllAcked(t, sent, "delivered")
		e.wantMetrics("delivered", map[string]int64{"cryo_messages_unacknowledged": 0})
	})
}

func TestHandedOverMessagesAreFilteredByMessageTypes(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(fromOnce, listenOutput)
		in := e.run(with(listenInput, "max_batch_count: 1"), toSerial)
		client := e.dial()
		text := send(client, "text")
		synctest.Wait()
		binary := sendAny(func() error { return client.SendBinary(t.Context(), []byte("binary")) })
		synctest.Wait()
		in.kill()
		require.Equal(t, []string{"text"}, e.arrival().texts(), "of the pipeline that was killed")
		e.run(with(listenInput, "message_types: [ utf8 ]"), toProbe)
		a := e.arrival()
		require.Equal(t, []string{"text"}, a.texts())
		binary.wantAcked(t, "filtered")
		a.deliver()
		text.wantAcked(t, "delivered")
		e.wantNoArrival("the other is no text")
	})
}

func TestScannerIsClosedOnceWithItsInput(t *testing.T) {
	inputs := map[string]func(e *engine) (peer func() *cryo.Session){
		dialInput:   func(e *engine) func() *cryo.Session { return e.serve().session },
		listenInput: func(e *engine) func() *cryo.Session { return e.dial },
	}
	for input, peerOf := range inputs {
		inEngine(t, func(t *testing.T, e *engine) {
			scanners, peer := e.scanWords(), peerOf(e)
			p := e.run(with(input, byWords), toProbe)
			stream := sendStream(peer(), "letters", "a\n")
			e.arrival().deliver()
			stream.wantAcked(t, "delivered")
			require.Zero(t, scanners.closed.Load())
			p.stop()
			require.Equal(t, int64(1), scanners.closed.Load())
		})
		inEngine(t, func(t *testing.T, e *engine) {
			scanners, peer := e.scanWords(), peerOf(e)
			p := e.run(with(input, byWords), toProbe)
			open := open(t, peer(), "letters")
			write(t, open, "a\n")
			e.arrival()
			p.kill()
			require.Equal(t, int64(1), scanners.closed.Load(), "a hard stop in the middle of a stream")
		})
	}
	inEngine(t, func(t *testing.T, e *engine) {
		scanners := e.scanWords()
		p := e.run(with(dialInput, byWords), toProbe)
		p.kill()
		require.Equal(t, int64(1), scanners.closed.Load(), "never connected")
	})
	inEngine(t, func(t *testing.T, e *engine) {
		_, err := e.net.Listen("tcp", somewhere)
		require.NoError(t, err)
		scanners := e.scanWords()
		p := e.run(with(listenInput, byWords), toProbe)
		p.kill()
		require.Equal(t, int64(1), scanners.closed.Load(), "never connected")
	})
}
