package cryo_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
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

// A peer can foresee our numbers. If it acknowledged a frame that it has not received,
// the send would return, and its caller could reuse the payload's memory for something else,
// which the peer would then receive.
func TestPrematureResultEndsTheSession(t *testing.T) {
	for name, c := range map[string]struct {
		send   func(*testing.T, *cryo.Session, []byte) error
		answer func(number uint32) wire.Frame
		want   string
	}{
		"ACK of a message": {
			func(t *testing.T, s *cryo.Session, data []byte) error { return s.SendBinary(t.Context(), data) },
			cryotest.Acked, "ACK for frame %d before it was sent",
		},
		"ERROR for a message": {
			func(t *testing.T, s *cryo.Session, data []byte) error { return s.SendBinary(t.Context(), data) },
			func(number uint32) wire.Frame { return cryotest.Error(number, "no") }, "ERROR for frame %d before it was sent",
		},
		"ACK of a stream's start": {
			func(t *testing.T, s *cryo.Session, data []byte) error {
				return s.SendStream(t.Context(), bytes.NewReader(data), nil)
			},
			cryotest.Acked, "ACK for frame %d before it was sent",
		},
		"TX_CANCEL of a stream": {
			func(t *testing.T, s *cryo.Session, data []byte) error {
				return s.SendStream(t.Context(), bytes.NewReader(data), nil)
			},
			func(uint32) wire.Frame { return txCancel(1, 0) }, "TX_CANCEL for stream 0 before its TX_START was sent",
		},
		"ACK of a flow": {
			func(t *testing.T, s *cryo.Session, _ []byte) error {
				return s.PullStreams(t.Context())
			},
			cryotest.Acked, "ACK for frame %d before it was sent",
		},
	} {
		t.Run(name, func(t *testing.T) {
			atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
				peer.Conn().StopReading()
				large := start(func() error { return s.SendBinary(t.Context(), make([]byte, 1<<20)) })
				synctest.Wait() // the line is busy
				data := []byte("for this peer")
				sending := start(func() error {
					defer copy(data, "FOR ANOTHER ONE") // the memory is the caller's again
					return c.send(t, s, data)
				})
				synctest.Wait()
				peer.WriteFrames(c.answer(end.first + 1))
				want := strings.ReplaceAll(c.want, "%d", fmt.Sprint(end.first+1))
				synctest.Wait()
				sending.wantBlocked(t)
				require.EqualError(t, s.Err(), "session ended: protocol violation: "+want)

				peer.Conn().ReadOn()
				peer.WantType("the large message", wire.Binary)
				for {
					e, err := peer.Try("what was queued, and the end")
					if err != nil {
						require.ErrorContains(t, err, "close 4001")
						require.ErrorContains(t, err, want)
						break
					}
					require.NotContains(t, string(e.Payload), "ANOTHER")
				}
				require.NoError(t, peer.WS.Close())
				for _, sending := range []*call{large, sending} {
					err := sending.result(t)
					_, ok := errors.AsType[*cryo.ProtocolError](err)
					require.True(t, ok, "%v", err)
					require.ErrorContains(t, err, want)
				}
			})
		})
	}
}

func TestPrematureAckOfTXFinishEndsTheSession(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		st, tx := opening(t, s, peer, &cryo.StreamOptions{ChunkBytes: 100_000})
		peer.Conn().StopReading()
		data := bytes.Repeat([]byte("for this peer"), 10_000)
		sent := bytes.Clone(data)
		_, err := st.Write(data[:100_000])
		require.NoError(t, err)
		synctest.Wait() // the line is busy
		finishing := start(func() error {
			defer clear(data)
			if _, err := st.ReadFrom(bytes.NewReader(data[100_000:])); err != nil { // not copied
				return err
			}
			return st.Finish()
		})
		synctest.Wait()
		peer.WriteFrames(cryotest.Acked(end.first + 1))
		synctest.Wait()
		finishing.wantBlocked(t)
		require.ErrorContains(t, s.Err(), "before it was sent")

		peer.Conn().ReadOn()
		for _, chunk := range [][]byte{sent[:100_000], sent[100_000:]} {
			f := peer.WantType("a chunk", wire.TxChunk)
			require.True(t, bytes.Equal(chunk, f.Payload))
		}
		peer.WantFrame("TX_FINISH", txFinish(end.first+1, tx))
		require.NoError(t, peer.WS.Close())
		require.ErrorContains(t, finishing.result(t), "before it was sent")
	})
}

// A large payload is written from where it is, where nothing is masked. Its peer may have
// all of it, and answer, before the write returns: then the send is over when it has.
func TestSendReturnsNilOnlyOnceWrittenAndAnswered(t *testing.T) {
	sendingTo := func(t *testing.T, test func(t *testing.T, s *cryo.Session, peer *cryotest.Peer, ctx context.Context, data []byte, sending *call, answer func(wire.Frame))) {
		synctest.Test(t, func(t *testing.T) {
			s, peer := accepted(t, cryo.ServerOptions{SessionOptions: quiet})
			peer.Conn().StopReading()
			data := bytes.Repeat([]byte("for this peer"), 100_000)
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			sending := start(func() error { return s.SendBinary(ctx, data) })
			synctest.Wait()
			test(t, s, peer, ctx, data, sending, func(f wire.Frame) {
				peer.WriteFrames(f)
				synctest.Wait()
				sending.wantBlocked(t)
				require.NoError(t, s.Err(), "it may have all of it")
				require.Equal(t, 1, s.Awaited())
			})
		})
	}
	wantAll := func(t *testing.T, peer *cryotest.Peer, data []byte) {
		t.Helper()
		peer.Conn().ReadOn()
		require.True(t, bytes.Equal(data, peer.WantType("all of it", wire.Binary).Payload))
	}
	t.Run("acknowledged", func(t *testing.T) {
		sendingTo(t, func(t *testing.T, s *cryo.Session, peer *cryotest.Peer, _ context.Context, data []byte, sending *call, answer func(wire.Frame)) {
			answer(cryotest.Acked(peer.First + 1))
			answer(cryotest.Error(peer.First+1, "the first answer counts"))
			wantAll(t, peer, data)
			sending.wantSuccess(t)
			require.Zero(t, s.Awaited())
			require.NoError(t, s.Err())
		})
	})
	t.Run("rejected", func(t *testing.T) {
		sendingTo(t, func(t *testing.T, s *cryo.Session, peer *cryotest.Peer, _ context.Context, data []byte, sending *call, answer func(wire.Frame)) {
			answer(cryotest.Error(peer.First+1, "no"))
			answer(cryotest.Acked(peer.First + 1))
			wantAll(t, peer, data)
			require.Equal(t, &cryo.RejectedError{Text: "no"}, sending.result(t))
			require.Zero(t, s.Awaited())
		})
	})
	t.Run("lost", func(t *testing.T) {
		sendingTo(t, func(t *testing.T, s *cryo.Session, peer *cryotest.Peer, _ context.Context, _ []byte, sending *call, answer func(wire.Frame)) {
			answer(cryotest.Acked(peer.First + 1))
			peer.Conn().Cut()
			require.ErrorIs(t, sending.result(t), net.ErrClosed, "the peer can't have got all of it")
			require.Zero(t, s.Awaited())
		})
	})
}

func TestSendCancelledDuringItsWriteReturnsImmediately(t *testing.T) {
	for _, answered := range []bool{false, true} {
		t.Run(fmt.Sprint("answered: ", answered), func(t *testing.T) {
			late := 0
			opts := quiet
			opts.OnLateAck = func(*cryo.Session) { late++ }
			synctest.Test(t, func(t *testing.T) {
				s, peer := accepted(t, cryo.ServerOptions{SessionOptions: opts})
				peer.Conn().StopReading()
				ctx, cancel := context.WithCancel(t.Context())
				sending := start(func() error { return s.SendBinary(ctx, make([]byte, 1<<20)) })
				synctest.Wait()
				if answered {
					peer.WriteFrames(cryotest.Acked(peer.First + 1))
					synctest.Wait()
				}
				sending.wantBlocked(t)
				cancel()
				require.ErrorIs(t, sending.result(t), context.Canceled)
				require.Zero(t, s.Awaited())
				peer.Conn().ReadOn()
				peer.WantType("it is sent all the same", wire.Binary)
				peer.WriteFrames(cryotest.Acked(peer.First + 1))
				synctest.Wait()
				require.Equal(t, 1, late)
				require.NoError(t, s.Err())
				peer.Read()
				next := start(func() error { return s.SendText(t.Context(), "next") })
				peer.Ack(peer.WantType("the next", wire.UTF8))
				next.wantSuccess(t)
			})
		})
	}
}

// What is taken back was never sent, and an answer to it is one to a number that nobody
// waits for.
func TestAnswerToAWithdrawnSendIsLate(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		peer.Conn().StopReading()
		large := start(func() error { return s.SendBinary(t.Context(), make([]byte, 1<<20)) })
		synctest.Wait()
		ctx, cancel := context.WithCancel(t.Context())
		sending := start(func() error { return s.SendText(ctx, "queued") })
		synctest.Wait()
		cancel()
		require.ErrorIs(t, sending.result(t), context.Canceled)
		peer.WriteFrames(cryotest.Acked(end.first+1), cryotest.Error(end.first+1, "no"))
		synctest.Wait()
		require.NoError(t, s.Err())
		peer.Conn().ReadOn()
		peer.Ack(peer.WantType("the large message", wire.Binary))
		large.wantSuccess(t)
		peer.WantIdle("nothing of what was taken back", time.Hour)
	})
}

// Whatever becomes of a stream's chunks, they don't count as waiting to be written any
// more when it is over.
func TestEndedStreamHasNoQueuedFrames(t *testing.T) {
	for name, over := range map[string]func(s *cryo.Session, peer *cryotest.Peer, st *cryo.OutgoingStream){
		"written":   func(_ *cryo.Session, peer *cryotest.Peer, _ *cryo.OutgoingStream) { peer.Conn().ReadOn() },
		"abandoned": func(_ *cryo.Session, _ *cryotest.Peer, st *cryo.OutgoingStream) { _ = st.Close() },
		"cancelled": func(_ *cryo.Session, peer *cryotest.Peer, st *cryo.OutgoingStream) {
			peer.WriteFrames(txCancel(1, st.Tx()))
		},
		"cut":    func(_ *cryo.Session, peer *cryotest.Peer, _ *cryo.OutgoingStream) { peer.Conn().Cut() },
		"closed": func(s *cryo.Session, _ *cryotest.Peer, _ *cryo.OutgoingStream) { cut(s) },
	} {
		t.Run(name, func(t *testing.T) {
			atBothEnds(t, quiet, func(t *testing.T, _ end, s *cryo.Session, peer *cryotest.Peer) {
				st, _ := opening(t, s, peer, &cryo.StreamOptions{ChunkBytes: 100_000})
				peer.Conn().StopReading()
				for range 2 { // one is being written, and one queued
					_, err := st.Write(make([]byte, 100_000))
					require.NoError(t, err)
					synctest.Wait()
				}
				require.Greater(t, st.Queued(), 200_000)
				over(s, peer, st)
				synctest.Wait()
				peer.Conn().ReadOn() // what is being written is so until then
				synctest.Wait()
				require.Zero(t, st.Queued())
			})
		})
	}
}
