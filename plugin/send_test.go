package plugin

import (
	"bytes"
	"fmt"
	"math"
	"testing"
	"testing/synctest"
	"time"

	"github.com/redpanda-data/benthos/v4/public/service"
	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
)

func TestMessageIsDeliveredWhenTheServerHasAcknowledgedIt(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		server := e.serve()
		p := e.run(fromOnce, dialOutput)
		peer := server.session()
		f := e.produce("hello")
		m := receive(t, peer)
		f.wantPending(t, "not acknowledged yet")
		require.NoError(t, m.Ack())
		f.wantDelivered(t, "acknowledged")

		p.stop()
		var closed *cryo.PeerClosedError
		require.ErrorAs(t, peer.Err(), &closed, "it says BYE")
	})
}

func TestUnacknowledgedMessageFailsItsBatch(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		server := e.serve()
		e.run(fromOnce, with(dialOutput, "ack_timeout: 3s"))
		peer := server.session()
		begin := time.Now()
		f := e.produce(numbered("m%d", 4)...)
		m := receiveTexts(t, peer, numbered("m%d", 4)...)
		require.NoError(t, m[0].Ack())
		require.NoError(t, m[1].Reject("not today"))
		require.NoError(t, m[2].Ack())
		f.wantFailed(t, `2 of 4 messages were not acknowledged, first error: rejected by the peer: "not today"`)
		require.Equal(t, 3*time.Second, time.Since(begin), "everything was awaited first")
		require.NoError(t, peer.Err(), "the session goes on")

		// Too late, and taken for no other message's.
		require.NoError(t, m[3].Ack())
		f = e.produce("next")
		m = receiveTexts(t, peer, "next")
		f.wantPending(t, "not acknowledged yet")
		require.NoError(t, m[0].Ack())
		f.wantDelivered(t, "acknowledged")
	})
}

func TestMessageTypeFollowsTheFieldAndTheMetadata(t *testing.T) {
	for _, tt := range []struct {
		messageType, received, payload string
		want                           cryo.Kind
	}{
		{"auto", "", "text", cryo.KindText},
		{"auto", "", "", cryo.KindText},
		{"auto", "", "\xff\xfe", cryo.KindBinary},
		{"auto", "binary", "text", cryo.KindBinary},
		{"auto", "utf8", "text", cryo.KindText},
		{"auto", "utf8", "\xff now compressed", cryo.KindBinary},
		{"auto", "error", "text", cryo.KindText},
		{"utf8", "binary", "text", cryo.KindText},
		{"binary", "utf8", "text", cryo.KindBinary},
		{"binary", "", "", cryo.KindBinary},
		{"${! @kind }", "", "text", cryo.KindBinary},
	} {
		t.Run(fmt.Sprintf("%s, received as %q, %q", tt.messageType, tt.received, tt.payload), func(t *testing.T) {
			inEngine(t, func(t *testing.T, e *engine) {
				server := e.serve()
				e.run(fromOnce, with(dialOutput, `message_type: "`+tt.messageType+`"`))
				batch := batchOf(tt.payload)
				batch[0].MetaSet("kind", "binary")
				if tt.received != "" {
					batch[0].MetaSet("cryo_message_type", tt.received)
				}
				f := e.produceBatch(batch)
				m := receive(t, server.session())
				require.Equal(t, tt.want, m.Kind)
				require.Equal(t, tt.payload, string(m.Payload))
				require.NoError(t, m.Ack())
				f.wantDelivered(t, "acknowledged")
			})
		})
	}
}

func TestUnsendableMessageFailsAfterAllOthersAreAcknowledged(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		server := e.serve()
		e.run(fromOnce, with(dialOutput, `message_type: '${! metadata("kind").or("utf8") }', batching: { count: 6 }`))
		peer := server.session()
		batch := batchOf("good", "\xff", "unknown", string(bytes.Repeat([]byte("x"), cryo.MaxPayload+1)), "good too", "")
		batch[2].MetaSet("kind", "text")
		batch[5].MetaSetMut("kind", nil)
		f := e.produceEach(batch)
		for _, m := range receiveTexts(t, peer, "good", "good too", "") {
			require.NoError(t, m.Ack())
		}
		f.wantFailed(t, map[int]string{
			1: "text of 1 bytes is not valid UTF-8: send it as binary",
			2: `field message_type: unknown message type "text": it must be auto, utf8, binary or stream`,
			3: "message of 16777217 bytes is too large: one frame carries at most 16 MiB, send larger data as a stream",
		})
		wantNothing(t, peer)
	})
}

func TestFailedInterpolationOfMessageTypeFailsTheMessage(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		server := e.serve()
		e.run(fromOnce, with(dialOutput, `message_type: '${! throw("who knows") }'`))
		server.session()
		err := next(t, e.produce("m").verdict)
		require.ErrorContains(t, err, "field message_type: ")
		require.ErrorContains(t, err, "who knows")
	})
}

func TestOutputRejectsMessagesFromTheServer(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		server := e.serve()
		e.run(fromOnce, dialOutput)
		send(server.session(), "for whom?").wantRejected(t, "this session receives no messages")
	})
}

func TestWriteBatchWithoutASessionReturnsErrNotConnected(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		server := e.serve()
		out := e.bareOutput("")
		require.ErrorIs(t, out.WriteBatch(t.Context(), batchOf("m")), service.ErrNotConnected)
		require.NoError(t, out.Connect(t.Context()))
		server.session()
		synctest.Wait()
		e.net.cut()
		synctest.Wait()
		require.ErrorIs(t, out.WriteBatch(t.Context(), batchOf("m")), service.ErrNotConnected)
		require.ErrorIs(t, out.WriteBatch(t.Context(), batchOf("m")), service.ErrNotConnected)
		require.Equal(t, 1, e.log.count("Disconnected"))
		require.NoError(t, out.Close(t.Context()))
	})
}

func TestContentThatJSONCannotRepresentIsNotSent(t *testing.T) {
	atBothOutputs(t, "", func(t *testing.T, e *engine, peer *cryo.Session) {
		batch := batchOf("")
		batch[0].SetStructuredMut(map[string]any{"name": "a", "degrees": math.NaN()})
		require.ErrorContains(t, next(t, e.produceBatch(batch).verdict), "JSON cannot represent")
		wantNothing(t, peer)
		e.produce("").wantPending(t, "one that is empty is sent")
		require.Empty(t, receive(t, peer).Payload)
	})
}
