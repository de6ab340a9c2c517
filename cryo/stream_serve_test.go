package cryo_test

import (
	"bytes"
	"errors"
	"io"
	"math"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/cryotest"
)

// pulled is a stream of ours that a raw peer pulls: "abcdefghij" in chunks of 4.
type pulled struct {
	*cryotest.Peer
	t       *testing.T
	sending *call
	number  uint32 // of its frames, the next one
	tx      uint32
}

func pulling(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) *pulled {
	t.Helper()
	setFlow(peer, cryo.FlowPull)
	p := &pulled{Peer: peer, t: t, number: end.first}
	p.sending = start(func() error {
		return s.SendStream(t.Context(), strings.NewReader("abcdefghij"), &cryo.StreamOptions{Name: "n", ChunkBytes: 4})
	})
	p.WantFrame("TX_START with the size", txStart(p.number, 0, 10, "n"))
	p.WriteFrames(cryotest.Acked(p.number))
	p.number++
	return p
}

func (p *pulled) fetch(start, end uint32, chunks ...int) {
	p.t.Helper()
	p.WriteFrames(txFetch(50, p.tx, start, end))
	p.WantFrame("TX_FETCH acknowledged", cryotest.Acked(50))
	for _, i := range chunks {
		p.WantFrame("a chunk", txChunk(p.tx, uint32(i), []string{"abcd", "efgh", "ij"}[i]))
	}
}

func (p *pulled) finish() {
	p.t.Helper()
	p.WantFrame("TX_FINISH", txFinish(p.number, p.tx))
	p.sending.wantBlocked(p.t)
	p.WriteFrames(cryotest.Acked(p.number))
	p.sending.wantSuccess(p.t)
	p.WantIdle("nothing follows", time.Hour)
}

func TestAPulledStreamIsSentAsItIsAskedFor(t *testing.T) {
	for name, fetch := range map[string]func(*pulled){
		"one by one": func(p *pulled) {
			for i := range 3 {
				p.WantIdle("no chunk that was not asked for", time.Hour)
				p.fetch(uint32(i), uint32(i+1), i)
			}
		},
		"all at once":                func(p *pulled) { p.fetch(0, 3, 0, 1, 2) },
		"more than there is":         func(p *pulled) { p.fetch(0, math.MaxUint32, 0, 1, 2) },
		"all twice":                  func(p *pulled) { p.fetch(0, 2, 0, 1); p.fetch(0, 3, 0, 1, 2) },
		"overlapping":                func(p *pulled) { p.fetch(0, 2, 0, 1); p.fetch(1, 3, 1, 2) },
		"out of order":               func(p *pulled) { p.fetch(1, 2, 1); p.fetch(0, 1, 0); p.fetch(2, 3, 2) },
		"the last chunk alone":       func(p *pulled) { p.fetch(2, 3, 2) },
		"nothing, then all":          func(p *pulled) { p.fetch(0, 0); p.fetch(1, 1); p.fetch(2, 1); p.fetch(0, 3, 0, 1, 2) },
		"past the end":               func(p *pulled) { p.fetch(3, 4) },
		"far past the end":           func(p *pulled) { p.fetch(math.MaxUint32-1, math.MaxUint32) },
		"backwards, past the end":    func(p *pulled) { p.fetch(9, 3) },
		"with others' in between":    func(p *pulled) { p.tx = 7; p.fetch(0, 3); p.tx = 0; p.fetch(0, 3, 0, 1, 2) },
		"after a change of the flow": func(p *pulled) { setFlow(p.Peer, cryo.FlowPush); p.fetch(0, 3, 0, 1, 2) },
	} {
		t.Run(name, func(t *testing.T) {
			atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
				p := pulling(t, end, s, peer)
				fetch(p)
				p.finish()
			})
		})
	}
}

func TestAPulledStreamIsCancelledWhileNothingIsAskedFor(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		p := pulling(t, end, s, peer)
		p.fetch(0, 1, 0)
		p.WriteFrames(txCancel(51, 0))
		p.WantFrame("TX_CANCEL acknowledged", cryotest.Acked(51))
		require.ErrorIs(t, p.sending.result(t), cryo.ErrStreamCancelled)
		p.fetch(1, 3)
		p.WantIdle("no chunk of it", time.Hour)
	})
}

func TestWhatIsAskedForBeforeTheStartIsAcknowledgedComesAfterIt(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		setFlow(peer, cryo.FlowPull)
		send := start(func() error { return s.SendStream(t.Context(), strings.NewReader("abc"), nil) })
		f := peer.WantType("TX_START", cryo.TypeTxStart)
		peer.WriteFrames(txFetch(1, 0, 0, 1))
		peer.WantFrame("TX_FETCH acknowledged", cryotest.Acked(1))
		peer.WantIdle("no chunk yet", time.Hour)
		peer.Ack(f)
		peer.WantFrame("the chunk", txChunk(0, 0, "abc"))
		peer.Ack(peer.WantType("TX_FINISH", cryo.TypeTxFinish))
		send.wantSuccess(t)
	})
}

func TestAnEmptyPulledStreamFinishesWhenNothingIsAskedFor(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		setFlow(peer, cryo.FlowPull)
		past := strings.NewReader("abc")
		_, _ = past.Seek(10, io.SeekStart)
		for tx, source := range []io.Reader{strings.NewReader(""), io.MultiReader(), past} {
			send := start(func() error { return s.SendStream(t.Context(), source, nil) })
			f := peer.WantType("TX_START", cryo.TypeTxStart)
			require.Zero(t, f.Size)
			peer.Ack(f)
			peer.WantIdle("no TX_FINISH by itself", time.Hour)
			peer.WriteFrames(txFetch(1, uint32(tx), 0, 0))
			peer.WantFrame("TX_FETCH acknowledged", cryotest.Acked(1))
			peer.Ack(peer.WantType("TX_FINISH", cryo.TypeTxFinish))
			send.wantSuccess(t)
		}
	})
}

func TestAPeerThatAsksTooOftenIsServedWithinBounds(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		setFlow(peer, cryo.FlowPull)
		send := start(func() error {
			return s.SendStream(t.Context(), strings.NewReader("abcdef"), &cryo.StreamOptions{ChunkBytes: 3})
		})
		f := peer.WantType("TX_START", cryo.TypeTxStart)
		for range 100 {
			peer.WriteFrames(txFetch(1, 0, 0, 1))
			peer.WantFrame("TX_FETCH acknowledged", cryotest.Acked(1))
		}
		peer.Ack(f)
		for range 64 {
			peer.WantFrame("the chunk, as often as is remembered", txChunk(0, 0, "abc"))
		}
		peer.WantIdle("and no more often", time.Hour)
		peer.WriteFrames(txFetch(1, 0, 1, 2))
		peer.WantFrame("TX_FETCH acknowledged", cryotest.Acked(1))
		peer.WantFrame("the other chunk", txChunk(0, 1, "def"))
		peer.Ack(peer.WantType("TX_FINISH", cryo.TypeTxFinish))
		send.wantSuccess(t)
	})
}

func TestTheFlowCountsForStreamsThatAreOpenedLater(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		pushed, tx := opening(t, s, peer, nil)
		setFlow(peer, cryo.FlowPull)
		_, err := pushed.Write([]byte("x"))
		require.NoError(t, err)
		peer.WantFrame("pushed on", txChunk(tx, 0, "x"))
		peer.WriteFrames(txFetch(1, tx, 0, 1))
		peer.WantFrame("TX_FETCH acknowledged", cryotest.Acked(1))
		peer.WantIdle("a pushed stream can't be pulled", instant)

		pulled, err := s.OpenStream(t.Context(), nil)
		require.NoError(t, err)
		setFlow(peer, cryo.FlowPush)
		_, err = io.WriteString(pulled, "later")
		require.NoError(t, err)
		peer.WantIdle("not announced before its size is known", time.Hour)
		finish := start(pulled.Finish)
		f := peer.WantType("TX_START", cryo.TypeTxStart)
		require.Equal(t, int32(5), f.Size)
		peer.Ack(f)
		peer.WriteFrames(txFetch(1, f.Tx, 0, 1))
		peer.WantFrame("TX_FETCH acknowledged", cryotest.Acked(1))
		peer.WantFrame("the chunk", txChunk(f.Tx, 0, "later"))
		peer.Ack(peer.WantType("TX_FINISH", cryo.TypeTxFinish))
		finish.wantSuccess(t)

		_, tx = opening(t, s, peer, nil)
		require.Equal(t, uint32(2), tx)
	})
}

// vast is a file of any size, all zeros.
type vast struct {
	endless
	size int64
}

func (v vast) Seek(_ int64, whence int) (int64, error) {
	if whence == io.SeekEnd {
		return v.size, nil
	}
	return 0, nil
}

func (v vast) ReadAt(p []byte, _ int64) (int, error) { return v.Read(p) }

func TestOnlyStreamsBelow2GiBCanBePulled(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		setFlow(peer, cryo.FlowPull)
		err := s.SendStream(t.Context(), vast{size: 2 << 30}, nil)
		require.ErrorContains(t, err, "only streams below 2 GiB can be pulled")
		peer.WantIdle("nothing is announced", instant)

		send := start(func() error { return s.SendStream(t.Context(), vast{size: 2<<30 - 1}, nil) })
		f := peer.WantType("TX_START", cryo.TypeTxStart)
		require.Equal(t, int32(math.MaxInt32), f.Size)
		peer.Ack(f)
		peer.WriteFrames(txFetch(1, f.Tx, 32767, 32768))
		peer.WantFrame("TX_FETCH acknowledged", cryotest.Acked(1))
		peer.WantFrame("the last chunk", txChunk(f.Tx, 32767, strings.Repeat("\x00", 65535)))
		peer.Ack(peer.WantType("TX_FINISH", cryo.TypeTxFinish))
		send.wantSuccess(t)
	})
}

func TestWhatCanNotBeReadAgainIsKeptWithinABound(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		setFlow(peer, cryo.FlowPull)
		opts := &cryo.StreamOptions{MaxSpoolBytes: 10}
		err := s.SendStream(t.Context(), io.MultiReader(strings.NewReader("0123456789a")), opts)
		require.ErrorContains(t, err, "only 10 bytes of it are kept")

		st, err := s.OpenStream(t.Context(), opts)
		require.NoError(t, err)
		_, err = st.Write([]byte("0123456789"))
		require.NoError(t, err)
		_, err = st.Write([]byte("a"))
		require.ErrorContains(t, err, "only 10 bytes of it are kept")
		require.ErrorContains(t, st.Finish(), "only 10 bytes of it are kept")
		peer.WantIdle("neither was announced", time.Hour)

		send := start(func() error { return s.SendStream(t.Context(), strings.NewReader("0123456789a"), opts) })
		require.Equal(t, int32(11), peer.WantType("TX_START of what can be read again", cryo.TypeTxStart).Size)
		send.wantBlocked(t)
	})
}

// pipe is a file that can't seek.
type pipe struct{ *bytes.Buffer }

func (pipe) Seek(int64, int) (int64, error)        { return 0, errors.New("illegal seek") }
func (pipe) ReadAt(p []byte, _ int64) (int, error) { return 0, errors.New("illegal seek") }

func TestAFileThatCanNotSeekIsKept(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		setFlow(peer, cryo.FlowPull)
		start(func() error { return s.SendStream(t.Context(), pipe{bytes.NewBufferString("abc")}, nil) })
		require.Equal(t, int32(3), peer.WantType("TX_START", cryo.TypeTxStart).Size)
	})
}

func TestAFileIsSentFromWhereItStandsAndNotPastWhatItHad(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		setFlow(peer, cryo.FlowPull)
		file := strings.NewReader("..abc")
		_, _ = file.Seek(2, io.SeekStart)
		send := start(func() error { return s.SendStream(t.Context(), file, nil) })
		f := peer.WantType("TX_START", cryo.TypeTxStart)
		require.Equal(t, int32(3), f.Size)
		file.Reset("..ab") // it shrinks
		peer.Ack(f)
		peer.WriteFrames(txFetch(1, f.Tx, 0, 1))
		peer.WantFrame("TX_FETCH acknowledged", cryotest.Acked(1))
		require.ErrorIs(t, send.result(t), io.ErrUnexpectedEOF)
		peer.WantIdle("nothing is made up", time.Hour)
	})
}

// limited is what a vast file has, as a plain reader.
func (v vast) limited() io.Reader { return io.LimitReader(endless{}, v.size) }
