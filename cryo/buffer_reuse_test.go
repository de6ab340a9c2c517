package cryo_test

import (
	"strings"
	"testing"
	"testing/synctest"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/cryotest"
	"github.com/cryo-connect/cryo-connect/internal/wire"
)

// What nobody keeps gives its memory back. That must never be the memory of a
// message that came before it.
func TestMessageMemoryIsNotReusedByLaterFrames(t *testing.T) {
	for name, dropped := range map[string][]wire.Frame{
		"chunks of no stream": {
			{Type: wire.TxChunk, Tx: 1, Seq: 0, Payload: make([]byte, cryo.DefaultChunkBytes)},
			{Type: wire.TxChunk, Tx: 1, Seq: 1, Payload: make([]byte, cryo.DefaultChunkBytes)},
		},
		"small frames": {cryotest.Ping(1), cryotest.Acked(1), cryotest.Ping(2)},
		"nothing":      nil,
	} {
		t.Run(name, func(t *testing.T) {
			atBothEnds(t, cryo.SessionOptions{}, func(t *testing.T, _ end, s *cryo.Session, peer *cryotest.Peer) {
				peer.Read()
				var kept []*cryo.Message
				for i, text := range []string{"short", strings.Repeat("long ", 50), "", "next", strings.Repeat("x", 20_000), "last"} {
					peer.WriteFrames(cryotest.Text(uint32(100+i), text))
					kept = append(kept, receive(t, s))
					peer.WriteFrames(dropped...)
					synctest.Wait()
				}
				var got []string
				for _, m := range kept {
					got = append(got, string(m.Payload))
				}
				require.Equal(t, []string{"short", strings.Repeat("long ", 50), "", "next", strings.Repeat("x", 20_000), "last"}, got)
			})
		})
	}
}

// While the receive buffer is full, a large frame is skipped, and has no
// memory: the frame before it keeps what it has.
func TestMessageMemoryIsNotReusedByADiscardedFrame(t *testing.T) {
	opts := quiet
	opts.MaxBufferBytes = 2000
	atBothEnds(t, opts, func(t *testing.T, _ end, s *cryo.Session, peer *cryotest.Peer) {
		answer := start(func() error { return s.SendText(t.Context(), "waits for its acknowledgement") })
		text := peer.WantType("ours", wire.UTF8)
		release := s.Reserve(1600)
		peer.WriteFrames(
			cryotest.Text(1000, strings.Repeat("A", 300)),     // taken
			cryotest.Text(1001, strings.Repeat("B", 100_000)), // skipped
			cryotest.Text(1002, strings.Repeat("C", 300)),     // rejected
		)
		m := receive(t, s)
		wantAmongPongs(t, peer, cryotest.Error(1001, bufferFull))
		wantAmongPongs(t, peer, cryotest.Error(1002, bufferFull))
		require.Equal(t, strings.Repeat("A", 300), string(m.Payload))
		release()
		peer.Ack(text)
		answer.wantSuccess(t)
		require.NoError(t, m.Ack())
	})
}

func TestStreamMemoryIsNotReusedByADiscardedMessage(t *testing.T) {
	opts := quiet
	opts.MaxBufferBytes = 90_000
	atBothEnds(t, opts, func(t *testing.T, _ end, s *cryo.Session, peer *cryotest.Peer) {
		st := incoming(t, s, peer, 1, 0)
		answer := start(func() error { return s.SendText(t.Context(), "waits for its acknowledgement") })
		text := peer.WantType("ours", wire.UTF8)
		release := s.Reserve(79_800)
		peer.WriteFrames(
			txChunk(0, 1, strings.Repeat("A", 300)),           // taken
			cryotest.Text(1001, strings.Repeat("B", 100_000)), // skipped
			cryotest.Text(1002, strings.Repeat("C", 200)),     // rejected
			txFinish(1003, 0),
		)
		wantAmongPongs(t, peer, cryotest.Error(1001, bufferFull))
		wantAmongPongs(t, peer, cryotest.Error(1002, bufferFull))
		release()
		peer.Ack(text)
		answer.wantSuccess(t)
		require.NoError(t, wantRest(t, st, strings.Repeat("A", 300)))
		require.NoError(t, st.Ack())
		wantAmongPongs(t, peer, cryotest.Acked(1003))
	})
}
