package cryo_test

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/cryotest"
	"github.com/cryo-connect/cryo-connect/internal/wire"
)

func TestNumbersStartAtARandomValueInTheRangeOfTheirSide(t *testing.T) {
	const mask = 1<<30 - 1
	seen := make(map[uint32]bool)
	for range 20 {
		atBothEnds(t, quiet, func(t *testing.T, end end, _ *cryo.Session, peer *cryotest.Peer) {
			seen[peer.First] = true
			if end.dialled {
				require.Equal(t, dialledFrom, peer.First&^mask)
			} else {
				require.Equal(t, acceptedFrom, peer.First&^mask)
			}
		})
	}
	require.Len(t, seen, 40)
}

// A peer that answers on a new connection what it got on the one before answers nothing.
func TestAnswersToAPreviousConnectionMatchNoFrame(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		opts := quiet
		opts.CloseTimeout = time.Second
		_, l, sessions := serve(t, cryo.ServerOptions{SessionOptions: opts})
		old := join(t, l, sid)
		old.ClientHandshake()
		lost := next(t, sessions)
		first := start(func() error { return lost.SendBatch(t.Context(), texts("a", "b", "c")) })
		var numbers []uint32
		for range 3 {
			numbers = append(numbers, old.WantType("a text", wire.UTF8).Ack)
		}
		old.Conn().Cut()
		require.Error(t, first.result(t))

		peer := join(t, l, sid)
		peer.ClientHandshake()
		s := next(t, sessions)
		again := start(func() error { return s.SendBatch(t.Context(), texts("a", "b", "c")) })
		var frames []wire.Frame
		for range 3 {
			frames = append(frames, peer.WantType("a text", wire.UTF8))
		}
		for _, n := range numbers {
			peer.WriteFrames(cryotest.Acked(n))
		}
		again.wantBlocked(t)
		require.Equal(t, 3, s.Awaited())
		require.NoError(t, s.Err())
		peer.Ack(frames...)
		again.wantSuccess(t)
	})
}
