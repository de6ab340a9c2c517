package cryo_test

import (
	"encoding/binary"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/cryotest"
)

const large = 600_000

// bytesOf is a client's message as it travels, in one frame.
func bytesOf(t *testing.T, peer *cryotest.Peer, f cryo.Frame) []byte {
	t.Helper()
	f.SID = peer.SID
	frame, err := cryo.AppendFrame(nil, &f)
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

// crowded is a server with room for two large messages to come in, and three
// clients; the third has begun one that is not read.
func crowded(t *testing.T) (clients []*cryotest.Peer, sessions []*cryo.Session, rests [][]byte, third <-chan struct{}) {
	t.Helper()
	_, l, accepted := serve(t, cryo.ServerOptions{SessionOptions: cryo.SessionOptions{MaxBufferBytes: large + 1000}})
	for i := range 3 {
		peer := join(t, l, uint64(1+i))
		peer.ClientHandshake()
		clients, sessions = append(clients, peer), append(sessions, next(t, accepted))
	}
	for i := range uint32(2) {
		rests = append(rests, begin(t, clients[i], 100+i))
	}
	clients[2].Conn().StopReading()
	written := make(chan struct{})
	require.NoError(t, clients[2].WS.NetConn().SetWriteDeadline(time.Time{}))
	b := bytesOf(t, clients[2], cryotest.Binary(102, string(make([]byte, large))))
	go func() {
		_, _ = clients[2].WS.NetConn().Write(b)
		close(written)
	}()
	time.Sleep(10 * time.Second)
	select {
	case <-written:
		require.FailNow(t, "the third is read")
	default:
	}
	return clients, sessions, rests, written
}

func TestLargeMessagesThatAreComingInAreBoundedTogether(t *testing.T) {
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

func TestSmallMessagesPassLargeOnesThatAreComingIn(t *testing.T) {
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

func TestALargeMessageThatKeepsOthersWaitingForAMinuteLosesItsSession(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		clients, sessions, rests, third := crowded(t)
		began := time.Now().Add(-10 * time.Second)
		for i := 0; sessions[0].Err() == nil; i++ { // bytes that trickle are a sign of life
			require.Less(t, time.Since(began), 2*time.Minute)
			for c := range 2 {
				sends(t, clients[c], rests[c][i:i+1])
			}
			time.Sleep(time.Second)
		}
		require.GreaterOrEqual(t, time.Since(began), time.Minute)
		require.ErrorIs(t, sessions[0].Err(), cryo.ErrSlow)
		clients[0].Conn().ReadOn()
		synctest.Wait()
		clients[0].Skip() // pings
		clients[0].WantClose("it is told", 4001, cryo.ErrSlow.Error())
		<-third
		require.Len(t, receive(t, sessions[2]).Payload, large)
	})
}

func TestALargeMessageMayTakeItsTimeWhereNobodyWaits(t *testing.T) {
	atBothEnds(t, cryo.SessionOptions{MaxBufferBytes: 1000}, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		b := bytesOf(t, peer, cryotest.Binary(1, string(make([]byte, 20_000))))
		if end.dialled { // a server doesn't mask
			b = append([]byte{0x82, 127}, append(b[2:10], b[14:]...)...)
		}
		peer.Conn().StopReading()
		for i := 0; i < len(b); i += 10 { // more than half an hour
			sends(t, peer, b[i:min(i+10, len(b))])
			time.Sleep(time.Second)
		}
		require.Len(t, receive(t, s).Payload, 20_000)
	})
}

// Of a message in fragments nobody knows how large it gets, so a large one counts as
// the largest.
func TestALargeMessageInFragmentsIsBoundedToo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, l, accepted := serve(t, cryo.ServerOptions{SessionOptions: cryo.SessionOptions{MaxBufferBytes: 16 << 20}})
		first, second := join(t, l, 1), join(t, l, 2)
		first.ClientHandshake()
		a := next(t, accepted)
		second.ClientHandshake()
		b := next(t, accepted)
		fragments := bytesOf(t, first, cryotest.Binary(1, string(make([]byte, large))))
		fragments[0] = 0x02 // not the last
		last := []byte{0x80, 0x80, 0, 0, 0, 0}
		sends(t, first, fragments)

		require.NoError(t, second.WS.NetConn().SetWriteDeadline(time.Time{}))
		waits := append(bytesOf(t, second, cryotest.Binary(2, string(make([]byte, large)))), bytesOf(t, second, cryotest.Ping(3))...)
		go func() { _, _ = second.WS.NetConn().Write(waits) }()
		second.WantIdle("the other is not read", 10*time.Second)
		sends(t, first, last)
		require.Len(t, receive(t, a).Payload, large)
		require.Len(t, receive(t, b).Payload, large)
		second.WantFrame("the answer to what was behind it", cryotest.Pong(3))
	})
}
