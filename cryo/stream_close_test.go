package cryo_test

import (
	"io"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/cryotest"
	"github.com/cryo-connect/cryo-connect/internal/wire"
)

// scriptedStream is what a raw peer sends of a stream, and what this end does with it.
type scriptedStream struct {
	Pull      bool
	Announced int    // bytes; -1: none
	Chunks    []int  // sizes
	Missing   int    // the index of a chunk that is left out; behind the last: none
	Finish    bool   // TX_FINISH is sent
	Cut       bool   // the connection is lost then
	Read      int    // bytes that are read before the next step; all and io.EOF if it is more
	Ack       []bool // Ack or Close, in turn, while it is read
}

var scriptedStreams = rapid.Custom(func(t *rapid.T) scriptedStream {
	x := scriptedStream{
		Pull:   rapid.Bool().Draw(t, "pull"),
		Chunks: rapid.SliceOfN(rapid.IntRange(0, 3), 0, 5).Draw(t, "chunks"),
		Finish: rapid.Bool().Draw(t, "finish"),
		Cut:    rapid.IntRange(0, 4).Draw(t, "cut") == 0,
		Read:   rapid.IntRange(0, 20).Draw(t, "read"),
		Ack:    rapid.SliceOfN(rapid.Bool(), 0, 3).Draw(t, "Ack, not Close"),
	}
	x.Missing = rapid.IntRange(0, 2*len(x.Chunks)).Draw(t, "missing")
	x.Announced = rapid.SampledFrom([]int{-1, x.bytes(), x.bytes(), max(x.bytes()-1, 0), x.bytes() + 1}).Draw(t, "announced")
	return x
})

// bytes is the number of bytes that are sent.
func (x *scriptedStream) bytes() (n int) {
	for i, size := range x.Chunks {
		if i != x.Missing {
			n += size
		}
	}
	return n
}

// whole reports whether all of the stream comes. Nobody can notice that the last chunk
// is missing but by the size.
func (x *scriptedStream) whole() bool {
	gap := x.Missing < len(x.Chunks)-1
	sized := x.Announced == x.bytes()
	return !gap && (x.Finish && (sized || x.Announced < 0) || x.Pull && sized && x.Announced > 0)
}

func TestOnlyACompleteStreamReadsToEOFAndIsAcknowledged(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		x := scriptedStreams.Draw(rt, "stream")
		synctest.Test(t, func(t *testing.T) { x.run(t) })
	})
}

func (x *scriptedStream) run(t *testing.T) {
	const started, finished = 1, 2
	s, peer := accepted(t, cryo.ServerOptions{SessionOptions: quiet})
	if x.Pull {
		pullStreams(t, s, peer)
	}
	peer.WriteFrames(txStart(started, 0, int32(x.Announced), "n"))
	st := acceptStream(t, s)
	_, err := st.Read(nil)
	require.NoError(t, err)
	for i, size := range x.Chunks {
		if i != x.Missing {
			peer.WriteFrames(txChunk(0, uint32(i), strings.Repeat("x", size)))
		}
	}
	if x.Finish {
		peer.WriteFrames(txFinish(finished, 0))
	}
	synctest.Wait()
	if x.Cut {
		peer.Conn().Cut()
		wantEnded(t, s)
	}

	read, eof := 0, false
	reading := start(func() error {
		got, err := io.ReadAll(io.LimitReader(st, int64(x.Read)))
		if read = len(got); err == nil && read < x.Read {
			eof = true
		}
		return nil
	})
	synctest.Wait()
	acknowledged, closed := false, false
	for _, ack := range x.Ack {
		switch {
		case !ack:
			_ = st.Close()
			closed = !acknowledged
		case st.Ack() == nil:
			require.False(t, closed, "the first one counts")
			acknowledged = true
		default:
			require.False(t, acknowledged, "it stays acknowledged")
		}
	}
	_ = st.Close()
	<-reading.done
	require.False(t, acknowledged && !eof, "acknowledged without io.EOF")
	require.False(t, eof && (!x.whole() || read != x.bytes()), "%d of %d bytes taken for a whole", read, x.bytes())
	if x.Cut {
		require.False(t, acknowledged)
		return
	}
	synctest.Wait()
	acks, cancels := 0, 0
	for _, f := range peer.Taken() {
		if f.Type == wire.Ack && f.Ack == finished {
			acks++
		}
		if f.Type == wire.TxCancel {
			cancels++
		}
	}
	require.Equal(t, acknowledged && x.Finish, acks == 1, "%d acknowledgements of TX_FINISH", acks)
	require.Equal(t, !acknowledged, cancels == 1, "%d TX_CANCEL", cancels)
}

func TestFirstOfAckAndCloseCounts(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		for i := range uint32(200) {
			st := incoming(t, s, peer, 1, i)
			peer.WriteFrames(txFinish(1000+i, i))
			require.NoError(t, wantRest(t, st, ""))
			closing := start(st.Close)
			err := st.Ack()
			closing.wantSuccess(t)
			if err == nil {
				peer.WantFrame("TX_FINISH acknowledged", cryotest.Acked(1000+i))
			} else {
				require.ErrorIs(t, err, cryo.ErrStreamClosed)
				require.Equal(t, i, peer.WantType("TX_CANCEL", wire.TxCancel).Tx)
			}
			require.Equal(t, err, st.Ack(), "it stays as it is")
			peer.WantIdle("one answer", instant)
		}
	})
}

func TestAckReportsTheEndOfTheSessionEachTime(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		st := incoming(t, s, peer, 1, 0)
		peer.WriteFrames(txFinish(2, 0))
		require.NoError(t, wantRest(t, st, ""))
		peer.Conn().Cut()
		cause := wantEnded(t, s)
		for range 2 {
			require.Equal(t, cause, st.Ack())
		}
		require.NoError(t, st.Close(), "it is settled")
	})
}

// A stream that is closed while it is written or finished either arrives whole, or its
// TX_FINISH is not sent.
func TestStreamClosedDuringASendIsNeverFinished(t *testing.T) {
	const chunks = 5
	finishes := 0
	for i := range 300 {
		inBubble(t, func(t *testing.T) {
			s, peer := accepted(t, cryo.ServerOptions{SessionOptions: quiet})
			st, _ := opening(t, s, peer, nil)
			sending := start(func() error {
				for range chunks {
					_, _ = st.Write([]byte("x")) // a sender that does not look at errors
				}
				return st.Finish()
			})
			var closed error
			closing := start(func() error {
				for range i % 7 {
					synctest.Wait()
				}
				closed = st.Close()
				return nil
			})
			<-closing.done
			synctest.Wait()
			seen := 0
			for _, f := range peer.Taken() {
				switch f.Type {
				case wire.TxChunk:
					require.Equal(t, uint32(seen), f.Seq)
					seen++
				case wire.TxFinish:
					require.Equal(t, chunks, seen)
					finishes++
				}
			}
			require.ErrorIs(t, closed, cryo.ErrStreamClosed, "nothing was acknowledged")
			require.ErrorIs(t, <-sending.done, cryo.ErrStreamClosed)
		})
	}
	t.Logf("%d of 300 were whole", finishes)
}

func TestCloseSucceedsOnlyAfterFinish(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		write := func(w io.WriteCloser) error { // knows nothing of Finish
			_, err := io.WriteString(w, "x")
			require.NoError(t, err)
			return w.Close()
		}
		forgotten, _ := opening(t, s, peer, &cryo.StreamOptions{Name: "n"})
		require.EqualError(t, write(forgotten), `the stream "n" is not finished: the stream is closed`)
		require.LessOrEqual(t, peer.Skip(), 1, "the chunk, and no TX_FINISH")

		cancelled, tx := opening(t, s, peer, nil)
		peer.WriteFrames(txCancel(1, tx))
		peer.WantFrame("TX_CANCEL acknowledged", cryotest.Acked(1))
		require.ErrorIs(t, cancelled.Close(), cryo.ErrStreamCancelled)

		rejected, _ := opening(t, s, peer, nil)
		finishing := start(rejected.Finish)
		f := peer.WantType("TX_FINISH", wire.TxFinish)
		peer.WriteFrames(cryotest.Error(f.Ack, "no"))
		require.Error(t, finishing.result(t))
		require.Error(t, rejected.Close())

		finished, _ := opening(t, s, peer, nil)
		finishing = start(finished.Finish)
		peer.Ack(peer.WantType("TX_FINISH", wire.TxFinish))
		finishing.wantSuccess(t)
		require.NoError(t, finished.Close())
	})
}

func TestCloseEndsAFinishThatWaits(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		st, _ := opening(t, s, peer, nil)
		finishing := start(st.Finish)
		f := peer.WantType("TX_FINISH", wire.TxFinish)
		finishing.wantBlocked(t)
		require.ErrorIs(t, st.Close(), cryo.ErrStreamClosed)
		require.ErrorIs(t, finishing.result(t), cryo.ErrStreamClosed)
		peer.Ack(f) // too late
		peer.WantIdle("nothing follows", time.Hour)
		require.NoError(t, s.Err())
	})
}
