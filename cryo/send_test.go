package cryo_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/cryotest"
	"github.com/cryo-connect/cryo-connect/internal/wire"
)

func TestSendReturnsWhenThePeerHasAcknowledged(t *testing.T) {
	atBothEnds(t, cryo.SessionOptions{}, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		text := start(func() error { return s.SendText(t.Context(), "grüße") })
		peer.WantFrame("the text", cryotest.Text(end.first, "grüße"))
		text.wantBlocked(t)
		peer.WriteFrames(cryotest.Acked(end.first))
		text.wantSuccess(t)

		data := start(func() error { return s.SendBinary(t.Context(), []byte{0, 255}) })
		peer.WantFrame("the bytes", cryotest.Binary(end.first+1, "\x00\xff"))
		data.wantBlocked(t)
		peer.WriteFrames(cryotest.Acked(end.first + 1))
		data.wantSuccess(t)
	})
}

func TestEmptyMessagesAreSent(t *testing.T) {
	atBothEnds(t, cryo.SessionOptions{}, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		text := start(func() error { return s.SendText(t.Context(), "") })
		peer.WantFrame("an empty text", cryotest.Text(end.first, ""))
		peer.WriteFrames(cryotest.Acked(end.first))
		text.wantSuccess(t)

		require.NoError(t, s.SendBatch(t.Context(), nil))
		peer.WantIdle("no frame for an empty batch", instant)
	})
}

func TestRejectedSendFailsAndTheErrorIsNotAcknowledged(t *testing.T) {
	atBothEnds(t, cryo.SessionOptions{}, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		send := start(func() error { return s.SendText(t.Context(), "no") })
		peer.WantFrame("the text", cryotest.Text(end.first, "no"))
		peer.WriteFrames(cryotest.Error(end.first, "disk full\x00\x00"))
		require.Equal(t, &cryo.RejectedError{Text: "disk full"}, send.result(t))
		peer.WantIdle("no acknowledgement of a rejection", instant)
		require.NoError(t, s.Err())
	})
}

func TestRejectionTextIsTruncated(t *testing.T) {
	atBothEnds(t, cryo.SessionOptions{}, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		send := start(func() error { return s.SendText(t.Context(), "no") })
		peer.WantType("the text", wire.UTF8)
		peer.WriteFrames(cryotest.Error(end.first, strings.Repeat("é ", 1<<20)))
		rejected, ok := errors.AsType[*cryo.RejectedError](send.result(t))
		require.True(t, ok)
		require.Equal(t, strings.Repeat("é ", 341), rejected.Text)
	})
}

func TestSendWaitsNoLongerThanItsContext(t *testing.T) {
	atBothEnds(t, cryo.SessionOptions{}, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
		defer cancel()
		begin := time.Now()
		err := s.SendText(ctx, "first")
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.EqualError(t, err, "waiting for the acknowledgement: context deadline exceeded")
		require.Equal(t, 3*time.Second, time.Since(begin))
		peer.WantFrame("the text", cryotest.Text(end.first, "first"))
		require.NoError(t, s.Err(), "the session goes on")
	})
}

func TestSendReturnsTheCauseOfItsContext(t *testing.T) {
	atBothEnds(t, cryo.SessionOptions{}, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		ctx, cancel := context.WithCancelCause(t.Context())
		send := start(func() error { return s.SendText(ctx, "first") })
		peer.WantType("the text", wire.UTF8)
		cancel(errors.New("the pipeline stops"))
		require.EqualError(t, send.result(t), "waiting for the acknowledgement: the pipeline stops")
	})
}

func TestSendWithAnEndedContextSendsNothing(t *testing.T) {
	atBothEnds(t, cryo.SessionOptions{}, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		require.ErrorIs(t, s.SendText(ctx, "first"), context.Canceled)
		peer.WantIdle("nothing", instant)
	})
}

func TestLateAcknowledgementSettlesNothingElse(t *testing.T) {
	atBothEnds(t, cryo.SessionOptions{}, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		require.ErrorIs(t, s.SendText(ctx, "first"), context.DeadlineExceeded)
		peer.WantFrame("the first text", cryotest.Text(end.first, "first"))

		second := start(func() error { return s.SendText(t.Context(), "second") })
		peer.WantFrame("the second text", cryotest.Text(end.first+1, "second"))
		peer.WriteFrames(cryotest.Acked(end.first), cryotest.Acked(0), cryotest.Acked(end.first+2))
		second.wantBlocked(t)
		peer.WriteFrames(cryotest.Acked(end.first+1), cryotest.Acked(end.first+1))
		second.wantSuccess(t)
		peer.WantIdle("nothing about acknowledgements of nothing", instant)
		require.NoError(t, s.Err())
	})
}

func TestLateRejectionIsNeitherAcknowledgedNorReceived(t *testing.T) {
	atBothEnds(t, cryo.SessionOptions{}, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		require.ErrorIs(t, s.SendText(ctx, "first"), context.DeadlineExceeded)
		peer.WantFrame("the text", cryotest.Text(end.first, "first"))
		peer.WriteFrames(cryotest.Error(end.first, "too late"), cryotest.Text(9, "next"))
		require.Equal(t, "next", string(receive(t, s).Payload))
		peer.WantIdle("no acknowledgement of a rejection", instant)
	})
}

func TestSendFailsWithTheEndOfTheSession(t *testing.T) {
	atBothEnds(t, cryo.SessionOptions{}, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		send := start(func() error { return s.SendText(t.Context(), "lost") })
		peer.WantType("the text", wire.UTF8)
		peer.WriteClose(4002, "out of order")
		err := send.result(t)
		require.ErrorIs(t, err, net.ErrClosed)
		closed, ok := errors.AsType[*cryo.PeerClosedError](err)
		require.True(t, ok)
		require.Equal(t, &cryo.PeerClosedError{Code: 4002, Reason: "out of order"}, closed)
		require.EqualError(t, err, `session ended: closed by the peer with code 4002: "out of order"`)

		wantEnded(t, s)
		require.Equal(t, err, s.SendText(t.Context(), "after the end"))
	})
}

func TestSendFailsWithALostConnection(t *testing.T) {
	atBothEnds(t, cryo.SessionOptions{}, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		send := start(func() error { return s.SendText(t.Context(), "lost") })
		peer.WantType("the text", wire.UTF8)
		peer.Conn().Cut()
		err := send.result(t)
		require.ErrorIs(t, err, net.ErrClosed)
		require.ErrorContains(t, err, "session ended: connection lost: ")
		require.ErrorContains(t, err, "connection reset by peer")
	})
}

func TestBatchIsSentInOrderAndReturnsErrorsByIndex(t *testing.T) {
	atBothEnds(t, cryo.SessionOptions{}, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		huge := make([]byte, cryo.MaxPayload+1)
		send := start(func() error {
			return s.SendBatch(t.Context(), []cryo.OutMessage{
				cryo.Text("zero"),
				cryo.Text("not \xff text"),
				cryo.Binary([]byte("two")),
				cryo.Binary(huge),
				{Kind: cryo.KindError, Payload: []byte("four")},
				cryo.Text("five"),
			})
		})
		peer.WantFrame("the first", cryotest.Text(end.first, "zero"))
		peer.WantFrame("the third", cryotest.Binary(end.first+1, "two"))
		peer.WantFrame("the last", cryotest.Text(end.first+2, "five"))
		peer.WantIdle("nothing that can't be sent", instant)

		peer.WriteFrames(cryotest.Acked(end.first+2), cryotest.Error(end.first+1, "no"))
		send.wantBlocked(t)
		peer.WriteFrames(cryotest.Acked(end.first))
		err := send.result(t)
		batch, ok := errors.AsType[*cryo.BatchError](err)
		require.True(t, ok)
		require.Len(t, batch.Errs, 6)
		require.NoError(t, batch.Errs[0])
		require.EqualError(t, batch.Errs[1], "text of 10 bytes is not valid UTF-8: send it as binary")
		require.Equal(t, &cryo.RejectedError{Text: "no"}, batch.Errs[2])
		require.ErrorIs(t, batch.Errs[1], cryo.ErrInvalidUTF8)
		require.ErrorIs(t, batch.Errs[3], cryo.ErrTooLarge)
		require.EqualError(t, batch.Errs[3], "message of 16777217 bytes is too large: one frame carries at most 16 MiB, send larger data as a stream")
		require.EqualError(t, batch.Errs[4], "a message to send must be of KindText or KindBinary")
		require.NoError(t, batch.Errs[5])
		require.EqualError(t, err, "4 of 6 messages not acknowledged, the first: text of 10 bytes is not valid UTF-8: send it as binary")

		rejected, ok := errors.AsType[*cryo.RejectedError](err)
		require.True(t, ok, "each message's error can be found in the batch's")
		require.Equal(t, "no", rejected.Text)
	})
}

func TestBatchWithoutValidMessagesFailsImmediately(t *testing.T) {
	atBothEnds(t, cryo.SessionOptions{}, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		require.EqualError(t, s.SendText(t.Context(), "\xff"), "text of 1 bytes is not valid UTF-8: send it as binary")
		peer.WantIdle("nothing", instant)
	})
}

func TestEndedContextFailsTheRestOfABatch(t *testing.T) {
	atBothEnds(t, cryo.SessionOptions{}, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		send := start(func() error { return s.SendBatch(ctx, texts("a", "\xff", "b")) })
		peer.WantFrame("a", cryotest.Text(end.first, "a"))
		peer.WantFrame("b", cryotest.Text(end.first+1, "b"))
		peer.WriteFrames(cryotest.Acked(end.first))
		batch, ok := errors.AsType[*cryo.BatchError](send.result(t))
		require.True(t, ok)
		require.NoError(t, batch.Errs[0])
		require.ErrorContains(t, batch.Errs[1], "not valid UTF-8")
		require.ErrorIs(t, batch.Errs[2], context.DeadlineExceeded)
	})
}

func TestLargestMessagePasses(t *testing.T) {
	atBothEnds(t, cryo.SessionOptions{}, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		large := bytes.Repeat([]byte("0123456789abcdef"), cryo.MaxPayload/16)
		send := start(func() error { return s.SendBinary(t.Context(), large) })
		f := peer.WantType("16 MiB", wire.Binary)
		require.True(t, bytes.Equal(large, f.Payload))
		peer.Ack(f)
		send.wantSuccess(t)
	})
}

func TestCancelledSendIsNotSent(t *testing.T) {
	atBothEnds(t, cryo.SessionOptions{}, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		peer.Conn().StopReading()
		first := start(func() error { return s.SendBinary(t.Context(), make([]byte, 1<<20)) })
		first.wantBlocked(t) // it keeps the writer busy
		ctx, cancel := context.WithCancel(t.Context())
		second := start(func() error { return s.SendText(ctx, "cancelled") })
		second.wantBlocked(t)
		third := start(func() error { return s.SendText(t.Context(), "third") })
		third.wantBlocked(t)
		cancel()
		require.ErrorIs(t, second.result(t), context.Canceled)

		peer.Conn().ReadOn()
		peer.Ack(peer.WantType("the first", wire.Binary))
		first.wantSuccess(t)
		peer.WantFrame("the third", cryotest.Text(end.first+2, "third"))
		peer.WriteFrames(cryotest.Acked(end.first + 2))
		third.wantSuccess(t)
	})
}

func TestConcurrentSends(t *testing.T) {
	atBothEnds(t, cryo.SessionOptions{}, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		const senders, each = 20, 50
		var sending sync.WaitGroup
		for i := range senders {
			sending.Go(func() {
				for n := range each {
					err := s.SendBatch(t.Context(), texts(fmt.Sprint(i, ":", n, ":a"), fmt.Sprint(i, ":", n, ":b")))
					if err != nil {
						t.Error(err)
					}
				}
			})
		}
		seen := map[string]bool{}
		numbers := map[uint32]bool{}
		for range 2 * senders * each {
			f := peer.WantType("a text", wire.UTF8)
			seen[string(f.Payload)], numbers[f.Ack] = true, true
			peer.Ack(f)
		}
		sending.Wait()
		require.Len(t, seen, 2*senders*each)
		require.Len(t, numbers, 2*senders*each, "each message has its own number")
		synctest.Wait()
	})
}

func texts(list ...string) []cryo.OutMessage {
	var batch []cryo.OutMessage
	for _, text := range list {
		batch = append(batch, cryo.Text(text))
	}
	return batch
}
