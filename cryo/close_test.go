package cryo_test

import (
	"context"
	"errors"
	"net"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/cryotest"
	"github.com/cryo-connect/cryo-connect/internal/wire"
)

func TestCloseWritesTheQueueThenByeAndWaitsForThePeer(t *testing.T) {
	atBothEnds(t, cryo.SessionOptions{}, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		peer.WriteFrames(cryotest.Text(1, ""), cryotest.Text(2, ""), cryotest.Text(3, "never acknowledged"))
		synctest.Wait()
		batch, err := s.ReceiveBatch(t.Context(), 3)
		require.NoError(t, err)
		require.NoError(t, cryo.AckBatch([]*cryo.Message{batch[0], batch[1]}))
		require.NoError(t, s.Err())
		closing := start(func() error { return s.Close(t.Context(), "that's all") })
		<-s.Context().Done()

		peer.WantFrame("an acknowledgement", cryotest.Acked(1))
		peer.WantFrame("an acknowledgement", cryotest.Acked(2))
		peer.WantFrame("BYE", cryotest.Bye(end.first, "that's all"))
		peer.WantClose("the end", 4000, "that's all")
		buf := make([]byte, 1)
		_, err = peer.Conn().Read(buf)
		require.EqualError(t, err, "EOF", "the connection is half-closed")

		closing.wantBlocked(t)
		peer.WriteFrames(cryotest.Acked(end.first), cryotest.Text(4, "discarded"), cryotest.Ping(5))
		require.ErrorIs(t, batch[2].Ack(), cryo.ErrClosed)
		require.ErrorIs(t, s.SendText(t.Context(), "too late"), cryo.ErrClosed)
		closing.wantBlocked(t)
		require.NoError(t, peer.WS.Close())
		closing.wantSuccess(t)

		wantEnded(t, s)
		require.EqualError(t, s.Err(), "session ended: closed by this end")
		require.ErrorIs(t, s.Err(), cryo.ErrClosed)
		require.ErrorIs(t, s.Err(), net.ErrClosed)
		_, err = s.Receive(t.Context())
		require.ErrorIs(t, err, cryo.ErrClosed, "what came after Close is discarded")
	})
}

func TestAcknowledgementDuringTheCloseHandshakeCounts(t *testing.T) {
	atBothEnds(t, cryo.SessionOptions{}, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		send := start(func() error { return s.SendBatch(t.Context(), texts("a", "b")) })
		peer.WantType("a", wire.UTF8)
		peer.WantType("b", wire.UTF8)
		closing := start(func() error { return s.Close(t.Context(), "") })
		peer.WantFrame("BYE", cryotest.Bye(end.first+2, ""))
		peer.WantClose("the end", 4000, "")
		send.wantBlocked(t)
		peer.WriteFrames(cryotest.Acked(end.first))
		peer.WriteClose(4000, "")
		closing.wantSuccess(t)
		batch, ok := errors.AsType[*cryo.BatchError](send.result(t))
		require.True(t, ok)
		require.NoError(t, batch.Errs[0])
		require.ErrorIs(t, batch.Errs[1], cryo.ErrClosed)
	})
}

func TestCloseMayBeCalledAgain(t *testing.T) {
	atBothEnds(t, cryo.SessionOptions{}, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		first := start(func() error { return s.Close(t.Context(), "first") })
		peer.WantFrame("BYE", cryotest.Bye(end.first, "first"))
		peer.WantClose("the end", 4000, "first")
		second := start(func() error { return s.Close(t.Context(), "second") })
		second.wantBlocked(t)
		require.NoError(t, peer.WS.Close())
		first.wantSuccess(t)
		second.wantSuccess(t)
		require.NoError(t, s.Close(t.Context(), "third"))
	})
}

func TestCloseIsBoundedByItsTimeout(t *testing.T) {
	opts := cryo.SessionOptions{CloseTimeout: 3 * time.Second}
	for name, prepare := range map[string]func(*cryotest.Peer){
		"that doesn't close": func(peer *cryotest.Peer) { peer.Read() },
		"that doesn't read":  func(peer *cryotest.Peer) { peer.Conn().StopReading() },
		"that is gone":       func(peer *cryotest.Peer) { peer.Conn().Freeze() },
	} {
		t.Run(name, func(t *testing.T) {
			atBothEnds(t, opts, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
				prepare(peer)
				send := start(func() error { return s.SendBinary(t.Context(), make([]byte, 1<<20)) })
				send.wantBlocked(t)
				begin := time.Now()
				require.NoError(t, s.Close(t.Context(), ""))
				require.Equal(t, 3*time.Second, time.Since(begin))
				require.ErrorIs(t, send.result(t), cryo.ErrClosed)
			})
		})
	}
}

func TestCloseIsBoundedByItsContext(t *testing.T) {
	atBothEnds(t, cryo.SessionOptions{}, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		begin := time.Now()
		require.Equal(t, context.DeadlineExceeded, s.Close(ctx, ""))
		require.Equal(t, time.Second, time.Since(begin))
		wantEnded(t, s)
		require.ErrorIs(t, s.Err(), cryo.ErrClosed)
	})
}

func TestCloseDoesNotWaitForCapacity(t *testing.T) {
	atBothEnds(t, smallBuffer, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		fill(t, s, peer)
		closing := start(func() error { return s.Close(t.Context(), "") })
		peer.WantFrame("BYE", cryotest.Bye(end.first, ""))
		peer.WriteClose(4000, "")
		begin := time.Now()
		closing.wantSuccess(t)
		require.Zero(t, time.Since(begin))
	})
}

func TestCloseReasonsAreTruncated(t *testing.T) {
	for name, c := range map[string]struct{ reason, sent string }{
		"of the maximum length": {strings.Repeat("x", 123), strings.Repeat("x", 123)},
		"too long":              {strings.Repeat("x", 124), strings.Repeat("x", 123)},
		"within a rune":         {strings.Repeat("x", 121) + "€", strings.Repeat("x", 121)},
		"not UTF-8":             {"not \xff text", "not \uFFFD text"},
	} {
		t.Run(name, func(t *testing.T) {
			atBothEnds(t, cryo.SessionOptions{}, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
				closing := start(func() error { return s.Close(t.Context(), c.reason) })
				peer.WantFrame("BYE", cryotest.Bye(end.first, c.sent))
				peer.WantClose("the end", 4000, c.sent)
				require.NoError(t, peer.WS.Close())
				closing.wantSuccess(t)
			})
		})
	}
}

func TestByeOfThePeerIsAcknowledgedAndAnswered(t *testing.T) {
	atBothEnds(t, cryo.SessionOptions{}, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		peer.WriteFrames(cryotest.Text(1, ""))
		require.NoError(t, receive(t, s).Ack())
		peer.WriteFrames(cryotest.Bye(9, "sch\xc3\xb6n\xff war es\x00\x00"))
		peer.WantFrame("the acknowledgement of the text", cryotest.Acked(1))
		peer.WantFrame("the acknowledgement of BYE", cryotest.Acked(9))
		peer.WantClose("the end", 4000, "")
		synctest.Wait()
		closed, ok := errors.AsType[*cryo.PeerClosedError](s.Err())
		require.True(t, ok)
		require.Equal(t, &cryo.PeerClosedError{Reason: "schön\uFFFD war es"}, closed)
		require.EqualError(t, s.Err(), `session ended: closed by the peer: "schön`+"\uFFFD"+` war es"`)

		peer.WriteClose(4000, "sch")
		wantEnded(t, s)
	})
}

func TestPeerThatSendsByeAndNeverClosesIsDisconnected(t *testing.T) {
	atBothEnds(t, cryo.SessionOptions{CloseTimeout: 2 * time.Second}, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		begin := time.Now()
		peer.WriteFrames(cryotest.Bye(9, strings.Repeat("x", 200_000)))
		wantEnded(t, s)
		require.Equal(t, 2*time.Second, time.Since(begin))
		require.Less(t, len(s.Err().Error()), 2000, "the reason is not repeated at length")
	})
}

func TestPeerMayCloseWithoutBye(t *testing.T) {
	atBothEnds(t, cryo.SessionOptions{}, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		peer.WriteFrames(cryotest.Text(1, ""))
		m := receive(t, s)
		peer.Conn().StopReading()
		stuck := start(func() error { return s.SendBinary(t.Context(), make([]byte, 1<<20)) })
		stuck.wantBlocked(t)
		require.NoError(t, m.Ack())
		peer.WriteClose(4000, "Client finished.") // as cryo-client-node does
		synctest.Wait()
		peer.Conn().ReadOn()
		peer.WantType("what was being written", wire.Binary)
		peer.WantFrame("the acknowledgement that was queued", cryotest.Acked(1))
		peer.WantClose("the end, by the same code", 4000, "")
		require.EqualError(t, wantEnded(t, s), `session ended: closed by the peer with code 4000: "Client finished."`)
		require.ErrorIs(t, stuck.result(t), net.ErrClosed)
	})
}

func TestPeerMayCloseWithoutACode(t *testing.T) {
	atBothEnds(t, cryo.SessionOptions{}, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		peer.WriteClose(websocket.CloseNoStatusReceived, "")
		peer.WantClose("the end", websocket.CloseNormalClosure, "")
		require.EqualError(t, wantEnded(t, s), "session ended: closed by the peer with code 1005")
	})
}

func TestConnectionCanBeLost(t *testing.T) {
	for name, lose := range map[string]func(*cryotest.Peer){
		"reset":            func(peer *cryotest.Peer) { peer.Conn().Cut() },
		"closed":           func(peer *cryotest.Peer) { _ = peer.Conn().Close() },
		"within a message": func(peer *cryotest.Peer) { _, _ = peer.Conn().Write([]byte{0x82}); _ = peer.Conn().Close() },
	} {
		t.Run(name, func(t *testing.T) {
			atBothEnds(t, cryo.SessionOptions{}, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
				lose(peer)
				err := wantEnded(t, s)
				require.ErrorContains(t, err, "session ended: connection lost: ")
				require.ErrorIs(t, err, net.ErrClosed)
				_, broken := errors.AsType[*cryo.ProtocolError](err)
				require.False(t, broken)
				require.NoError(t, s.Close(t.Context(), ""))
			})
		})
	}
}

// TestConcurrentEndsHaveOneCause is for the race detector.
func TestConcurrentEndsHaveOneCause(t *testing.T) {
	for range 20 {
		atBothEnds(t, cryo.SessionOptions{CloseTimeout: time.Second}, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
			peer.Read()
			var all sync.WaitGroup
			var messages []*cryo.Message
			for i := range uint32(20) {
				peer.WriteFrames(cryotest.Text(i, ""))
				messages = append(messages, receive(t, s))
			}
			for i := range 4 {
				all.Go(func() {
					for j := range 5 {
						_ = messages[5*i+j].Ack()
					}
				})
				all.Go(func() {
					ctx, cancel := context.WithTimeout(t.Context(), time.Second)
					defer cancel()
					_ = s.SendBatch(ctx, texts("a", "b", "c"))
				})
				all.Go(func() { _, _ = s.Receive(t.Context()) })
				all.Go(func() { _ = s.Close(t.Context(), "") })
				all.Go(func() { s.SetSendOnly(i%2 == 0) })
			}
			all.Go(func() {
				_ = peer.TryWriteFrames(cryotest.Text(99, ""), cryotest.Ping(1), cryotest.Bye(100, ""))
				_ = peer.WS.Close()
			})
			all.Wait()
			wantEnded(t, s)
		})
	}
}
