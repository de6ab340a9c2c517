package cryo_test

import (
	"context"
	"errors"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/cryotest"
	"github.com/cryo-connect/cryo-connect/internal/wire"
)

// audience is a server's sessions, and the raw clients at their other ends.
func audience(t *testing.T, ids ...uint64) (sessions []*cryo.Session, peers []*cryotest.Peer) {
	t.Helper()
	_, l, connected := serve(t, cryo.ServerOptions{})
	for _, id := range ids {
		peer := join(t, l, id)
		peer.ClientHandshake()
		sessions, peers = append(sessions, next(t, connected)), append(peers, peer)
	}
	return sessions, peers
}

// broadcast sends messages to several sessions side by side, and returns the errors by
// session.
func broadcast(ctx context.Context, sessions []*cryo.Session, messages []cryo.OutMessage) []error {
	pending := make([]*cryo.Pending, len(sessions))
	for i, s := range sessions {
		pending[i] = s.Queue(messages)
	}
	errs := make([]error, len(sessions))
	for i := range pending {
		errs[i] = pending[i].Wait(ctx)
	}
	return errs
}

func TestBroadcastReturnsWhenEachPeerHasAcknowledged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sessions, peers := audience(t, 1, 2, 3)
		var errs []error
		sending := start(func() error {
			errs = broadcast(t.Context(), sessions, texts("a", "\xff", "b"))
			return nil
		})
		for i, peer := range peers {
			sending.wantBlocked(t)
			for n, text := range []string{"a", "b"} {
				want := cryotest.Text(peer.First+1+uint32(n), text)
				want.SID = sessions[i].ID()
				peer.WantFrame("its own session's frame", want)
				peer.WriteFrames(cryotest.Acked(want.Ack))
			}
		}
		sending.wantSuccess(t)
		for _, err := range errs {
			batch, ok := errors.AsType[*cryo.BatchError](err)
			require.True(t, ok)
			require.NoError(t, batch.Errs[0])
			require.ErrorContains(t, batch.Errs[1], "not valid UTF-8")
			require.NoError(t, batch.Errs[2])
		}
	})
}

func TestRejectionByOneSessionDoesNotAffectAnother(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sessions, peers := audience(t, 1, 2)
		var errs []error
		sending := start(func() error {
			errs = broadcast(t.Context(), sessions, texts("\xff", "a"))
			return nil
		})
		peers[0].WriteFrames(cryotest.Error(peers[0].WantType("a", wire.UTF8).Ack, "no"))
		peers[1].Ack(peers[1].WantType("a", wire.UTF8))
		sending.wantSuccess(t)
		for i, want := range []error{&cryo.RejectedError{Text: "no"}, nil} {
			batch, ok := errors.AsType[*cryo.BatchError](errs[i])
			require.True(t, ok)
			require.ErrorContains(t, batch.Errs[0], "not valid UTF-8")
			require.Equal(t, want, batch.Errs[1])
		}
	})
}

func TestBroadcastReturnsTheResultOfEachSession(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sessions, peers := audience(t, 1, 2, 3, 4, 5)
		cut(sessions[4])
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
		defer cancel()
		var errs []error
		begin := time.Now()
		sending := start(func() error {
			errs = broadcast(ctx, sessions, texts("a"))
			return nil
		})
		for _, peer := range peers[:4] {
			peer.WantType("the text", wire.UTF8)
		}
		peers[0].Conn().Cut()
		peers[2].WriteFrames(cryotest.Error(peers[2].First+1, "no"))
		peers[3].WriteFrames(cryotest.Acked(peers[3].First + 1))
		sending.wantSuccess(t)
		require.Equal(t, 3*time.Second, time.Since(begin))

		require.ErrorIs(t, errs[0], net.ErrClosed, "it has gone")
		require.ErrorIs(t, errs[1], context.DeadlineExceeded, "it was late")
		rejected, ok := errors.AsType[*cryo.RejectedError](errs[2])
		require.True(t, ok)
		require.Equal(t, "no", rejected.Text)
		require.NoError(t, errs[3])
		require.ErrorIs(t, errs[4], net.ErrClosed, "it had gone before")
		require.NoError(t, sessions[1].Err(), "what becomes of a late one is the caller's")
	})
}

func TestSessionThatDoesNotReadBlocksNoOther(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sessions, peers := audience(t, 1, 2)
		peers[0].Conn().StopReading()
		ctx, cancel := context.WithCancel(t.Context())
		large := []cryo.OutMessage{cryo.Binary(make([]byte, 1<<20))}
		broadcasts := make([]*call, 3)
		for i := range broadcasts {
			broadcasts[i] = start(func() error { broadcast(ctx, sessions, large); return nil })
			peers[1].Ack(peers[1].WantType("all of them, at once", wire.Binary))
		}
		for _, b := range broadcasts {
			b.wantBlocked(t)
		}
		cancel()
		for _, b := range broadcasts {
			b.wantSuccess(t)
		}
	})
}

func TestBatchesAreSentInTheOrderOfQueue(t *testing.T) {
	atBothEnds(t, cryo.SessionOptions{}, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		first := s.Queue(texts("a", "b"))
		second := s.Queue(texts("c"))
		for i, text := range []string{"a", "b", "c"} {
			peer.WantFrame("in order", cryotest.Text(end.first+uint32(i), text))
		}
		peer.WriteFrames(cryotest.Acked(end.first + 2))
		require.NoError(t, second.Wait(t.Context()))
		waiting := start(func() error { return first.Wait(t.Context()) })
		waiting.wantBlocked(t)
		peer.WriteFrames(cryotest.Acked(end.first), cryotest.Error(end.first+1, "no"))
		batch, ok := errors.AsType[*cryo.BatchError](waiting.result(t))
		require.True(t, ok)
		require.Equal(t, []error{nil, &cryo.RejectedError{Text: "no"}}, batch.Errs)
		cut(s)
		require.ErrorIs(t, s.Queue(texts("d")).Wait(t.Context()), net.ErrClosed)
	})
}
