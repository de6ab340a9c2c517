package cryo_test

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/cryotest"
	"github.com/cryo-connect/cryo-connect/internal/wire"
)

func TestEveryWaitReturnsItsContextsErrorAndCause(t *testing.T) {
	cause := errors.New("the application's own reason")
	messages := []cryo.OutMessage{cryo.Text("x")}
	for name, wait := range map[string]func(ctx context.Context, s *cryo.Session) error{
		"SendText":   func(ctx context.Context, s *cryo.Session) error { return s.SendText(ctx, "x") },
		"SendBinary": func(ctx context.Context, s *cryo.Session) error { return s.SendBinary(ctx, nil) },
		"SendBatch":  func(ctx context.Context, s *cryo.Session) error { return s.SendBatch(ctx, messages) },
		"Wait":       func(ctx context.Context, s *cryo.Session) error { return s.Queue(messages).Wait(ctx) },
		"Receive": func(ctx context.Context, s *cryo.Session) error {
			_, err := s.Receive(ctx)
			return err
		},
		"ReceiveBatch": func(ctx context.Context, s *cryo.Session) error {
			_, err := s.ReceiveBatch(ctx, 2)
			return err
		},
		"AcceptStream": func(ctx context.Context, s *cryo.Session) error {
			_, err := s.AcceptStream(ctx)
			return err
		},
		"PullStreams": func(ctx context.Context, s *cryo.Session) error { return s.PullStreams(ctx) },
		"OpenStream": func(ctx context.Context, s *cryo.Session) error {
			_, err := s.OpenStream(ctx, nil)
			return err
		},
		"SendStream": func(ctx context.Context, s *cryo.Session) error {
			return s.SendStream(ctx, strings.NewReader("x"), nil)
		},
	} {
		t.Run(name, func(t *testing.T) {
			atBothEnds(t, quiet, func(t *testing.T, _ end, s *cryo.Session, _ *cryotest.Peer) {
				deadline, cancel := context.WithTimeoutCause(t.Context(), time.Second, cause)
				defer cancel()
				for _, when := range []string{"during the wait", "before it"} {
					err := wait(deadline, s)
					require.ErrorIs(t, err, cause, when)
					require.ErrorIs(t, err, context.DeadlineExceeded, when)
				}
				cancelled, end := context.WithCancelCause(t.Context())
				end(cause)
				err := wait(cancelled, s)
				require.ErrorIs(t, err, cause)
				require.ErrorIs(t, err, context.Canceled)
			})
		})
	}
}

func TestStreamReturnsItsContextsErrorAndCause(t *testing.T) {
	cause := errors.New("the application's own reason")
	for name, step := range map[string]func(st *cryo.OutgoingStream) error{
		"Write": func(st *cryo.OutgoingStream) error {
			_, err := st.Write(make([]byte, 8<<20))
			return err
		},
		"ReadFrom": func(st *cryo.OutgoingStream) error {
			_, err := st.ReadFrom(bytes.NewReader(make([]byte, 8<<20)))
			return err
		},
		"Finish": (*cryo.OutgoingStream).Finish,
	} {
		t.Run(name, func(t *testing.T) {
			atBothEnds(t, quiet, func(t *testing.T, _ end, s *cryo.Session, peer *cryotest.Peer) {
				ctx, cancel := context.WithTimeoutCause(t.Context(), time.Second, cause)
				defer cancel()
				var st *cryo.OutgoingStream
				open := start(func() (err error) {
					st, err = s.OpenStream(ctx, nil)
					return err
				})
				peer.Ack(peer.WantType("TX_START", wire.TxStart))
				open.wantSuccess(t)
				peer.Conn().StopReading()
				for _, when := range []string{"during the wait", "before it"} {
					err := step(st)
					require.ErrorIs(t, err, cause, when)
					require.ErrorIs(t, err, context.DeadlineExceeded, when)
				}
			})
		})
	}
}

func TestErrStreamCancelledMatchesNoContextError(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, _ end, s *cryo.Session, peer *cryotest.Peer) {
		st, tx := opening(t, s, peer, nil)
		finish := start(st.Finish)
		peer.WantType("TX_FINISH", wire.TxFinish)
		peer.WriteFrames(txCancel(1, tx))
		err := finish.result(t)
		require.ErrorIs(t, err, cryo.ErrStreamCancelled)
		require.NotErrorIs(t, err, context.Canceled)
	})
}

func TestCloseReturnsTheContextsErrorAndCause(t *testing.T) {
	cause := errors.New("the application's own reason")
	atBothEnds(t, quiet, func(t *testing.T, _ end, s *cryo.Session, _ *cryotest.Peer) {
		ctx, cancel := context.WithTimeoutCause(t.Context(), time.Second, cause)
		defer cancel()
		err := s.Close(ctx, "")
		require.ErrorIs(t, err, cause)
		require.ErrorIs(t, err, context.DeadlineExceeded)
	})
}
