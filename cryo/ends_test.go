package cryo_test

import (
	"bytes"
	"context"
	"io"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/cryotest"
	"github.com/cryo-connect/cryo-connect/internal/wire"
)

// The ends of a session, met by something else.

func TestDrainDiscardsAnIncompleteLargeMessage(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, _ end, s *cryo.Session, peer *cryotest.Peer) {
		frame, err := wire.Append(nil, &wire.Frame{SID: sid, Type: wire.Binary, Ack: 5, Payload: make([]byte, 3<<20)})
		require.NoError(t, err)
		w, err := peer.WS.NextWriter(websocket.BinaryMessage)
		require.NoError(t, err)
		_, err = w.Write(frame[:1<<20])
		require.NoError(t, err)
		synctest.Wait()
		drain := start(func() error { return s.Drain(t.Context(), "") })
		peer.WantType("BYE", wire.Bye)
		peer.WantClose("the end", 4000, "")
		go func() {
			_, _ = w.Write(frame[1<<20:])
			_ = w.Close()
			_ = peer.WS.Close()
		}()
		drain.wantSuccess(t)
		require.Zero(t, s.ComingIn())
		require.Zero(t, s.Held())
		_, err = s.Receive(t.Context())
		require.ErrorIs(t, err, cryo.ErrClosed)
	})
}

func TestDrainReturnsWhenTheSessionIsTakenOver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, l, sessions := serve(t, cryo.ServerOptions{})
		peer := join(t, l, sid)
		peer.ClientHandshake()
		s := next(t, sessions)
		peer.WriteFrames(cryotest.Text(1, ""))
		m := receive(t, s)
		drain := start(func() error { return s.Drain(t.Context(), "") })
		drain.wantBlocked(t)
		join(t, l, sid).ClientHandshake()
		require.ErrorIs(t, drain.result(t), cryo.ErrTakenOver)
		require.ErrorIs(t, m.Ack(), cryo.ErrTakenOver)
		require.NoError(t, next(t, sessions).Err(), "the newer one is none that drains")
	})
}

func TestBothHandlersMayEndTheirSession(t *testing.T) {
	for name, end := range map[string]func(*cryo.Session) error{
		"Close":    func(s *cryo.Session) error { return s.Close(context.Background(), "") },
		"CloseNow": (*cryo.Session).CloseNow,
		"Drain":    func(s *cryo.Session) error { return s.Drain(context.Background(), "") },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				results := make(chan error, 2)
				server, l, _ := serve(t, cryo.ServerOptions{
					OnSession:    func(s *cryo.Session, _ *cryo.Upgrade) { results <- end(s) },
					OnSessionEnd: func(s *cryo.Session) { results <- end(s) },
				})
				peer := join(t, l, sid)
				peer.WriteFrames(cryotest.EndpointInfo(0))
				require.NoError(t, next(t, results))
				again := next(t, results)
				if name == "Drain" {
					require.ErrorIs(t, again, cryo.ErrClosed)
				} else {
					require.NoError(t, again)
				}
				require.NoError(t, server.Shutdown(t.Context()))
			})
		})
	}
}

// What is acknowledged while a session drains, its sender sees acknowledged, and nothing else.
func TestSendersAgreeWithADrainedSessionOnDeliveredMessages(t *testing.T) {
	for i := range 30 {
		opts := cryo.SessionOptions{MaxBufferBytes: []int{4 << 10, 1 << 20}[i%2], CloseTimeout: time.Minute}
		_, l, sessions := serve(t, cryo.ServerOptions{SessionOptions: opts})
		sender, err := cryo.Dial(t.Context(), memoryURL, &cryo.DialOptions{NetDial: l.Dial, Token: token})
		require.NoError(t, err)
		s := next(t, sessions)
		if i%3 == 0 {
			require.NoError(t, s.PullStreams(t.Context()))
		}
		var (
			all                             sync.WaitGroup
			messages, streams               atomic.Int64
			messagesDelivered, streamsWhole atomic.Int64
		)
		repeat := func(done *atomic.Int64, send func() error) {
			all.Go(func() {
				for sender.Err() == nil {
					if send() == nil {
						done.Add(1)
					}
				}
			})
		}
		for range 3 {
			repeat(&messages, func() error { return sender.SendBinary(t.Context(), make([]byte, rand.N(100_000))) })
			repeat(&streams, func() error {
				return sender.SendStream(t.Context(), bytes.NewReader(make([]byte, rand.N(3000))), nil)
			})
		}
		all.Go(func() {
			for m, err := range s.Messages(t.Context()) {
				if err == nil && m.Ack() == nil {
					messagesDelivered.Add(1)
				}
			}
		})
		for range 2 {
			all.Go(func() {
				for st, err := range s.Streams(t.Context()) {
					if err != nil {
						return
					}
					if _, err := io.Copy(io.Discard, st); err == nil && st.Ack() == nil {
						streamsWhole.Add(1)
					}
					_ = st.Close()
				}
			})
		}
		time.Sleep(rand.N(4 * time.Millisecond))
		require.NoError(t, s.Drain(t.Context(), ""))
		all.Wait()
		require.Equal(t, messagesDelivered.Load(), messages.Load(), "messages")
		require.Equal(t, streamsWhole.Load(), streams.Load(), "streams")
		require.Zero(t, s.Held())
		require.Zero(t, s.Stats().UnsettledMessages)
	}
}
