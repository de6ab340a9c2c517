package cryo_test

import (
	"bytes"
	"context"
	"math"
	"net"
	"os"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/cryotest"
	"github.com/cryo-connect/cryo-connect/internal/wire"
)

// flood writes frames until the session doesn't read on, and returns how many.
func flood(t *testing.T, peer *cryotest.Peer, f wire.Frame) int {
	t.Helper()
	f.SID = peer.SID
	frame, err := wire.Append(nil, &f)
	require.NoError(t, err)
	peer.Read()
	for written := 0; ; written++ {
		require.NoError(t, peer.WS.SetWriteDeadline(time.Now().Add(time.Millisecond)))
		err := peer.WS.WriteMessage(websocket.BinaryMessage, frame)
		if err != nil {
			require.ErrorIs(t, err, os.ErrDeadlineExceeded)
			return written
		}
	}
}

func TestReadsPauseWhenTheReceiveBufferIsFull(t *testing.T) {
	const bound, payload = 1 << 20, 1000
	atBothEnds(t, cryo.SessionOptions{MaxBufferBytes: bound}, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		written := flood(t, peer, cryotest.Binary(1, strings.Repeat("x", payload)))
		received := 0
		for {
			ctx, cancel := context.WithTimeout(t.Context(), instant)
			batch, err := s.ReceiveBatch(ctx, 64)
			cancel()
			if err != nil {
				break
			}
			received += len(batch)
		}
		held := received * (payload + 256)
		require.LessOrEqual(t, held, bound+payload+256, "at most one message beyond the bound")
		require.Greater(t, held, bound*8/10)
		require.Greater(t, written, received, "the rest is the network's")
		peer.WantIdle("nothing is settled", instant)
	})
}

func TestReadsContinueWhenMessagesAreSettled(t *testing.T) {
	atBothEnds(t, smallBuffer, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		for _, settle := range []func(*cryo.Message) error{
			(*cryo.Message).Ack,
			func(m *cryo.Message) error { return m.Reject("no") },
			func(m *cryo.Message) error { return cryo.AckBatch([]*cryo.Message{m}) },
		} {
			m := fill(t, s, peer)
			waiting := start(func() error {
				m, err := s.Receive(t.Context())
				if err != nil {
					return err
				}
				return m.Ack()
			})
			waiting.wantBlocked(t)
			require.NoError(t, settle(m))
			waiting.wantSuccess(t)
			require.NoError(t, settle(m), "and what it weighs is given back only once")
		}
	})
}

func TestEachSettledMessageFreesCapacityForAnother(t *testing.T) {
	atBothEnds(t, cryo.SessionOptions{MaxBufferBytes: 100_000}, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		for i := range uint32(100) {
			peer.WriteFrames(cryotest.Binary(i, strings.Repeat("x", 1000)))
		}
		synctest.Wait()
		batch, err := s.ReceiveBatch(t.Context(), 1000)
		require.NoError(t, err)
		require.Less(t, len(batch), 100)
		for i := range 100 - len(batch) {
			require.NoError(t, batch[i].Ack())
			synctest.Wait()
			more, err := s.ReceiveBatch(t.Context(), 1000)
			require.NoError(t, err)
			require.Len(t, more, 1)
			batch = append(batch, more[0])
		}
	})
}

func TestReadsContinueWhenASessionBecomesSendOnly(t *testing.T) {
	atBothEnds(t, smallBuffer, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		m := fill(t, s, peer)
		s.SetSendOnly(true)
		peer.WantFrame("the rejection of what waited", cryotest.Error(1001, "this session receives no messages"))
		require.NoError(t, m.Ack())
		peer.WantFrame("the acknowledgement of what was taken", cryotest.Acked(1000))
	})
}

func TestControlFramesAreReadWhenTheReceiveBufferIsFull(t *testing.T) {
	atBothEnds(t, smallBuffer, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		peer.WriteFrames(cryotest.Binary(1, strings.Repeat("x", 2000)))
		m := receive(t, s)
		for i := range uint32(10) {
			send := start(func() error { return s.SendText(t.Context(), "hello") })
			peer.Ack(peer.WantType("the text", wire.UTF8))
			send.wantSuccess(t)
			peer.WriteFrames(cryotest.Ping(i))
			peer.WantFrame("the answer", cryotest.Pong(i))
		}
		peer.WriteFrames(cryotest.Text(2, "a message waits"), cryotest.Ping(20))
		peer.WantIdle("no answer to what is behind the message", instant)
		require.NoError(t, m.Ack())
		peer.WantFrame("the acknowledgement", cryotest.Acked(1))
		peer.WantFrame("the answer", cryotest.Pong(20))
		require.Equal(t, "a message waits", string(receive(t, s).Payload))
	})
}

func TestMessageLargerThanTheBufferIsReceivedAlone(t *testing.T) {
	atBothEnds(t, smallBuffer, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		for i := range uint32(3) {
			peer.WriteFrames(cryotest.Binary(i, strings.Repeat("x", 1<<20)))
			require.NoError(t, receive(t, s).Ack())
		}
	})
}

func TestHugeMaxBufferBytesDoesNotOverflow(t *testing.T) {
	for _, bound := range []int{math.MaxInt, math.MaxInt - 1, math.MaxInt/8 + 1} {
		atBothEnds(t, cryo.SessionOptions{MaxBufferBytes: bound}, func(t *testing.T, _ end, s *cryo.Session, peer *cryotest.Peer) {
			for _, size := range []int{5, 1 << 20} {
				peer.WriteFrames(cryotest.Binary(1000, strings.Repeat("x", size)))
				m := receive(t, s)
				require.Len(t, m.Payload, size)
				require.NoError(t, m.Ack())
			}
			require.False(t, s.Stats().Paused)
		})
	}
}

func TestStalledSessionLeavesCapacityForOthers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, l, sessions := serve(t, cryo.ServerOptions{SessionOptions: cryo.SessionOptions{MaxBufferBytes: 100_000}})
		stalled := join(t, l, 1)
		stalled.ClientHandshake()
		flood(t, stalled, cryotest.Text(1, "never settled"))
		busy := next(t, sessions)
		peer := join(t, l, 2)
		peer.ClientHandshake()
		s := next(t, sessions)
		for i := range uint32(100) {
			peer.WriteFrames(cryotest.Text(i, "hello"))
			require.NoError(t, receive(t, s).Ack())
			peer.WantFrame("its acknowledgement", cryotest.Acked(i))
		}
		require.NoError(t, busy.Err())
	})
}

func TestStalledSessionsLetOthersSend(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, l, sessions := serve(t, cryo.ServerOptions{SessionOptions: cryo.SessionOptions{MaxBufferBytes: 100_000}})
		for i := range uint64(5) { // more than enough to use up all capacity
			stalled := join(t, l, 1+i)
			stalled.ClientHandshake()
			flood(t, stalled, cryotest.Text(1, "never settled"))
			next(t, sessions)
		}
		peer := join(t, l, 9)
		peer.ClientHandshake()
		s := next(t, sessions)
		for range 100 {
			send := start(func() error { return s.SendText(t.Context(), "hello") })
			peer.Ack(peer.WantType("the text", wire.UTF8))
			send.wantSuccess(t)
		}
	})
}

func TestEndedSessionReleasesItsCapacity(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const bound = 10_000
		server, l, sessions := serve(t, cryo.ServerOptions{SessionOptions: cryo.SessionOptions{MaxBufferBytes: bound}})
		alive := func() {
			t.Helper()
			peer := join(t, l, sid)
			peer.ClientHandshake()
			s := next(t, sessions)
			for range 10 {
				peer.WriteFrames(cryotest.Binary(1, strings.Repeat("x", bound/2)))
				require.NoError(t, receive(t, s).Ack())
			}
			cut(s)
		}
		fillAndLeave := func(handshake bool) {
			peer := join(t, l, sid)
			if handshake {
				peer.ClientHandshake()
			}
			flood(t, peer, cryotest.Text(1, ""))
			peer.Conn().Cut()
			synctest.Wait()
			time.Sleep(15 * time.Second) // a session that doesn't read notices when it writes
		}
		for range 5 { // nobody receives from these
			fillAndLeave(false)
			next(t, sessions).Discard()
		}
		require.Empty(t, server.Sessions())
		alive()
		for range 5 { // what was not taken is rejected
			fillAndLeave(true)
			next(t, sessions).SetSendOnly(true)
		}
		alive()
		for range 5 { // what was taken is settled, which nobody hears
			fillAndLeave(true)
			s := next(t, sessions)
			for {
				m, err := s.Receive(t.Context())
				if err != nil {
					break
				}
				require.ErrorIs(t, m.Ack(), net.ErrClosed)
			}
		}
		alive()
	})
}

func TestPeerThatReadsLateReceivesAllAcknowledgements(t *testing.T) {
	atBothEnds(t, cryo.SessionOptions{}, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		messages := 100_000
		if end.dialled {
			messages = 10_000
		}
		acking := start(func() error {
			for left := messages; left > 0; {
				batch, err := s.ReceiveBatch(t.Context(), 64)
				if err != nil {
					return err
				}
				if err := cryo.AckBatch(batch); err != nil {
					return err
				}
				left -= len(batch)
			}
			return nil
		})
		frame, err := wire.Append(nil, &wire.Frame{SID: sid, Type: wire.Binary, Payload: make([]byte, 32)})
		require.NoError(t, err)
		peer.Conn().StopReading()
		_, err = peer.Conn().Write(bytes.Repeat(raw(end, 0x82, frame), messages))
		require.NoError(t, err)
		acking.wantSuccess(t)
		peer.Conn().ReadOn()
		for range messages {
			peer.WantType("an acknowledgement", wire.Ack)
		}
		peer.WantIdle("that's all", instant)
		require.NoError(t, s.Err())
	})
}

func TestUnreadAnswersAreBounded(t *testing.T) {
	for name, c := range map[string]struct {
		frame  wire.Frame
		answer wire.Type
	}{
		"rejections":            {cryotest.Text(1, ""), wire.Error},
		"rejections of streams": {wire.Frame{Type: wire.TxStart, Ack: 1, Size: -1}, wire.TxCancel},
	} {
		t.Run(name, func(t *testing.T) {
			// Nothing more is read until they are written.
			synctest.Test(t, func(t *testing.T) {
				s, peer := accepted(t, cryo.ServerOptions{SessionOptions: cryo.SessionOptions{SendOnly: true}})
				peer.Conn().StopReading()
				written := flood(t, peer, c.frame)
				require.Less(t, written, 20_000)
				peer.Conn().ReadOn()
				for range written {
					peer.WantType("an answer", c.answer)
				}
				require.NoError(t, s.Err())
			})
		})
	}
}

func TestUnreadAnswersOfAllSessionsAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const full = 64 << 20
		server, l, sessions := serve(t, cryo.ServerOptions{SessionOptions: cryo.SessionOptions{SendOnly: true}})
		connect := func(id uint64) (*cryo.Session, *cryotest.Peer) {
			peer := join(t, l, id)
			peer.ClientHandshake()
			return next(t, sessions), peer
		}
		flooded := func(id uint64) (*cryo.Session, *cryotest.Peer, int) {
			s, peer := connect(id)
			peer.Conn().StopReading()
			return s, peer, flood(t, peer, cryotest.Text(1, ""))
		}
		var peers []*cryotest.Peer
		for id := uint64(1); server.Unwritten() <= full; id++ {
			require.LessOrEqual(t, id, uint64(65))
			_, peer, _ := flooded(id)
			peers = append(peers, peer)
		}
		before := server.Unwritten()
		paused, pausedPeer, written := flooded(100)
		require.Less(t, server.Unwritten()-before, int64(5<<10))
		reader, readerPeer := connect(200)
		for range 1000 {
			readerPeer.WriteFrames(cryotest.Text(1, ""))
			readerPeer.WantType("who reads is served", wire.Error)
		}
		require.NoError(t, reader.Err())

		for _, peer := range peers {
			require.NoError(t, peer.Conn().Close())
		}
		synctest.Wait()
		require.Less(t, server.Unwritten(), int64(20<<10), "those that have ended do not count")
		pausedPeer.Conn().ReadOn()
		for range written {
			pausedPeer.WantType("an answer", wire.Error)
		}
		require.NoError(t, paused.Err())
		synctest.Wait()
		require.Zero(t, server.Unwritten())
	})
}

func TestTwoEndsThatOnlySendCannotBlockEachOther(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		opts := cryo.SessionOptions{SendOnly: true}
		_, l, sessions := serve(t, cryo.ServerOptions{SessionOptions: opts})
		client, err := cryo.Dial(t.Context(), memoryURL, &cryo.DialOptions{SessionOptions: opts, NetDial: l.Dial, Token: token})
		require.NoError(t, err)
		defer cut(client)
		batch := make([]cryo.OutMessage, 50_000)
		for i := range batch {
			batch[i].Kind = cryo.KindText
		}
		up := start(func() error { return client.SendBatch(t.Context(), batch) })
		down := start(func() error { return next(t, sessions).SendBatch(t.Context(), batch) })
		// All rejected, or the session ended: either is better than waiting for ever.
		require.Error(t, <-up.done)
		require.Error(t, <-down.done)
	})
}

func TestSendsToAPeerThatNeverReadsEndWithTheirContexts(t *testing.T) {
	atBothEnds(t, cryo.SessionOptions{}, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		peer.Conn().StopReading()
		var sends []*call
		begin := time.Now()
		for range 50 {
			sends = append(sends, start(func() error {
				ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
				defer cancel()
				return s.SendBinary(ctx, make([]byte, 100_000))
			}))
		}
		for _, send := range sends {
			require.ErrorIs(t, send.result(t), context.DeadlineExceeded)
		}
		require.Equal(t, 5*time.Second, time.Since(begin))

		// Received messages are served meanwhile.
		peer.WriteFrames(cryotest.Text(1, "hello"))
		require.NoError(t, receive(t, s).Ack())

		require.NoError(t, s.Close(t.Context(), ""))
		require.Equal(t, 5*time.Second+cryo.DefaultCloseTimeout, time.Since(begin))
	})
}

func TestSmallFramesOvertakeALargeBatch(t *testing.T) {
	atBothEnds(t, cryo.SessionOptions{}, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		peer.Conn().StopReading()
		batch := make([]cryo.OutMessage, 20)
		for i := range batch {
			batch[i] = cryo.Binary(make([]byte, 1<<20))
		}
		send := start(func() error { return s.SendBatch(t.Context(), batch) })
		send.wantBlocked(t)
		peer.WriteFrames(cryotest.Ping(7), cryotest.Text(8, "hello"))
		require.NoError(t, receive(t, s).Ack())
		peer.Conn().ReadOn()

		peer.Ack(peer.WantType("the first of the batch, which was being written", wire.Binary))
		peer.WantFrame("the acknowledgement", cryotest.Acked(8))
		peer.WantFrame("the pong", cryotest.Pong(7))
		for range len(batch) - 1 {
			peer.Ack(peer.WantType("the rest of the batch", wire.Binary))
		}
		send.wantSuccess(t)
	})
}
