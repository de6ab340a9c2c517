package plugin

import (
	"context"
	"fmt"
	"io"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/cryotest"
	"github.com/cryo-connect/cryo-connect/internal/wire"
)

const asStream = "message_type: stream"

func TestMessageSentAsAStreamIsDeliveredWhenItsEndIsAcknowledged(t *testing.T) {
	for _, flow := range []string{"push", "pull"} {
		t.Run(flow, func(t *testing.T) {
			atBothOutputs(t, asStream, func(t *testing.T, e *engine, peer *cryo.Session) {
				size := int64(-1)
				if flow == "pull" {
					require.NoError(t, peer.PullStreams(t.Context()))
					size = 300_000
				}
				text := strings.Repeat("abc", 100_000)
				f := e.produce(text)
				st, content := readStream(t, peer)
				require.Equal(t, text, content)
				require.Equal(t, "anonymous", st.Name())
				require.Equal(t, size, st.Size())
				f.wantPending(t, "not acknowledged yet")
				require.NoError(t, st.Ack())
				f.wantDelivered(t, "acknowledged")
			})
		})
	}
}

func TestStreamTypeAndNameAreInterpolated(t *testing.T) {
	const fields = `message_type: '${! @kind }', stream: { name: 'files/${! @file }.txt' }`
	atBothOutputs(t, fields, func(t *testing.T, e *engine, peer *cryo.Session) {
		batch := batchOf("first", "text", "second")
		for i, kind := range []string{"stream", "utf8", "stream"} {
			batch[i].MetaSetMut("kind", kind)
			batch[i].MetaSetMut("file", i)
		}
		f := e.produceBatch(batch)
		for _, want := range []string{"first in files/0.txt", "second in files/2.txt"} {
			st, content := readStream(t, peer)
			require.Equal(t, want, content+" in "+st.Name())
			require.NoError(t, st.Ack())
			if content == "first" {
				require.NoError(t, receiveTexts(t, peer, "text")[0].Ack())
			}
		}
		f.wantDelivered(t, "all are acknowledged")
	})
}

func TestStreamIsSentInChunksOfTheConfiguredSize(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		sizes := make(chan int, 100)
		e.serveRaw(func(peer *cryotest.Peer) {
			peer.ServerHandshake()
			start := peer.WantType("the stream", wire.TxStart)
			peer.Ack(start)
			for {
				f := peer.Next("a part of the stream")
				if f.Type == wire.TxFinish {
					peer.Ack(f)
					return
				}
				sizes <- len(f.Payload)
			}
		})
		e.run(fromOnce, with(dialOutput, asStream+", stream: { chunk_bytes: 1000 }"))
		e.produce(strings.Repeat("x", 2500)).wantDelivered(t, "acknowledged")
		require.Equal(t, []int{1000, 1000, 500}, []int{<-sizes, <-sizes, <-sizes})
		require.Empty(t, sizes)
	})
}

func TestArchivedBatchIsSentAsOneStream(t *testing.T) {
	for format, want := range map[string]string{"lines": "m0\nm1\nm2", "json_array": `["m0","m1","m2"]`} {
		t.Run(format, func(t *testing.T) {
			inEngine(t, func(t *testing.T, e *engine) {
				server := e.serve()
				e.run(fromFeed, with(dialOutput, asStream+", stream: { name: batch }, batching: { count: 3, processors: [ { archive: { format: "+format+" } } ] }"))
				peer := server.session()
				texts := []string{"m0", "m1", "m2"}
				if format == "json_array" {
					texts = []string{`"m0"`, `"m1"`, `"m2"`}
				}
				f := e.produce(texts...)
				st, content := readStream(t, peer)
				require.Equal(t, want, content)
				f.wantPending(t, "not acknowledged")
				require.NoError(t, st.Close())
				st, content = readStream(t, peer)
				require.Equal(t, want, content, "all of it again")
				require.NoError(t, st.Ack())
				f.wantDelivered(t, "acknowledged")
			})
		})
	}
}

func TestOnlyTheStreamCancelledByThePeerFails(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		server := e.serve()
		e.run(fromOnce, with(dialOutput, asStream+", stream: { name: '${! content() }' }, batching: { count: 4 }"))
		peer := server.session()
		f := e.produceEach(batchOf(numbered("m%d", 4)...))
		for i := range 4 {
			switch i {
			case 1: // unread
				require.NoError(t, acceptStream(t, peer).Close())
			case 2: // behind its end
				st, _ := readStream(t, peer)
				synctest.Wait()
				require.NoError(t, st.Close())
			default:
				st, content := readStream(t, peer)
				require.Equal(t, fmt.Sprintf("m%d", i), content)
				require.NoError(t, st.Ack())
			}
		}
		f.wantFailed(t, map[int]string{
			1: `opening the stream "m1": the peer cancelled the stream`,
			2: `finishing the stream "m2": the peer cancelled the stream`,
		})
		require.NoError(t, peer.Err(), "the session goes on")
	})
}

func TestAckTimeoutAppliesToEachStepOfAStream(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		server := e.serve()
		e.run(fromOnce, with(dialOutput, asStream+", ack_timeout: 10s"))
		peer := server.session()
		begin := time.Now()
		f := e.produce(strings.Repeat("x", 100_000))
		st := acceptStream(t, peer)
		time.Sleep(9 * time.Second)
		_, err := st.Read(make([]byte, 1)) // acknowledges TX_START
		require.NoError(t, err)
		time.Sleep(9 * time.Second)
		_, err = io.ReadAll(st)
		require.NoError(t, err)
		require.NoError(t, st.Ack())
		f.wantDelivered(t, "each step came in time")
		require.Equal(t, 18*time.Second, time.Since(begin))

		for _, read := range []bool{false, true} {
			begin = time.Now()
			f = e.produce("late")
			if read {
				readStream(t, peer)
			} else {
				st := acceptStream(t, peer)
				defer func() { _ = st.Close() }()
			}
			err = next(t, f.verdict)
			require.ErrorIs(t, err, cryo.ErrStepTimeout)
			require.ErrorContains(t, err, "timed out after ack_timeout (10s)")
			require.Equal(t, 10*time.Second, time.Since(begin))
			require.NoError(t, peer.Err(), "the session goes on")
		}
	})
}

func TestMessageTooLargeForAFrameIsSentOnlyAsAStream(t *testing.T) {
	atBothOutputs(t, `message_type: '${! @kind.or("stream") }'`, func(t *testing.T, e *engine, peer *cryo.Session) {
		big := strings.Repeat("x", cryo.MaxPayload+1)
		for _, kind := range []string{"utf8", "binary", "auto"} {
			batch := batchOf(big)
			batch[0].MetaSetMut("kind", kind)
			err := next(t, e.produceBatch(batch).verdict)
			require.ErrorContains(t, err, "16777217 bytes", kind)
			require.ErrorContains(t, err, "stream", kind)
		}
		f := e.produce(big)
		st, content := readStream(t, peer)
		require.Len(t, content, len(big))
		require.NoError(t, st.Ack())
		f.wantDelivered(t, "acknowledged")
	})
}

func TestReceivedStreamIsForwardedAsAStreamWithItsName(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		server := e.serve()
		const elsewhere = "192.0.2.3:80"
		e.run(strings.Replace(listenInput, somewhere, elsewhere, 1), dialOutput)
		to := server.session()
		from, err := cryo.Dial(t.Context(), "ws://"+elsewhere, &cryo.DialOptions{Token: token, NetDial: e.net.Dial})
		require.NoError(t, err)
		defer end(from)
		sent := sendStream(from, "orders.csv", "a,b\n1,2\n")
		st, content := readStream(t, to)
		require.Equal(t, "orders.csv", st.Name())
		require.Equal(t, "a,b\n1,2\n", content)
		sent.wantPending(t, "not acknowledged at the far end")
		require.NoError(t, st.Ack())
		sent.wantAcked(t, "acknowledged at the far end")

		m := send(from, "text")
		require.NoError(t, receiveTexts(t, to, "text")[0].Ack())
		m.wantAcked(t, "a message stays one")
	})
}

func TestStreamWithAnInvalidNameFailsAlone(t *testing.T) {
	atBothOutputs(t, asStream+`, stream: { name: '${! json("name") }' }, batching: { count: 4 }`, func(t *testing.T, e *engine, peer *cryo.Session) {
		batch := batchOf(`{"name":"good"}`, `no JSON`, `{"name":"`+strings.Repeat("x", 1025)+`"}`, `{"name":"last"}`)
		f := e.produceEach(batch)
		for _, name := range []string{"good", "last"} {
			st, _ := readStream(t, peer)
			require.Equal(t, name, st.Name())
			require.NoError(t, st.Ack())
		}
		f[0].wantDelivered(t, "acknowledged")
		require.ErrorContains(t, next(t, f[1].verdict), "field stream.name: ")
		require.ErrorContains(t, next(t, f[2].verdict), "1025 bytes, at most 1024")
		f[3].wantDelivered(t, "acknowledged")
	})
}

func TestBroadcastStreamIsDeliveredWhenAllClientsHaveResponded(t *testing.T) {
	toAll(t, asStream, 3, func(t *testing.T, e *engine, clients []*cryo.Session) {
		f := e.produce("news")
		for i, c := range clients {
			f.wantPending(t, "not all have answered")
			st, content := readStream(t, c)
			require.Equal(t, "news", content)
			if i == 1 {
				require.NoError(t, st.Close())
			} else {
				require.NoError(t, st.Ack())
			}
		}
		f.wantDelivered(t, "all have answered, and some have acknowledged")

		f = e.produce("refused")
		for _, c := range clients {
			require.NoError(t, acceptStream(t, c).Close())
		}
		require.ErrorContains(t, next(t, f.verdict), "not acknowledged by any of 3 sessions: ")
	})
}

func TestClientThatAcceptsNoBroadcastStreamIsClosed(t *testing.T) {
	toAll(t, asStream+", ack_timeout: 3s", 2, func(t *testing.T, e *engine, clients []*cryo.Session) {
		f := e.produce("news")
		st, _ := readStream(t, clients[0])
		require.NoError(t, st.Ack())
		f.wantDelivered(t, "one has acknowledged")
		synctest.Wait()
		require.NoError(t, clients[0].Err())
		require.Error(t, clients[1].Err(), "this one did not even take it")
	})
}

func TestReplyStreamIsSentToTheSender(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(listenInput, with(listenOutput, "send_to: session, session_id: '${! @cryo_session_id }'"), "mapping: root = content().uppercase()")
		first, second := e.dial(), e.dial()
		for i, client := range []*cryo.Session{first, second} {
			name := fmt.Sprint("stream ", i)
			sent := sendStream(client, name, "hello")
			st, content := readStream(t, client)
			require.Equal(t, name+" HELLO", st.Name()+" "+content)
			sent.wantPending(t, "the answer is not acknowledged")
			require.NoError(t, st.Ack())
			sent.wantAcked(t, "and now it is")
		}
	})
}

func TestStreamOfALostSessionIsResentOnTheNext(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		server := e.serve()
		e.run(fromFeed, with(dialOutput, asStream))
		f := e.produce("text")
		for range 2 {
			peer := server.session()
			readStream(t, peer)
			f.wantPending(t, "not acknowledged")
			end(peer)
		}
		st, content := readStream(t, server.session())
		require.Equal(t, "text", content)
		require.NoError(t, st.Ack())
		f.wantDelivered(t, "acknowledged")
	})
}

func TestMixedBatchKeepsItsOrder(t *testing.T) {
	atBothOutputs(t, `message_type: '${! if content().has_prefix("s") { "stream" } else { "utf8" } }', stream: { name: '${! content() }' }`, func(t *testing.T, e *engine, peer *cryo.Session) {
		texts := []string{"m0", "m1", "s2", "s3", "m4", "s5", "m6"}
		f := e.produce(texts...)
		for _, text := range texts {
			f.wantPending(t, "not all are acknowledged")
			if text[0] == 's' {
				wantNothing(t, peer)
				st, content := readStream(t, peer)
				require.Equal(t, text, content)
				require.NoError(t, st.Ack())
				continue
			}
			ctx, cancel := context.WithCancel(t.Context())
			cancel()
			_, err := peer.AcceptStream(ctx)
			require.ErrorIs(t, err, context.Canceled, "not yet")
			require.NoError(t, receiveTexts(t, peer, text)[0].Ack())
		}
		f.wantDelivered(t, "all are acknowledged")
	})
}

func TestOutputCancelsStreamsFromItsPeer(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		server := e.serve()
		e.run(fromOnce, dialOutput)
		peer := server.session()
		err := peer.SendStream(t.Context(), strings.NewReader("content"), nil)
		require.ErrorIs(t, err, cryo.ErrStreamCancelled)
		require.NoError(t, peer.Err())
	})
}
