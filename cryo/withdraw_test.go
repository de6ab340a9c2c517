package cryo_test

import (
	"context"
	"math/rand/v2"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/cryotest"
	"github.com/cryo-connect/cryo-connect/internal/wire"
)

// blocked has a session write a message to a peer that reads nothing, and then queue
// more of them.
func blocked(s *cryo.Session, conn *cryotest.Conn, queued int) (first *cryo.Sending, more []*cryo.Sending) {
	conn.StopReading()
	first = s.StartBatch([]cryo.Outgoing{{Kind: cryo.KindBinary, Payload: make([]byte, 4<<20)}})
	for i := range queued {
		more = append(more, s.StartBatch([]cryo.Outgoing{{Kind: cryo.KindText, Payload: []byte(strconv.Itoa(i))}}))
	}
	return first, more
}

func TestGivingUpASendCostsTimeInItsOwnFramesOnly(t *testing.T) {
	const sends = 32_000
	for name, order := range map[string]func([]*cryo.Sending){
		"the oldest first": func([]*cryo.Sending) {},
		"in any order": func(s []*cryo.Sending) {
			rand.Shuffle(len(s), func(i, j int) { s[i], s[j] = s[j], s[i] })
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s, peer := accepted(t, cryo.ServerOptions{SessionOptions: quiet})
				_, waiting := blocked(s, peer.Conn(), sends)
				order(waiting)
				ctx, cancel := context.WithCancel(t.Context())
				cancel()
				for _, sending := range waiting {
					require.ErrorIs(t, sending.Wait(ctx), context.Canceled)
				}
				require.Equal(t, 1, s.Awaited(), "the one that is being written")
				// One for its number, and at most two for its place in the queue, which
				// is compacted when half of it is withdrawn.
				require.LessOrEqual(t, s.Visited(), 3*sends+10)
				cut(s)
			})
		})
	}
}

func TestWhatWasGivenUpIsNotWrittenHoweverMuchOfTheQueueItIs(t *testing.T) {
	for _, every := range []int{2, 3, 10} {
		t.Run(strconv.Itoa(every), func(t *testing.T) {
			atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
				first, waiting := blocked(s, peer.Conn(), 100)
				var given []int
				ctx, cancel := context.WithCancel(t.Context())
				cancel()
				for i := range waiting {
					if i%every == 0 || every == 2 && i > 5 { // with 2: nearly all
						require.ErrorIs(t, waiting[i].Wait(ctx), context.Canceled)
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
					f := peer.WantType("what was not given up", wire.UTF8)
					require.Equal(t, strconv.Itoa(i), string(f.Payload))
					peer.Ack(f)
					require.NoError(t, sending.Wait(t.Context()))
				}
				serving(t, s, peer)
			})
		})
	}
}

func TestAnAbandonedStreamsChunksLeaveTheQueueUnwritten(t *testing.T) {
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
		abandoned.Abandon()
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

// BenchmarkGivingUpSends gives up sends to a peer that does not read.
func BenchmarkGivingUpSends(b *testing.B) {
	for _, sends := range []int{2_000, 8_000, 32_000} {
		b.Run(strconv.Itoa(sends), func(b *testing.B) {
			p := connect(b, quiet, quiet)
			ctx, cancel := context.WithCancel(b.Context())
			cancel()
			_, waiting := blocked(p.server, p.conn, 0)
			for b.Loop() {
				b.StopTimer()
				waiting = waiting[:0]
				for range sends {
					waiting = append(waiting, p.server.StartBatch([]cryo.Outgoing{{Kind: cryo.KindBinary, Payload: make([]byte, 100)}}))
				}
				b.StartTimer()
				for _, sending := range waiting {
					_ = sending.Wait(ctx)
				}
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*sends), "ns/send")
		})
	}
}
