package cryo_test

import (
	"context"
	"encoding/binary"
	"slices"
	"strconv"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/cryotest"
	"github.com/cryo-connect/cryo-connect/internal/wire"
)

const large = 600_000

// bytesOf is a client's message as it travels, in one frame.
func bytesOf(t *testing.T, peer *cryotest.Peer, f wire.Frame) []byte {
	t.Helper()
	f.SID = peer.SID
	frame, err := wire.Append(nil, &f)
	require.NoError(t, err)
	head := binary.BigEndian.AppendUint64([]byte{0x82, 0xFF}, uint64(len(frame)))
	return append(append(head, 0, 0, 0, 0), frame...)
}

// sends writes bytes, and wants the session to take them.
func sends(t *testing.T, peer *cryotest.Peer, b []byte) {
	t.Helper()
	require.NoError(t, peer.WS.NetConn().SetWriteDeadline(time.Now().Add(time.Second)))
	_, err := peer.WS.NetConn().Write(b)
	require.NoError(t, err)
}

// begin lets a client send the first half of a large message, and gives the rest.
// It reads nothing: an answer to a ping would be in the middle of the message.
func begin(t *testing.T, peer *cryotest.Peer, number uint32) (rest []byte) {
	t.Helper()
	peer.Conn().StopReading()
	b := bytesOf(t, peer, cryotest.Binary(number, string(make([]byte, large))))
	sends(t, peer, b[:large/2])
	return b[large/2:]
}

// eachItsOwner authorizes each session as one of a separate client.
func eachItsOwner(u *cryo.Upgrade) error {
	u.Owner = strconv.FormatUint(u.SessionID, 10)
	return nil
}

// slow is a server with capacity for as many incomplete large messages, each of which
// has come by half, and for one client more.
func slow(t *testing.T, count int) (clients []*cryotest.Peer, sessions []*cryo.Session, rests [][]byte) {
	t.Helper()
	_, l, accepted := serve(t, cryo.ServerOptions{Authorize: eachItsOwner, SessionOptions: cryo.SessionOptions{MaxBufferBytes: (count-1)*large + 1000}})
	for i := range count + 1 {
		peer := join(t, l, uint64(1+i))
		peer.ClientHandshake()
		clients, sessions = append(clients, peer), append(sessions, next(t, accepted))
	}
	for i := range count {
		rests = append(rests, begin(t, clients[i], 100+uint32(i)))
	}
	return clients, sessions, rests
}

// begins lets a client send a large message, and frames behind it. The channel is
// closed when they are taken.
func begins(t *testing.T, peer *cryotest.Peer, behind ...wire.Frame) <-chan struct{} {
	t.Helper()
	peer.Conn().StopReading()
	require.NoError(t, peer.WS.NetConn().SetWriteDeadline(time.Time{}))
	b := bytesOf(t, peer, cryotest.Binary(102, string(make([]byte, large))))
	for _, f := range behind {
		b = append(b, bytesOf(t, peer, f)...)
	}
	written := make(chan struct{})
	go func() {
		_, _ = peer.WS.NetConn().Write(b)
		close(written)
	}()
	return written
}

// crowded is a server with capacity for two incomplete large messages, and three
// clients; the third has begun one that is not read.
func crowded(t *testing.T) (clients []*cryotest.Peer, sessions []*cryo.Session, rests [][]byte, third <-chan struct{}) {
	t.Helper()
	clients, sessions, rests = slow(t, 2)
	third = begins(t, clients[2])
	time.Sleep(10 * time.Second)
	select {
	case <-third:
		require.FailNow(t, "the third is read")
	default:
	}
	return clients, sessions, rests, third
}

func TestIncompleteLargeMessagesAreBoundedTogether(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		clients, sessions, rests, third := crowded(t)

		sends(t, clients[1], rests[1])
		require.Len(t, receive(t, sessions[1]).Payload, large)
		<-third
		require.Len(t, receive(t, sessions[2]).Payload, large)
		sends(t, clients[0], rests[0])
		require.Len(t, receive(t, sessions[0]).Payload, large)
	})
}

func TestSmallMessagesOvertakeIncompleteLargeOnes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, l, accepted := serve(t, cryo.ServerOptions{SessionOptions: cryo.SessionOptions{MaxBufferBytes: large}})
		slow, quick := join(t, l, 1), join(t, l, 2)
		slow.ClientHandshake()
		next(t, accepted)
		begin(t, slow, 100)
		quick.ClientHandshake()
		s := next(t, accepted)
		for i := range uint32(100) {
			quick.WriteFrames(cryotest.Binary(i, string(make([]byte, 16_000))))
			require.NoError(t, receive(t, s).Ack())
			quick.WantFrame("its acknowledgement", cryotest.Acked(i))
		}
	})
}

// trickle sends the rest of each client's message, one byte a second, which keeps the session
// alive. It returns the number of sessions that are alive afterwards.
func trickle(t *testing.T, clients []*cryotest.Peer, sessions []*cryo.Session, rests [][]byte, during time.Duration) (alive int) {
	t.Helper()
	for end := time.Now().Add(during); time.Now().Before(end); time.Sleep(time.Second) {
		for c := range rests {
			if sessions[c].Err() == nil {
				sends(t, clients[c], rests[c][:1])
				rests[c] = rests[c][1:]
			}
		}
	}
	for c := range rests {
		if sessions[c].Err() == nil {
			alive++
		} else {
			require.ErrorIs(t, sessions[c].Err(), cryo.ErrReceiveTimeout)
		}
	}
	return alive
}

func TestSlowLargeMessageThatDelaysOthersEndsItsSession(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		clients, sessions, rests, third := crowded(t)
		require.Equal(t, 2, trickle(t, clients, sessions, rests, 19*time.Second), "half of the message came immediately")
		require.Equal(t, 1, trickle(t, clients, sessions, rests, cryo.DefaultHeartbeatInterval+time.Second), "one ends, and releases its capacity")
		<-third
		require.Len(t, receive(t, sessions[2]).Payload, large)
		require.Equal(t, 1, trickle(t, clients, sessions, rests, time.Hour), "nobody waits for the other")
		for c := range rests {
			if sessions[c].Err() != nil {
				clients[c].Conn().ReadOn()
				synctest.Wait()
				clients[c].Skip() // pings
				clients[c].WantClose("the close frame with the cause", 4001, cryo.ErrReceiveTimeout.Error())
			}
		}
	})
}

// Who has been slow while nobody waited doesn't pay for it when somebody does.
func TestShortWaitEndsNoSession(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		clients, sessions, rests := slow(t, 2)
		require.Equal(t, 2, trickle(t, clients, sessions, rests, 10*time.Minute-3*time.Second))
		third := begins(t, clients[2])
		require.Equal(t, 2, trickle(t, clients, sessions, rests, 4*time.Second), "at a heartbeat")
		sends(t, clients[0], rests[0])
		<-third
		require.Len(t, receive(t, sessions[0]).Payload, large)
		require.Len(t, receive(t, sessions[2]).Payload, large)
		require.NoError(t, sessions[1].Err())
	})
}

// A minute suffices for the rest at this rate.
func TestLargeMessageThatTakesLessThanAMinuteIsReceivedWhileOthersWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		clients, sessions, rests, third := crowded(t)
		for len(rests[0]) > 0 {
			for c := range rests {
				n := min(large/2/48, len(rests[c]))
				sends(t, clients[c], rests[c][:n])
				rests[c] = rests[c][n:]
			}
			time.Sleep(time.Second)
		}
		for _, s := range sessions[:2] {
			m := receive(t, s)
			require.Len(t, m.Payload, large)
			require.NoError(t, m.Ack()) // otherwise the two may fill the receive buffer before the third is read
		}
		<-third
		require.Len(t, receive(t, sessions[2]).Payload, large)
	})
}

func TestStalledLargeMessageEndsItsSessionAtAHeartbeat(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCrowd(t, eachItsOwner, 2*wire.MaxPayload, 2)
		for i := range c.peers {
			c.announce(t, i, wire.MaxPayload)
		}
		s, other := c.other(t, 200)
		begin := time.Now()
		sending := start(func() error { return other.SendBinary(t.Context(), make([]byte, wire.MaxPayload)) })
		m, err := s.Receive(t.Context())
		require.NoError(t, err)
		require.NoError(t, m.Ack())
		sending.wantSuccess(t)
		require.LessOrEqual(t, time.Since(begin), 5*time.Second+cryo.DefaultHeartbeatInterval)
		ended := 0
		for _, s := range c.sessions {
			if s.Err() != nil {
				require.ErrorIs(t, s.Err(), cryo.ErrReceiveTimeout)
				ended++
			}
		}
		require.Equal(t, 1, ended)
	})
}

// Those that wait to come in must not all do so when they were let through to wait
// while the receive buffer had capacity.
func TestWaitingLargeMessagesCheckTheBufferAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const count = 8
		_, l, accepted := serve(t, cryo.ServerOptions{Authorize: eachItsOwner, SessionOptions: cryo.SessionOptions{MaxBufferBytes: large + 1000}})
		var sessions []*cryo.Session
		for i := range uint64(count) {
			peer := join(t, l, 1+i)
			peer.ClientHandshake()
			begins(t, peer)
			sessions = append(sessions, next(t, accepted))
		}
		time.Sleep(10 * time.Second)
		received := 0
		for _, s := range sessions {
			ctx, cancel := context.WithTimeout(t.Context(), instant)
			batch, _ := s.ReceiveBatch(ctx, count)
			cancel()
			received += len(batch)
		}
		require.LessOrEqual(t, received, 3, "one, one beyond the bound, and one that was coming in meanwhile")
	})
}

func TestAcknowledgementBehindAWaitingLargeMessageIsReadAfterTenSeconds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		clients, sessions, rests := slow(t, 2)
		send := start(func() error { return sessions[2].SendText(t.Context(), "hello") })
		text := clients[2].WantType("the text", wire.UTF8)
		begin := time.Now()
		begins(t, clients[2], cryotest.Acked(text.Ack), cryotest.Text(200, "a small one"))
		trickle(t, clients, sessions, rests, rejectAfter+time.Second)
		require.NoError(t, send.result(t))
		require.Less(t, time.Since(begin), rejectAfter+2*time.Second)
		require.Equal(t, "a small one", string(receive(t, sessions[2]).Payload))
		clients[2].Conn().ReadOn()
		clients[2].WantFrame("the rejection", cryotest.Error(102, bufferFull))
	})
}

func TestSlowLargeMessageIsReceivedIfNoOtherWaits(t *testing.T) {
	atBothEnds(t, cryo.SessionOptions{MaxBufferBytes: 1000}, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		b := bytesOf(t, peer, cryotest.Binary(1, string(make([]byte, 70_000))))
		if end.dialled { // a server doesn't mask
			b = append([]byte{0x82, 127}, append(b[2:10], b[14:]...)...)
		}
		peer.Conn().StopReading()
		for i := 0; i < len(b); i += 30 { // more than half an hour
			sends(t, peer, b[i:min(i+30, len(b))])
			time.Sleep(time.Second)
		}
		require.Len(t, receive(t, s).Payload, 70_000)
	})
}

// sendsFragment writes a fragment of a message, and wants the session to take it. first is
// the fragment's first byte: 0x02 begins a message, 0x00 continues and 0x80 ends it.
func sendsFragment(t *testing.T, peer *cryotest.Peer, first byte, payload []byte) {
	t.Helper()
	peer.Conn().StopReading()
	sends(t, peer, raw(end{}, first, payload))
}

// encoded is a client's frame without WebSocket's part.
func encoded(t *testing.T, peer *cryotest.Peer, f wire.Frame) []byte {
	t.Helper()
	f.SID = peer.SID
	frame, err := wire.Append(nil, &f)
	require.NoError(t, err)
	return frame
}

// Of a message in fragments nobody knows how large it gets: it takes 1 MiB until more
// has come.
func TestLargeFragmentedMessagesAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, l, accepted := serve(t, cryo.ServerOptions{SessionOptions: cryo.SessionOptions{MaxBufferBytes: 1 << 20}})
		first, second := join(t, l, 1), join(t, l, 2)
		first.ClientHandshake()
		a := next(t, accepted)
		second.ClientHandshake()
		b := next(t, accepted)
		sendsFragment(t, first, 0x02, encoded(t, first, cryotest.Binary(1, string(make([]byte, large)))))

		require.NoError(t, second.WS.NetConn().SetWriteDeadline(time.Time{}))
		waits := append(bytesOf(t, second, cryotest.Binary(2, string(make([]byte, large)))), bytesOf(t, second, cryotest.Ping(3))...)
		go func() { _, _ = second.WS.NetConn().Write(waits) }()
		second.WantIdle("the other is not read", 10*time.Second)
		require.Equal(t, int64(1<<20), a.ComingIn())
		require.Zero(t, b.ComingIn())
		sendsFragment(t, first, 0x80, nil)
		require.Len(t, receive(t, a).Payload, large)
		require.Len(t, receive(t, b).Payload, large)
		second.WantFrame("the answer to what was behind it", cryotest.Pong(3))
		require.Zero(t, a.ComingIn()+b.ComingIn())
	})
}

func TestIncompleteFragmentsBlockNoOtherSession(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, l, sessions := serve(t, cryo.ServerOptions{Authorize: eachItsOwner}) // 32 MiB
		for i := range uint64(20) {
			slow := join(t, l, sid-1-i)
			slow.ClientHandshake()
			next(t, sessions)
			b := encoded(t, slow, cryotest.Binary(1, string(make([]byte, 66_000))))
			sendsFragment(t, slow, 0x02, b[:1000])
			sendsFragment(t, slow, 0x00, b[1000:])
		}
		synctest.Wait()
		other, err := cryo.Dial(t.Context(), memoryURL, &cryo.DialOptions{Token: token, NetDial: l.Dial})
		require.NoError(t, err)
		defer cut(other)
		s := next(t, sessions)
		for _, size := range []int{70_000, 1 << 20, 16 << 20} {
			begin := time.Now()
			send := start(func() error { return other.SendBinary(t.Context(), make([]byte, size)) })
			require.NoError(t, receive(t, s).Ack())
			send.wantSuccess(t)
			require.Zero(t, time.Since(begin))
		}
	})
}

// What has outgrown 1 MiB may take the largest message, one at a time, and only while
// others have left some of the receive buffer.
func TestOneMessageInFragmentsAtATimeOutgrowsAMebibyte(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const bound, part = 3 << 20, 900 << 10
		_, l, accepted := serve(t, cryo.ServerOptions{Authorize: eachItsOwner, SessionOptions: cryo.SessionOptions{MaxBufferBytes: bound}})
		var (
			peers    []*cryotest.Peer
			sessions []*cryo.Session
		)
		for i := range uint64(3) {
			peer := join(t, l, 1+i)
			peer.ClientHandshake()
			peers, sessions = append(peers, peer), append(sessions, next(t, accepted))
		}
		goesOn := func(i int, first byte) *call { // for as long as it takes
			require.NoError(t, peers[i].WS.NetConn().SetWriteDeadline(time.Time{}))
			return start(func() error {
				_, err := peers[i].WS.NetConn().Write(raw(end{}, first, make([]byte, part)))
				return err
			})
		}
		wantComing := func(what string, want ...int64) {
			t.Helper()
			time.Sleep(time.Second)
			require.Equal(t, want, []int64{sessions[0].ComingIn(), sessions[1].ComingIn()}, what)
		}
		for i := range 2 {
			sendsFragment(t, peers[i], 0x02, encoded(t, peers[i], cryotest.Binary(1, string(make([]byte, part)))))
		}
		wantComing("what is small enough", 1<<20, 1<<20)

		release := sessions[2].Reserve(bound)
		more := []*call{goesOn(0, 0x00), nil}
		wantComing("the receive buffer is full", 1<<20, 1<<20)
		release()
		wantComing("the first may get as large as it likes", 16<<20, 1<<20)
		more[0].wantSuccess(t)

		more[1] = goesOn(1, 0x00)
		wantComing("the second waits", 16<<20, 1<<20)
		goesOn(0, 0x80).wantSuccess(t)
		require.Len(t, receive(t, sessions[0]).Payload, 3*part)
		wantComing("until the first is whole", 0, 16<<20)
		more[1].wantSuccess(t)
		goesOn(1, 0x80).wantSuccess(t)
		require.Len(t, receive(t, sessions[1]).Payload, 3*part)
		wantComing("nothing is left", 0, 0)
	})
}

// What has some of its memory must not wait for what its own session is to settle, or
// those that wait for that memory would, too.
func TestFragmentedMessageContinuesBeyondItsSessionsQuota(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const bound = 1 << 20
		_, l, accepted := serve(t, cryo.ServerOptions{SessionOptions: cryo.SessionOptions{MaxBufferBytes: bound}})
		first, second := join(t, l, 1), join(t, l, 2)
		first.ClientHandshake()
		a := next(t, accepted)
		second.ClientHandshake()
		b := next(t, accepted)
		sendsFragment(t, first, 0x02, encoded(t, first, cryotest.Binary(1, string(make([]byte, large)))))
		a.Reserve(bound - 1000)
		begins(t, second)
		time.Sleep(10 * time.Second)
		require.True(t, b.Stats().Paused)
		sendsFragment(t, first, 0x00, make([]byte, large))
		sendsFragment(t, first, 0x80, nil)
		m := receive(t, a)
		require.Len(t, m.Payload, 2*large)
		require.NoError(t, m.Ack())
		require.Len(t, receive(t, b).Payload, large)
	})
}

// A session that is ended for its message releases the memory at once, and not when its
// peer is gone; and the close frame with the cause is still sent, behind queued frames.
func TestEvictedSessionReleasesItsMemoryImmediately(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		clients, sessions, rests, third := crowded(t)
		trickle(t, clients, sessions, rests, 19*time.Second)
		ended := -1
		for ended < 0 {
			trickle(t, clients, sessions, rests, time.Second)
			ended = slices.IndexFunc(sessions, func(s *cryo.Session) bool { return s.Err() != nil })
		}
		synctest.Wait()
		require.Zero(t, sessions[ended].ComingIn())
		<-third
		require.Len(t, receive(t, sessions[2]).Payload, large)
		select {
		case <-sessions[ended].Done():
			require.FailNow(t, "its peer has not closed")
		default:
		}
		// The rest is discarded from where it stopped: what follows is understood.
		sends(t, clients[ended], rests[ended])
		sends(t, clients[ended], raw(end{}, 0x88, nil))
		begin := time.Now()
		wantEnded(t, sessions[ended])
		require.Zero(t, time.Since(begin))
		require.ErrorIs(t, sessions[ended].Err(), cryo.ErrReceiveTimeout)
	})
}

// Data that comes when the session is ending can't be acknowledged: it gets no memory.
func TestEndingSessionDiscardsALargeMessageWithoutMemory(t *testing.T) {
	for name, before := range map[string]int{"begun before": large / 2, "begun after": 0} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				_, l, accepted := serve(t, cryo.ServerOptions{})
				peer := join(t, l, sid)
				peer.ClientHandshake()
				s := next(t, accepted)
				peer.Conn().StopReading()
				b := bytesOf(t, peer, cryotest.Binary(1, string(make([]byte, large))))
				sends(t, peer, b[:before])
				synctest.Wait()
				require.Equal(t, before > 0, s.ComingIn() > 0)
				closing := start(func() error { return s.Close(t.Context(), "that's all") })
				closing.wantBlocked(t)
				require.Zero(t, s.ComingIn())
				sends(t, peer, b[before:])
				for range 20 {
					sends(t, peer, b[:large/2])
					synctest.Wait()
					require.Zero(t, s.ComingIn())
					sends(t, peer, b[large/2:])
				}
				sends(t, peer, raw(end{}, 0x88, nil))
				closing.wantSuccess(t)
				require.ErrorIs(t, s.Err(), cryo.ErrClosed)
				require.Zero(t, s.Held())
				_, err := s.Receive(t.Context())
				require.ErrorIs(t, err, cryo.ErrClosed)
			})
		})
	}
}

// The published server does not survive the end of its session while it sends a stream.
func TestReceiveTimeoutCancelsStreamsBeforeTheCloseFrame(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, l, accepted := serve(t, cryo.ServerOptions{SessionOptions: cryo.SessionOptions{MaxBufferBytes: 1000}})
		slow, other := join(t, l, 1), join(t, l, 2)
		slow.ClientHandshake()
		s := next(t, accepted)
		other.ClientHandshake()
		next(t, accepted)
		incoming(t, s, slow, 1, 5)
		rest := begin(t, slow, 100)
		begins(t, other)
		for s.Err() == nil {
			sends(t, slow, rest[:1])
			rest = rest[1:]
			time.Sleep(time.Second)
		}
		require.ErrorIs(t, s.Err(), cryo.ErrReceiveTimeout)
		sends(t, slow, rest)
		slow.Conn().ReadOn() // no answer to a ping is in the middle of the message
		cancel := slow.Next("TX_CANCEL")
		for cancel.Type == wire.PingPong {
			cancel = slow.Next("TX_CANCEL")
		}
		require.Equal(t, wire.TxCancel, cancel.Type)
		select {
		case <-s.Done():
			require.FailNow(t, "the close frame did not wait")
		default:
		}
		slow.Ack(cancel)
		synctest.Wait()
		slow.Skip() // pings
		slow.WantClose("the end", 4001, cryo.ErrReceiveTimeout.Error())
	})
}
