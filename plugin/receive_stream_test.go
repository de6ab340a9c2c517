package plugin

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/redpanda-data/benthos/v4/public/service"
	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// asLines makes each line a batch.
const asLines = "max_batch_count: 1, streams: { scanner: { lines: {} } }"

func TestStreamIsAcknowledgedWhenAllItsPartsAreDelivered(t *testing.T) {
	atBothInputs(t, asLines, func(t *testing.T, e *engine, _ *pipeline, peer *cryo.Session) {
		stream := sendStream(peer, "log", "one\ntwo\nthree\n")
		arrivals := e.want("one", "two", "three")
		require.Len(t, arrivals, 3)
		for _, i := range []int{2, 0, 1} {
			stream.wantPending(t, "a line is in the pipeline")
			arrivals[i].deliver()
		}
		stream.wantAcked(t, "all lines are delivered")
	})
}

func TestLinesOfAStreamArriveWhileItIsSent(t *testing.T) {
	atBothInputs(t, asLines, func(t *testing.T, e *engine, _ *pipeline, peer *cryo.Session) {
		st := open(t, peer, "log")
		for i := range 3 {
			write(t, st, fmt.Sprintf("line %d\nand a pa", i))
			e.want(fmt.Sprintf("%sline %d", map[bool]string{true: "and a part"}[i > 0], i))[0].deliver()
			write(t, st, "rt")
			e.wantNoArrival("the line is not complete")
		}
		finish := sendAny(st.Finish)
		last := e.want("and a part")[0]
		finish.wantPending(t, "the last line is in the pipeline")
		last.deliver()
		finish.wantAcked(t, "delivered")
	})
}

func TestRejectedMessageCancelsOnlyItsStream(t *testing.T) {
	atBothInputs(t, "auto_replay_nacks: false, "+asLines, func(t *testing.T, e *engine, _ *pipeline, peer *cryo.Session) {
		bad := sendStream(peer, "bad", "one\ntwo\n")
		arrivals := e.want("one", "two")
		good := sendStream(peer, "good", "three\n")
		other := e.want("three")[0]
		arrivals[0].fail(errOutput)
		bad.wantCancelled(t, "one of its lines is rejected")
		arrivals[1].deliver()
		good.wantPending(t, "in the pipeline")
		other.deliver()
		good.wantAcked(t, "delivered")
		require.NoError(t, peer.Err(), "the session goes on")
	})
}

func TestRejectedMessageCancelsAnIncompleteStream(t *testing.T) {
	atBothInputs(t, "auto_replay_nacks: false, "+asLines, func(t *testing.T, e *engine, _ *pipeline, peer *cryo.Session) {
		st := open(t, peer, "log")
		write(t, st, "one\n")
		e.want("one")[0].fail(errOutput)
		synctest.Wait()
		_, err := st.Write([]byte("two\n"))
		require.ErrorIs(t, err, cryo.ErrStreamCancelled)
		e.wantNoArrival("the stream is cancelled")
	})
}

func TestRestOfACancelledStreamIsNotDelivered(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(with(listenInput, "auto_replay_nacks: false, max_in_flight: 1, "+asLines), toProbe)
		st := sendStream(e.dial(), "bad", "1\n2\n3\n4\n")
		e.arrival().fail(errOutput)
		st.wantCancelled(t, "one of its lines is rejected")
		require.Equal(t, []string{"2"}, e.deliverNext(1), "it waited for the first")
		e.wantNoArrival("the sender has to send all of it again")
		require.Zero(t, e.log.count("Stream failed"), "the cause is logged with the rejection")
	})
}

func TestFailedMessageOfAStreamIsRedelivered(t *testing.T) {
	atBothInputs(t, asLines, func(t *testing.T, e *engine, _ *pipeline, peer *cryo.Session) {
		stream := sendStream(peer, "log", "one\ntwo\n")
		arrivals := e.want("one", "two")
		arrivals[1].deliver()
		arrivals[0].fail(errOutput)
		for range 3 {
			stream.wantPending(t, "a line is not delivered")
			again := e.want("one")[0]
			require.Equal(t, "log", meta(again.batch[0], metaStreamName))
			again.fail(errOutput)
		}
		e.want("one")[0].deliver()
		stream.wantAcked(t, "delivered in the end")
		e.wantNoArrival("nothing is delivered twice")
	})
}

func TestEmptyStreamIsAcknowledged(t *testing.T) {
	for _, tt := range []struct {
		scanner string
		want    []string
	}{
		{"lines: {}", nil},
		{"csv: {}", nil},
		{"chunker: { size: 10 }", nil},
		{"json_documents: {}", nil},
		{"tar: {}", nil},
		{"decompress: { algorithm: gzip, into: { lines: {} } }", nil},
		{"skip_bom: { into: { lines: {} } }", nil},
		{"to_the_end: {}", []string{""}}, // an empty file is a file
	} {
		t.Run(tt.scanner, func(t *testing.T) {
			inEngine(t, func(t *testing.T, e *engine) {
				e.run(with(listenInput, "streams: { scanner: { "+tt.scanner+" } }"), toProbe)
				stream := sendStream(e.dial(), "empty", "")
				for _, a := range e.want(tt.want...) {
					stream.wantPending(t, "in the pipeline")
					a.deliver()
				}
				stream.wantAcked(t, "nothing more of it is to be delivered")
				e.wantNoArrival("nothing was in it")
			})
		})
	}
}

func meta(m *service.Message, key string) any { v, _ := m.MetaGetMut(key); return v }

func TestStreamMetadataIsSetOnItsMessages(t *testing.T) {
	all := func(m *service.Message) map[string]any {
		got := make(map[string]any)
		_ = m.MetaWalkMut(func(key string, value any) error { got[key] = value; return nil })
		return got
	}
	for flow, size := range map[string]int64{flowPush: -1, flowPull: 8} {
		atBothInputs(t, "max_batch_count: 1, streams: { flow_control: "+flow+", scanner: { lines: {} } }", func(t *testing.T, e *engine, _ *pipeline, peer *cryo.Session) {
			synctest.Wait() // TX_FLOW is there
			stream := sendStream(peer, "../names/ come from öutside", "one\ntwo\n")
			for i, a := range e.want("one", "two") {
				want := map[string]any{
					"cryo_message_type": "stream",
					"cryo_session_id":   strconv.FormatUint(peer.ID(), 10),
					"cryo_stream_name":  "../names/ come from öutside",
					"cryo_tx_id":        tx(t, a),
					"cryo_stream_size":  size,
				}
				if strings.Contains(t.Name(), "/cryo_server") {
					want["cryo_remote_address"] = meta(a.batch[0], metaRemoteAddress)
					require.NotEmpty(t, want["cryo_remote_address"])
				}
				require.Equal(t, want, all(a.batch[0]), "line %d", i)
				a.deliver()
			}
			stream.wantAcked(t, "delivered")
		})
	}
}

// tx is the number of the stream that a message was cut from.
func tx(t *testing.T, a *arrival) int64 {
	t.Helper()
	n, ok := meta(a.batch[0], metaTxID).(int64)
	require.True(t, ok)
	return n
}

func TestOnlyStreamsWithConfiguredNamesAreReceived(t *testing.T) {
	atBothInputs(t, "streams: { names: [ orders, returns ], max_bytes: 1000 }", func(t *testing.T, e *engine, _ *pipeline, peer *cryo.Session) {
		sendStream(peer, "Orders", strings.Repeat("x", 1<<20)).wantAcked(t, "acknowledged and dropped")
		sendStream(peer, "", "anonymous").wantAcked(t, "acknowledged and dropped")
		e.wantNoArrival("nobody wants these")
		require.Equal(t, int64(2), e.metrics.value("cryo_messages_filtered{message_type=stream}"))
		stream := sendStream(peer, "returns", "wanted")
		e.want("wanted")[0].deliver()
		stream.wantAcked(t, "delivered")
		require.Equal(t, int64(2), e.metrics.value("cryo_messages_filtered{message_type=stream}"))
	})
}

func TestStreamsAreAcknowledgedAndDroppedUnlessConfigured(t *testing.T) {
	atBothInputs(t, "message_types: [ utf8 ], streams: { flow_control: pull }", func(t *testing.T, e *engine, _ *pipeline, peer *cryo.Session) {
		sendStream(peer, "orders", "content").wantAcked(t, "acknowledged and dropped")
		require.Equal(t, int64(1), e.metrics.value("cryo_messages_filtered{message_type=stream}"))
		m := send(peer, "text")
		e.want("text")[0].deliver()
		m.wantAcked(t, "delivered")
	})
}

func TestOversizedStreamIsCancelled(t *testing.T) {
	atBothInputs(t, "streams: { max_bytes: 100000 }", func(t *testing.T, e *engine, _ *pipeline, peer *cryo.Session) {
		sendStream(peer, "long", strings.Repeat("x", 100_001)).wantCancelled(t, "a byte too much")
		e.wantNoArrival("not whole")
		e.log.want(t, "WARN Stream failed", "error=stream exceeds max_bytes (100000)")
		e.log.want(t, fmt.Sprint("session=", peer.ID()))
		e.log.want(t, "stream=long")
		stream := sendStream(peer, "fits", strings.Repeat("x", 100_000))
		e.arrival().deliver()
		stream.wantAcked(t, "delivered")
	})
}

func TestMaxBytesZeroAllowsStreamsOfAnyLength(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(with(listenInput, "streams: { max_bytes: 0, scanner: { chunker: { size: 1000000 } } }"), toProbe)
		texts := e.deliverAll()
		sendStream(e.dial(), "long", strings.Repeat("x", 80_500_000)).wantAcked(t, "delivered")
		require.Len(t, texts(), 81)
	})
}

func TestStreamsOverMaxOpenWait(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(with(listenInput, "streams: { max_open: 2, idle_timeout: 10h, scanner: { lines: {} } }"), toProbe)
		one, other := e.dial(), e.dial()
		first, second := open(t, one, "first"), open(t, other, "second")
		third := sendStream(other, "third", "3\n")
		message := send(other, "beside")
		e.want("beside")[0].deliver()
		message.wantAcked(t, "messages pass")
		third.wantPending(t, "two are open, of all sessions together")
		write(t, second, "2\n")
		finish := sendAny(second.Finish)
		a := e.want("2")[0]
		third.wantPending(t, "two are not delivered")
		a.deliver()
		finish.wantAcked(t, "delivered")
		e.want("3")[0].deliver()
		third.wantAcked(t, "it got the place")
		require.NoError(t, first.Finish())
	})
}

func TestIdleStreamIsCancelled(t *testing.T) {
	atBothInputs(t, "streams: { idle_timeout: 20s, scanner: { lines: {} } }", func(t *testing.T, e *engine, _ *pipeline, peer *cryo.Session) {
		st := open(t, peer, "quiet")
		for range 3 {
			time.Sleep(15 * time.Second)
			write(t, st, "x\nhalf a li")
			e.arrival().deliver()
		}
		time.Sleep(20 * time.Second)
		synctest.Wait()
		e.wantNoArrival("the last line is not complete")
		require.ErrorIs(t, st.Finish(), cryo.ErrStreamCancelled)
		e.log.want(t, "WARN Stream failed", "error=stream idle for 20s")
		e.log.want(t, fmt.Sprint("session=", peer.ID()))
		e.log.want(t, "stream=quiet")
	})
}

func TestSlowPipelineDoesNotTriggerTheIdleTimeout(t *testing.T) {
	atBothInputs(t, "max_in_flight: 1, streams: { idle_timeout: 20s, scanner: { lines: {} } }", func(t *testing.T, e *engine, _ *pipeline, peer *cryo.Session) {
		stream := sendStream(peer, "log", strings.Repeat("x\n", 20))
		for range 20 {
			time.Sleep(time.Minute)
			e.want("x")[0].deliver()
		}
		stream.wantAcked(t, "delivered")
	})
}

func TestStreamsArePulledIfConfigured(t *testing.T) {
	atBothInputs(t, "max_in_flight: 1, max_batch_count: 1, streams: { flow_control: pull, max_bytes: 0, scanner: { chunker: { size: 100000 } } }", func(t *testing.T, e *engine, _ *pipeline, peer *cryo.Session) {
		synctest.Wait()
		stream := sendStream(peer, "pulled", strings.Repeat("x", 2_050_000))
		for i := range 21 {
			a := e.arrival()
			require.Len(t, a.texts()[0], map[bool]int{true: 100_000, false: 50_000}[i < 20])
			require.Equal(t, int64(2_050_000), meta(a.batch[0], metaStreamSize))
			stream.wantPending(t, "not all is delivered")
			a.deliver()
		}
		stream.wantAcked(t, "delivered")
	})
}

func TestAcknowledgeReceivedAcknowledgesAStreamInThePipeline(t *testing.T) {
	for _, replay := range []bool{true, false} {
		atBothInputs(t, fmt.Sprintf("acknowledge: received, auto_replay_nacks: %v, %s", replay, asLines), func(t *testing.T, e *engine, _ *pipeline, peer *cryo.Session) {
			st := open(t, peer, "first")
			write(t, st, "one\n")
			e.want("one")[0].fail(errOutput)
			if replay {
				e.want("one")[0].deliver()
			}
			write(t, st, "two\n") // a failure is nothing that the sender learns of
			a := e.want("two")[0]
			finish := sendAny(st.Finish)
			finish.wantAcked(t, "all is handed over")
			a.fail(errOutput)
			if replay {
				e.want("two")[0].deliver()
			} else {
				synctest.Wait()
				e.log.want(t, "ERROR Lost messages that were acknowledged on receipt", "messages=1")
			}
			stream := sendStream(peer, "second", "three\n")
			b := e.want("three")[0]
			stream.wantAcked(t, "handed over")
			b.deliver()
		})
	}
}

func TestRedeliveriesDoNotAcknowledgeAStreamEarly(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(with(listenInput, "acknowledge: received, max_in_flight: 1, "+asLines), toProbe)
		stream := sendStream(e.dial(), "log", "one\ntwo\nthree\n")
		e.want("one")[0].fail(errOutput)
		e.want("one")[0].fail(errOutput)
		a := e.want("one")[0]
		stream.wantPending(t, "two and three have not been handed over")
		a.deliver()
		e.want("two")[0].deliver()
		b := e.want("three")[0]
		stream.wantAcked(t, "all is handed over")
		b.deliver()
	})
}

func TestStreamsAndMessagesInterleave(t *testing.T) {
	atBothInputs(t, asLines, func(t *testing.T, e *engine, _ *pipeline, peer *cryo.Session) {
		texts := e.deliverAll()
		var streams []*cryo.OutgoingStream
		for i := range 5 {
			streams = append(streams, open(t, peer, fmt.Sprint(i)))
		}
		var want []string
		for line := range 20 {
			for i, st := range streams {
				text := fmt.Sprintf("stream %d line %d", i, line)
				write(t, st, text[:8])
				require.NoError(t, peer.SendText(context.Background(), "message beside "+text))
				write(t, st, text[8:]+"\n")
				want = append(want, "message beside "+text, text)
			}
		}
		for _, st := range streams {
			require.NoError(t, st.Finish())
		}
		require.Equal(t, want, texts())
	})
}

func TestOneClientCannotUseAllStreamSlots(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(with(listenInput, "streams: { max_open: 8, idle_timeout: 10h, scanner: { lines: {} } }"), toProbe)
		greedy := e.dial()
		var waiting []*sending
		for i := range 20 {
			waiting = append(waiting, sendAny(func() error {
				_, err := greedy.OpenStream(t.Context(), &cryo.StreamOptions{Name: fmt.Sprint(i)})
				return err
			}))
		}
		synctest.Wait()
		opened := 0
		for _, w := range waiting {
			select {
			case err := <-w.done:
				require.NoError(t, err)
				opened++
			default:
			}
		}
		require.Equal(t, 4, opened, "half of them")
		e.wantMetrics("no more wait here than may be taken", map[string]int64{"cryo_messages_received{message_type=stream}": 8})
		for i := range 3 { // others get theirs, each its own half of the rest
			stream := sendStream(e.dial(), "modest", fmt.Sprintf("%d\n", i))
			e.want(fmt.Sprint(i))[0].deliver()
			stream.wantAcked(t, "delivered")
		}
	})
}
