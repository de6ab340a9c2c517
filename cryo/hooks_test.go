package cryo_test

import (
	"context"
	"encoding/binary"
	"errors"
	"log/slog"
	"runtime"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/cryotest"
	"github.com/cryo-connect/cryo-connect/internal/wire"
)

// onLog is a log handler that calls a function.
type onLog struct {
	slog.Handler
	f func()
}

func (l onLog) Handle(context.Context, slog.Record) error {
	l.f()
	return nil
}

func (l onLog) Enabled(context.Context, slog.Level) bool { return true }

func TestNoHookAndNoLogHandlerRunsWithALockHeld(t *testing.T) {
	var (
		s      atomic.Pointer[cryo.Session]
		calls  atomic.Int32
		locked atomic.Int32
	)
	probe := func() {
		calls.Add(1)
		// Another goroutine may hold a lock, and its thread may wait for a processor for some time.
		for range 10_000_000 {
			if locked.Load() > 0 || s.Load().Unlocked() {
				return
			}
			runtime.Gosched()
		}
		locked.Add(1)
	}
	opts := cryo.SessionOptions{
		HeartbeatInterval: 24 * time.Hour,
		MaxBufferBytes:    1000,
		OnReject:          func(*cryo.Session, cryo.Kind) { probe() },
		OnLateAck:         func(*cryo.Session) { probe() },
		OnIgnore:          func(*cryo.Session) { probe() },
		Logger:            slog.New(onLog{f: probe}),
	}
	atBothEnds(t, opts, func(t *testing.T, end end, session *cryo.Session, peer *cryotest.Peer) {
		s.Store(session)
		want := func(what string, n int32) {
			t.Helper()
			synctest.Wait()
			require.Equal(t, n, calls.Swap(0), "calls: %s", what)
			require.Zero(t, locked.Swap(0), what)
		}

		peer.WriteBytes(append(binary.BigEndian.AppendUint64(nil, sid), 77))
		want("a frame is ignored", 1)
		session.SetSendOnly(true)
		peer.WriteFrames(txStart(1, 0, -1, "in"))
		peer.WantType("TX_CANCEL", wire.TxCancel)
		want("a stream is rejected", 1)
		peer.WriteFrames(cryotest.Text(2, "in"))
		peer.WantType("ERROR", wire.Error)
		want("a message is rejected", 1)
		peer.WriteFrames(cryotest.Error(3, "out of paper"))
		want("an error of the peer's application is rejected and logged", 2)
		session.SetSendOnly(false)
		time.Sleep(time.Minute) // the log's limit

		peer.WriteFrames(txStart(4, 1, -1, "in"), cryotest.Text(5, "in"))
		synctest.Wait()
		session.SetSendOnly(true)
		peer.WantType("ERROR", wire.Error)
		peer.WantType("TX_CANCEL", wire.TxCancel)
		want("what waits is rejected", 2)
		session.SetSendOnly(false)

		peer.WriteFrames(txStart(9, 3, -1, "in"), txChunk(3, 0, "early"))
		peer.WantType("TX_CANCEL", wire.TxCancel)
		want("a stream breaks before it is accepted", 1)
		for tx := range uint32(256) {
			peer.WriteFrames(txStart(10, 1000+tx, -1, "in"))
		}
		time.Sleep(cryo.DefaultStreamIdleTimeout + instant)
		peer.Skip() // a dialling end sends pongs
		peer.WriteFrames(txStart(11, 2000, -1, "in"))
		peer.WantFrame("TX_CANCEL", txCancel(end.first+3, 1000))
		want("a stream makes way", 1)
		session.SetSendOnly(true)
		want("all of them are rejected", 256)
		session.SetSendOnly(false)
		peer.Skip()

		ctx, cancel := context.WithTimeoutCause(t.Context(), time.Second, errors.New("enough"))
		defer cancel()
		send := start(func() error { return session.SendText(ctx, "out") })
		text := peer.WantType("text", wire.UTF8)
		require.Error(t, send.result(t))
		peer.Ack(text)
		want("a late acknowledgement", 1)

		st := incoming(t, session, peer, 6, 2)
		peer.WriteFrames(cryotest.Binary(7, string(make([]byte, 2000))))
		m := receive(t, session)
		send = start(func() error { return session.SendText(t.Context(), "out") })
		text = peer.WantType("text", wire.UTF8)
		peer.WriteFrames(txChunk(2, 1, "not held"), cryotest.Text(8, "not held"))
		require.ErrorIs(t, wantRest(t, st, ""), cryo.ErrBufferFull)
		peer.Ack(text)
		send.wantSuccess(t)
		require.NoError(t, m.Ack())
		want("a chunk and a message without capacity: one line, one rejection", 2)
	})
}

// A log handler may take as long as the session needs to log once more.
func TestLogHandlerMayBlockUntilTheSessionReadsAgain(t *testing.T) {
	var (
		peer *cryotest.Peer
		done = make(chan struct{})
	)
	opts := cryo.SessionOptions{Logger: slog.New(onLog{f: func() {
		peer.WriteFrames(cryotest.Error(2, "out of ink"), cryotest.Ping(3))
		peer.WantFrame("it reads on", cryotest.Pong(3))
		close(done)
	}})}
	s, p := accepted(t, cryo.ServerOptions{SessionOptions: opts})
	peer = p
	peer.WriteFrames(cryotest.Error(1, "out of paper"), cryotest.Ping(1))
	peer.WantFrame("both are read", cryotest.Pong(1))
	s.SetSendOnly(true)
	next(t, done)
}
