package plugin

import (
	"fmt"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/cryotest"
	"github.com/cryo-connect/cryo-connect/internal/wire"
)

func TestClientOverItsRateIsSlowedDown(t *testing.T) {
	for settings, want := range map[string]time.Duration{
		"max_messages_per_second: 2":  6 * time.Second,
		"max_bytes_per_second: 256":   3 * time.Second, // of at least 64 bytes
		"max_messages_per_second: 16": 750 * time.Millisecond,
	} {
		t.Run(settings, func(t *testing.T) {
			inEngine(t, func(t *testing.T, e *engine) {
				e.run(with(listenInput, settings), toProbe)
				fast := e.dial()
				begin := time.Now()
				var sent []*sending
				for i := range 12 {
					sent = append(sent, send(fast, fmt.Sprintf("%05d", i)))
				}
				e.deliverNext(12)
				wantAllAcked(t, sent, "delivered")
				require.Equal(t, want, time.Since(begin))
				counted := max(0, want-time.Second) // without the pauses that any client may have at its start
				e.wantMetrics("only pauses are counted", map[string]int64{
					"cryo_throttled_ns": int64(counted), "cryo_session_rejections{message_type=utf8}": 0, "cryo_messages_rejected{message_type=utf8}": 0,
				})
				require.Equal(t, counted > 0, e.log.count("WARN Reads are paused: the peer sends faster than its limit") == 1)
				require.NoError(t, fast.Err())
			})
		})
	}
}

// The acknowledgement is behind messages of the client that are not read yet.
func TestThrottledSessionIsNotClosedAfterAckTimeout(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		const limit = "max_messages_per_second: 1"
		e.run(with(listenInput, limit), "drop: {}")
		e.run(fromOnce, with(listenOutput, limit+", send_to: session, session_id: '77', ack_timeout: 5s"))
		client := e.rawClient()
		sent := e.produce("to the client")
		text := client.WantType("the message", wire.UTF8)
		for i := range uint32(10) {
			client.WriteFrames(cryotest.Text(i, "from the client"))
		}
		client.Ack(text)
		begin := time.Now()
		require.ErrorContains(t, next(t, sent.verdict), "acknowledgement timed out")
		require.Equal(t, 5*time.Second, time.Since(begin))
		for i := range uint32(10) {
			client.WantFrame("the session is still there", cryotest.Acked(i))
		}
		require.Zero(t, e.log.count("Closing session"))
		e.wantMetrics("the acknowledgement has been read", map[string]int64{"cryo_late_acks": 1, "cryo_sessions": 1})
	})
}

// Otherwise a client that exceeds its rate and acknowledges nothing would delay all others for ever.
func TestThrottledSessionIsClosedAfterTenAckTimeouts(t *testing.T) {
	for _, sendTo := range []string{"all", "any"} {
		t.Run(sendTo, func(t *testing.T) {
			inEngine(t, func(t *testing.T, e *engine) {
				const limit = "max_messages_per_second: 1"
				e.run(with(listenInput, limit), "drop: {}")
				e.run(fromOnce, with(listenOutput, limit+", ack_timeout: 5s, send_to: "+sendTo))
				hostile := e.rawClient()
				hostile.AnswerPings()
				var sending sync.WaitGroup
				sending.Go(func() {
					for i := range uint32(1000) {
						if hostile.TryWriteFrames(cryotest.Text(i, "from the client")) != nil {
							return
						}
					}
				})
				synctest.Wait()
				acknowledgeAll(e.dial())
				begin := time.Now()
				for range 30 {
					e.produce("to both").wantDelivered(t, "by the other")
				}
				require.Equal(t, 50*time.Second, time.Since(begin))
				e.log.want(t, "WARN Closing session: acknowledgement timed out", "session=77")
				time.Sleep(cryo.DefaultCloseTimeout)
				sending.Wait()
				e.wantMetrics("it is gone", map[string]int64{"cryo_sessions": 1})
			})
		})
	}
}

func TestSessionThrottledJustBeforeAckTimeoutIsNotClosed(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		const limit = "max_messages_per_second: 2"
		e.run(with(listenInput, limit), "drop: {}")
		e.run(fromOnce, with(listenOutput, limit+", send_to: session, session_id: '77', ack_timeout: 5s"))
		client := e.rawClient()
		sent := e.produce("to the client")
		text := client.WantType("the message", wire.UTF8)
		time.Sleep(3900 * time.Millisecond)
		for i := range uint32(4) {
			client.WriteFrames(cryotest.Text(i, "from the client")) // the last one is read after 4.9 s
		}
		require.ErrorContains(t, next(t, sent.verdict), "acknowledgement timed out")
		client.Ack(text)
		e.wantMetrics("the session is still there", map[string]int64{"cryo_late_acks": 1, "cryo_sessions": 1})
	})
}

// A pause because of a limit is not the pipeline's fault.
func TestThrottledSessionIsNotReportedAsAStalledPipeline(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(with(listenInput, "max_bytes_per_second: 10"), toProbe)
		client := e.dial()
		first := send(client, "slow to deliver")
		arrived := e.arrival()
		send(client, strings.Repeat("x", 10_000)) // a pause of minutes
		time.Sleep(3 * stallTimeout)
		require.Zero(t, e.log.count("Pipeline stalled"))
		arrived.deliver()
		first.wantAcked(t, "delivered")
		require.NoError(t, client.Err())
	})
}

func TestClientsOverTheRateAreDenied(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(with(listenInput, "max_connects_per_second: 2"), toProbe)
		for range 10 {
			_, err := e.tryDial(cryo.DialOptions{Token: "wrong"})
			require.ErrorIs(t, err, cryo.ErrUnauthorized, "and does not count")
		}
		e.dial()
		e.dial()
		denied := e.wantDenied(cryo.DialOptions{Token: token}, http.StatusServiceUnavailable)
		require.Equal(t, "Too many clients are connecting at the same time.", denied.Message)
		require.GreaterOrEqual(t, denied.RetryAfter, 3*time.Second)
		require.LessOrEqual(t, denied.RetryAfter, 9*time.Second)
		e.wantMetrics("each is counted", map[string]int64{"cryo_sessions_denied{status=401}": 10, "cryo_sessions_denied{status=503}": 1})
		time.Sleep(time.Second)
		e.dial()
	})
}
