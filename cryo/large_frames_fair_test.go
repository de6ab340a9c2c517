package cryo_test

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/cryotest"
	"github.com/cryo-connect/cryo-connect/internal/wire"
)

// identified are ways in which a server distinguishes the client whose sessions have the ids from
// 100 from others.
var identified = map[string]func(u *cryo.Upgrade) error{
	"by its owner": func(u *cryo.Upgrade) error {
		u.Owner = fmt.Sprint("owner ", u.SessionID/100)
		return nil
	},
	"by its token": cryo.Tokens(token, "of others"),
	"by its address": func(u *cryo.Upgrade) error {
		u.Request.RemoteAddr = fmt.Sprintf("192.0.2.%d:1", u.SessionID/100)
		return nil
	},
}

// crowd is a server, and a client that has many sessions.
type crowd struct {
	listener *cryotest.Listener
	accepted <-chan *cryo.Session
	peers    []*cryotest.Peer
	sessions []*cryo.Session
}

func newCrowd(t *testing.T, authorize func(u *cryo.Upgrade) error, limit, count int) *crowd {
	t.Helper()
	c := &crowd{}
	_, c.listener, c.accepted = serve(t, cryo.ServerOptions{Authorize: authorize, SessionOptions: cryo.SessionOptions{MaxBufferBytes: limit}})
	for i := range uint64(count) {
		peer := join(t, c.listener, 100+i)
		peer.ClientHandshake()
		peer.Conn().StopReading() // an answer to a ping would be in the middle of a message
		c.peers, c.sessions = append(c.peers, peer), append(c.sessions, next(t, c.accepted))
	}
	return c
}

// other returns the session of another client, and its end.
func (c *crowd) other(t *testing.T, id uint64) (*cryo.Session, *cryo.Session) {
	t.Helper()
	client, err := cryo.Dial(t.Context(), memoryURL, &cryo.DialOptions{Token: "of others", SessionID: id, NetDial: c.listener.Dial})
	require.NoError(t, err)
	t.Cleanup(func() { cut(client) })
	return next(t, c.accepted), client
}

// announce lets a session announce a message of a size, of which nothing comes.
func (c *crowd) announce(t *testing.T, i, size int) (rest []byte) {
	t.Helper()
	b := bytesOf(t, c.peers[i], cryotest.Binary(5, string(make([]byte, size))))
	const head = 14 + wire.AckHeaderSize
	sendsWhenRead(c.peers[i], b[:head])
	synctest.Wait()
	return b[head:]
}

// sendsWhenRead writes bytes, and does not wait until they are read.
func sendsWhenRead(peer *cryotest.Peer, b []byte) {
	_ = peer.WS.NetConn().SetWriteDeadline(time.Time{})
	go func() { _, _ = peer.WS.NetConn().Write(b) }()
}

// keepsSending writes bytes, and then more of them every second.
func keepsSending(sending *sync.WaitGroup, stop <-chan struct{}, peer *cryotest.Peer, b, more []byte) {
	peer.Conn().StopReading()
	_ = peer.WS.NetConn().SetWriteDeadline(time.Time{})
	sending.Go(func() {
		for err := error(nil); err == nil; b = more {
			_, err = peer.WS.NetConn().Write(b)
			select {
			case <-time.After(time.Second):
			case <-stop:
				return
			}
		}
	})
}

func TestClientWithManySessionsLeavesCapacityForLargeMessagesOfOthers(t *testing.T) {
	for name, authorize := range identified {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c := newCrowd(t, authorize, cryo.DefaultMaxBufferBytes, 12)
				for i := range c.peers {
					c.announce(t, i, wire.MaxPayload)
				}
				s, other := c.other(t, 200)
				for range 3 {
					begin := time.Now()
					sending := start(func() error { return other.SendBinary(t.Context(), make([]byte, wire.MaxPayload)) })
					require.NoError(t, receive(t, s).Ack())
					sending.wantSuccess(t)
					require.Zero(t, time.Since(begin))
				}
			})
		})
	}
}

// Whatever one client begins, continues and completes in its sessions, another one that receives
// one large message at a time does not wait.
func TestLargeMessagesOfOneClientNeverDelayThoseOfAnother(t *testing.T) {
	type step struct {
		Session, Size int // Size 0: the session continues
		Part          int
		After         time.Duration
		Other         int
	}
	sizes := rapid.OneOf(rapid.IntRange(70_000, 300_000), rapid.IntRange(8<<20, wire.MaxPayload))
	steps := rapid.SliceOfN(rapid.Custom(func(t *rapid.T) step {
		return step{
			Session: rapid.IntRange(0, 7).Draw(t, "session"),
			Size:    rapid.OneOf(rapid.Just(0), sizes, sizes).Draw(t, "size"),
			Part:    rapid.IntRange(1, 400_000).Draw(t, "part"),
			After:   time.Duration(rapid.IntRange(0, 20).Draw(t, "after")) * time.Second,
			Other:   rapid.OneOf(rapid.Just(0), rapid.Just(0), sizes).Draw(t, "other"),
		}
	}), 1, 12)
	rapid.Check(t, func(rt *rapid.T) {
		limit := rapid.IntRange(2*wire.MaxPayload, 4*wire.MaxPayload).Draw(rt, "limit")
		todo := steps.Draw(rt, "steps")
		synctest.Test(t, func(t *testing.T) {
			c := newCrowd(t, identified["by its owner"], limit, 8)
			for _, s := range c.sessions {
				acknowledgeMessages(t, s)
			}
			rests := make([][]byte, len(c.peers))
			s, other := c.other(t, 200)
			for _, step := range todo {
				time.Sleep(step.After)
				i := step.Session
				switch part := min(step.Part, len(rests[i])); {
				case len(rests[i]) == 0 && step.Size > 0:
					rests[i] = c.announce(t, i, step.Size)
				case c.sessions[i].ComingIn() > 0:
					sendsWhenRead(c.peers[i], rests[i][:part])
					rests[i] = rests[i][part:]
					synctest.Wait()
				}
				var sum int64
				for _, s := range c.sessions {
					sum += s.ComingIn()
				}
				_, free, _ := s.Free()
				require.True(t, sum <= wire.MaxPayload || sum <= 8*free, "%d bytes of one client, and %d left for others", sum, free)
				if step.Other == 0 {
					continue
				}
				begin := time.Now()
				sending := start(func() error { return other.SendBinary(t.Context(), make([]byte, step.Other)) })
				require.NoError(t, receive(t, s).Ack())
				sending.wantSuccess(t)
				require.Zero(t, time.Since(begin))
			}
		})
	})
}

// The messages of one client would otherwise be received one after the other first, each for a minute.
func TestClientsAreServedInTurnForMessagesThatOutgrowAMebibyte(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCrowd(t, identified["by its owner"], cryo.DefaultMaxBufferBytes, 6)
		const part = 600 << 10
		stop := make(chan struct{})
		var sending sync.WaitGroup
		fragments := func(peer *cryotest.Peer) []byte {
			b := encoded(t, peer, cryotest.Binary(1, string(make([]byte, part))))
			return append(raw(end{}, 0x02, b), raw(end{}, 0x00, make([]byte, part))...)
		}
		for _, peer := range c.peers {
			keepsSending(&sending, stop, peer, fragments(peer), raw(end{}, 0x8A, nil)) // pongs keep the session alive
			synctest.Wait()
		}
		require.EqualValues(t, wire.MaxPayload, c.sessions[0].ComingIn())
		require.EqualValues(t, 1<<20, c.sessions[5].ComingIn())
		other := join(t, c.listener, 200)
		other.ClientHandshake()
		other.Conn().StopReading()
		s := next(t, c.accepted)
		sendsWhenRead(other, append(fragments(other), raw(end{}, 0x80, nil)...))
		ctx, cancel := context.WithTimeout(t.Context(), 2*(time.Minute+cryo.DefaultHeartbeatInterval))
		defer cancel()
		m, err := s.Receive(ctx)
		require.NoError(t, err)
		require.Len(t, m.Payload, 2*part)
		for _, s := range c.sessions[2:] { // the first was received, and the second waited before
			require.NoError(t, s.Err())
		}
		close(stop)
		for _, s := range c.sessions {
			cut(s)
		}
		sending.Wait()
	})
}

// A client on a slow line needs more than a minute for a large message. Another one always has a message
// that has waited for longer, and receives others meanwhile.
func TestClientWithManySessionsEndsNoSessionOfAnother(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCrowd(t, identified["by its owner"], 2*wire.MaxPayload, 3)
		for _, s := range c.sessions {
			acknowledgeMessages(t, s)
		}
		rests := [][]byte{c.announce(t, 0, wire.MaxPayload)}
		slow := join(t, c.listener, 200)
		slow.ClientHandshake()
		s := next(t, c.accepted)
		b := bytesOf(t, slow, cryotest.Binary(1, string(make([]byte, wire.MaxPayload))))
		const pieces = 300
		stop := make(chan struct{})
		var sending sync.WaitGroup
		keepsSending(&sending, stop, slow, b[:len(b)-pieces], b[len(b)-pieces:][:1]) // a byte every second
		synctest.Wait()
		rests = append(rests, c.announce(t, 1, wire.MaxPayload), c.announce(t, 2, wire.MaxPayload))
		for i := range 5 {
			time.Sleep(50 * time.Second)
			require.NoError(t, s.Err(), "after %d messages of the other client", i)
			sendsWhenRead(c.peers[i%3], rests[i%3]) // one is complete, and the next one waits
			synctest.Wait()
			rests[i%3] = c.announce(t, i%3, wire.MaxPayload)
		}
		m, err := s.Receive(t.Context())
		require.NoError(t, err)
		require.Len(t, m.Payload, wire.MaxPayload)
		close(stop)
		for _, s := range append(c.sessions, s) {
			cut(s)
		}
		sending.Wait()
	})
}

func TestOneSlowSessionEndsForEachWaitingSession(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const holders, waiting = 6, 3
		_, l, accepted := serve(t, cryo.ServerOptions{Authorize: eachItsOwner, SessionOptions: cryo.SessionOptions{MaxBufferBytes: (holders-1)*large + 1000}})
		var (
			clients  []*cryotest.Peer
			sessions []*cryo.Session
			rests    [][]byte
		)
		for i := range uint64(holders + waiting) {
			peer := join(t, l, 1+i)
			peer.ClientHandshake()
			clients, sessions = append(clients, peer), append(sessions, next(t, accepted))
			if i < holders {
				rests = append(rests, begin(t, peer, 100))
			}
		}
		require.Equal(t, holders, trickle(t, clients, sessions, rests, 2*time.Minute), "nobody waits")
		stop := make(chan struct{})
		var sending sync.WaitGroup
		for _, peer := range clients[holders:] {
			b := bytesOf(t, peer, cryotest.Binary(100, string(make([]byte, large))))
			keepsSending(&sending, stop, peer, b[:large/2], b[large-1:large])
		}
		require.Equal(t, holders, trickle(t, clients, sessions, rests, 4*time.Second))
		require.Equal(t, holders-waiting, trickle(t, clients, sessions, rests, waiting*cryo.DefaultHeartbeatInterval), "none that need not end")
		for _, s := range sessions[holders:] {
			require.Equal(t, int64(large), s.ComingIn())
		}
		require.Equal(t, holders-waiting, trickle(t, clients, sessions, rests, 10*time.Minute), "nobody waits")
		close(stop)
		for _, s := range sessions {
			cut(s)
		}
		sending.Wait()
	})
}
