package cryo_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
	"weak"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/cryotest"
	"github.com/cryo-connect/cryo-connect/internal/wire"
)

// blocked has a session write a message to a peer that reads nothing, and then queue
// more of them.
func blocked(s *cryo.Session, conn *cryotest.Conn, queued int) (first *cryo.Pending, more []*cryo.Pending) {
	conn.StopReading()
	first = s.Queue([]cryo.OutMessage{cryo.Binary(make([]byte, 4<<20))})
	for i := range queued {
		more = append(more, s.Queue([]cryo.OutMessage{cryo.Text(strconv.Itoa(i))}))
	}
	return first, more
}

// cancelled is a context that has ended.
func cancelled(t testing.TB) context.Context {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	return ctx
}

// isDone reports whether it is known what has become of a send.
func isDone(sending *cryo.Pending) bool {
	select {
	case <-sending.Done():
		return true
	default:
		return false
	}
}

func TestCancelledSendsAreDoneBeforeTheirTurn(t *testing.T) {
	for name, order := range map[string]func([]*cryo.Pending){
		"the oldest first": func([]*cryo.Pending) {},
		"in any order": func(s []*cryo.Pending) {
			rand.Shuffle(len(s), func(i, j int) { s[i], s[j] = s[j], s[i] })
		},
	} {
		t.Run(name, func(t *testing.T) {
			atBothEnds(t, quiet, func(t *testing.T, _ end, s *cryo.Session, peer *cryotest.Peer) {
				_, waiting := blocked(s, peer.Conn(), 32_000)
				order(waiting)
				for i, sending := range waiting {
					require.False(t, isDone(sending))
					require.ErrorIs(t, sending.Wait(cancelled(t)), context.Canceled)
					require.True(t, isDone(sending))
					require.ErrorIs(t, sending.Wait(t.Context()), context.Canceled, "and so for everybody else")
					require.Equal(t, len(waiting)-i, s.Awaited())
				}
				cut(s)
			})
		})
	}
}

func TestCancelWithdrawsUnansweredMessages(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		pending := s.Queue(texts("acknowledged", "rejected", "unanswered"))
		peer.Ack(peer.WantType("the first", wire.UTF8))
		peer.WriteFrames(cryotest.Error(peer.WantType("the second", wire.UTF8).Ack, "no"))
		peer.WantType("the third", wire.UTF8)
		synctest.Wait()
		require.False(t, isDone(pending))
		pending.Cancel()
		require.True(t, isDone(pending))
		pending.Cancel()
		batch, ok := errors.AsType[*cryo.BatchError](pending.Wait(t.Context()))
		require.True(t, ok)
		require.NoError(t, batch.Errs[0])
		require.Equal(t, &cryo.RejectedError{Text: "no"}, batch.Errs[1])
		require.ErrorIs(t, batch.Errs[2], context.Canceled)
		require.Zero(t, s.Awaited())

		first, queued := blocked(s, peer.Conn(), 2)
		queued[0].Cancel()
		require.True(t, isDone(queued[0]))
		peer.Conn().ReadOn()
		peer.Ack(peer.WantType("what was being written", wire.Binary))
		f := peer.WantType("what was queued behind it", wire.UTF8)
		require.Equal(t, "1", string(f.Payload))
		peer.Ack(f)
		for _, acknowledged := range []*cryo.Pending{first, queued[1]} {
			require.NoError(t, acknowledged.Wait(t.Context()))
			acknowledged.Cancel()
			require.NoError(t, acknowledged.Wait(t.Context()), "too late to withdraw it")
		}
		serving(t, s, peer)
	})
}

func TestCancelledSendsAreNotWritten(t *testing.T) {
	for _, every := range []int{2, 3, 10} {
		t.Run(strconv.Itoa(every), func(t *testing.T) {
			atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
				first, waiting := blocked(s, peer.Conn(), 100)
				var given []int
				for i := range waiting {
					if i%every == 0 || every == 2 && i > 5 { // with 2: nearly all
						require.ErrorIs(t, waiting[i].Wait(cancelled(t)), context.Canceled)
						given = append(given, i)
					}
				}
				peer.Conn().ReadOn()
				peer.Ack(peer.WantType("what was being written", wire.Binary))
				require.NoError(t, first.Wait(t.Context()))
				for i, sending := range waiting {
					if len(given) > 0 && given[0] == i {
						given = given[1:]
						continue
					}
					f := peer.WantType("what was not cancelled", wire.UTF8)
					require.Equal(t, strconv.Itoa(i), string(f.Payload))
					peer.Ack(f)
					require.NoError(t, sending.Wait(t.Context()))
				}
				serving(t, s, peer)
			})
		})
	}
}

func TestQueueDoesNotRetainACancelledPayload(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, _ end, s *cryo.Session, peer *cryotest.Peer) {
		first, _ := blocked(s, peer.Conn(), 10) // more than is withdrawn: the queue is not compacted
		payload := new([1 << 20]byte)
		kept := weak.Make(payload)
		sending := s.Queue([]cryo.OutMessage{cryo.Binary(payload[:])})
		payload = nil
		runtime.GC()
		require.NotNil(t, kept.Value())
		require.Error(t, sending.Wait(cancelled(t)))
		runtime.GC()
		require.Nil(t, kept.Value())
		require.False(t, isDone(first))
		runtime.KeepAlive(sending)
		cut(s)
	})
}

// Where nothing is masked, a large payload is written from where it is.
func TestCancelledSendIsDoneWhenItsPayloadIsNoLongerInUse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, peer := accepted(t, cryo.ServerOptions{SessionOptions: quiet})
		peer.Conn().StopReading()
		data := bytes.Repeat([]byte("for this peer"), 100_000)
		sent := bytes.Clone(data)
		sending := s.Queue([]cryo.OutMessage{cryo.Binary(data)})
		synctest.Wait() // it is being written
		require.ErrorIs(t, sending.Wait(cancelled(t)), context.Canceled)
		require.Zero(t, s.Awaited())
		synctest.Wait()
		require.False(t, isDone(sending))

		peer.Conn().ReadOn()
		<-sending.Done()
		clear(data)
		require.True(t, bytes.Equal(sent, peer.WantType("the message", wire.Binary).Payload))
		require.ErrorIs(t, sending.Wait(t.Context()), context.Canceled)
	})
}

func TestEverySendIsDoneAtTheEnd(t *testing.T) {
	for name, over := range map[string]func(s *cryo.Session, peer *cryotest.Peer){
		"cut":     func(_ *cryo.Session, peer *cryotest.Peer) { peer.Conn().Cut() },
		"aborted": func(s *cryo.Session, _ *cryotest.Peer) { cut(s) },
		"closed":  func(s *cryo.Session, _ *cryotest.Peer) { _ = s.Close(context.Background(), "") },
		"closed by the peer": func(_ *cryo.Session, peer *cryotest.Peer) {
			peer.WriteClose(1000, "")
			_ = peer.WS.Close()
		},
	} {
		t.Run(name, func(t *testing.T) {
			atBothEnds(t, quiet, func(t *testing.T, _ end, s *cryo.Session, peer *cryotest.Peer) {
				unanswered := s.Queue(texts("a", "b"))
				peer.WantType("a", wire.UTF8)
				peer.Ack(peer.WantType("b", wire.UTF8))
				first, queued := blocked(s, peer.Conn(), 2)
				queued = append(queued, s.Queue(texts("c", "\xff", "d")))
				withdrawn := s.Queue(texts("e", "f"))
				require.Error(t, withdrawn.Wait(cancelled(t)))
				synctest.Wait()
				over(s, peer)
				late := s.Queue(texts("g", "h"))
				<-s.Done()
				later := s.Queue(texts("i"))
				for _, sending := range append(queued, unanswered, first, withdrawn, late, later) {
					<-sending.Done()
					err := sending.Wait(t.Context())
					require.Error(t, err)
					if sending != withdrawn {
						require.ErrorIs(t, err, net.ErrClosed)
					}
				}
				batch, ok := errors.AsType[*cryo.BatchError](unanswered.Wait(t.Context()))
				require.True(t, ok)
				require.NoError(t, batch.Errs[1], "it was acknowledged")
				require.Zero(t, s.Awaited())
			})
		})
	}
}

// Against the clock: sends are started, cancelled, acknowledged, rejected and cut off at any
// time.
func TestEverySendCompletes(t *testing.T) {
	for range 10 {
		client, server := overTCP(t)
		var going sync.WaitGroup
		going.Go(func() {
			for n := 0; ; n++ {
				m, err := server.Receive(context.Background())
				switch {
				case err != nil:
					return
				case n%5 == 0:
					_ = m.Reject("no")
				case n%7 != 0:
					_ = m.Ack()
				}
			}
		})
		for range 8 {
			going.Go(func() {
				var sendings []*cryo.Pending
				for client.Err() == nil {
					messages := make([]cryo.OutMessage, 1+rand.IntN(5)*rand.IntN(2))
					for i := range messages {
						messages[i] = cryo.Binary(make([]byte, 10+rand.IntN(2)*rand.IntN(100_000)))
					}
					sending := client.Queue(messages)
					sendings = append(sendings, sending)
					ctx, cancel := context.WithTimeout(context.Background(), time.Duration(rand.IntN(1000))*time.Microsecond)
					_ = sending.Wait(ctx)
					cancel()
				}
				for i, sending := range sendings {
					select {
					case <-sending.Done():
					case <-time.After(cryotest.Patience):
						t.Error("never done: ", i, " of ", len(sendings))
					}
				}
			})
		}
		time.Sleep(50 * time.Millisecond)
		cut([]*cryo.Session{client, server}[rand.IntN(2)])
		going.Wait()
		require.Zero(t, client.Awaited())
	}
}

func TestChunksOfAnAbandonedStreamAreNotWritten(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		abandoned, _ := opening(t, s, peer, nil)
		kept, _ := opening(t, s, peer, nil)
		first, waiting := blocked(s, peer.Conn(), 3)
		for range 3 {
			_, err := abandoned.Write([]byte("abandoned"))
			require.NoError(t, err)
			_, err = kept.Write([]byte(strings.Repeat("kept", 100)))
			require.NoError(t, err)
		}
		_ = abandoned.Close()
		peer.Conn().ReadOn()
		peer.Ack(peer.WantType("what was being written", wire.Binary))
		require.NoError(t, first.Wait(t.Context()))
		for _, sending := range waiting {
			peer.Ack(peer.WantType("a message", wire.UTF8))
			require.NoError(t, sending.Wait(t.Context()))
		}
		for range 3 {
			f := peer.WantType("a chunk", wire.TxChunk)
			require.Equal(t, strings.Repeat("kept", 100), string(f.Payload))
		}
		serving(t, s, peer)
		require.Zero(t, abandoned.Queued())
		require.Zero(t, kept.Queued())
	})
}

// BenchmarkCancelledSends cancels sends to a peer that does not read.
func BenchmarkCancelledSends(b *testing.B) {
	for _, sends := range []int{2_000, 8_000, 32_000} {
		b.Run(fmt.Sprint(sends), func(b *testing.B) {
			p := connect(b, quiet, quiet)
			_, waiting := blocked(p.server, p.conn, 0)
			for b.Loop() {
				b.StopTimer()
				waiting = waiting[:0]
				for range sends {
					waiting = append(waiting, p.server.Queue([]cryo.OutMessage{cryo.Binary(make([]byte, 100))}))
				}
				b.StartTimer()
				for _, sending := range waiting {
					_ = sending.Wait(cancelled(b))
				}
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*sends), "ns/send")
		})
	}
}
