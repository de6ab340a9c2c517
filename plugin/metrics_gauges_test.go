package plugin

import (
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// The gauges of the sending half count what is unacknowledged, and nothing when that has
// ended, however it ends.

var (
	nothingSent = map[string]int64{"cryo_messages_unacknowledged": 0, "cryo_streams_open": 0}
	twoMessages = map[string]int64{"cryo_messages_unacknowledged": 2, "cryo_streams_open": 0}
	oneStream   = map[string]int64{"cryo_messages_unacknowledged": 0, "cryo_streams_open": 1}
)

const streamsByName = `message_type: '${! if content().has_prefix("s") { "stream" } else { "utf8" } }'`

func TestOutputGaugesReturnToZeroAfterAnyMessageOutcome(t *testing.T) {
	for name, end := range map[string]func(t *testing.T, m []*cryo.Message){
		"acknowledged": func(t *testing.T, m []*cryo.Message) { require.NoError(t, cryo.AckBatch(m)) },
		"rejected": func(t *testing.T, m []*cryo.Message) {
			require.NoError(t, m[0].Reject("no"))
			require.NoError(t, m[1].Reject("no"))
		},
		"late":       func(*testing.T, []*cryo.Message) { time.Sleep(10 * time.Second) },
		"half of it": func(t *testing.T, m []*cryo.Message) { require.NoError(t, m[0].Ack()); time.Sleep(10 * time.Second) },
	} {
		t.Run(name, func(t *testing.T) {
			atBothOutputs(t, "ack_timeout: 10s", func(t *testing.T, e *engine, peer *cryo.Session) {
				f := e.produce("m0", "m1")
				m := receiveTexts(t, peer, "m0", "m1")
				e.wantMetrics("sent", twoMessages)
				end(t, m)
				next(t, f.verdict)
				e.wantMetrics(name, nothingSent)
			})
		})
	}
}

func TestOutputGaugesReturnToZeroAfterAnyStreamOutcome(t *testing.T) {
	for name, end := range map[string]func(t *testing.T, peer *cryo.Session, st *cryo.IncomingStream){
		"cancelled": func(t *testing.T, _ *cryo.Session, st *cryo.IncomingStream) { require.NoError(t, st.Close()) },
		"late":      func(*testing.T, *cryo.Session, *cryo.IncomingStream) { time.Sleep(10 * time.Second) },
		"session closed": func(t *testing.T, peer *cryo.Session, _ *cryo.IncomingStream) {
			require.NoError(t, peer.Close(t.Context(), ""))
		},
	} {
		t.Run(name, func(t *testing.T) {
			atBothOutputs(t, asStream+", ack_timeout: 10s", func(t *testing.T, e *engine, peer *cryo.Session) {
				f := e.produce("s")
				st := acceptStream(t, peer)
				e.wantMetrics("sent", oneStream)
				end(t, peer, st)
				require.Error(t, next(t, f.verdict))
				e.wantMetrics(name, nothingSent)
			})
		})
	}
}

func TestOutputGaugesReturnToZeroWhenItsSessionIsLost(t *testing.T) {
	outputs := map[string]string{
		"cryo":                      dialOutput,
		"cryo_server":               listenOutput,
		"cryo_server, send_to: any": with(listenOutput, toAny),
	}
	for name, output := range outputs {
		t.Run(name, func(t *testing.T) {
			inEngine(t, func(t *testing.T, e *engine) {
				var server *server
				if name == "cryo" {
					server = e.serve()
				}
				e.run(fromOnce, with(output, streamsByName+", ack_timeout: 10s"))
				for _, content := range []string{"m", "s"} {
					peer := e.peerOf(server)
					f := e.produce(content)
					if content == "s" {
						acceptStream(t, peer)
						e.wantMetrics("sent", oneStream)
					} else {
						receive(t, peer)
						e.wantMetrics("sent", map[string]int64{"cryo_messages_unacknowledged": 1})
					}
					if server != nil {
						server.shutdown()
					} else {
						require.NoError(t, peer.CloseNow())
					}
					e.wantMetrics("lost", nothingSent)
					require.Error(t, next(t, f.verdict))
					e.wantMetrics("failed", nothingSent)
					if server != nil {
						server = e.serve()
					}
				}
			})
		})
	}
}

// peerOf returns the other end of an output's session: with a server, or its own next client.
func (e *engine) peerOf(s *server) *cryo.Session {
	if s == nil {
		return e.dial()
	}
	return s.session()
}

func TestBroadcastGaugesReturnToZeroWhenASessionIsLate(t *testing.T) {
	toAll(t, streamsByName+", ack_timeout: 10s", 2, func(t *testing.T, e *engine, clients []*cryo.Session) {
		f := e.produce("m")
		require.NoError(t, receiveTexts(t, clients[0], "m")[0].Ack())
		receiveTexts(t, clients[1], "m")
		e.wantMetrics("sent to two", twoMessages)
		f.wantDelivered(t, "to one")
		e.wantMetrics("one was late", nothingSent)

		clients[1] = e.dial()
		f = e.produce("s")
		st, _ := readStream(t, clients[0])
		acceptStream(t, clients[1])
		e.wantMetrics("sent to two", map[string]int64{"cryo_streams_open": 2})
		require.NoError(t, st.Ack())
		f.wantDelivered(t, "to one")
		e.wantMetrics("one was late", nothingSent)
	})
}

func TestOutputGaugesReturnToZeroAfterHardStop(t *testing.T) {
	for name, output := range map[string]string{
		"cryo":                      dialOutput,
		"cryo_server":               listenOutput,
		"cryo_server, send_to: any": with(listenOutput, toAny),
	} {
		t.Run(name, func(t *testing.T) {
			inEngine(t, func(t *testing.T, e *engine) {
				var server *server
				if name == "cryo" {
					server = e.serve()
				}
				p := e.run(fromOnce, with(output, streamsByName))
				peer := e.peerOf(server)
				e.produce("m0", "m1", "s"+strings.Repeat("x", 1<<20))
				m := receive(t, peer)
				if name == "cryo_server, send_to: any" { // the stream does not wait for the messages
					receive(t, peer)
				} else {
					require.NoError(t, m.Ack())
					require.NoError(t, receive(t, peer).Ack())
				}
				acceptStream(t, peer)
				e.wantMetrics("sending", map[string]int64{"cryo_streams_open": 1})
				p.kill()
				e.wantMetrics("stopped", nothingSent)
			})
		})
	}
}

// Each way in which messages and streams of an input end, with how many of each there were
// before. The gauges must return to zero.
func TestInputGaugesReturnToZero(t *testing.T) {
	const conf = "max_in_flight: 4, max_batch_count: 1, " + byWords
	for name, c := range map[string]struct {
		content  string // of a stream that does not end
		messages int64  // unacknowledged then
		end      func(t *testing.T, e *engine, in *pipeline, client *cryo.Session)
	}{
		"a hard stop": {"a b\n", 2, func(_ *testing.T, _ *engine, in *pipeline, _ *cryo.Session) { in.kill() }},
		"a hard stop between two batches of a scanner": {"a b c\nd e\n", 3, func(_ *testing.T, _ *engine, in *pipeline, _ *cryo.Session) { in.kill() }},
		"a hard stop in the middle of a batch":         {"a b c d\n", 3, func(_ *testing.T, _ *engine, in *pipeline, _ *cryo.Session) { in.kill() }},
		"a graceful stop with failures": {"a b\n", 2, func(_ *testing.T, _ *engine, in *pipeline, _ *cryo.Session) {
			in.stopWhile(func(a *arrival) { a.fail(errOutput) })
		}},
		"the end of the session": {"a b\n", 2, func(t *testing.T, e *engine, _ *pipeline, client *cryo.Session) {
			end(client)
			e.wantMetrics("the messages are in the pipeline all the same", map[string]int64{"cryo_messages_unacknowledged": 2, "cryo_streams_open": 0})
			e.deliverNext(2)
		}},
		"the loss of the connection while the scanner waits": {"a b c d\n", 3, func(t *testing.T, e *engine, _ *pipeline, _ *cryo.Session) {
			e.net.cut()
			e.deliverNext(4)
		}},
		"a hand-over": {"a b\n", 2, func(t *testing.T, e *engine, in *pipeline, client *cryo.Session) {
			sent := send(client, "message")
			synctest.Wait()
			in.kill()
			for len(e.probe.arrivals) > 0 {
				<-e.probe.arrivals
			}
			e.run(with(listenInput, conf), toProbe)
			e.wantMetrics("the stream is cancelled, the message is in flight again", map[string]int64{"cryo_messages_unacknowledged": 1, "cryo_streams_open": 0})
			e.deliverNext(1)
			sent.wantAcked(t, "delivered")
		}},
	} {
		t.Run(strings.ReplaceAll(name, " ", "_"), func(t *testing.T) {
			inEngine(t, func(t *testing.T, e *engine) {
				e.scanWords()
				e.run(fromOnce, listenOutput) // has the listener
				in := e.run(with(listenInput, conf), toProbe)
				client := e.dial()
				write(t, open(t, client, "open"), c.content)
				e.wantMetrics("before", map[string]int64{"cryo_messages_unacknowledged": c.messages, "cryo_streams_open": 1})
				c.end(t, e, in, client)
				e.wantMetrics("after", map[string]int64{"cryo_messages_unacknowledged": 0, "cryo_streams_open": 0})
			})
		})
	}
}

func TestAgeOfTheOldestUnacknowledgedMessageIsReported(t *testing.T) {
	atBothInputs(t, "max_batch_count: 1", func(t *testing.T, e *engine, _ *pipeline, peer *cryo.Session) {
		age := func() time.Duration {
			synctest.Wait()
			return time.Duration(e.metrics.value("cryo_oldest_unacknowledged_ns"))
		}
		first := send(peer, "first")
		a := e.arrival()
		time.Sleep(time.Minute)
		send(peer, "second")
		b := e.arrival()
		require.InDelta(t, time.Minute, age(), float64(6*time.Second), "sampled every 5 s")

		a.fail(errOutput)
		a = e.arrival()
		time.Sleep(time.Minute)
		require.InDelta(t, 2*time.Minute, age(), float64(7*time.Second), "it is older than its redelivery")

		a.deliver()
		first.wantAcked(t, "delivered")
		time.Sleep(5 * time.Second)
		require.InDelta(t, time.Minute, age(), float64(12*time.Second), "of the second one")
		b.deliver()
		time.Sleep(5 * time.Second)
		require.Zero(t, age())
	})
}

func TestAgeOfTheOldestPartOfAStreamCountsFromItsFirstDelivery(t *testing.T) {
	atBothInputs(t, "", func(t *testing.T, e *engine, p *pipeline, peer *cryo.Session) {
		sendStream(peer, "", "a line")
		for begin := time.Now(); time.Since(begin) < time.Minute; {
			e.arrival().fail(errOutput)
		}
		require.InDelta(t, time.Minute, e.metrics.value("cryo_oldest_unacknowledged_ns"), float64(40*time.Second))
		require.Greater(t, e.metrics.value("cryo_oldest_unacknowledged_ns"), int64(30*time.Second), "though it is redelivered repeatedly")
		p.kill()
		require.Zero(t, e.metrics.value("cryo_oldest_unacknowledged_ns"))
	})
}

func TestAgesOfInputCopiesDoNotAddUp(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run("broker: { copies: 2, inputs: [ "+listenInput+" ] }", toProbe)
		send(e.dial(), "a")
		send(e.dial(), "b")
		e.want("a", "b")
		time.Sleep(time.Minute)
		require.InDelta(t, time.Minute, e.metrics.value("cryo_oldest_unacknowledged_ns"), float64(6*time.Second))
	})
}

// The engine does not close an input when it repeatedly fails to build the rest of a pipeline.
func TestInputsThatAreNeverClosedLeaveNothingInAGauge(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		conf, res := e.parse("input cryo_server", "")
		for range 3 {
			_, err := dependencies{}.serverInput(conf, res)
			require.NoError(t, err)
		}
		key := meterOf(res).component
		key.name = metricOldest
		require.Empty(t, meterOf(res).levels.level(key).parts)
	})
}

func TestSessionsWhoseReadsArePausedAreCounted(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(with(listenInput, "max_buffer_bytes: 3000"), toProbe)
		client := e.dial()
		for range 9 {
			send(client, strings.Repeat("x", 1000))
		}
		e.dial() // sends nothing
		time.Sleep(6 * time.Second)
		require.Equal(t, int64(1), e.metrics.value("cryo_sessions_paused"))
		deliver := e.deliverAll()
		time.Sleep(6 * time.Second)
		require.Len(t, deliver(), 9)
		require.Zero(t, e.metrics.value("cryo_sessions_paused"))
	})
}
