package cryo_test

import (
	"context"
	"errors"
	"io"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/cryotest"
	"github.com/cryo-connect/cryo-connect/internal/wire"
)

// fourStreams has a peer open the streams 0, of which a byte was read, 1, which is accepted,
// 2, which nobody has accepted, and 3, which has come whole and is read.
func fourStreams(t *testing.T, s *cryo.Session, peer *cryotest.Peer) (open, accepted, whole *cryo.IncomingStream) {
	t.Helper()
	open = incoming(t, s, peer, 1000, 0)
	whole = incoming(t, s, peer, 1003, 3)
	peer.WriteFrames(txFinish(1004, 3))
	require.NoError(t, wantRest(t, whole, ""))
	peer.WriteFrames(txStart(1001, 1, -1, "accepted"), txStart(1002, 2, -1, "announced"))
	return open, acceptStream(t, s, "accepted"), whole
}

// wantCancels wants TX_CANCEL for these streams next, in any order.
func wantCancels(t *testing.T, peer *cryotest.Peer, streams ...uint32) (cancels []wire.Frame) {
	t.Helper()
	var got []uint32
	for range streams {
		f := peer.WantType("a stream is cancelled", wire.TxCancel)
		got, cancels = append(got, f.Tx), append(cancels, f)
	}
	slices.Sort(got)
	require.Equal(t, streams, got)
	return cancels
}

func TestCloseSendsByeOnceCancelledStreamsAreAcknowledged(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		open, accepted, whole := fourStreams(t, s, peer)
		peer.WriteFrames(cryotest.Text(1, ""), txChunk(0, 1, "a"))
		m := receive(t, s)
		synctest.Wait()
		closing := start(func() error { return s.Close(t.Context(), "done") })
		cancels := wantCancels(t, peer, 0, 1, 2)

		require.ErrorIs(t, s.Err(), cryo.ErrClosed)
		require.Equal(t, s.Err(), context.Cause(s.Context()))
		require.ErrorIs(t, s.SendText(t.Context(), "too late"), cryo.ErrClosed)
		_, err := s.OpenStream(t.Context(), nil)
		require.ErrorIs(t, err, cryo.ErrClosed)
		again := start(func() error { return s.Close(t.Context(), "again") })
		peer.Ack(cancels[:2]...)
		peer.WriteFrames(txChunk(0, 2, "discarded"), cryotest.Text(2, "discarded"), txFinish(1005, 0), txStart(1006, 4, -1, "late"), cryotest.Ping(7))
		late := wantCancels(t, peer, 4)
		peer.WantFrame("frames that are no data are answered", cryotest.Pong(7))
		require.NoError(t, m.Ack())
		peer.WantFrame("what was received is acknowledged", cryotest.Acked(1))
		require.NoError(t, whole.Ack())
		peer.WantFrame("streams, too", cryotest.Acked(1004))
		peer.Ack(late...)
		peer.WantIdle("BYE waits", instant)
		closing.wantBlocked(t)
		again.wantBlocked(t)

		peer.Ack(cancels[2])
		require.Equal(t, "done", string(peer.WantType("BYE", wire.Bye).Payload))
		peer.WantClose("the end", 4000, "done")
		require.NoError(t, peer.WS.Close())
		closing.wantSuccess(t)
		again.wantSuccess(t)

		err = wantRest(t, open, "a")
		require.ErrorIs(t, err, io.ErrUnexpectedEOF)
		require.ErrorIs(t, err, cryo.ErrClosed)
		require.ErrorContains(t, err, "after 2 bytes")
		require.ErrorIs(t, open.Ack(), cryo.ErrClosed)
		require.ErrorIs(t, wantRest(t, accepted, ""), cryo.ErrClosed)
		require.Zero(t, s.Held())
	})
}

func TestCloseWaitsForStreamsThatWereCancelledJustBefore(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, _ end, s *cryo.Session, peer *cryotest.Peer) {
		require.NoError(t, incoming(t, s, peer, 1, 0).Close())
		closing := start(func() error { return s.Close(t.Context(), "") })
		cancel := peer.WantType("the stream is cancelled", wire.TxCancel)
		peer.WantIdle("BYE waits", time.Second)
		peer.Ack(cancel)
		peer.WantType("BYE", wire.Bye)
		peer.WantClose("the end", 4000, "")
		peer.WriteClose(4000, "")
		closing.wantSuccess(t)
	})
}

func TestCloseWaitsHalfItsTimeoutForAnUnansweredCancel(t *testing.T) {
	opts := quiet
	opts.CloseTimeout = 4 * time.Second
	for name, c := range map[string]struct {
		streams  func(*testing.T, *cryo.Session, *cryotest.Peer)
		bye, end time.Duration
	}{
		"an open stream": {func(t *testing.T, s *cryo.Session, peer *cryotest.Peer) {
			incoming(t, s, peer, 1, 0)
		}, 2 * time.Second, 4 * time.Second},
		"one that was cancelled before": {func(t *testing.T, s *cryo.Session, peer *cryotest.Peer) {
			require.NoError(t, incoming(t, s, peer, 1, 0).Close())
			peer.WantType("TX_CANCEL", wire.TxCancel)
			time.Sleep(1500 * time.Millisecond)
		}, 500 * time.Millisecond, 4 * time.Second},
		"one that was cancelled long ago": {func(t *testing.T, s *cryo.Session, peer *cryotest.Peer) {
			require.NoError(t, incoming(t, s, peer, 1, 0).Close())
			peer.WantType("TX_CANCEL", wire.TxCancel)
			time.Sleep(2 * time.Second)
		}, 0, 4 * time.Second},
		"more that come meanwhile": {func(t *testing.T, s *cryo.Session, peer *cryotest.Peer) {
			incoming(t, s, peer, 1, 0)
			time.AfterFunc(time.Second, func() { peer.WriteFrames(txStart(2, 1, -1, "late")) })
		}, 2 * time.Second, 4 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			atBothEnds(t, opts, func(t *testing.T, _ end, s *cryo.Session, peer *cryotest.Peer) {
				c.streams(t, s, peer)
				begin := time.Now()
				closing := start(func() error { return s.Close(t.Context(), "") })
				for f := peer.Next("BYE"); f.Type != wire.Bye; f = peer.Next("BYE") {
					require.Equal(t, wire.TxCancel, f.Type)
				}
				require.Equal(t, c.bye, time.Since(begin))
				closing.wantSuccess(t)
				require.Equal(t, c.end, time.Since(begin), "CloseTimeout bounds all of it")
			})
		})
	}
}

func TestWaitForACancelEndsWithTheSession(t *testing.T) {
	for name, c := range map[string]struct {
		leave func(*testing.T, *cryotest.Peer)
		cut   bool
	}{
		"closes": {func(_ *testing.T, peer *cryotest.Peer) { peer.WriteClose(4000, "") }, false},
		"sends BYE": {func(_ *testing.T, peer *cryotest.Peer) {
			peer.WriteFrames(cryotest.Bye(9, ""))
			peer.WantFrame("BYE is acknowledged", cryotest.Acked(9))
		}, false},
		"is lost": {func(_ *testing.T, peer *cryotest.Peer) { peer.Conn().Cut() }, true},
	} {
		t.Run(name, func(t *testing.T) {
			atBothEnds(t, quiet, func(t *testing.T, _ end, s *cryo.Session, peer *cryotest.Peer) {
				incoming(t, s, peer, 1, 0)
				begin := time.Now()
				closing := start(func() error { return s.Close(t.Context(), "") })
				peer.WantType("the stream is cancelled", wire.TxCancel)
				c.leave(t, peer)
				if !c.cut {
					_, err := peer.Try("the close frame, without BYE")
					require.Error(t, err)
					_ = peer.WS.Close()
				}
				closing.wantSuccess(t)
				require.Zero(t, time.Since(begin))
				require.ErrorIs(t, s.Err(), cryo.ErrClosed)
			})
		})
	}
}

func TestWaitForACancelEndsWithTheContext(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, _ end, s *cryo.Session, peer *cryotest.Peer) {
		incoming(t, s, peer, 1, 0)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		begin := time.Now()
		require.ErrorIs(t, s.Close(ctx, ""), context.DeadlineExceeded)
		require.Equal(t, time.Second, time.Since(begin))
	})
}

func TestShutdownCancelsStreamsBeforeItCloses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server, l, sessions := serve(t, cryo.ServerOptions{SessionOptions: quiet})
		peer := join(t, l, sid)
		peer.ClientHandshake()
		incoming(t, next(t, sessions), peer, 1, 0)
		shutdown := start(func() error { return server.Shutdown(t.Context()) })
		cancel := peer.WantType("the stream is cancelled", wire.TxCancel)
		peer.WantIdle("the close frame waits", instant)
		peer.Ack(cancel)
		peer.WantClose("the end, without BYE", 1012, "server is shutting down")
		peer.WriteClose(1012, "")
		shutdown.wantSuccess(t)
	})
}

func TestDrainClosesWhenAllReceivedMessagesAreSettled(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		_, _, whole := fourStreams(t, s, peer)
		peer.WriteFrames(cryotest.Text(1, "a"), cryotest.Text(2, "b"), cryotest.Text(3, "c"), cryotest.Error(4, "d"))
		synctest.Wait()
		a := receive(t, s)
		drain := start(func() error { return s.Drain(t.Context(), "drained") })
		cancels := wantCancels(t, peer, 0, 1, 2)
		peer.WriteFrames(cryotest.Text(5, "later"), cryotest.Binary(6, "later"), cryotest.Error(7, "later"), txChunk(0, 1, "later"))
		peer.WriteFrames(txStart(1005, 5, -1, "later"), cryotest.Ping(8))
		cancels = append(cancels, wantCancels(t, peer, 5)...)
		peer.WantFrame("what came later is not answered, but for frames that are no data", cryotest.Pong(8))
		peer.Ack(cancels...)

		send := start(func() error { return s.SendText(t.Context(), "a response") })
		f := peer.WantType("sends are possible", wire.UTF8)
		peer.Ack(f)
		send.wantSuccess(t)
		require.NoError(t, a.Ack())
		peer.WantFrame("a", cryotest.Acked(1))
		rest, err := s.ReceiveBatch(t.Context(), 10)
		require.NoError(t, err)
		require.Len(t, rest, 3, "what came before can be received, and what came later can't")
		require.NoError(t, rest[0].Reject("no"))
		peer.WantFrame("b", cryotest.Error(2, "no"))
		require.NoError(t, cryo.AckBatch(rest[1:]))
		peer.WantFrame("c", cryotest.Acked(3))
		peer.WantFrame("d", cryotest.Acked(4))
		peer.WantIdle("the whole stream is not settled", time.Hour)
		drain.wantBlocked(t)
		require.NoError(t, s.Err())

		require.NoError(t, whole.Ack())
		peer.WantFrame("the stream", cryotest.Acked(1004))
		require.Equal(t, "drained", string(peer.WantType("BYE", wire.Bye).Payload))
		peer.WantClose("the end", 4000, "drained")
		peer.WriteClose(4000, "")
		drain.wantSuccess(t)
		require.ErrorIs(t, wantEnded(t, s), cryo.ErrClosed)
		require.Zero(t, s.Held())
	})
}

func TestDrainResumesPausedReads(t *testing.T) {
	atBothEnds(t, smallBuffer, func(t *testing.T, _ end, s *cryo.Session, peer *cryotest.Peer) {
		m := fill(t, s, peer)
		require.True(t, s.Stats().Paused)
		drain := start(func() error { return s.Drain(t.Context(), "") })
		peer.WriteFrames(cryotest.Ping(77))
		peer.WantFrame("it reads", cryotest.Pong(77))
		require.False(t, s.Stats().Paused)
		drain.wantBlocked(t)
		require.NoError(t, m.Ack())
		peer.WantFrame("what the application had", cryotest.Acked(1000))
		peer.WantType("BYE: what was not read needs no answer", wire.Bye)
		peer.WriteClose(4000, "")
		drain.wantSuccess(t)
	})
}

func TestDrainDoesNotWaitForDiscardedMessages(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, _ end, s *cryo.Session, peer *cryotest.Peer) {
		peer.WriteFrames(cryotest.Text(1, "nobody takes it"))
		synctest.Wait()
		drain := start(func() error { return s.Drain(t.Context(), "") })
		drain.wantBlocked(t)
		s.Discard()
		peer.WantType("BYE", wire.Bye)
		peer.WriteClose(4000, "")
		drain.wantSuccess(t)
	})
}

func TestDrainEndsWithItsContextAndCanBeCalledAgain(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, _ end, s *cryo.Session, peer *cryotest.Peer) {
		peer.WriteFrames(cryotest.Text(1, "a"))
		m := receive(t, s)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		begin := time.Now()
		require.ErrorIs(t, s.Drain(ctx, ""), context.DeadlineExceeded)
		require.Equal(t, time.Second, time.Since(begin))
		require.NoError(t, s.Err())
		peer.WriteFrames(cryotest.Text(2, "b"))
		peer.WantIdle("it still drains", time.Minute)

		drain := start(func() error { return s.Drain(t.Context(), "") })
		drain.wantBlocked(t)
		require.NoError(t, m.Ack())
		peer.WantFrame("a", cryotest.Acked(1))
		peer.WantType("BYE", wire.Bye)
		peer.WriteClose(4000, "")
		drain.wantSuccess(t)
	})
}

func TestDrainReturnsTheCauseWhenTheSessionEndsFirst(t *testing.T) {
	for name, unsettled := range map[string]func(*testing.T, *cryo.Session, *cryotest.Peer){
		"a message": func(t *testing.T, s *cryo.Session, peer *cryotest.Peer) {
			peer.WriteFrames(cryotest.Text(1, ""))
			receive(t, s)
		},
		"a stream": func(t *testing.T, s *cryo.Session, peer *cryotest.Peer) {
			st := incoming(t, s, peer, 1, 0)
			peer.WriteFrames(txFinish(2, 0))
			require.NoError(t, wantRest(t, st, ""))
		},
	} {
		t.Run(name, func(t *testing.T) {
			atBothEnds(t, quiet, func(t *testing.T, _ end, s *cryo.Session, peer *cryotest.Peer) {
				unsettled(t, s, peer)
				drain := start(func() error { return s.Drain(t.Context(), "") })
				drain.wantBlocked(t)
				peer.WriteClose(4000, "gone")
				closed, ok := errors.AsType[*cryo.PeerClosedError](drain.result(t))
				require.True(t, ok)
				require.Equal(t, "gone", closed.Reason)
			})
		})
	}
}

func TestCloseNowClosesTheConnectionInEveryState(t *testing.T) {
	for name, ending := range map[string]func(context.Context, *cryo.Session) error{
		"nothing": func(context.Context, *cryo.Session) error { return nil },
		"Close":   func(ctx context.Context, s *cryo.Session) error { return s.Close(ctx, "") },
		"Drain": func(ctx context.Context, s *cryo.Session) error {
			err := s.Drain(ctx, "")
			if errors.Is(err, cryo.ErrClosed) {
				return nil
			}
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			atBothEnds(t, quiet, func(t *testing.T, _ end, s *cryo.Session, peer *cryotest.Peer) {
				incoming(t, s, peer, 1, 0)
				peer.WriteFrames(cryotest.Text(1, ""))
				receive(t, s)
				end := start(func() error { return ending(t.Context(), s) })
				synctest.Wait()
				begin := time.Now()
				require.NoError(t, s.CloseNow())
				require.Zero(t, time.Since(begin))
				require.ErrorIs(t, wantEnded(t, s), cryo.ErrClosed)
				end.wantSuccess(t)
				peer.Skip()
			})
		})
	}
}

func TestDrainClosesWhenTheLastAnswerOfAStreamIsQueued(t *testing.T) {
	for name, settle := range map[string]func(*cryo.IncomingStream) error{
		"Ack":   (*cryo.IncomingStream).Ack,
		"Close": (*cryo.IncomingStream).Close,
	} {
		t.Run(name, func(t *testing.T) {
			s, peer := dialled(t, cryo.DialOptions{SessionOptions: quiet})
			_, _, whole := fourStreams(t, s, peer)
			drain := start(func() error { return s.Drain(t.Context(), "") })
			peer.Ack(wantCancels(t, peer, 0, 1, 2)...)
			time.Sleep(50 * time.Millisecond) // Drain waits for the stream
			release := s.HoldWriter()
			settling := start(func() error { return settle(whole) })
			time.Sleep(50 * time.Millisecond) // the stream is not open any more
			early := s.Err()
			release()
			require.NoError(t, early)
			settling.wantSuccess(t)
			if name == "Ack" {
				peer.WantFrame("TX_FINISH is acknowledged", cryotest.Acked(1004))
			} else {
				peer.Ack(wantCancels(t, peer, 3)...)
			}
			peer.WantType("BYE", wire.Bye)
			peer.WantClose("the end", 4000, "")
			peer.WriteClose(4000, "")
			drain.wantSuccess(t)
		})
	}
}

// acknowledgedAhead has a peer send all of a stream but TX_FINISH, and acknowledges it.
func acknowledgedAhead(t *testing.T, s *cryo.Session, peer *cryotest.Peer) {
	t.Helper()
	pull := start(func() error { return s.PullStreams(t.Context()) })
	peer.Ack(peer.WantType("TX_FLOW", wire.TxFlow))
	pull.wantSuccess(t)
	peer.WriteFrames(txStart(1, 0, 3, "in"))
	st := acceptStream(t, s)
	read := start(func() error { return wantRest(t, st, "abc") })
	peer.WantFrame("TX_START acknowledged", cryotest.Acked(1))
	peer.Ack(peer.WantType("TX_FETCH", wire.TxFetch))
	peer.WriteFrames(txChunk(0, 0, "abc"))
	read.wantSuccess(t)
	require.NoError(t, st.Ack())
}

func TestEndWaitsForTheFinishOfAStreamThatIsAcknowledged(t *testing.T) {
	for name, finish := range map[string]func(*cryo.Session, context.Context, string) error{
		"Close": (*cryo.Session).Close,
		"Drain": (*cryo.Session).Drain,
	} {
		t.Run(name, func(t *testing.T) {
			atBothEnds(t, quiet, func(t *testing.T, _ end, s *cryo.Session, peer *cryotest.Peer) {
				acknowledgedAhead(t, s, peer)
				ending := start(func() error { return finish(s, t.Context(), "") })
				peer.WantIdle("BYE waits", time.Second)
				peer.WriteFrames(txFinish(2, 0))
				peer.WantFrame("TX_FINISH acknowledged", cryotest.Acked(2))
				peer.WantType("BYE", wire.Bye)
				peer.WantClose("the end", 4000, "")
				peer.WriteClose(4000, "")
				ending.wantSuccess(t)
			})
		})
	}
}

func TestMissingFinishDelaysByeByHalfOfCloseTimeout(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, _ end, s *cryo.Session, peer *cryotest.Peer) {
		acknowledgedAhead(t, s, peer)
		time.Sleep(time.Second)
		begin := time.Now()
		closing := start(func() error { return s.Close(t.Context(), "") })
		peer.WantType("BYE", wire.Bye)
		require.Equal(t, cryo.DefaultCloseTimeout/2-time.Second, time.Since(begin))
		peer.WriteClose(4000, "")
		closing.wantSuccess(t)
	})
}
