package cryo_test

import (
	"encoding/binary"
	"math/rand/v2"
	"slices"
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

func TestPingIsAnsweredWithItsNumberAndPongIsNot(t *testing.T) {
	atBothEnds(t, cryo.SessionOptions{}, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		peer.WriteFrames(cryotest.Ping(77))
		peer.WantFrame("the answer", cryotest.Pong(77))
		peer.WriteFrames(cryotest.Pong(77), cryotest.Pong(78))
		peer.WantIdle("no answer to a pong", 10*time.Second)
	})
}

func TestWebSocketPongCarriesThePingData(t *testing.T) {
	atBothEnds(t, cryo.SessionOptions{}, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		pongs := make(chan string, 1)
		peer.WS.SetPongHandler(func(words string) error { pongs <- words; return nil })
		require.NoError(t, peer.WS.WriteMessage(websocket.PingMessage, []byte("are you there?")))
		require.Equal(t, "are you there?", next(t, pongs))
	})
}

func TestAnswersToAFloodOfPingsAreBounded(t *testing.T) {
	atBothEnds(t, cryo.SessionOptions{}, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		peer.Conn().StopReading()
		stuck := start(func() error { return s.SendBinary(t.Context(), make([]byte, 1<<20)) })
		stuck.wantBlocked(t) // so that answers queue up
		for i := range uint32(10_000) {
			peer.WriteFrames(cryotest.Ping(i))
			require.NoError(t, peer.WS.WriteMessage(websocket.PingMessage, nil))
		}
		synctest.Wait()
		peer.Conn().ReadOn()
		peer.WantType("what was being written", wire.Binary)
		for i := range uint32(16) {
			peer.WantFrame("one of the first pongs", cryotest.Pong(i))
		}
		peer.WriteFrames(cryotest.Ping(1 << 20))
		peer.WantFrame("the next pong", cryotest.Pong(1<<20))
	})
}

func TestServerPingsAndClientDoesNot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, peer := accepted(t, cryo.ServerOptions{})
		time.Sleep(15 * time.Second)
		peer.WantFrame("a ping", cryotest.Ping(peer.First+1))
		time.Sleep(15 * time.Second)
		peer.WantFrame("a ping", cryotest.Ping(peer.First+2))
	})
	synctest.Test(t, func(t *testing.T) {
		_, peer := dialled(t, cryo.DialOptions{})
		peer.WantIdle("no ping", time.Minute)
	})
}

func TestAnswersToWebSocketPingsKeepASessionAlive(t *testing.T) {
	atBothEnds(t, cryo.SessionOptions{}, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		// The peer answers those, and neither sends Cryo pings nor answers any.
		peer.Read()
		time.Sleep(24 * time.Hour)
		require.NoError(t, s.Err())
	})
}

func TestBlackHoleIsDetectedWithinThreeIntervals(t *testing.T) {
	const interval = 10 * time.Second
	for range 10 {
		atBothEnds(t, cryo.SessionOptions{HeartbeatInterval: interval}, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
			peer.Read()
			time.Sleep(time.Minute + rand.N(interval))
			peer.Conn().Freeze()
			begin := time.Now()
			<-s.Done()
			require.LessOrEqual(t, time.Since(begin), 3*interval)
			require.ErrorIs(t, s.Err(), cryo.ErrPeerTimeout)
			require.EqualError(t, s.Err(), "session ended: peer timeout after 20s")
		})
	}
}

func TestBlackHoleIsDetectedWhileSending(t *testing.T) {
	const interval = 10 * time.Second
	atBothEnds(t, cryo.SessionOptions{HeartbeatInterval: interval}, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		peer.Read()
		time.Sleep(time.Minute + 1500*time.Millisecond) // never writing at a beat
		peer.Conn().Freeze()
		begin := time.Now()
		for s.Err() == nil { // now and then, and soon more than the network takes
			start(func() error { return s.SendBinary(t.Context(), make([]byte, 5000)) })
			time.Sleep(time.Second)
		}
		require.LessOrEqual(t, time.Since(begin), 3*interval+time.Second)
		require.ErrorIs(t, s.Err(), cryo.ErrPeerTimeout)
		wantEnded(t, s)
	})
}

func TestSlowConnectionDoesNotTimeOut(t *testing.T) {
	atBothEnds(t, cryo.SessionOptions{HeartbeatInterval: 10 * time.Second}, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		// Our pings wait behind the message, so the peer answers none for more
		// than four minutes.
		peer.Read()
		peer.Conn().ReadSlowly(64 << 10)
		begin := time.Now()
		send := start(func() error { return s.SendBinary(t.Context(), make([]byte, 16<<20)) })
		time.Sleep(257 * time.Second)
		peer.Ack(peer.WantType("all of it", wire.Binary))
		require.NoError(t, send.result(t))
		require.Greater(t, time.Since(begin), 256*time.Second)
		require.NoError(t, s.Err())
	})
}

func TestVerySlowConnectionDoesNotTimeOut(t *testing.T) {
	atBothEnds(t, cryo.SessionOptions{}, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		peer.Read()
		peer.Conn().ReadSlowly(7 << 10)
		send := start(func() error { return s.SendBinary(t.Context(), make([]byte, 2<<20)) })
		time.Sleep(5*time.Minute + time.Second)
		require.NoError(t, s.Err())
		peer.Conn().ReadSlowly(0)
		peer.Ack(peer.WantType("all of it", wire.Binary))
		require.NoError(t, send.result(t))
	})
}

func TestSlowlyReceivedMessageDoesNotTimeOut(t *testing.T) {
	atBothEnds(t, cryo.SessionOptions{}, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		message := cryotest.Binary(1, string(make([]byte, 500_000)))
		message.SID = sid
		frame, err := wire.Append(nil, &message)
		require.NoError(t, err)
		w, err := peer.WS.NextWriter(websocket.BinaryMessage) // and nothing is read, so no ping is answered
		require.NoError(t, err)
		for piece := range slices.Chunk(frame, 5_000) {
			_, err := w.Write(piece)
			require.NoError(t, err)
			time.Sleep(2 * time.Second)
		}
		require.NoError(t, s.Err())
		require.NoError(t, w.Close())
		require.NoError(t, receive(t, s).Ack())
	})
}

// fill makes a session stop reading: it has received a message that nobody
// settles, and may not hold the one that waits.
func fill(t *testing.T, s *cryo.Session, peer *cryotest.Peer) *cryo.Message {
	t.Helper()
	peer.WriteFrames(cryotest.Binary(1000, string(make([]byte, 2000))), cryotest.Text(1001, "what waits"))
	m := receive(t, s)
	synctest.Wait()
	return m
}

var smallBuffer = cryo.SessionOptions{MaxBufferBytes: 1000}

func TestPausedReadsDoNotCountTowardsThePeerTimeout(t *testing.T) {
	atBothEnds(t, smallBuffer, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		m := fill(t, s, peer)
		peer.Conn().StopReading() // not even answers to WebSocket pings
		time.Sleep(time.Hour)
		require.NoError(t, s.Err())

		peer.Conn().ReadOn()
		require.NoError(t, m.Ack())
		synctest.Wait()
		peer.Conn().Freeze()
		begin := time.Now()
		<-s.Done()
		require.ErrorIs(t, s.Err(), cryo.ErrPeerTimeout)
		require.GreaterOrEqual(t, time.Since(begin), 2*15*time.Second, "the pause doesn't count")
		require.LessOrEqual(t, time.Since(begin), 3*15*time.Second)
	})
}

// The first ping to a peer that is gone may only make its kernel report it.
func TestPausedReadsSendTwoWebSocketPingsPerInterval(t *testing.T) {
	atBothEnds(t, smallBuffer, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		begin := time.Now()
		var pings []time.Duration
		peer.WS.SetPingHandler(func(string) error { pings = append(pings, time.Since(begin)); return nil })
		m := fill(t, s, peer)
		peer.Read()
		time.Sleep(52 * time.Second)
		require.NoError(t, m.Ack())
		require.NoError(t, receive(t, s).Ack()) // what waited
		time.Sleep(30 * time.Second)
		synctest.Wait()
		var seconds []float64
		for _, at := range pings {
			seconds = append(seconds, at.Seconds())
		}
		require.Equal(t, []float64{15, 22.5, 30, 37.5, 45, 52.5, 60, 75}, seconds)
	})
}

func TestLostConnectionIsDetectedWhileReadsArePaused(t *testing.T) {
	atBothEnds(t, smallBuffer, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		fill(t, s, peer)
		time.Sleep(time.Minute + time.Second)
		peer.Conn().Cut()
		begin := time.Now()
		require.ErrorContains(t, wantEnded(t, s), "connection lost: writing")
		require.LessOrEqual(t, time.Since(begin), 15*time.Second/2)
	})
}

func TestDiallingEndSendsKeepalivesWhileReadsArePaused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, peer := dialled(t, cryo.DialOptions{SessionOptions: smallBuffer})
		m := fill(t, s, peer)
		begin := time.Now()
		for i := range 3 {
			peer.WantFrame("a keepalive", cryotest.Pong(0))
			require.Equal(t, time.Duration(1+i)*5*time.Second, time.Since(begin), "before any ping was seen")
		}
		require.NoError(t, m.Ack())
		peer.WantFrame("the acknowledgement", cryotest.Acked(1000))
		peer.WantIdle("no more of these", time.Minute)
	})
}

func TestKeepaliveIntervalIsHalfThePingInterval(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, peer := dialled(t, cryo.DialOptions{SessionOptions: smallBuffer})
		for i, pause := range []time.Duration{0, 12 * time.Second, 8 * time.Second, 9 * time.Second} {
			time.Sleep(pause)
			peer.WriteFrames(cryotest.Ping(uint32(i)))
			peer.WantFrame("the answer", cryotest.Pong(uint32(i)))
		}
		m := fill(t, s, peer)
		begin := time.Now()
		for i := range 3 {
			peer.WantFrame("a keepalive with the last ping's number", cryotest.Pong(3))
			require.Equal(t, time.Duration(1+i)*4500*time.Millisecond, time.Since(begin))
		}

		// Pings that pile up meanwhile come all at once, which is no interval.
		for i := range uint32(4) {
			peer.WriteFrames(cryotest.Ping(10 + i))
		}
		require.NoError(t, m.Ack())
		peer.WantFrame("the acknowledgement", cryotest.Acked(1000))
		for i := range uint32(4) {
			peer.WantFrame("the answer", cryotest.Pong(10+i))
		}
		require.NoError(t, receive(t, s).Ack())
		peer.WantFrame("the acknowledgement of what waited", cryotest.Acked(1001))
		fill(t, s, peer)
		begin = time.Now()
		peer.WantFrame("a keepalive", cryotest.Pong(13))
		require.Equal(t, 4500*time.Millisecond, time.Since(begin))
	})
}

func TestKeepaliveIntervalFollowsThePingInterval(t *testing.T) {
	for _, want := range []struct{ last, every time.Duration }{
		{110 * time.Millisecond, 55 * time.Millisecond},
		{1010 * time.Millisecond, 505 * time.Millisecond},
		{time.Hour + 10*time.Millisecond, 5 * time.Second},
	} {
		t.Run(want.last.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				opts := smallBuffer
				opts.HeartbeatInterval = 24 * time.Hour
				s, peer := dialled(t, cryo.DialOptions{SessionOptions: opts})
				for _, pause := range []time.Duration{0, 100 * time.Millisecond, want.last} {
					time.Sleep(pause)
					peer.WriteFrames(cryotest.Ping(7))
					peer.WantFrame("the answer", cryotest.Pong(7))
				}
				fill(t, s, peer)
				begin := time.Now()
				for i := range 3 {
					peer.WantFrame("a keepalive", cryotest.Pong(7))
					require.Equal(t, time.Duration(1+i)*want.every, time.Since(begin))
				}
			})
		})
	}
}

// TestStalledReceiverDoesNotEndTheSession plays cryo-server, which ends a
// session that sent no pong between two of its ticks.
func TestStalledReceiverDoesNotEndTheSession(t *testing.T) {
	for _, tick := range []time.Duration{5 * time.Second, 15 * time.Second, time.Minute} {
		synctest.Test(t, func(t *testing.T) {
			s, peer := dialled(t, cryo.DialOptions{SessionOptions: smallBuffer})
			serverTick := func() {
				peer.WriteFrames(cryotest.Ping(0))
				time.Sleep(tick)
				require.Positive(t, peer.Skip(), "the server would have ended the session")
			}
			serverTick()
			serverTick()
			m := fill(t, s, peer)
			for begin := time.Now(); time.Since(begin) < 10*time.Minute; {
				serverTick()
			}
			require.NoError(t, s.Err())
			require.NoError(t, m.Ack())
			require.Equal(t, "what waits", string(receive(t, s).Payload))
		})
	}
}

func TestListeningEndSendsNoKeepalives(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, peer := accepted(t, cryo.ServerOptions{SessionOptions: smallBuffer})
		fill(t, s, peer)
		for range 40 { // ten minutes
			time.Sleep(15*time.Second + instant)
			require.Equal(t, "ping", string(peer.WantType("the regular ping", wire.PingPong).Payload))
			peer.WriteFrames(cryotest.Pong(0)) // which the session doesn't get to see
			peer.WantIdle("nothing else", instant)
		}
		require.NoError(t, s.Err())
	})
}

func TestPeerThatSendsAndNeverReadsTimesOut(t *testing.T) {
	opts := cryo.SessionOptions{SendOnly: true}
	atBothEnds(t, opts, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		// The rejections of all that would be without bound.
		peer.Conn().StopReading()
		flood := start(func() error {
			frame, _ := wire.Append(nil, &wire.Frame{SID: sid, Type: wire.UTF8})
			for {
				if err := peer.WS.WriteMessage(websocket.BinaryMessage, frame); err != nil {
					return err
				}
			}
		})
		begin := time.Now()
		<-s.Done()
		require.ErrorIs(t, s.Err(), cryo.ErrPeerTimeout)
		require.LessOrEqual(t, time.Since(begin), 3*15*time.Second)
		require.Error(t, flood.result(t))
	})
}

// A slow line too keeps pings behind the data: behind many messages, or behind one
// that takes longer than the interval. Nothing is paused then.
func TestDiallingEndSendsKeepalivesWhilePingsAreBehindData(t *testing.T) {
	for name, size := range map[string]int{"many messages": 10_000, "one message": 1_000_000} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s, peer := dialled(t, cryo.DialOptions{})
				go func() {
					for {
						if _, err := s.Receive(t.Context()); err != nil {
							return
						}
					}
				}()
				message := cryotest.Binary(1, strings.Repeat("x", size))
				message.SID = sid
				frame, err := wire.Append(nil, &message)
				require.NoError(t, err)
				whole := append([]byte{0x82, 127}, binary.BigEndian.AppendUint64(nil, uint64(len(frame)))...)
				whole = append(whole, frame...)
				peer.WS.SetPingHandler(func(string) error { return nil }) // its answers would be behind the data too
				peer.Read()
				require.NoError(t, peer.WS.NetConn().SetWriteDeadline(time.Time{}))
				const second = 10_000 // bytes
				for range 1_000_000 / size {
					for piece := range slices.Chunk(whole, second) {
						_, err := peer.WS.NetConn().Write(piece)
						require.NoError(t, err)
						time.Sleep(time.Second * time.Duration(len(piece)) / second)
					}
				}
				pongs := 0
				for _, f := range peer.Taken() {
					if f.Type == wire.PingPong {
						require.Equal(t, "pong", string(f.Payload))
						pongs++
					}
				}
				require.Equal(t, 100/5, pongs)
				peer.Skip()
				peer.WantIdle("no more of these", 20*time.Second)
			})
		})
	}
}

// A pipeline that is only slow makes many pauses, each shorter than any interval.
// The pings are as far behind the data as in one long pause.
func TestDiallingEndSendsKeepalivesThroughManyShortPauses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, peer := dialled(t, cryo.DialOptions{SessionOptions: smallBuffer})
		peer.WriteFrames(cryotest.Ping(1))
		time.Sleep(10 * time.Second)
		peer.WriteFrames(cryotest.Ping(2))
		synctest.Wait()
		for range 40 { // their pings would be behind them
			peer.WriteFrames(cryotest.Binary(1, string(make([]byte, 1000))))
		}
		peer.Read()
		time.Sleep(time.Second / 2) // so that reads do not continue exactly when a keepalive is due
		begin, pongs := time.Now(), 0
		for range 40 {
			m := receive(t, s)
			time.Sleep(time.Second)
			require.NoError(t, m.Ack())
		}
		synctest.Wait()
		for _, f := range peer.Taken() {
			if f.Type == wire.PingPong && string(f.Payload) == "pong" {
				pongs++
			}
		}
		require.GreaterOrEqual(t, pongs, 2+int(time.Since(begin)/(5*time.Second))-1)
	})
}
