package cryo_test

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/cryotest"
	"github.com/cryo-connect/cryo-connect/internal/wire"
)

func TestMessagesAreReceivedInOrder(t *testing.T) {
	atBothEnds(t, cryo.SessionOptions{}, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		peer.WriteFrames(
			cryotest.Text(3, "grüße"), cryotest.Binary(1, "\x00\xff"), cryotest.Text(4, ""),
			cryotest.Text(1<<32-1, "not \xff text"), cryotest.Binary(0, ""),
		)
		for _, want := range []struct {
			kind    cryo.Kind
			number  uint32
			payload string
		}{
			{cryo.KindText, 3, "grüße"},
			{cryo.KindBinary, 1, "\x00\xff"},
			{cryo.KindText, 4, ""},
			{cryo.KindText, 1<<32 - 1, "not \xff text"},
			{cryo.KindBinary, 0, ""},
		} {
			m := receive(t, s)
			require.Equal(t, want.kind, m.Kind)
			require.Equal(t, want.number, m.Number())
			require.Equal(t, want.payload, string(m.Payload))
			require.Same(t, s, m.Session())
		}
		peer.WantIdle("no acknowledgement of what nobody has settled", instant)
	})
}

func TestReceiveBatchReturnsTheQueueUpToItsLimit(t *testing.T) {
	atBothEnds(t, cryo.SessionOptions{}, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		for i := range uint32(10) {
			peer.WriteFrames(cryotest.Text(i, fmt.Sprint(i)))
		}
		synctest.Wait()
		var got []string
		for _, limit := range []int{4, 0, -1, 100} {
			batch, err := s.ReceiveBatch(t.Context(), limit)
			require.NoError(t, err)
			line := ""
			for i := range batch {
				line += string(batch[i].Payload)
			}
			got = append(got, line)
		}
		require.Equal(t, []string{"0123", "4", "5", "6789"}, got)
	})
}

func TestReceiveWaitsNoLongerThanItsContext(t *testing.T) {
	atBothEnds(t, cryo.SessionOptions{}, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, err := s.Receive(ctx)
		require.Equal(t, context.DeadlineExceeded, err)

		peer.WriteFrames(cryotest.Text(0, "still there"))
		require.Equal(t, "still there", string(receive(t, s).Payload))
	})
}

func TestConcurrentReceives(t *testing.T) {
	atBothEnds(t, cryo.SessionOptions{}, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		const messages = 2000
		var (
			seen      sync.Map
			received  atomic.Int32
			receiving sync.WaitGroup
		)
		for i := range 10 {
			receiving.Go(func() {
				for {
					batch, err := s.ReceiveBatch(t.Context(), 1+i)
					if err != nil {
						return
					}
					for i := range batch {
						seen.Store(string(batch[i].Payload), true)
						received.Add(1)
						_ = batch[i].Ack()
					}
				}
			})
		}
		for i := range uint32(messages) {
			peer.WriteFrames(cryotest.Text(i, fmt.Sprint(i)))
		}
		acked := map[uint32]bool{}
		for range messages {
			acked[peer.WantType("an acknowledgement", wire.Ack).Ack] = true
		}
		require.Len(t, acked, messages)
		peer.WriteClose(4000, "")
		receiving.Wait()
		distinct := 0
		seen.Range(func(any, any) bool { distinct++; return true })
		require.Equal(t, messages, distinct)
		require.EqualValues(t, messages, received.Load())
	})
}

func TestAckRejectAndAckBatchOnTheWire(t *testing.T) {
	atBothEnds(t, cryo.SessionOptions{}, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		peer.WriteFrames(cryotest.Text(10, "a"), cryotest.Text(11, "b"), cryotest.Text(12, "c"), cryotest.Text(13, "d"))
		synctest.Wait()
		batch, err := s.ReceiveBatch(t.Context(), 10)
		require.NoError(t, err)

		require.NoError(t, batch[1].Ack())
		peer.WantFrame("the acknowledgement of b", cryotest.Acked(11))
		require.NoError(t, batch[3].Reject("disk full"))
		peer.WantFrame("the rejection of d", cryotest.Error(13, "disk full"))
		require.NoError(t, cryo.AckBatch([]*cryo.Message{batch[2], batch[1], batch[0], batch[3]}))
		peer.WantFrame("the acknowledgement of c", cryotest.Acked(12))
		peer.WantFrame("the acknowledgement of a", cryotest.Acked(10))
		peer.WantIdle("nothing for what was settled before", instant)

		for i := range batch {
			require.NoError(t, batch[i].Ack())
			require.NoError(t, batch[i].Reject("again"))
		}
		require.NoError(t, cryo.AckBatch([]*cryo.Message{batch[0], batch[1]}))
		require.NoError(t, cryo.AckBatch(nil))
		peer.WantIdle("nothing for what is settled twice", instant)
	})
}

func TestFirstSettlementCounts(t *testing.T) {
	atBothEnds(t, cryo.SessionOptions{}, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		var settling sync.WaitGroup
		for i := range uint32(100) {
			peer.WriteFrames(cryotest.Text(i, ""))
			m := receive(t, s)
			for range 3 {
				settling.Go(func() { _ = m.Ack() })
				settling.Go(func() { _ = m.Reject("no") })
				settling.Go(func() { _ = cryo.AckBatch([]*cryo.Message{m, m}) })
			}
		}
		settling.Wait()
		synctest.Wait()
		require.Equal(t, 100, peer.Skip(), "one answer for each")
	})
}

func TestMessageInTwoSlicesIsSettledOnce(t *testing.T) {
	for _, size := range []uint32{1, 3} { // of the batch
		for name, settle := range map[string]func(*cryo.Message) error{
			"Ack":      (*cryo.Message).Ack,
			"Reject":   func(m *cryo.Message) error { return m.Reject("no") },
			"AckBatch": func(m *cryo.Message) error { return cryo.AckBatch([]*cryo.Message{m, m}) },
		} {
			t.Run(fmt.Sprint(name, " in a batch of ", size), func(t *testing.T) {
				atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
					for i := range size {
						peer.WriteFrames(cryotest.Text(i, "x"))
					}
					synctest.Wait()
					batch, err := s.ReceiveBatch(t.Context(), 10)
					require.NoError(t, err)
					slices.Reverse(batch) // to whoever has the slice, it may be sorted, too
					for _, m := range batch {
						again := m
						require.NoError(t, settle(m))
						require.NoError(t, again.Ack())
						require.NoError(t, again.Reject("again"))
					}
					for i := range batch {
						require.NoError(t, batch[i].Reject("again"))
						require.NoError(t, batch[i].Ack())
						require.NoError(t, cryo.AckBatch([]*cryo.Message{batch[i]}))
					}
					for i := range size {
						if f := peer.Next("an answer"); name == "Reject" {
							require.Equal(t, wire.Error, f.Type)
							require.Equal(t, "no", string(f.Payload))
						} else {
							require.Equal(t, wire.Ack, f.Type)
							require.Equal(t, size-1-i, f.Ack)
						}
					}
					peer.WantIdle("one each", instant)
					require.Zero(t, s.Held())
				})
			})
		}
	}
}

func TestMessagesOfABatchAreSettledOneByOne(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		peer.WriteFrames(cryotest.Text(0, "a"), cryotest.Text(1, "b"), cryotest.Text(2, "c"))
		synctest.Wait()
		batch, err := s.ReceiveBatch(t.Context(), 10)
		require.NoError(t, err)
		require.Len(t, batch, 3)
		for _, i := range []uint32{1, 2, 0} {
			require.NoError(t, batch[i].Ack())
			peer.WantFrame("its own acknowledgement", cryotest.Acked(i))
		}
	})
}

func TestNoMoreIsReleasedThanIsHeld(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, l, sessions := serve(t, cryo.ServerOptions{SessionOptions: bounded()})
		first, second := join(t, l, 1), join(t, l, 2)
		first.ClientHandshake()
		one := next(t, sessions)
		second.ClientHandshake()
		other := next(t, sessions)
		releaseOther := other.Reserve(1000)
		release, releaseNothing := one.Reserve(10), one.Reserve(-5)
		releaseNothing()
		require.Equal(t, int64(10), one.Held())
		release()
		release()
		require.Zero(t, one.Held())
		require.Equal(t, int64(1000), other.Held())
		releaseOther()
		wantFree(t, one, first, 90_000, 0)
	})
}

func TestOneBatchAcknowledgesMessagesOfManySessions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, peerOfA := dialled(t, cryo.DialOptions{})
		b, peerOfB := dialled(t, cryo.DialOptions{})
		ended, peerOfEnded := dialled(t, cryo.DialOptions{})
		var batch []*cryo.Message
		for i := range uint32(2) {
			peerOfA.WriteFrames(cryotest.Text(1+i, "a"))
			peerOfB.WriteFrames(cryotest.Text(5+i, "b"))
			peerOfEnded.WriteFrames(cryotest.Text(9+i, "c"))
			batch = append(batch, receive(t, a), receive(t, b), receive(t, ended))
		}
		peerOfEnded.WriteClose(4000, "")
		wantEnded(t, ended)
		require.ErrorIs(t, cryo.AckBatch(batch), net.ErrClosed)
		peerOfA.WantFrame("a's first", cryotest.Acked(1))
		peerOfA.WantFrame("a's second", cryotest.Acked(2))
		peerOfB.WantFrame("b's first", cryotest.Acked(5))
		peerOfB.WantFrame("b's second", cryotest.Acked(6))
	})
}

func TestQueueIsReceivedAfterTheEndBeforeTheCause(t *testing.T) {
	atBothEnds(t, cryo.SessionOptions{}, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		peer.WriteFrames(cryotest.Text(1, "a"), cryotest.Text(2, "b"))
		peer.WriteClose(4000, "Client finished.")
		cause := wantEnded(t, s)
		require.EqualError(t, cause, `session ended: closed by the peer with code 4000: "Client finished."`)

		m := receive(t, s)
		require.Equal(t, "a", string(m.Payload))
		require.Equal(t, cause, m.Ack(), "too late to acknowledge it")
		require.NoError(t, m.Ack(), "it is settled")
		m = receive(t, s)
		require.Equal(t, "b", string(m.Payload))
		require.Equal(t, cause, m.Reject("no"))
		for range 2 {
			_, err := s.Receive(t.Context())
			require.Equal(t, cause, err)
			require.ErrorIs(t, err, net.ErrClosed)
		}
	})
}

func TestEndWakesAllReceivers(t *testing.T) {
	atBothEnds(t, cryo.SessionOptions{}, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		var calls []*call
		for range 3 {
			calls = append(calls, start(func() error {
				_, err := s.Receive(t.Context())
				return err
			}))
		}
		synctest.Wait()
		peer.Conn().Cut()
		for _, c := range calls {
			require.ErrorIs(t, c.result(t), net.ErrClosed)
		}
	})
}

func TestNumberBelongsToItsConnection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server := cryotest.NewServer(t)
		dial := func() (*cryo.Session, *cryotest.Peer) {
			var s *cryo.Session
			dial := start(func() (err error) {
				s, err = cryo.Dial(t.Context(), memoryURL, &cryo.DialOptions{NetDial: server.Dial, SessionID: sid})
				return err
			})
			peer := server.NextPeer()
			peer.ServerHandshake()
			dial.wantSuccess(t)
			t.Cleanup(func() { cut(s) })
			return s, peer
		}
		first, peer := dial()
		peer.WriteFrames(cryotest.Text(7, "from the first connection"))
		old := receive(t, first)
		peer.Conn().Cut()
		wantEnded(t, first)

		second, peer := dial()
		require.Equal(t, first.ID(), second.ID())
		peer.WriteFrames(cryotest.Text(7, "another message with the same number"))
		require.ErrorIs(t, old.Ack(), net.ErrClosed)
		peer.WantIdle("no acknowledgement on the new connection", instant)
		require.NoError(t, receive(t, second).Ack())
		peer.WantFrame("its own acknowledgement", cryotest.Acked(7))
	})
}

func TestReceiverOwnsThePayloads(t *testing.T) {
	atBothEnds(t, cryo.SessionOptions{}, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		var kept []*cryo.Message
		sizes := []int{0, 1, 100, 5, 511, 512, 20_000, 3, 70_000, 300_000, 1, 1 << 20, 2 << 20, 40}
		for round := range 3 {
			for i, size := range sizes {
				peer.WriteFrames(cryotest.Binary(0, strings.Repeat(string(rune('a'+round*len(sizes)+i)), size)))
				m := receive(t, s)
				m.Payload = append(m.Payload, "?"...) // has no capacity behind it that another uses
				kept = append(kept, m)
			}
		}
		for i, m := range kept {
			want := []byte(strings.Repeat(string(rune('a'+i)), sizes[i%len(sizes)]) + "?")
			require.True(t, bytes.Equal(want, m.Payload), "message %d was overwritten", i)
		}
	})
}

func TestRetainedMessageRetainsNoOthers(t *testing.T) {
	listener := cryotest.NewServer(t)
	dial := make(chan *cryo.Session, 1)
	go func() {
		s, err := cryo.Dial(context.Background(), memoryURL, &cryo.DialOptions{NetDial: listener.Dial, SessionID: sid})
		if err == nil {
			dial <- s
		}
	}()
	peer := listener.NextPeer()
	peer.ServerHandshake()
	s := next(t, dial)
	defer cut(s)

	large := strings.Repeat("x", 100_000)
	for i := range uint32(10) {
		peer.WriteFrames(cryotest.Binary(i, large))
	}
	kept := receive(t, s)
	var freed atomic.Int32
	for range 9 {
		m := receive(t, s)
		runtime.AddCleanup(&m.Payload[0], func(int) { freed.Add(1) }, 0)
	}
	require.Eventually(t, func() bool {
		runtime.GC()
		return freed.Load() >= 8 // the last one's memory may be the session's for the next
	}, 10*time.Second, time.Millisecond)
	require.True(t, bytes.Equal([]byte(large), kept.Payload))
}
