package cryo_test

import (
	"context"
	"errors"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/cryotest"
)

func TestMessagesLeavesTheRestInTheQueue(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, _ end, s *cryo.Session, peer *cryotest.Peer) {
		peer.WriteFrames(cryotest.Text(1, "first"), cryotest.Text(2, "second"), cryotest.Text(3, "third"))
		synctest.Wait()
		messages := s.Messages(t.Context())
		for _, want := range []string{"first", "second"} {
			for m, err := range messages {
				require.NoError(t, err)
				require.Equal(t, want, string(m.Payload))
				require.NoError(t, m.Ack())
				break
			}
		}
		require.Equal(t, "third", string(receive(t, s).Payload))
	})
}

func TestMessagesYieldsTheEndOnceAfterAllMessages(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, _ end, s *cryo.Session, peer *cryotest.Peer) {
		peer.WriteFrames(cryotest.Text(1, "first"), cryotest.Text(2, "second"))
		synctest.Wait()
		cut(s)
		var got []string
		var errs []error
		for m, err := range s.Messages(t.Context()) {
			if err != nil {
				require.Nil(t, m)
				errs = append(errs, err)
				continue
			}
			got = append(got, string(m.Payload))
			require.Equal(t, s.Err(), m.Ack())
		}
		require.Equal(t, []string{"first", "second"}, got)
		require.Equal(t, []error{s.Err()}, errs)
	})
}

func TestStreamsLeavesTheRestUnaccepted(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		peer.WriteFrames(txStart(1, 1, -1, "in"), txStart(2, 2, -1, "other"), txStart(3, 3, -1, "in"))
		synctest.Wait()
		var yielded *cryo.IncomingStream
		for st, err := range s.Streams(t.Context(), "in") {
			require.NoError(t, err)
			yielded = st
			break
		}
		require.Equal(t, uint32(1), yielded.Tx())
		peer.WantIdle("it is the caller's, and is not closed by the end of the loop", instant)
		require.NoError(t, yielded.Close())
		peer.WantFrame("TX_CANCEL", txCancel(end.first, 1))
		require.Equal(t, uint32(2), acceptStream(t, s).Tx())
		require.Equal(t, uint32(3), acceptStream(t, s).Tx())
	})
}

func TestWaitingIteratorYieldsItsErrorOnce(t *testing.T) {
	cause := errors.New("the application's own reason")
	for name, iterate := range map[string]func(ctx context.Context, s *cryo.Session) (errs []error){
		"messages": func(ctx context.Context, s *cryo.Session) (errs []error) {
			for _, err := range s.Messages(ctx) {
				errs = append(errs, err)
			}
			return errs
		},
		"streams": func(ctx context.Context, s *cryo.Session) (errs []error) {
			for _, err := range s.Streams(ctx) {
				errs = append(errs, err)
			}
			return errs
		},
	} {
		t.Run(name, func(t *testing.T) {
			atBothEnds(t, quiet, func(t *testing.T, _ end, s *cryo.Session, _ *cryotest.Peer) {
				ctx, cancel := context.WithTimeoutCause(t.Context(), time.Second, cause)
				defer cancel()
				errs := iterate(ctx, s)
				require.Len(t, errs, 1)
				require.ErrorIs(t, errs[0], cause)
				require.ErrorIs(t, errs[0], context.DeadlineExceeded)

				waiting := start(func() error {
					errs := iterate(t.Context(), s)
					require.Len(t, errs, 1)
					return errs[0]
				})
				waiting.wantBlocked(t)
				cut(s)
				err := waiting.result(t)
				require.ErrorIs(t, err, net.ErrClosed)
				require.ErrorIs(t, err, cryo.ErrClosed)
			})
		})
	}
}
