package plugin

import (
	"bytes"
	"context"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/cryotest"
)

func TestMaxInFlightIsNeverExceeded(t *testing.T) {
	atBothInputs(t, "max_in_flight: 3", func(t *testing.T, e *engine, _ *pipeline, peer *cryo.Session) {
		var sent []*sending
		for i := range 10 {
			if strings.HasSuffix(t.Name(), "cryo_server") {
				peer = e.dial() // one alone has no more than its share
			}
			sent = append(sent, send(peer, fmt.Sprint(i)))
			synctest.Wait()
		}
		var inFlight []*arrival
		total := 0
		for total < 10 {
			for count := 0; count < min(3, 10-total); {
				a := e.arrival()
				inFlight = append(inFlight, a)
				count += len(a.batch)
				require.LessOrEqual(t, count, 3)
			}
			e.wantNoArrival("three are in the pipeline")
			for _, a := range inFlight {
				total += len(a.batch)
				a.deliver()
			}
			inFlight = nil
		}
		wantAllAcked(t, sent, "delivered")
	})
}

func TestMessageAwaitingRedeliveryIsInFlight(t *testing.T) {
	atBothInputs(t, "max_in_flight: 1", func(t *testing.T, e *engine, _ *pipeline, peer *cryo.Session) {
		first := send(peer, "first")
		e.arrival().fail(errOutput)
		second := send(peer, "second")
		a := e.arrival()
		require.Equal(t, []string{"first"}, a.texts())
		e.wantNoArrival("one is in flight")
		a.deliver()
		first.wantAcked(t, "delivered")
		e.arrival().deliver()
		second.wantAcked(t, "delivered")
	})
}

func TestBatchHasAtMostMaxBatchCountMessages(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		_, sent := e.runWithBatch("max_batch_count: 4", numbered("m%d", 10))
		var got []string
		for len(got) < 10 {
			a := e.arrival()
			require.LessOrEqual(t, len(a.batch), 4)
			got = append(got, a.texts()...)
			a.deliver()
		}
		require.ElementsMatch(t, numbered("m%d", 10), got)
		wantAllAcked(t, sent, "delivered")
	})
}

func TestMessagesOfASessionArriveInOrder(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(listenInput, toSerial)
		peer := e.dial()
		var batch []cryo.OutMessage
		for _, text := range numbered("m%d", 1000) {
			batch = append(batch, cryo.Text(text))
		}
		sent := sendAny(func() error { return peer.SendBatch(context.Background(), batch) })
		got := e.deliverNext(1000)
		require.Equal(t, numbered("m%d", 1000), got)
		sent.wantAcked(t, "delivered")
	})
}

func TestStalledPipelineBlocksTheSenderAndKeepsTheSession(t *testing.T) {
	const size = 64 << 10
	atBothInputs(t, fmt.Sprintf("max_buffer_bytes: %d, max_in_flight: 1, heartbeat_interval: 1s", 4*size), func(t *testing.T, e *engine, _ *pipeline, peer *cryo.Session) {
		payload := bytes.Repeat([]byte("x"), size)
		var sent []*sending
		for range 40 {
			sent = append(sent, sendAny(func() error { return peer.SendBinary(t.Context(), payload) }))
		}
		a := e.arrival()
		time.Sleep(10 * time.Minute) // of a stalled output
		e.wantNoArrival("one is in the pipeline")
		require.NoError(t, peer.Err(), "the session lives")

		a.deliver()
		for range 39 {
			e.arrival().deliver()
		}
		wantAllAcked(t, sent, "delivered")
	})
}

func TestReadsArePausedWhenMaxBufferBytesAreUnacknowledged(t *testing.T) {
	const size, limit = 64 << 10, 4
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(with(listenInput, fmt.Sprintf("max_buffer_bytes: %d", limit*size)), toProbe)
		peer := e.rawClient()
		peer.Read()
		var written atomic.Int32
		go func() {
			for i := range 20 {
				peer.WriteFrames(cryotest.Binary(uint32(i), strings.Repeat("x", size)))
				written.Add(1)
			}
		}()
		synctest.Wait()
		// One more than the limit is read, and two fill what buffers there are.
		require.LessOrEqual(t, written.Load(), int32(limit+3))
		e.deliverNext(20)
		synctest.Wait()
		require.Equal(t, int32(20), written.Load())
	})
}
