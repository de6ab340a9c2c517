package cryo_test

import (
	"bytes"
	"io"
	"runtime"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/cryotest"
)

const chunkWeight = 128 // of a chunk that waits to be read, beside its bytes

// bounded has a bound that is easy to divide by nine.
func bounded() cryo.SessionOptions {
	o := quiet
	o.MaxBufferBytes = 90_000
	return o
}

func TestUnreadBytesCountAgainstTheBound(t *testing.T) {
	atBothEnds(t, bounded(), func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		wantFree(t, s, peer, 90_000, 0)
		st := incoming(t, s, peer, 1, 0)
		wantFree(t, s, peer, 90_000, 0)
		peer.WriteFrames(txChunk(0, 1, strings.Repeat("a", 1000)), txChunk(0, 2, ""), txChunk(0, 3, "bc"))
		wantFree(t, s, peer, 90_000, 1000+chunkWeight+2+chunkWeight)
		wantBytes(t, st, "aaa") // which frees no memory
		wantFree(t, s, peer, 90_000, 1000+chunkWeight+2+chunkWeight)
		wantBytes(t, st, strings.Repeat("a", 997)+"b")
		wantFree(t, s, peer, 90_000, 2+chunkWeight)
		release := s.Reserve(500)
		wantBytes(t, st, "c")
		wantFree(t, s, peer, 90_000, 500)
		release()
		wantFree(t, s, peer, 90_000, 0)
	})
}

func TestSettledStreamReleasesItsCapacity(t *testing.T) {
	for name, settle := range map[string]func(*testing.T, *cryotest.Peer, *cryo.IncomingStream){
		"read": func(t *testing.T, _ *cryotest.Peer, st *cryo.IncomingStream) { wantBytes(t, st, "abcdef") },
		"whole, Ack": func(t *testing.T, peer *cryotest.Peer, st *cryo.IncomingStream) {
			peer.WriteFrames(txFinish(2, 0))
			require.NoError(t, wantRest(t, st, "abcdef"))
			require.NoError(t, st.Ack())
		},
		"whole, Close": func(t *testing.T, peer *cryotest.Peer, st *cryo.IncomingStream) {
			peer.WriteFrames(txFinish(2, 0))
			synctest.Wait()
			require.NoError(t, st.Close())
		},
		"Close": func(t *testing.T, _ *cryotest.Peer, st *cryo.IncomingStream) { require.NoError(t, st.Close()) },
		"half, Close": func(t *testing.T, _ *cryotest.Peer, st *cryo.IncomingStream) {
			wantBytes(t, st, "ab")
			require.NoError(t, st.Close())
		},
		"broken, Close": func(t *testing.T, peer *cryotest.Peer, st *cryo.IncomingStream) {
			peer.WriteFrames(txChunk(0, 17, "x"))
			synctest.Wait()
			require.NoError(t, st.Close())
		},
		"idle, Close": func(t *testing.T, _ *cryotest.Peer, st *cryo.IncomingStream) {
			wantBytes(t, st, "abcdef")
			time.Sleep(cryo.DefaultStreamIdleTimeout)
			require.ErrorIs(t, wantRest(t, st, ""), cryo.ErrStreamIdle)
			require.NoError(t, st.Close())
		},
	} {
		t.Run(name, func(t *testing.T) {
			atBothEnds(t, bounded(), func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
				st := incoming(t, s, peer, 1, 0)
				peer.WriteFrames(txChunk(0, 1, "abc"), txChunk(0, 2, "def"))
				wantFree(t, s, peer, 90_000, 6+2*chunkWeight)
				settle(t, peer, st)
				peer.WriteFrames(txChunk(0, 3, "late"))
				if name == "read" {
					wantBytes(t, st, "late")
				}
				time.Sleep(instant)
				peer.Skip()
				wantFree(t, s, peer, 90_000, 0)
			})
		})
	}
}

func TestSettledStreamsOfALostSessionReleaseTheirCapacity(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		_, l, sessions := serve(t, cryo.ServerOptions{SessionOptions: bounded()})
		open := func(id uint64) (*cryo.Session, *cryotest.Peer) {
			peer := join(t, l, id)
			peer.ClientHandshake()
			return next(t, sessions), peer
		}
		other, otherPeer := open(1)
		for id, settle := range []func(*cryo.IncomingStream) error{
			(*cryo.IncomingStream).Ack,
			(*cryo.IncomingStream).Close,
			func(st *cryo.IncomingStream) error { _, err := io.ReadAll(st); return err },
		} {
			s, peer := open(10 + uint64(id))
			st := incoming(t, s, peer, 1, 0)
			peer.WriteFrames(txChunk(0, 1, "abc"), txStart(2, 1, -1, "never accepted"))
			serving(t, s, peer)
			peer.Conn().Cut()
			wantEnded(t, s)
			require.Error(t, settle(st))
			wantFree(t, other, otherPeer, 90_000, 0)
		}
	})
}

func TestReadsPauseForUnreadStreamBytes(t *testing.T) {
	atBothEnds(t, bounded(), func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		st := incoming(t, s, peer, 1, 0)
		for i := range uint32(3) { // the second is one too many
			peer.WriteFrames(txChunk(0, 1+i, strings.Repeat("x", 50_000)))
		}
		peer.WriteFrames(txFinish(2, 0), cryotest.Text(3, "behind it"))
		synctest.Wait()
		require.Equal(t, int64(100_001), st.Received())
		waiting := start(func() error { return receive(t, s).Ack() })
		waiting.wantBlocked(t)
		require.NoError(t, wantRest(t, st, strings.Repeat("x", 150_000)))
		waiting.wantSuccess(t)
		peer.WantFrame("the message acknowledged", cryotest.Acked(3))
	})
}

// Bytes that were read don't count: two streams that are both being read never
// stop each other, however the peer mixes them.
func TestTwoHalfReadStreamsDoNotBlockEachOther(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		tiny := quiet
		tiny.MaxBufferBytes = 1000
		p := connect(t, tiny, tiny)
		data := noise(1 << 20)
		var sending, reading []*call
		for range 8 {
			sending = append(sending, start(func() error {
				return p.client.SendStream(t.Context(), bytes.NewReader(data), nil)
			}))
			st := acceptStream(t, p.server)
			reading = append(reading, start(func() error {
				got, err := io.ReadAll(st)
				require.True(t, bytes.Equal(data, got))
				if err != nil {
					return err
				}
				return st.Ack()
			}))
		}
		for i := range sending {
			sending[i].wantSuccess(t)
			reading[i].wantSuccess(t)
		}
	})
}

// A peer that sends a large frame for nobody and then a small chunk must not
// make us keep more than is counted.
func TestSmallChunkDoesNotRetainALargeFrame(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		s, peer := accepted(t, cryo.ServerOptions{SessionOptions: quiet})
		st := incoming(t, s, peer, 1, 0)
		before := heapInUse()
		large := strings.Repeat("x", 512<<10)
		for i := range uint32(100) {
			peer.WriteFrames(txChunk(99, 0, large), txChunk(0, 1+i, "a"))
		}
		synctest.Wait()
		require.Equal(t, int64(101), st.Received())
		require.Less(t, heapInUse(), before+10<<20)
		require.NoError(t, st.Close())
	})
}

// heapInUse is what is left after garbage collection.
func heapInUse() uint64 {
	runtime.GC()
	runtime.GC() // frees what was allocated while the first collection ran, until a receive buffer was full
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapInuse
}
