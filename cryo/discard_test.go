package cryo_test

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/cryotest"
)

func TestDiscardReleasesMessagesOfClosedSessions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, l, sessions := serve(t, cryo.ServerOptions{SessionOptions: cryo.SessionOptions{MaxBufferBytes: 1 << 20}})
		for i, n := range []uint32{31, 31, 31, 9, 1} {
			peer := join(t, l, sid+uint64(i))
			peer.ClientHandshake()
			s := next(t, sessions)
			for j := range n {
				peer.WriteFrames(cryotest.Binary(j, string(make([]byte, 10_000))))
			}
			synctest.Wait()
			cut(s)
			require.NotZero(t, s.Held())
			s.Discard()
			require.Zero(t, s.Held())
			_, err := s.Receive(t.Context())
			require.ErrorIs(t, err, cryo.ErrClosed)
		}
		peer := join(t, l, sid+10)
		peer.ClientHandshake()
		s := next(t, sessions)
		peer.WriteFrames(cryotest.Text(1000, "hello"))
		require.Equal(t, "hello", string(receive(t, s).Payload), "the memory is free for others")
		require.False(t, s.Stats().Paused)
	})
}

func TestDiscardDropsLaterMessages(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		peer.WriteFrames(cryotest.Text(1, "received by the application"), cryotest.Text(2, "in the queue"))
		m := receive(t, s)
		synctest.Wait()
		s.Discard()
		s.Discard()
		require.NoError(t, m.Ack(), "what the application has is its own to answer")
		peer.WantFrame("of the one that it has", cryotest.Acked(1))
		peer.WriteFrames(cryotest.Text(3, "late"))
		peer.WantIdle("no answer", time.Minute)
		require.Zero(t, s.Held())

		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, err := s.Receive(ctx)
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.NoError(t, s.Err())
	})
}

func TestServerWithoutOnSessionReleasesEndedSessions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var heldAtEnd int64
		server := newServer(t, cryo.ServerOptions{
			Authorize:    cryo.Tokens(token),
			OnSessionEnd: func(s *cryo.Session) { heldAtEnd = s.Held() },
		})
		peer := join(t, cryotest.Serve(t, server), sid)
		peer.ClientHandshake()
		synctest.Wait()
		s, ok := server.Session(sid)
		require.True(t, ok)
		peer.WriteFrames(cryotest.Text(1, "taken by nobody"))
		synctest.Wait()
		require.NotZero(t, s.Held())
		cut(s)
		synctest.Wait() // OnSessionEnd follows Done
		require.NotZero(t, heldAtEnd, "OnSessionEnd may still take it")
		require.Zero(t, s.Held())
	})
}
