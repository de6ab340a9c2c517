package cryo_test

import (
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/cryotest"
	"github.com/cryo-connect/cryo-connect/internal/wire"
)

func TestReceivedStreamIsAcknowledgedStepByStep(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		peer.WriteFrames(txStart(7, 3, -1, "grüße"))
		st := acceptStream(t, s)
		require.Equal(t, "grüße", st.Name())
		require.Equal(t, uint32(3), st.Tx())
		require.Equal(t, int64(-1), st.Size())
		require.Same(t, s, st.Session())
		peer.WantIdle("TX_START waits for the first Read", time.Hour)

		read := start(func() error { return wantRest(t, st, "abcdef") })
		peer.WantFrame("TX_START acknowledged", cryotest.Acked(7))
		peer.WriteFrames(txChunk(3, 0, "abc"), txChunk(3, 1, ""), txChunk(3, 2, "def"))
		read.wantBlocked(t)
		require.Equal(t, int64(6), st.Received())
		peer.WriteFrames(txFinish(8, 3))
		read.wantSuccess(t)
		peer.WantIdle("TX_FINISH waits for Ack", time.Hour)
		require.NoError(t, st.Ack())
		peer.WantFrame("TX_FINISH acknowledged", cryotest.Acked(8))
		require.NoError(t, st.Ack())
		require.NoError(t, st.Close())
		peer.WantIdle("a stream is settled once", time.Hour)
		require.NoError(t, wantRest(t, st, ""), "and its end stays its end")
	})
}

func TestStreamMayBeReadInPieces(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		st := incoming(t, s, peer, 1, 0)
		peer.WriteFrames(txChunk(0, 1, "abcde"), txChunk(0, 2, "f"), txFinish(2, 0))
		synctest.Wait()
		n, err := st.Read(nil)
		require.Zero(t, n)
		require.NoError(t, err)
		wantBytes(t, st, "a")
		wantBytes(t, st, "bcd")
		wantBytes(t, st, "ef")
		require.NoError(t, wantRest(t, st, ""))
	})
}

func TestReadIntoAnEmptySliceLetsThePeerSend(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		peer.WriteFrames(txStart(7, 3, -1, ""))
		st := acceptStream(t, s)
		for range 2 {
			n, err := st.Read(nil)
			require.Zero(t, n)
			require.NoError(t, err)
		}
		peer.WantFrame("TX_START acknowledged", cryotest.Acked(7))
		peer.WantIdle("once", instant)
	})
}

func TestRejectedStreamIsCancelledAndNeverAcknowledged(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		peer.WriteFrames(txStart(1, 7, -1, "unread"))
		require.NoError(t, acceptStream(t, s).Close())
		peer.WantFrame("TX_CANCEL of the peer's number, and no ACK", txCancel(end.first, 7))

		half := incoming(t, s, peer, 2, 8)
		require.NoError(t, half.Close())
		peer.WantFrame("TX_CANCEL", txCancel(end.first+1, 8))
		_, err := half.Read(make([]byte, 1))
		require.ErrorIs(t, err, cryo.ErrStreamClosed)

		whole := incoming(t, s, peer, 3, 9)
		peer.WriteFrames(txFinish(4, 9))
		require.NoError(t, wantRest(t, whole, ""))
		require.NoError(t, whole.Close())
		require.ErrorIs(t, whole.Ack(), cryo.ErrStreamClosed)
		peer.WantFrame("TX_CANCEL", txCancel(end.first+2, 9))

		for tx := uint32(7); tx < 10; tx++ {
			peer.WriteFrames(txChunk(tx, 1, "late"), txFinish(5, tx), cryotest.Acked(end.first+tx-7))
		}
		peer.WantIdle("TX_FINISH is never acknowledged", time.Hour)
		serving(t, s, peer)
	})
}

func TestCloseEndsAWaitingRead(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		st := incoming(t, s, peer, 1, 0)
		read := start(func() error {
			_, err := st.Read(make([]byte, 1))
			return err
		})
		read.wantBlocked(t)
		require.NoError(t, st.Close())
		require.ErrorIs(t, read.result(t), cryo.ErrStreamClosed)
		peer.WantFrame("TX_CANCEL", txCancel(end.first, 0))

		st = incoming(t, s, peer, 1, 2)
		peer.WriteFrames(txChunk(2, 1, "unread"), txFinish(2, 2))
		require.NoError(t, st.Close())
		_, err := st.Read(make([]byte, 1))
		require.ErrorIs(t, err, cryo.ErrStreamClosed, "what was thrown away is no end")
	})
}

func TestStreamCannotBeAcknowledgedBeforeItIsReadToItsEnd(t *testing.T) {
	const unread = "the stream can't be acknowledged before Read has returned io.EOF"
	atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		peer.WriteFrames(txStart(1, 7, -1, ""))
		st := acceptStream(t, s)
		require.EqualError(t, st.Ack(), unread, "not a byte was asked for")
		peer.WantIdle("TX_START is not acknowledged", time.Hour)

		read := start(func() error { wantBytes(t, st, "ab"); return nil })
		peer.WantFrame("TX_START acknowledged", cryotest.Acked(1))
		peer.WriteFrames(txChunk(7, 0, "abc"))
		read.wantSuccess(t)
		require.EqualError(t, st.Ack(), unread, "a byte is unread")
		wantBytes(t, st, "c")
		peer.WriteFrames(txFinish(2, 7))
		synctest.Wait()
		require.EqualError(t, st.Ack(), unread, "all is read, but Read has not returned io.EOF")
		peer.WantIdle("nothing is acknowledged", time.Hour)

		require.NoError(t, wantRest(t, st, ""))
		require.NoError(t, st.Ack(), "the stream is as it was")
		peer.WantFrame("TX_FINISH acknowledged", cryotest.Acked(2))

		st = incoming(t, s, peer, 3, 8)
		require.EqualError(t, st.Ack(), unread)
		require.NoError(t, st.Close(), "it may be given up")
		peer.WantFrame("TX_CANCEL", txCancel(end.first, 8))
		peer.WriteFrames(txFinish(4, 8))
		peer.WantIdle("TX_FINISH is never acknowledged", time.Hour)
	})
}

// The sender of a stream that its receiver tries to acknowledge too early is not left
// alone: the stream goes on, and ends one way or the other.
func TestEarlyAckDoesNotSettleAStream(t *testing.T) {
	for _, flow := range []wire.Flow{wire.FlowPush, wire.FlowPull} {
		for _, fate := range []string{"read on", "rejected", "left alone"} {
			t.Run(fmt.Sprint(flow, ", ", fate), func(t *testing.T) {
				inBubble(t, func(t *testing.T) {
					p := connect(t, quiet, quiet)
					useFlow(t, p.server, flow)
					text := strings.Repeat("x", 1<<20)
					sending := start(func() error {
						return p.client.SendStream(t.Context(), strings.NewReader(text), &cryo.StreamOptions{StepTimeout: time.Hour})
					})
					st := acceptStream(t, p.server)
					wantBytes(t, st, "xxx")
					require.ErrorContains(t, st.Ack(), "before Read has returned io.EOF")
					sending.wantBlocked(t)
					switch fate {
					case "read on":
						require.NoError(t, wantRest(t, st, text[3:]))
						require.NoError(t, st.Ack())
						sending.wantSuccess(t)
					case "rejected":
						require.NoError(t, st.Close())
						require.ErrorIs(t, sending.result(t), cryo.ErrStreamCancelled)
					default:
						require.ErrorIs(t, <-sending.done, cryo.ErrStepTimeout)
						require.NoError(t, st.Close())
					}
				})
			})
		}
	}
}

// A stream that is whole by its size is acknowledged with its TX_FINISH, which may come
// later, or never. Another stream of its number has nothing of that.
func TestReusedStreamNumberIsNotAcknowledgedForTheOldStream(t *testing.T) {
	for name, another := range map[string]func(t *testing.T, s *cryo.Session, peer *cryotest.Peer){
		"rejected": func(t *testing.T, s *cryo.Session, peer *cryotest.Peer) {
			peer.WriteFrames(txStart(3, 5, -1, ""))
			require.NoError(t, acceptStream(t, s).Close())
		},
		"rejected by SetSendOnly": func(t *testing.T, s *cryo.Session, peer *cryotest.Peer) {
			s.SetSendOnly(true)
			peer.WriteFrames(txStart(3, 5, -1, ""))
		},
		"with a name that is too long": func(t *testing.T, s *cryo.Session, peer *cryotest.Peer) {
			peer.WriteFrames(txStart(3, 5, -1, strings.Repeat("n", 1025)))
		},
		"one of too many": func(t *testing.T, s *cryo.Session, peer *cryotest.Peer) {
			for tx := range uint32(256) {
				peer.WriteFrames(txStart(9, 1000+tx, -1, ""))
			}
			peer.WriteFrames(txStart(3, 5, -1, ""))
		},
		"broken": func(t *testing.T, s *cryo.Session, peer *cryotest.Peer) {
			peer.WriteFrames(txStart(3, 5, -1, ""), txChunk(5, 0, "early"))
		},
	} {
		t.Run(name, func(t *testing.T) {
			atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
				p := pullFrom(t, end, s, peer, 3)
				p.wantFetch(0, 1)
				p.WriteFrames(txChunk(5, 0, "abc"))
				require.NoError(t, wantRest(t, p.st, "abc"))
				require.NoError(t, p.st.Ack(), "TX_FINISH will be acknowledged")
				another(t, s, peer)
				p.wantCancel()
				p.WriteFrames(txFinish(4, 5))
				p.WantIdle("but not that of a stream which is not delivered", time.Hour)
			})
		})
	}
}

func TestSettlingAfterTheEndReturnsTheCause(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		whole, half, fresh := incoming(t, s, peer, 1, 0), incoming(t, s, peer, 2, 1), incoming(t, s, peer, 3, 2)
		peer.WriteFrames(txFinish(4, 0), txChunk(1, 1, "abc"), txStart(5, 3, -1, "never accepted"))
		acceptStream(t, s)
		peer.WriteFrames(txStart(6, 4, -1, "never accepted"))
		serving(t, s, peer)
		peer.Conn().Cut()
		cause := wantEnded(t, s)

		require.NoError(t, wantRest(t, whole, ""), "it is whole all the same")
		require.Equal(t, cause, whole.Ack())
		err := wantRest(t, half, "abc")
		require.ErrorIs(t, err, io.ErrUnexpectedEOF)
		require.ErrorIs(t, err, net.ErrClosed)
		require.ErrorContains(t, err, "after 4 bytes")
		require.Equal(t, cause, half.Close())
		require.Equal(t, cause, fresh.Ack(), "TX_FINISH will never be acknowledged")
		_, err = s.AcceptStream(t.Context())
		require.Equal(t, cause, err)
	})
}

func TestStreamsAreAcceptedByName(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		for tx, name := range []string{"a", "b", "c", "b", ""} {
			peer.WriteFrames(txStart(1, uint32(tx), -1, name))
		}
		waiting := start(func() error {
			require.Equal(t, uint32(5), acceptStream(t, s, "d").Tx())
			return nil
		})
		require.Equal(t, uint32(1), acceptStream(t, s, "c", "b").Tx())
		require.Equal(t, uint32(2), acceptStream(t, s, "c", "b").Tx())
		require.Equal(t, uint32(0), acceptStream(t, s).Tx())
		require.Equal(t, uint32(4), acceptStream(t, s, "anonymous").Tx())
		wantNoStream(t, s, "c")
		waiting.wantBlocked(t)
		peer.WriteFrames(txStart(1, 5, -1, "d"))
		waiting.wantSuccess(t)
		require.Equal(t, uint32(3), acceptStream(t, s).Tx())
		wantNoStream(t, s)
	})
}

func TestEachStreamIsAcceptedOnce(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		const streams = 16
		got := make(chan uint32, streams)
		for range streams {
			go func() {
				if st, err := s.AcceptStream(t.Context()); err == nil {
					got <- st.Tx()
				}
			}()
		}
		for tx := range uint32(streams) {
			peer.WriteFrames(txStart(1, tx, -1, ""))
		}
		seen := make(map[uint32]bool)
		for range streams {
			seen[next(t, got)] = true
		}
		require.Len(t, seen, streams)
	})
}

func TestStreamNamesAreValidAndBounded(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		peer.WriteFrames(
			txStart(1, 0, -1, "caf\xe9/\x00"),
			txStart(1, 1, -1, ""),
			txStart(1, 2, -1, strings.Repeat("n", 1024)),
			txStart(1, 3, -1, strings.Repeat("n", 1025)),
			txStart(1, 4, -1, strings.Repeat("n", 1<<20)),
			txStart(1, 5, -1, strings.Repeat("\xff.", 400)), // three bytes each, and the dot
		)
		require.Equal(t, "caf\uFFFD/\x00", acceptStream(t, s).Name())
		require.Equal(t, "anonymous", acceptStream(t, s).Name())
		require.Equal(t, strings.Repeat("n", 1024), acceptStream(t, s).Name())
		for tx := uint32(3); tx <= 5; tx++ {
			peer.WantFrame("TX_CANCEL of a name that is too long", txCancel(end.first+tx-3, tx))
		}
		wantNoStream(t, s)
	})
}

func TestNumberMayBeUsedAgainOnceItsStreamIsSettled(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		for range 3 {
			require.NoError(t, incoming(t, s, peer, 1, 5).Close())
			peer.WantType("TX_CANCEL", wire.TxCancel)
			st := incoming(t, s, peer, 2, 5)
			peer.WriteFrames(txFinish(3, 5))
			peer.WantIdle("not acknowledged by itself", instant)
			require.NoError(t, wantRest(t, st, ""))
			require.NoError(t, st.Ack())
			peer.WantFrame("TX_FINISH acknowledged", cryotest.Acked(3))
		}
	})
}

func TestRepeatedStreamNumberEndsTheSession(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		st := incoming(t, s, peer, 1, 5)
		peer.WriteFrames(txChunk(5, 1, "abc"), txStart(2, 5, -1, "again"))
		peer.Ack(peer.WantType("the open stream is cancelled", wire.TxCancel))
		peer.WantClose("the protocol is broken", 4001, "protocol violation: TX_START for stream 5, which is already open")
		peer.WS.Close()
		_, ok := errors.AsType[*cryo.ProtocolError](wantEnded(t, s))
		require.True(t, ok)
		require.ErrorIs(t, wantRest(t, st, "abc"), io.ErrUnexpectedEOF)
	})
}

func TestReadReturnsTheBytesOfABrokenStreamBeforeTheError(t *testing.T) {
	for name, frames := range map[string][]wire.Frame{
		"a chunk is missing":       {txChunk(5, 2, "x")},
		"a chunk comes twice":      {txChunk(5, 0, "<")},
		"a chunk from nowhere":     {txChunk(5, 1<<31, "x")},
		"a chunk behind TX_FINISH": {txFinish(2, 5), txChunk(5, 1, "x")},
		"… even an empty one":      {txFinish(2, 5), txChunk(5, 1, "")},
	} {
		t.Run(name, func(t *testing.T) {
			atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
				peer.WriteFrames(txStart(1, 5, -1, ""))
				st := acceptStream(t, s)
				_, err := st.Read(nil)
				require.NoError(t, err)
				peer.WantFrame("TX_START acknowledged", cryotest.Acked(1))
				peer.WriteFrames(txChunk(5, 0, "<"))
				peer.WriteFrames(frames...)
				peer.WantFrame("TX_CANCEL", txCancel(end.first, 5))
				peer.WriteFrames(cryotest.Acked(end.first), txChunk(5, 1, "y"), txFinish(3, 5))
				require.ErrorIs(t, wantRest(t, st, "<"), cryo.ErrStreamBroken)
				require.ErrorIs(t, st.Ack(), cryo.ErrStreamBroken)
				require.NoError(t, st.Close())
				peer.WantIdle("cancelled once, and never acknowledged", time.Hour)
				serving(t, s, peer)
			})
		})
	}
}

func TestChunksBeforeTheStartIsAcknowledgedBreakAStream(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		peer.WriteFrames(txStart(1, 5, -1, ""), txChunk(5, 0, "x"))
		peer.WantFrame("TX_CANCEL", txCancel(end.first, 5))
		wantNoStream(t, s)

		peer.WriteFrames(txStart(1, 5, -1, ""))
		st := acceptStream(t, s)
		peer.WriteFrames(txChunk(5, 0, "x"))
		peer.WantFrame("TX_CANCEL", txCancel(end.first+1, 5))
		require.ErrorIs(t, wantRest(t, st, ""), cryo.ErrStreamBroken)
		require.NoError(t, st.Close())
		peer.WantIdle("TX_START stays unacknowledged", time.Hour)
		wantFree(t, s, peer, cryo.DefaultMaxBufferBytes, 0)
	})
}

func TestSessionThatOnlySendsCancelsStreams(t *testing.T) {
	only := quiet
	only.SendOnly = true
	atBothEnds(t, only, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		peer.WriteFrames(txStart(1, 5, -1, ""))
		peer.WantFrame("TX_CANCEL", txCancel(end.first, 5))
		s.SetSendOnly(false)
		peer.WriteFrames(txStart(1, 6, -1, ""), txStart(2, 7, -1, ""))
		st := acceptStream(t, s)
		_, err := st.Read(nil)
		require.NoError(t, err)
		peer.WantFrame("TX_START acknowledged", cryotest.Acked(1))
		s.SetSendOnly(true)
		peer.WantFrame("TX_CANCEL of the one that nobody has accepted", txCancel(end.first+1, 7))
		peer.WriteFrames(txChunk(6, 0, "x"), txFinish(3, 6))
		require.NoError(t, wantRest(t, st, "x"), "the other goes on")
		require.NoError(t, st.Ack())
		peer.WantFrame("TX_FINISH acknowledged", cryotest.Acked(3))
	})
}
