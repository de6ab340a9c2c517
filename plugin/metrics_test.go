package plugin

import (
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"regexp"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/cryotest"
)

// namesIn finds the names of metrics in a file of the repository.
func namesIn(t *testing.T, file, pattern string) []string {
	t.Helper()
	content, err := os.ReadFile(file)
	require.NoError(t, err)
	var names []string
	for _, match := range regexp.MustCompile(pattern).FindAllSubmatch(content, -1) {
		names = append(names, string(match[1]))
	}
	slices.Sort(names)
	return slices.Compact(names)
}

func TestEveryMetricIsDocumentedAndInTheDashboard(t *testing.T) {
	names := namesIn(t, "metrics.go", `"(cryo_[a-z_]+)"`)
	require.NotEmpty(t, names)
	require.Equal(t, names, namesIn(t, "../docs/operations/metrics.md", "(?m)^\\| `(cryo_[a-z_]+)` \\|"), "in the table of docs/operations/metrics.md")
	require.Equal(t, names, namesIn(t, "../config/grafana/cryo-connect.json", `\b(cryo_[a-z_]+?)(?:_bucket)?\b`), "in the dashboard")
}

func TestGaugesOfOutputCopiesAddUp(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		server := e.serve()
		e.run(fromFeed, "broker: { pattern: round_robin, copies: 4, outputs: [ "+dialOutput+" ] }")
		var sessions []*cryo.Session
		for range 4 {
			sessions = append(sessions, server.session())
		}
		synctest.Wait()
		require.Equal(t, int64(4), e.metrics.value("cryo_sessions"))
		for i := range sessions {
			e.produce(fmt.Sprint(i))
		}
		var received []*cryo.Message
		for i := range sessions {
			received = append(received, receive(t, sessions[i]))
		}
		require.Equal(t, int64(4), e.metrics.value("cryo_messages_unacknowledged"))
		for _, m := range received {
			require.NoError(t, m.Ack())
		}
		synctest.Wait()
		require.Zero(t, e.metrics.value("cryo_messages_unacknowledged"))
		end(sessions[0])
		synctest.Wait()
		require.Equal(t, int64(3), e.metrics.value("cryo_sessions"))
	})
}

func TestInputGaugesReturnToZeroAfterHardStop(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		in := e.run(with(listenInput, "streams: { scanner: { lines: {} } }"), toProbe)
		client := e.dial()
		sendAll(client, "a", "b", "c")
		sendStream(client, "", "d\ne\n")
		synctest.Wait()
		require.Positive(t, e.metrics.value("cryo_messages_unacknowledged"))
		require.Equal(t, int64(1), e.metrics.value("cryo_streams_open"))
		in.kill()
		require.Zero(t, e.metrics.value("cryo_messages_unacknowledged"))
		require.Zero(t, e.metrics.value("cryo_streams_open"))
		require.Zero(t, e.metrics.value("cryo_sessions"))
	})
}

func TestListenerMetricsAreReportedByARemainingComponent(t *testing.T) {
	for name, stop := range map[string]func(*pipeline){"graceful stop": (*pipeline).stop, "hard stop": (*pipeline).kill} {
		t.Run(name, func(t *testing.T) {
			inEngine(t, func(t *testing.T, e *engine) {
				sessions := func(label string) int64 { return e.metrics.value("cryo_sessions{label=" + label + "}") }
				first := e.run("label: first\n"+listenInput, toProbe)
				second := e.run(fromFeed, "label: second\n"+listenOutput)
				third := e.run("label: third\n"+listenInput, toProbe)
				clients := []*cryo.Session{e.dial(), e.dial()}
				synctest.Wait()
				require.Equal(t, []int64{2, 0, 0}, []int64{sessions("first"), sessions("second"), sessions("third")})

				stop(third)
				require.Equal(t, int64(2), sessions("first"), "it stays")
				stop(first)
				require.Equal(t, []int64{0, 2}, []int64{sessions("first"), sessions("second")})

				e.dial()
				end(clients[0])
				end(clients[1])
				synctest.Wait()
				require.Equal(t, []int64{0, 1}, []int64{sessions("first"), sessions("second")})
				_, err := e.tryDial(cryo.DialOptions{Token: "wrong"})
				require.Error(t, err)
				require.Equal(t, int64(1), e.metrics.value("cryo_sessions_denied{label=second}{status=401}"))
				require.Zero(t, e.metrics.value("cryo_sessions_denied{label=first}{status=401}"))

				stop(second)
				require.Zero(t, sessions("second"))
			})
		})
	}
}

func TestInputsCountMessages(t *testing.T) {
	atBothInputs(t, "auto_replay_nacks: false, message_types: [ utf8, binary ]", func(t *testing.T, e *engine, _ *pipeline, peer *cryo.Session) {
		delivered := send(peer, "12345")
		a := e.arrival()
		e.wantMetrics("in the pipeline", map[string]int64{
			"cryo_messages_received{message_type=utf8}": 1,
			"cryo_bytes_received{message_type=utf8}":    5,
			"cryo_messages_unacknowledged":              1,
			"cryo_ack_latency_ns":                       0,
		})
		time.Sleep(3 * time.Second)
		a.deliver()
		delivered.wantAcked(t, "delivered")
		e.wantMetrics("delivered", map[string]int64{
			"cryo_messages_unacknowledged": 0,
			"cryo_ack_latency_ns":          int64(3 * time.Second),
		})

		rejected := sendAny(func() error { return peer.SendBinary(t.Context(), []byte("123")) })
		e.arrival().fail(errOutput)
		rejected.wantRejected(t, rejection)
		sendStream(peer, "orders", "").wantAcked(t, "dropped")
		e.wantMetrics("rejected, and left out", map[string]int64{
			"cryo_messages_received{message_type=binary}": 1,
			"cryo_bytes_received{message_type=binary}":    3,
			"cryo_messages_rejected{message_type=binary}": 1,
			"cryo_messages_rejected{message_type=utf8}":   0,
			"cryo_messages_received{message_type=stream}": 1,
			"cryo_messages_filtered{message_type=stream}": 1,
			"cryo_messages_unacknowledged":                0,
			"cryo_ack_latency_ns":                         int64(3 * time.Second),
		})
	})
}

func TestInputsCountRedeliveries(t *testing.T) {
	atBothInputs(t, "", func(t *testing.T, e *engine, _ *pipeline, peer *cryo.Session) {
		sent := send(peer, "m")
		for failures := range int64(3) {
			e.arrival().fail(errOutput)
			e.wantMetrics("failed", map[string]int64{"cryo_messages_redelivered": failures + 1})
		}
		e.arrival().deliver()
		sent.wantAcked(t, "delivered")
		e.wantMetrics("delivered", map[string]int64{"cryo_messages_redelivered": 3})
	})
}

// Without it, Prometheus does not count a component's first failure.
func TestFailuresAreExportedBeforeTheFirstOne(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(listenInput, dialOutput)
		require.Subset(t, e.metrics.names(), []string{
			"cryo_reconnections", "cryo_sessions_opened", "cryo_sessions_taken_over", "cryo_sessions_expired", "cryo_late_acks", "cryo_frames_ignored",
			"cryo_messages_redelivered",
			"cryo_messages_rejected{message_type=utf8}", "cryo_messages_rejected{message_type=binary}", "cryo_messages_rejected{message_type=stream}",
			"cryo_sends_rejected{message_type=error}", "cryo_session_rejections{message_type=utf8}",
		})
	})
}

func TestInputsCountStreams(t *testing.T) {
	atBothInputs(t, "streams: { max_bytes: 10 }", func(t *testing.T, e *engine, _ *pipeline, peer *cryo.Session) {
		stream := sendStream(peer, "orders", "1234567")
		a := e.arrival()
		e.wantMetrics("in the pipeline", map[string]int64{
			"cryo_messages_received{message_type=stream}": 1,
			"cryo_bytes_received{message_type=stream}":    7,
			"cryo_streams_open":                           1,
			"cryo_messages_unacknowledged":                1,
		})
		a.deliver()
		stream.wantAcked(t, "delivered")
		e.wantMetrics("delivered", map[string]int64{"cryo_streams_open": 0, "cryo_messages_unacknowledged": 0})

		require.ErrorIs(t, sendStream(peer, "orders", "12345678901").result(t), cryo.ErrStreamCancelled)
		e.wantMetrics("too long", map[string]int64{"cryo_streams_open": 0, "cryo_messages_rejected{message_type=stream}": 1})
	})
}

func TestOutputsCountMessages(t *testing.T) {
	atBothOutputs(t, "ack_timeout: 10s", func(t *testing.T, e *engine, peer *cryo.Session) {
		f := e.produce("12345", "\xff\x00")
		m := receiveTexts(t, peer, "12345", "\xff\x00")
		e.wantMetrics("on the way", map[string]int64{"cryo_messages_unacknowledged": 2, "cryo_sessions": 1})
		time.Sleep(2 * time.Second)
		require.NoError(t, cryo.AckBatch(m))
		f.wantDelivered(t, "acknowledged")
		delivered := map[string]int64{
			"cryo_messages_sent{message_type=utf8}":   1,
			"cryo_bytes_sent{message_type=utf8}":      5,
			"cryo_messages_sent{message_type=binary}": 1,
			"cryo_bytes_sent{message_type=binary}":    2,
			"cryo_messages_unacknowledged":            0,
			"cryo_ack_latency_ns":                     int64(2 * time.Second),
		}
		e.wantMetrics("delivered", delivered)

		f = e.produce("no")
		require.NoError(t, receiveTexts(t, peer, "no")[0].Reject("not today"))
		require.Error(t, next(t, f.verdict))
		e.wantMetrics("rejected", delivered)
		e.wantMetrics("rejected", map[string]int64{"cryo_sends_rejected{message_type=utf8}": 1})
	})
}

func TestOutputsCountStreams(t *testing.T) {
	atBothOutputs(t, asStream, func(t *testing.T, e *engine, peer *cryo.Session) {
		for _, take := range []bool{true, false} {
			f := e.produce("12345")
			stream, err := peer.AcceptStream(t.Context())
			require.NoError(t, err)
			e.wantMetrics("on the way", map[string]int64{"cryo_streams_open": 1})
			if take {
				_, err = io.ReadAll(stream)
				require.NoError(t, err)
				require.NoError(t, stream.Ack())
			} else {
				require.NoError(t, stream.Close())
			}
			require.Equal(t, take, next(t, f.verdict) == nil)
		}
		e.wantMetrics("one delivered, one cancelled", map[string]int64{
			"cryo_messages_sent{message_type=stream}":  1,
			"cryo_bytes_sent{message_type=stream}":     5,
			"cryo_sends_rejected{message_type=stream}": 1,
			"cryo_streams_open":                        0,
		})
	})
}

func TestBroadcastIsCountedOncePerSession(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(fromOnce, listenOutput)
		a, b := e.dial(), e.dial()
		f := e.produce("12345")
		fromA, fromB := receive(t, a), receive(t, b)
		e.wantMetrics("on the way", map[string]int64{"cryo_messages_unacknowledged": 2})
		time.Sleep(time.Second)
		require.NoError(t, fromA.Ack())
		require.NoError(t, fromB.Reject("no"))
		f.wantDelivered(t, "by one")
		e.wantMetrics("one acknowledged, one rejected", map[string]int64{
			"cryo_messages_sent{message_type=utf8}":  1,
			"cryo_bytes_sent{message_type=utf8}":     5,
			"cryo_sends_rejected{message_type=utf8}": 1,
			"cryo_messages_unacknowledged":           0,
			"cryo_ack_latency_ns":                    int64(time.Second),
		})
	})
}

func TestBroadcastCountsSessionsThatMissAMessage(t *testing.T) {
	toAll(t, "ack_timeout: 10s", 3, func(t *testing.T, e *engine, clients []*cryo.Session) {
		f := e.produce("m")
		require.NoError(t, receiveTexts(t, clients[0], "m")[0].Ack())
		require.NoError(t, receiveTexts(t, clients[1], "m")[0].Reject("no"))
		receiveTexts(t, clients[2], "m")
		f.wantDelivered(t, "to one")
		e.wantMetrics("rejected by one, not acknowledged by another", map[string]int64{
			"cryo_messages_missed":      2,
			"cryo_sessions_closed_late": 1,
		})

		f = e.produce("n")
		for _, client := range clients[:2] {
			require.NoError(t, receiveTexts(t, client, "n")[0].Reject("no"))
		}
		f.wantFailed(t, `not acknowledged by any of 2 sessions: rejected by the peer: "no"`)
		e.wantMetrics("the input sends it again", map[string]int64{"cryo_messages_missed": 2})
	})
}

func TestWorkQueueCountsMessages(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(fromOnce, with(listenOutput, "send_to: any"))
		worker := e.dial()
		f := e.produce("12345")
		m := receive(t, worker)
		e.wantMetrics("on the way", map[string]int64{"cryo_messages_unacknowledged": 1})
		time.Sleep(time.Second)
		require.NoError(t, m.Ack())
		f.wantDelivered(t, "acknowledged")
		e.wantMetrics("delivered", map[string]int64{
			"cryo_messages_sent{message_type=utf8}": 1,
			"cryo_bytes_sent{message_type=utf8}":    5,
			"cryo_messages_unacknowledged":          0,
			"cryo_ack_latency_ns":                   int64(time.Second),
		})
	})
}

func TestLateAcknowledgementsAreCounted(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		server := e.serve()
		e.run(fromOnce, with(dialOutput, "ack_timeout: 3s"))
		peer := server.session()
		f := e.produce("slow")
		m := receiveTexts(t, peer, "slow")
		require.Error(t, next(t, f.verdict))
		require.NoError(t, m[0].Ack())
		e.wantMetrics("too late", map[string]int64{
			"cryo_late_acks":                        1,
			"cryo_messages_sent{message_type=utf8}": 0,
			"cryo_messages_unacknowledged":          0,
			"cryo_ack_latency_ns":                   0,
		})
	})
}

func TestIgnoredFramesAreCounted(t *testing.T) {
	unknown := func(peer *cryotest.Peer) {
		for range 3 {
			peer.WriteBytes(append(binary.BigEndian.AppendUint64(nil, peer.SID), 77))
		}
	}
	t.Run("cryo", func(t *testing.T) {
		inEngine(t, func(t *testing.T, e *engine) {
			e.serveRaw(func(peer *cryotest.Peer) {
				peer.ServerHandshake()
				unknown(peer)
			})
			e.run(dialInput, toProbe)
			e.wantMetrics("ignored", map[string]int64{"cryo_frames_ignored": 3, "cryo_sessions": 1})
		})
	})
	t.Run("cryo_server", func(t *testing.T) {
		inEngine(t, func(t *testing.T, e *engine) {
			e.run(listenInput, toProbe)
			unknown(e.rawClient())
			e.wantMetrics("ignored", map[string]int64{"cryo_frames_ignored": 3, "cryo_sessions": 1})
		})
	})
}

func TestSessionsAndReconnectionsAreCounted(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		server := e.serve()
		p := e.run(dialInput, toProbe)
		first := server.session()
		e.wantMetrics("connected", map[string]int64{"cryo_sessions": 1, "cryo_reconnections": 0})
		end(first)
		synctest.Wait()
		second := server.session()
		e.wantMetrics("again", map[string]int64{"cryo_sessions": 1, "cryo_reconnections": 1})
		server.shutdown()
		<-second.Done()
		e.wantMetrics("lost", map[string]int64{"cryo_sessions": 0, "cryo_reconnections": 1})
		p.stop()
	})
}

func TestSessionsGaugeDropsToZeroWithoutAWrite(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		server := e.serve()
		e.run(fromOnce, dialOutput)
		server.session()
		e.wantMetrics("connected", map[string]int64{"cryo_sessions": 1})
		server.shutdown()
		e.wantMetrics("lost", map[string]int64{"cryo_sessions": 0})
	})
}

func TestTakenOverSessionsAreCounted(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(listenInput, toProbe)
		old, err := e.tryDial(cryo.DialOptions{Token: token, SessionID: 7})
		require.NoError(t, err)
		synctest.Wait() // the listener has the session, too
		_, err = e.tryDial(cryo.DialOptions{Token: token, SessionID: 7})
		require.NoError(t, err)
		<-old.Done()
		e.wantMetrics("one session in place of another", map[string]int64{
			"cryo_sessions":            1,
			"cryo_sessions_opened":     2,
			"cryo_sessions_taken_over": 1,
			"cryo_sessions_denied":     0,
		})
	})
}

func TestListenerCountsSessionsAndDeniedClients(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(fromOnce, with(listenOutput, "max_sessions: 2"))
		a, b := e.dial(), e.dial()
		e.wantMetrics("connected", map[string]int64{"cryo_sessions": 2})
		_, err := e.tryDial(cryo.DialOptions{Token: token})
		require.Error(t, err)
		_, err = e.tryDial(cryo.DialOptions{Token: "wrong"})
		require.Error(t, err)
		end(a)
		e.wantMetrics("one left, two were not let in", map[string]int64{
			"cryo_sessions":                    1,
			"cryo_sessions_denied{status=503}": 1,
			"cryo_sessions_denied{status=401}": 1,
		})

		time.Sleep(noInputTimeout)
		synctest.Wait()
		send(b, "anybody?").wantRejected(t, "this session receives no messages")
		require.ErrorIs(t, sendStream(b, "orders", "x").result(t), cryo.ErrStreamCancelled)
		e.wantMetrics("nobody receives", map[string]int64{
			"cryo_session_rejections{message_type=utf8}":   1,
			"cryo_session_rejections{message_type=stream}": 1,
		})
	})
}
