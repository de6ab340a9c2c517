package plugin

import (
	"context"
	"fmt"
	"io"
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

// Clients that read or acknowledge slowly, or not at all: "Slow clients" in
// docs/development/fault-matrix.md.

// A slow client acknowledges each message after ten seconds, the others at once.
func TestBroadcastKeepsASlowClientWithinMaxInFlight(t *testing.T) {
	toAll(t, "max_in_flight: 5", 2, func(t *testing.T, e *engine, clients []*cryo.Session) {
		quick, slow := clients[0], clients[1]
		var sent []*produced
		for i := range 5 {
			sent = append(sent, e.produce(fmt.Sprint(i)))
		}
		begin := time.Now()
		for range 5 {
			require.NoError(t, receive(t, quick).Ack())
		}
		require.Zero(t, time.Since(begin), "the others get them at once, as many as may be on their way")
		for range 5 {
			time.Sleep(5 * time.Second)
			require.NoError(t, receive(t, slow).Ack())
		}
		for _, f := range sent {
			f.wantDelivered(t, "acknowledged by both")
		}
		require.NoError(t, slow.Err(), "slow, but never late")
	})
}

func TestClientThatReadsNothingDelaysABroadcastByOneAckTimeout(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(fromOnce, with(listenOutput, "ack_timeout: 5s, max_in_flight: 3"))
		deaf := e.rawClient()
		deaf.Conn().StopReading()
		quick := e.dial()
		begin := time.Now()
		var sent []*produced
		for i := range 20 {
			sent = append(sent, e.produce(fmt.Sprint(i)))
		}
		for range 20 {
			require.NoError(t, receive(t, quick).Ack())
		}
		for _, f := range sent {
			f.wantDelivered(t, "by the one that takes part")
		}
		require.Equal(t, 5*time.Second, time.Since(begin))
		e.log.want(t, "WARN Closing session: acknowledgement timed out", "timed out after ack_timeout (5s)", "session=77")
	})
}

func TestClientThatReadsNothingDoesNotDelayOtherClients(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(fromOnce, with(listenOutput, "send_to: session, session_id: '${! content() }'"))
		deaf := e.rawClient()
		deaf.Conn().StopReading()
		quick := e.dial()
		for range 20 { // fewer than max_in_flight
			e.produce("77")
		}
		begin := time.Now()
		for range 100 {
			f := e.produce(fmt.Sprint(quick.ID()))
			require.NoError(t, receive(t, quick).Ack())
			f.wantDelivered(t, "acknowledged")
		}
		require.Zero(t, time.Since(begin))
	})
}

func TestClientThatAcknowledgesNothingDelaysOthersByOneAckTimeout(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(fromOnce, with(listenOutput, "send_to: session, session_id: '${! content() }', no_session: reject, ack_timeout: 5s, max_in_flight: 3"))
		deaf := e.rawClient()
		deaf.Conn().StopReading()
		quick := e.dial()
		begin := time.Now()
		var lost []*produced
		for range 20 {
			lost = append(lost, e.produce("77"))
		}
		f := e.produce(fmt.Sprint(quick.ID()))
		require.NoError(t, receive(t, quick).Ack())
		f.wantDelivered(t, "acknowledged")
		require.Equal(t, 5*time.Second, time.Since(begin))
		for _, f := range lost {
			require.Error(t, next(t, f.verdict), "rejected")
		}
		require.NoError(t, quick.Err())
		e.log.want(t, "WARN Closing session: acknowledgement timed out", "timed out after ack_timeout (5s)", "session=77")
	})
}

// While its reads are paused, a session is not closed at ack_timeout. A client that acknowledges
// nothing, and can keep them paused, would delay a broadcast for ever.
func TestClientThatKeepsReadsPausedIsEventuallyClosed(t *testing.T) {
	const settings = "max_buffer_bytes: 100000"
	broadcasts := func(t *testing.T, e *engine, during func()) {
		t.Helper()
		acknowledgeAll(e.dial())
		begin := time.Now()
		for range 30 {
			late := e.produce("to both")
			synctest.Wait()
			during()
			late.wantDelivered(t, "by the other")
		}
		require.Equal(t, 50*time.Second, time.Since(begin))
		e.log.want(t, "WARN Closing session: acknowledgement timed out", "session=77")
	}
	t.Run("by more messages than the pipeline takes", func(t *testing.T) {
		inEngine(t, func(t *testing.T, e *engine) {
			e.run(with(listenInput, settings+", max_batch_count: 1"), "drop: {}", "sleep: { duration: 193ms }")
			e.run(fromOnce, with(listenOutput, settings+", ack_timeout: 5s"))
			client := e.rawClient()
			client.AnswerPings()
			var sending sync.WaitGroup
			sending.Go(func() {
				text := strings.Repeat("x", 10_000)
				for i := range uint32(2000) {
					if client.TryWriteFrames(cryotest.Text(i, text)) != nil {
						return
					}
				}
			})
			synctest.Wait()
			broadcasts(t, e, func() {})
			require.NoError(t, client.WS.Close())
			sending.Wait()
		})
	})
	t.Run("by chunks of streams that are not accepted yet", func(t *testing.T) {
		inEngine(t, func(t *testing.T, e *engine) {
			e.run(with(listenInput, "streams: { max_open: 1 }"), "drop: {}")
			e.run(fromOnce, with(listenOutput, "ack_timeout: 5s"))
			client := e.rawClient()
			client.AnswerPings()
			start := func(tx uint32) wire.Frame {
				return wire.Frame{Type: wire.TxStart, Ack: 1 + tx, Tx: tx, Size: -1, Payload: []byte("x")}
			}
			client.WriteFrames(start(0)) // accepted, and never finished
			synctest.Wait()
			next, closed := uint32(1), false
			broadcasts(t, e, func() {
				if closed {
					return
				}
				time.Sleep(4900 * time.Millisecond)
				closed = client.TryWriteFrames(start(next), wire.Frame{Type: wire.TxChunk, Tx: next, Payload: []byte("early")}) != nil || next == 10
				next++
			})
		})
	})
}

// Each of its steps is in time, all of them together would take ten minutes.
func TestSlowReaderOfABroadcastStreamIsEventuallyClosed(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(fromOnce, with(listenOutput, "message_type: stream, ack_timeout: 30s"))
		quick := e.dial()
		slow, err := e.tryDial(cryo.DialOptions{Token: token, SessionOptions: cryo.SessionOptions{MaxBufferBytes: 100_000}})
		require.NoError(t, err)
		synctest.Wait()

		f := e.produce(strings.Repeat("x", 8<<20))
		begin := time.Now()
		slowly := sendAny(func() error {
			st, err := slow.AcceptStream(context.Background())
			if err != nil {
				return err
			}
			for err == nil {
				_, err = io.CopyN(io.Discard, st, 64<<10)
				time.Sleep(5 * time.Second)
			}
			return err
		})
		st, err := quick.AcceptStream(t.Context())
		require.NoError(t, err)
		_, err = io.Copy(io.Discard, st)
		require.NoError(t, err)
		time.Sleep(10 * time.Second)
		require.NoError(t, st.Ack())
		f.wantDelivered(t, "to the one that took it")
		require.Equal(t, 10*time.Second+10*time.Second+30*time.Second, time.Since(begin))
		synctest.Wait()
		require.NoError(t, quick.Err())
		require.Error(t, slowly.result(t), "cut off")
		require.Error(t, slow.Err())
		e.log.want(t, "stream sent more slowly than to another session: acknowledgement timed out after twice the time of that session plus ack_timeout (30s)", fmt.Sprintf("session=%d", slow.ID()))
	})
}

// The message in the batch of the stream bounds nothing: it takes no time.
func TestStreamCancelledByItsFirstReaderIsSentToSlowReaders(t *testing.T) {
	toAll(t, streamsByName+", ack_timeout: 30s", 2, func(t *testing.T, e *engine, clients []*cryo.Session) {
		f := e.produce("message", "stream")
		for _, client := range clients {
			require.NoError(t, receiveTexts(t, client, "message")[0].Ack())
		}
		require.NoError(t, acceptStream(t, clients[0]).Close())
		time.Sleep(20 * time.Second)
		st, content := readStream(t, clients[1])
		require.Equal(t, "stream", content)
		time.Sleep(20 * time.Second)
		require.NoError(t, st.Ack())
		f.wantDelivered(t, "each step took less than ack_timeout")
		require.NoError(t, clients[1].Err())
	})
}

// A client that answers nothing costs one ack_timeout, not one for each stream.
func TestUnresponsiveClientDelaysABroadcastOfStreamsOnce(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(fromOnce, with(listenOutput, "ack_timeout: 3s, message_type: stream"))
		good := e.dial()
		e.rawClient() // never answers
		synctest.Wait()
		go func() {
			for {
				st, err := good.AcceptStream(context.Background())
				if err != nil {
					return
				}
				go func() {
					_, _ = st.Read(make([]byte, 10))
					_, _ = st.Read(make([]byte, 10))
					_ = st.Ack()
				}()
			}
		}()
		begin := time.Now()
		f := e.produce(numbered("m%d", 20)...)
		f.wantDelivered(t, "")
		end(good)
		require.LessOrEqual(t, time.Since(begin), 4*time.Second)
	})
}
