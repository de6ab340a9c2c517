package plugin

import (
	"context"
	"io"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// counting counts what is read of a source.
type counting struct {
	io.Reader
	n atomic.Int64
}

func (c *counting) Read(p []byte) (int, error) {
	n, err := c.Reader.Read(p)
	c.n.Add(int64(n))
	return n, err
}

func TestStalledPipelineBlocksTheSenderOfAStream(t *testing.T) {
	for _, scanner := range []string{"lines: {}", "chunker: { size: 1000 }"} {
		t.Run(scanner, func(t *testing.T) {
			atBothInputs(t, "max_in_flight: 10, max_buffer_bytes: 300000, streams: { max_bytes: 0, scanner: { "+scanner+" } }", func(t *testing.T, e *engine, _ *pipeline, peer *cryo.Session) {
				const size = 10_000_000
				source := &counting{Reader: strings.NewReader(strings.Repeat(strings.Repeat("x", 999)+"\n", size/1000))}
				sent := sendAny(func() error { return peer.SendStream(context.Background(), source, nil) })
				sent.wantPending(t, "nothing is delivered")
				require.Less(t, source.n.Load(), int64(1_500_000), "read, queued, and on the network")
				texts := e.deliverAll()
				sent.wantAcked(t, "delivered")
				require.Len(t, texts(), size/1000)
			})
		})
	}
}

func TestTwoIncompleteStreamsDoNotBlockEachOther(t *testing.T) {
	atBothInputs(t, "max_buffer_bytes: 100000, max_batch_count: 1", func(t *testing.T, e *engine, _ *pipeline, peer *cryo.Session) {
		first, second := open(t, peer, "first"), open(t, peer, "second")
		part := strings.Repeat("x", 100_000)
		for range 10 {
			write(t, first, part)
			write(t, second, part)
		}
		for _, st := range []*cryo.OutgoingStream{first, second} {
			finish := sendAny(st.Finish)
			a := e.arrival()
			require.Len(t, a.texts()[0], 1_000_000)
			finish.wantPending(t, "in the pipeline")
			a.deliver()
			finish.wantAcked(t, "delivered")
		}
	})
}

func TestScannedMessagesCountTowardTheBufferUntilDelivered(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(with(listenInput, "max_buffer_bytes: 100000, max_batch_count: 1"), toProbe)
		peer := e.dial()
		stream := sendStream(peer, "large", strings.Repeat("x", 1_000_000))
		a := e.arrival()
		one, two := send(peer, "at most one message late"), send(peer, "waits")
		synctest.Wait()
		require.LessOrEqual(t, len(e.probe.arrivals), 1, "reading pauses")
		a.deliver()
		stream.wantAcked(t, "delivered")
		for range 2 {
			e.arrival().deliver()
		}
		one.wantAcked(t, "delivered")
		two.wantAcked(t, "delivered")
	})
}

func TestTruncatedPulledStreamDeliversOnlyWholeRecords(t *testing.T) {
	atBothInputs(t, "max_in_flight: 1, max_batch_count: 1, streams: { flow_control: pull, scanner: { chunker: { size: 100000 } } }", func(t *testing.T, e *engine, _ *pipeline, peer *cryo.Session) {
		synctest.Wait() // TX_FLOW is there
		sent := sendStream(peer, "pulled", strings.Repeat("x", 2_000_000))
		a := e.arrival()
		synctest.Wait()
		e.net.cut()
		require.Error(t, sent.result(t))
		for more := true; more; {
			require.Len(t, a.texts()[0], 100_000)
			a.deliver()
			synctest.Wait()
			select {
			case a = <-e.probe.arrivals:
			default:
				more = false
			}
		}
		e.log.want(t, "WARN Stream failed")
		e.log.want(t, "stream=pulled")
	})
}
