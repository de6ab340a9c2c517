package cryo_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/iotest"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/cryotest"
	"github.com/cryo-connect/cryo-connect/internal/wire"
)

func TestStreamIsAnnouncedSentAndFinishedStepByStep(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		for tx := range uint32(3) {
			number := end.first + 2*tx
			send := start(func() error {
				return s.SendStream(t.Context(), strings.NewReader("abcdefghij"), &cryo.StreamOptions{Name: "grüße", ChunkBytes: 4})
			})
			peer.WantFrame("TX_START", txStart(number, tx, -1, "grüße"))
			peer.WantIdle("no chunk before its acknowledgement", time.Hour)
			peer.WriteFrames(cryotest.Acked(number))
			peer.WantFrame("a chunk", txChunk(tx, 0, "abcd"))
			peer.WantFrame("another", txChunk(tx, 1, "efgh"))
			peer.WantFrame("the last", txChunk(tx, 2, "ij"))
			peer.WantFrame("TX_FINISH", txFinish(number+1, tx))
			send.wantBlocked(t)
			peer.WriteFrames(cryotest.Acked(number + 1))
			send.wantSuccess(t)
		}
		peer.WantIdle("nothing follows", time.Hour)
	})
}

func TestEmptyStreamHasNoChunksAndNoNameIsAnonymous(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		send := start(func() error { return s.SendStream(t.Context(), strings.NewReader(""), nil) })
		peer.WantFrame("TX_START", txStart(end.first, 0, -1, "anonymous"))
		peer.WriteFrames(cryotest.Acked(end.first))
		peer.WantFrame("TX_FINISH", txFinish(end.first+1, 0))
		peer.WriteFrames(cryotest.Acked(end.first + 1))
		send.wantSuccess(t)
	})
}

func TestEachWriteAndEachReadBecomesChunks(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		st, tx := opening(t, s, peer, &cryo.StreamOptions{ChunkBytes: 4})
		n, err := st.Write([]byte("abcdef"))
		require.NoError(t, err)
		require.Equal(t, 6, n)
		peer.WantFrame("a full one", txChunk(tx, 0, "abcd"))
		peer.WantFrame("the rest of the write", txChunk(tx, 1, "ef"))

		n, err = st.Write(nil)
		require.NoError(t, err)
		require.Zero(t, n)
		peer.WantIdle("nothing written is nothing sent", instant)

		sent, err := st.ReadFrom(iotest.OneByteReader(strings.NewReader("xyz")))
		require.NoError(t, err)
		require.Equal(t, int64(3), sent)
		for i, c := range []string{"x", "y", "z"} {
			peer.WantFrame("a read of one byte", txChunk(tx, uint32(2+i), c))
		}
		buf := []byte("mine")
		_, err = st.Write(buf)
		require.NoError(t, err)
		copy(buf, "over")
		peer.WantFrame("what was written, whatever becomes of the slice", txChunk(tx, 5, "mine"))
	})
}

func TestStreamOptionsAreCheckedBeforeAnythingIsSent(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		for _, c := range []struct {
			opts cryo.StreamOptions
			want string
			is   error
		}{
			{cryo.StreamOptions{Name: strings.Repeat("n", 1025)}, "stream name is too large: it has 1025 bytes, at most 1024 are allowed", cryo.ErrTooLarge},
			{cryo.StreamOptions{Name: "caf\xe9"}, `stream name "caf\xe9" is not valid UTF-8`, cryo.ErrInvalidUTF8},
			{cryo.StreamOptions{ChunkBytes: -1}, "ChunkBytes is -1: it must be 1 to 16777216, or 0 for its default", nil},
			{cryo.StreamOptions{ChunkBytes: cryo.MaxPayload + 1}, "ChunkBytes is 16777217: it must be 1 to 16777216, or 0 for its default", nil},
		} {
			_, err := s.OpenStream(t.Context(), &c.opts)
			require.EqualError(t, err, c.want)
			if c.is != nil {
				require.ErrorIs(t, err, c.is)
			}
			require.EqualError(t, s.SendStream(t.Context(), strings.NewReader("x"), &c.opts), c.want)
		}
		peer.WantIdle("nothing", instant)

		_, tx := opening(t, s, peer, &cryo.StreamOptions{Name: strings.Repeat("n", 1024), ChunkBytes: cryo.MaxPayload})
		require.Zero(t, tx, "no number was used up")
	})
}

func TestCancelledStreamStopsAtEachStep(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		cancel := func(tx uint32) {
			t.Helper()
			peer.WriteFrames(txCancel(70+tx, tx))
			peer.WantFrame("TX_CANCEL acknowledged", cryotest.Acked(70+tx))
		}
		open := start(func() error {
			_, err := s.OpenStream(t.Context(), nil)
			return err
		})
		f := peer.WantType("TX_START", wire.TxStart)
		cancel(0)
		require.ErrorIs(t, open.result(t), cryo.ErrStreamCancelled)
		peer.Ack(f) // too late

		st, tx := opening(t, s, peer, nil)
		_, err := st.Write([]byte("abc"))
		require.NoError(t, err)
		peer.WantFrame("a chunk", txChunk(tx, 0, "abc"))
		cancel(tx)
		_, err = st.Write([]byte("def"))
		require.ErrorIs(t, err, cryo.ErrStreamCancelled)
		require.ErrorIs(t, st.Finish(), cryo.ErrStreamCancelled)

		st, tx = opening(t, s, peer, nil)
		finish := start(st.Finish)
		f = peer.WantType("TX_FINISH", wire.TxFinish)
		finish.wantBlocked(t)
		cancel(tx)
		require.ErrorIs(t, finish.result(t), cryo.ErrStreamCancelled)
		peer.Ack(f) // too late
		peer.WantIdle("nothing of them follows", time.Hour)

		cancel(4711)
		peer.WantIdle("a stream that nobody knows is cancelled gladly", instant)
		require.NoError(t, s.Err())
	})
}

func TestCancelNamesTheSendersOwnStream(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		in := incoming(t, s, peer, 1, 0)
		first, _ := opening(t, s, peer, nil)
		second, _ := opening(t, s, peer, nil)
		peer.WriteFrames(txCancel(2, 0))
		peer.WantFrame("acknowledged", cryotest.Acked(2))

		_, err := first.Write([]byte("x"))
		require.ErrorIs(t, err, cryo.ErrStreamCancelled)
		_, err = second.Write([]byte("x"))
		require.NoError(t, err)
		peer.WantFrame("the other goes on", txChunk(1, 0, "x"))
		peer.WriteFrames(txChunk(0, 1, ">"), txFinish(3, 0))
		require.NoError(t, wantRest(t, in, ">"), "and so does the peer's with this number")
	})
}

func TestFirstOfAcknowledgementAndCancelCounts(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		for range 50 {
			for _, cancelFirst := range []bool{false, true} {
				st, tx := opening(t, s, peer, nil)
				finish := start(st.Finish)
				f := peer.WantType("TX_FINISH", wire.TxFinish)
				last := []wire.Frame{cryotest.Acked(f.Ack), txCancel(1, tx)}
				if cancelFirst {
					last[0], last[1] = last[1], last[0]
				}
				peer.WriteFrames(last...)
				if cancelFirst {
					require.ErrorIs(t, finish.result(t), cryo.ErrStreamCancelled)
				} else {
					finish.wantSuccess(t)
				}
				peer.WantFrame("acknowledged in any case", cryotest.Acked(1))
			}
		}
	})
}

// Against the clock: a chunk or TX_FINISH that was about to be queued when the
// stream was cancelled must not follow the acknowledgement.
func TestNothingOfAStreamFollowsTheAcknowledgementOfItsCancel(t *testing.T) {
	for range 5 {
		s, peer := accepted(t, cryo.ServerOptions{SessionOptions: quiet})
		const streams = 20
		var sending sync.WaitGroup
		var abandon [streams]context.CancelFunc // by name
		for i := range streams {
			var ctx context.Context
			ctx, abandon[i] = context.WithCancel(t.Context())
			sending.Go(func() {
				source := io.LimitReader(endless{}, 40_000)
				_ = s.SendStream(ctx, source, &cryo.StreamOptions{Name: strconv.Itoa(i), ChunkBytes: 1000})
			})
		}
		over, cancelled := make(map[uint32]bool), make(map[uint32]bool)
		named := make(map[uint32]int)
		for len(over) < streams {
			f := peer.Next("a frame of a stream")
			switch f.Type {
			case wire.TxStart:
				named[f.Tx], _ = strconv.Atoi(string(f.Payload))
				peer.Ack(f)
			case wire.TxChunk, wire.TxFinish:
				require.False(t, over[f.Tx], "%v of a cancelled stream", f.Type)
				if !cancelled[f.Tx] && (f.Type == wire.TxFinish || f.Seq == f.Tx) {
					cancelled[f.Tx] = true
					if f.Tx%2 == 0 { // at the same time
						sending.Go(abandon[named[f.Tx]])
					}
					peer.WriteFrames(txCancel(f.Tx, f.Tx))
				}
			case wire.Ack:
				over[f.Ack] = true
			}
		}
		sending.Wait()
		peer.WantIdle("nothing more", time.Millisecond)
		require.NoError(t, s.Err())
		cut(s)
	}
}

// endless is a source of zeros.
type endless struct{}

func (endless) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

func TestErrorForAStepRejectsTheStream(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		rejected := &cryo.RejectedError{Text: "no streams here"}
		open := start(func() error {
			_, err := s.OpenStream(t.Context(), nil)
			return err
		})
		f := peer.WantType("TX_START", wire.TxStart)
		peer.WriteFrames(cryotest.Error(f.Ack, rejected.Text))
		require.ErrorAs(t, open.result(t), &rejected)

		st, _ := opening(t, s, peer, nil)
		finish := start(st.Finish)
		f = peer.WantType("TX_FINISH", wire.TxFinish)
		peer.WriteFrames(cryotest.Error(f.Ack, rejected.Text))
		require.ErrorAs(t, finish.result(t), &rejected)
		peer.WantIdle("a rejection is never acknowledged", instant)
	})
}

func TestSourceErrorAbandonsTheStream(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		for _, c := range []struct {
			source io.Reader
			err    error
		}{
			{iotest.TimeoutReader(iotest.OneByteReader(strings.NewReader("ab"))), iotest.ErrTimeout},
			{io.MultiReader(strings.NewReader("a"), iotest.ErrReader(errFlaky)), errFlaky},
			{io.MultiReader(strings.NewReader("a"), idler{}), io.ErrNoProgress},
		} {
			send := start(func() error { return s.SendStream(t.Context(), c.source, nil) })
			peer.Ack(peer.WantType("TX_START", wire.TxStart))
			require.Equal(t, c.err, send.result(t))
			time.Sleep(time.Hour)
			require.LessOrEqual(t, peer.Skip(), 1, "a chunk at most, and no TX_FINISH")
		}
		serving(t, s, peer)
	})
}

// idler is a source that gives nothing, for ever.
type idler struct{}

func (idler) Read([]byte) (int, error) { return 0, nil }

func TestStreamWithAMissingChunkCannotBeFinished(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		st, _ := opening(t, s, peer, &cryo.StreamOptions{StepTimeout: time.Second})
		peer.Conn().StopReading()
		written, err := st.Write(make([]byte, 2<<20))
		require.ErrorIs(t, err, cryo.ErrStepTimeout)
		require.Less(t, written, 1<<20)
		peer.Conn().ReadOn()
		time.Sleep(time.Minute)
		require.ErrorIs(t, st.Finish(), cryo.ErrStepTimeout)
		_, err = st.Write([]byte("x"))
		require.ErrorIs(t, err, cryo.ErrStepTimeout)
		time.Sleep(time.Minute)
		peer.Skip()
		serving(t, s, peer)
	})
}

func TestAbandonedStreamSendsNothingMore(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		abandoned, _ := opening(t, s, peer, nil)
		for range 2 {
			err := abandoned.Close()
			require.ErrorIs(t, err, cryo.ErrStreamClosed, "it is not delivered")
			require.EqualError(t, err, `the stream "anonymous" is not finished: the stream is closed`)
		}
		_, err := abandoned.Write([]byte("x"))
		require.ErrorIs(t, err, cryo.ErrStreamClosed)
		require.ErrorIs(t, abandoned.Finish(), cryo.ErrStreamClosed)

		ctx, cancel := context.WithCancelCause(t.Context())
		var st *cryo.OutgoingStream
		open := start(func() (err error) {
			st, err = s.OpenStream(ctx, nil)
			return err
		})
		peer.Ack(peer.WantType("TX_START", wire.TxStart))
		open.wantSuccess(t)
		cause := errors.New("the pipeline stops")
		cancel(cause)
		_, err = st.Write([]byte("x"))
		require.ErrorIs(t, err, cause)
		require.ErrorIs(t, st.Finish(), cause)
		require.ErrorIs(t, st.Close(), cause)
		require.ErrorIs(t, s.SendStream(ctx, strings.NewReader("x"), nil), cause)
		peer.WantIdle("nothing", time.Hour)

		finished, tx := opening(t, s, peer, nil)
		finish := start(finished.Finish)
		peer.Ack(peer.WantType("TX_FINISH", wire.TxFinish))
		finish.wantSuccess(t)
		require.NoError(t, finished.Close())
		require.ErrorIs(t, finished.Finish(), cryo.ErrStreamClosed)
		_, err = finished.ReadFrom(bytes.NewReader([]byte("x")))
		require.ErrorIs(t, err, cryo.ErrStreamClosed)
		require.NoError(t, finished.Close())
		require.Equal(t, uint32(3), tx, "a stream whose context had ended used a number, and sent nothing")
	})
}

func TestContextEndsEachStepOfAStream(t *testing.T) {
	cause := errors.New("the pipeline stops")
	for name, test := range streamSteps {
		t.Run(name, func(t *testing.T) {
			atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
				ctx, cancel := context.WithCancelCause(t.Context())
				step := test(t, s, peer, func(source io.Reader) error { return s.SendStream(ctx, source, nil) })
				time.Sleep(time.Hour)
				step.wantBlocked(t)
				cancel(cause)
				require.ErrorIs(t, step.result(t), cause)
				require.NoError(t, s.Err())
			})
		})
	}
}

func TestStepTimeoutBoundsEachStepOfAStream(t *testing.T) {
	for name, test := range streamSteps {
		t.Run(name, func(t *testing.T) {
			atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
				var took time.Duration
				step := test(t, s, peer, func(source io.Reader) error {
					begin := time.Now()
					err := s.SendStream(t.Context(), source, &cryo.StreamOptions{StepTimeout: 7 * time.Second})
					took = time.Since(begin)
					return err
				})
				err := step.result(t)
				require.ErrorIs(t, err, cryo.ErrStepTimeout)
				require.ErrorContains(t, err, ": step timeout after 7s")
				require.NotErrorIs(t, err, context.DeadlineExceeded, "the caller's context has not ended")
				require.Equal(t, 7*time.Second, took)
				require.NoError(t, s.Err())
			})
		})
	}
}

// streamSteps bring a stream to where it waits for the peer.
var streamSteps = map[string]func(*testing.T, *cryo.Session, *cryotest.Peer, func(io.Reader) error) *call{
	"TX_START": func(t *testing.T, s *cryo.Session, peer *cryotest.Peer, send func(io.Reader) error) *call {
		step := start(func() error { return send(strings.NewReader("x")) })
		peer.WantType("TX_START", wire.TxStart)
		return step
	},
	"window": func(t *testing.T, s *cryo.Session, peer *cryotest.Peer, send func(io.Reader) error) *call {
		step := start(func() error { return send(endless{}) })
		f := peer.WantType("TX_START", wire.TxStart)
		peer.Conn().StopReading()
		peer.Ack(f)
		return step
	},
	"TX_FETCH": func(t *testing.T, s *cryo.Session, peer *cryotest.Peer, send func(io.Reader) error) *call {
		setFlow(peer, wire.FlowPull)
		step := start(func() error { return send(strings.NewReader("x")) })
		peer.Ack(peer.WantType("TX_START", wire.TxStart))
		return step
	},
	"TX_FINISH": func(t *testing.T, s *cryo.Session, peer *cryotest.Peer, send func(io.Reader) error) *call {
		step := start(func() error { return send(strings.NewReader("")) })
		peer.Ack(peer.WantType("TX_START", wire.TxStart))
		peer.WantType("TX_FINISH", wire.TxFinish)
		return step
	},
}

// setFlow sends the TX_FLOW of a peer.
func setFlow(peer *cryotest.Peer, flow wire.Flow) {
	peer.WriteFrames(txFlow(99, flow))
	peer.WantFrame("TX_FLOW acknowledged", cryotest.Acked(99))
}

func TestStreamsOfAnEndedSessionFailWithItsCause(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		st, _ := opening(t, s, peer, nil)
		setFlow(peer, wire.FlowPull)
		cut(s)
		_, err := st.Write([]byte("x"))
		require.ErrorIs(t, err, cryo.ErrClosed)
		require.ErrorIs(t, st.Finish(), cryo.ErrClosed)
		_, err = s.OpenStream(t.Context(), nil)
		require.ErrorIs(t, err, cryo.ErrClosed)
		require.ErrorIs(t, s.SendStream(t.Context(), strings.NewReader("x"), nil), cryo.ErrClosed)
		require.ErrorIs(t, s.PullStreams(t.Context()), cryo.ErrClosed)
		synctest.Wait()
	})
}

func TestNoStreamIsSentToAPeerWithoutStreams(t *testing.T) {
	without := cryotest.EndpointInfo(1)
	without.Features = 0
	atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		opening := start(func() error {
			_, err := s.OpenStream(t.Context(), nil)
			return err
		})
		peer.WantType("TX_START: it was announced", wire.TxStart)
		opening.wantBlocked(t)

		peer.WriteFrames(without)
		peer.WantFrame("ENDPOINT_INFO acknowledged", cryotest.Acked(1))
		require.ErrorIs(t, opening.result(t), cryo.ErrStreamsUnsupported, "it was on its way")
		_, err := s.OpenStream(t.Context(), nil)
		require.ErrorIs(t, err, cryo.ErrStreamsUnsupported)
		require.ErrorIs(t, s.SendStream(t.Context(), strings.NewReader("x"), nil), cryo.ErrStreamsUnsupported)
		require.NotErrorIs(t, err, context.Canceled)
		peer.WantIdle("nothing was sent", instant)
		require.NoError(t, s.Err())

		peer.WriteFrames(cryotest.EndpointInfo(2))
		peer.WantFrame("ENDPOINT_INFO acknowledged", cryotest.Acked(2))
		openStream := start(func() error {
			_, err := s.OpenStream(t.Context(), nil)
			return err
		})
		peer.Ack(peer.WantType("TX_START: it is announced again", wire.TxStart))
		openStream.wantSuccess(t)
	})
}

func TestStreamIsSentToAServerWithoutEndpointInfo(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		var s *cryo.Session
		peer, dial := diallingTo(t, cryo.DialOptions{SessionOptions: quiet}, &s)
		peer.WantEndpointInfo("the client's ENDPOINT_INFO")
		peer.WriteFrames(cryotest.Acked(peer.First))
		dial.wantSuccess(t)
		send := start(func() error { return s.SendStream(t.Context(), strings.NewReader(""), nil) })
		peer.Ack(peer.WantType("TX_START", wire.TxStart))
		peer.Ack(peer.WantType("TX_FINISH", wire.TxFinish))
		send.wantSuccess(t)
	})
}
