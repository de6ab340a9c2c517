package cryo_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"io"
	"math"
	"net"
	"net/http"
	"net/url"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/cryotest"
	"github.com/cryo-connect/cryo-connect/internal/wire"
)

// expiringAfter authorizes every client until a time from now.
func expiringAfter(d time.Duration) func(*cryo.Upgrade) error {
	return func(u *cryo.Upgrade) error {
		u.Expires = time.Now().Add(d)
		return nil
	}
}

// expiring returns a server's session that expires in a minute, and its raw client.
func expiring(t *testing.T, opts cryo.ServerOptions) (*cryo.Server, *cryotest.Listener, <-chan *cryo.Session, *cryo.Session, *cryotest.Peer) {
	t.Helper()
	opts.HeartbeatInterval = quiet.HeartbeatInterval
	opts.Authorize = expiringAfter(time.Minute)
	server, l, sessions := serve(t, opts)
	peer := join(t, l, sid)
	peer.ClientHandshake()
	return server, l, sessions, next(t, sessions), peer
}

// wantExpiredAfter wants the end of an expired session after d, and not before.
func wantExpiredAfter(t *testing.T, d time.Duration, s *cryo.Session, peer *cryotest.Peer) {
	t.Helper()
	peer.WantIdle("it is open until then", d-instant)
	require.NoError(t, s.Err())
	begin := time.Now()
	wantExpired(t, s, peer)
	require.Equal(t, instant, time.Since(begin))
}

// wantExpired wants the end of an expired session, and answers it.
func wantExpired(t *testing.T, s *cryo.Session, peer *cryotest.Peer) {
	t.Helper()
	require.Equal(t, "session expired", string(peer.WantType("BYE", wire.Bye).Payload))
	peer.WantClose("the end", 4000, "session expired")
	peer.WriteClose(4000, "")
	require.ErrorIs(t, wantEnded(t, s), cryo.ErrExpired)
	require.ErrorIs(t, s.Err(), net.ErrClosed)
}

func TestSessionEndsWhenItExpires(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ended := make(chan *cryo.Session, 1)
		server, _, _, s, peer := expiring(t, cryo.ServerOptions{OnSessionEnd: func(s *cryo.Session) { ended <- s }})
		peer.WriteFrames(cryotest.Text(1, "before"))
		require.NoError(t, receive(t, s).Ack())
		peer.WantFrame("the message", cryotest.Acked(1))
		require.False(t, s.Draining())
		wantExpiredAfter(t, time.Minute, s, peer)
		require.EqualError(t, s.Err(), "session ended: session expired")
		require.Same(t, s, next(t, ended))
		require.Empty(t, server.Sessions())
		require.NoError(t, server.Shutdown(t.Context()), "nothing of it is left")
	})
}

func TestSessionWithoutExpiryStaysOpen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, peer := accepted(t, cryo.ServerOptions{SessionOptions: quiet, ExpiryGrace: time.Second})
		peer.WantIdle("nothing ends it", 23*time.Hour)
		require.NoError(t, s.Err())
	})
}

func TestExpiredSessionEndsAfterTheGracePeriod(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, _, _, s, peer := expiring(t, cryo.ServerOptions{ExpiryGrace: 25 * time.Second})
		time.Sleep(time.Minute + 20*time.Second)
		peer.WriteFrames(cryotest.Text(1, "within the grace period"))
		require.NoError(t, receive(t, s).Ack())
		peer.WantFrame("it is delivered", cryotest.Acked(1))
		wantExpiredAfter(t, 5*time.Second, s, peer)
	})
}

// A client that connects again by itself after this close code does so at once, with the same token.
func TestSessionEndsAtItsMaximumAge(t *testing.T) {
	const reason = "session expired: maximum age of 1h0m0s reached"
	for name, expires := range map[string]time.Duration{
		"without an expiry":        0,
		"before its expiry":        2 * time.Hour,
		"without the grace period": time.Hour,
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				opts := cryo.ServerOptions{SessionOptions: quiet, MaxSessionAge: time.Hour, ExpiryGrace: time.Minute}
				if expires > 0 {
					opts.Authorize = expiringAfter(expires)
				}
				s, peer := accepted(t, opts)
				peer.WantIdle("it is open until then", 54*time.Minute-instant)
				time.Sleep(6*time.Minute + instant)
				peer.WantClose("the end, without BYE", 1013, reason)
				require.EqualError(t, wantEnded(t, s), "session ended: "+reason)
				require.ErrorIs(t, s.Err(), cryo.ErrExpired)
			})
		})
	}
}

func TestSessionThatExpiresBeforeItsMaximumAgeEndsThen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, _, _, s, peer := expiring(t, cryo.ServerOptions{MaxSessionAge: time.Hour, ExpiryGrace: time.Second})
		wantExpiredAfter(t, time.Minute+time.Second, s, peer)
	})
}

func TestSessionsThatBeginTogetherDoNotReachTheirMaximumAgeTogether(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const n = 10
		_, l, sessions := serve(t, cryo.ServerOptions{SessionOptions: quiet, MaxSessionAge: time.Hour})
		begin, ends := time.Now(), make(chan time.Duration, n)
		for i := range uint64(n) {
			join(t, l, i).ClientHandshake()
			s := next(t, sessions)
			go func() {
				<-s.Context().Done()
				ends <- time.Since(begin)
			}()
		}
		time.Sleep(time.Hour)
		seen := make(map[time.Duration]bool)
		for range n {
			seen[next(t, ends)] = true
		}
		require.Greater(t, len(seen), 1)
	})
}

func TestClientWhoseTokenHasExpiredIsDenied(t *testing.T) {
	for name, expires := range map[string]time.Time{
		"now":         time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC), // the time in a bubble
		"long ago":    time.Unix(0, 0),
		"before time": time.Date(-5000, 1, 1, 0, 0, 0, 0, time.UTC),
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				statuses := make(chan int, 1)
				_, l, _ := serve(t, cryo.ServerOptions{
					ExpiryGrace: time.Hour,
					OnDeny:      func(status int) { statuses <- status },
					Authorize: func(u *cryo.Upgrade) error {
						u.Expires = expires
						return nil
					},
				})
				_, err := cryo.Dial(t.Context(), memoryURL, &cryo.DialOptions{NetDial: l.Dial, Token: token})
				require.EqualError(t, err, "dialling ws://cryo.test: the server responded to the upgrade with 401 Unauthorized: The token has expired.")
				require.ErrorIs(t, err, cryo.ErrUnauthorized)
				require.Equal(t, http.StatusUnauthorized, next(t, statuses))
			})
		})
	}
}

func TestMessagesInFlightAreAcknowledgedAfterTheExpiry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, _, _, s, peer := expiring(t, cryo.ServerOptions{})
		peer.WriteFrames(cryotest.Text(1, "received"), cryotest.Text(2, "in the queue"))
		m := receive(t, s)
		time.Sleep(time.Minute)
		synctest.Wait()
		require.True(t, s.Draining())
		require.NoError(t, s.Err())
		peer.WriteFrames(cryotest.Text(3, "later"))
		peer.WantIdle("what is received later is discarded", 10*time.Second)

		send := start(func() error { return s.SendText(t.Context(), "a response") })
		peer.Ack(peer.WantType("a response can be sent", wire.UTF8))
		send.wantSuccess(t)
		require.NoError(t, m.Ack())
		peer.WantFrame("the received one", cryotest.Acked(1))
		require.NoError(t, receive(t, s).Ack())
		peer.WantFrame("the one in the queue", cryotest.Acked(2))
		wantExpired(t, s, peer)
		_, err := s.Receive(t.Context())
		require.ErrorIs(t, err, cryo.ErrExpired)
	})
}

func TestExpiredSessionWaits30SecondsForAStalledApplication(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server, _, _, s, peer := expiring(t, cryo.ServerOptions{SessionOptions: smallBuffer})
		m := fill(t, s, peer) // reads are paused
		time.Sleep(time.Minute)
		wantExpiredAfter(t, 30*time.Second, s, peer)
		require.ErrorIs(t, m.Ack(), cryo.ErrExpired)
		s.Discard()
		require.Zero(t, s.Held())
		require.Zero(t, s.Stats().UnsettledMessages)
		require.Empty(t, server.Sessions())
	})
}

func TestExpiryOfAClientThatReadsNothingIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, _, _, s, peer := expiring(t, cryo.ServerOptions{})
		peer.WriteFrames(cryotest.Text(1, "nobody settles it"))
		receive(t, s)
		peer.Conn().Freeze()
		begin := time.Now()
		<-s.Done()
		require.Equal(t, time.Minute+30*time.Second+cryo.DefaultCloseTimeout, time.Since(begin))
		require.ErrorIs(t, s.Err(), cryo.ErrExpired)
	})
}

func TestStreamsInProgressEndWithTheExpiry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, _, _, s, peer := expiring(t, cryo.ServerOptions{SessionOptions: cryo.SessionOptions{StreamIdleTimeout: time.Hour}})
		half := incoming(t, s, peer, 1, 5)
		whole := incoming(t, s, peer, 2, 6)
		peer.WriteFrames(txFinish(3, 6))
		var out *cryo.OutgoingStream
		opening := start(func() (err error) {
			out, err = s.OpenStream(t.Context(), nil)
			return err
		})
		peer.Ack(peer.WantType("TX_START", wire.TxStart))
		opening.wantSuccess(t)

		time.Sleep(time.Minute)
		cancel := peer.WantType("the incomplete stream is cancelled", wire.TxCancel)
		require.Equal(t, uint32(5), cancel.Tx)
		peer.Ack(cancel)
		_, err := io.ReadAll(half)
		require.ErrorIs(t, err, io.ErrUnexpectedEOF)
		require.ErrorIs(t, err, cryo.ErrExpired)
		_, err = io.ReadAll(whole)
		require.NoError(t, err)
		_, err = out.Write([]byte("out"))
		require.NoError(t, err, "the session still sends")
		peer.WantType("a chunk", wire.TxChunk)
		require.NoError(t, whole.Ack())
		peer.WantFrame("the complete one is acknowledged", cryotest.Acked(3))
		peer.WantType("BYE", wire.Bye)
		peer.WantClose("the end", 4000, "session expired")
		peer.WriteClose(4000, "")
		require.ErrorIs(t, out.Finish(), cryo.ErrExpired)
		wantEnded(t, s)
	})
}

func TestUnacknowledgedSendFailsWithTheExpiry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, _, _, s, peer := expiring(t, cryo.ServerOptions{})
		lost := start(func() error { return s.SendText(t.Context(), "lost") })
		kept := start(func() error { return s.SendText(t.Context(), "acknowledged") })
		peer.WantType("a text", wire.UTF8)
		f := peer.WantType("a text", wire.UTF8)
		time.Sleep(time.Minute)
		peer.WantType("BYE", wire.Bye)
		peer.WantClose("the end", 4000, "session expired")
		peer.Ack(f) // was in flight
		peer.WriteClose(4000, "")
		results := []error{lost.result(t), kept.result(t)}
		if results[0] == nil {
			results[0], results[1] = results[1], results[0]
		}
		require.ErrorIs(t, results[0], cryo.ErrExpired)
		require.NoError(t, results[1])
		wantEnded(t, s)
	})
}

func TestSessionCanExpireDuringItsHandshake(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server, l, sessions := serve(t, cryo.ServerOptions{Authorize: expiringAfter(500 * time.Millisecond), OnSessionEnd: func(*cryo.Session) {
			t.Error("it was never announced")
		}})
		peer := join(t, l, sid)
		require.Equal(t, "session expired", string(peer.WantType("BYE", wire.Bye).Payload))
		peer.WantClose("the end", 4000, "session expired")
		peer.WriteClose(4000, "")
		synctest.Wait()
		require.Empty(t, sessions)
		require.NoError(t, server.Shutdown(t.Context()))
	})
}

// A timer follows neither the wall clock nor a machine that was suspended.
func TestExpiryFollowsTheWallClock(t *testing.T) {
	for name, c := range map[string]struct {
		forward  time.Duration
		earliest time.Duration
		latest   time.Duration
	}{
		"set forward":                {time.Hour, 30 * time.Second, 45 * time.Second},
		"set forward by a little":    {20 * time.Second, 40 * time.Second, 45 * time.Second},
		"set back":                   {-time.Hour, time.Hour + time.Minute, time.Hour + time.Minute},
		"set forward by a long time": {math.MaxInt64 / 2, 30 * time.Second, 45 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				_, _, _, s, peer := expiring(t, cryo.ServerOptions{})
				begin := time.Now()
				time.Sleep(30 * time.Second)
				s.SetClockForward(c.forward)
				<-s.Context().Done()
				wantExpired(t, s, peer)
				require.GreaterOrEqual(t, time.Since(begin), c.earliest)
				require.LessOrEqual(t, time.Since(begin), c.latest)
			})
		})
	}
}

func TestExpiredSessionCanBeTakenOver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, l, sessions, s, peer := expiring(t, cryo.ServerOptions{})
		peer.WriteFrames(cryotest.Text(1, "in flight"))
		m := receive(t, s)
		time.Sleep(time.Minute)
		synctest.Wait()
		require.True(t, s.Draining())
		join(t, l, sid).ClientHandshake()
		peer.WantClose("the newer connection ends it", 4000, "taken over by a newer connection of the same client")
		peer.WriteClose(4000, "")
		require.ErrorIs(t, wantEnded(t, s), cryo.ErrTakenOver, "the first cause wins")
		require.ErrorIs(t, m.Ack(), cryo.ErrTakenOver)
		newer := next(t, sessions)
		time.Sleep(time.Minute - instant)
		require.NoError(t, newer.Err(), "it has its own time")
		require.False(t, newer.Draining())
	})
}

func TestClosingExpiredSessionIsReplacedByANewOne(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server, l, sessions, s, peer := expiring(t, cryo.ServerOptions{})
		time.Sleep(time.Minute)
		peer.WantType("BYE", wire.Bye)
		peer.WantClose("the end", 4000, "session expired")
		join(t, l, sid).ClientHandshake() // before it has answered
		newer := next(t, sessions)
		require.Equal(t, []*cryo.Session{newer}, server.Sessions())
		require.ErrorIs(t, wantEnded(t, s), cryo.ErrExpired)
		found, ok := server.Session(sid)
		require.True(t, ok)
		require.Same(t, newer, found)
	})
}

func TestServerEndsWhileASessionIsExpired(t *testing.T) {
	for name, end := range map[string]func(*testing.T, *cryo.Server) error{
		"Shutdown": func(t *testing.T, s *cryo.Server) error { return s.Shutdown(t.Context()) },
		"Drain":    func(t *testing.T, s *cryo.Server) error { return s.Drain(t.Context()) },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				server, _, _, s, peer := expiring(t, cryo.ServerOptions{})
				peer.WriteFrames(cryotest.Text(1, "in flight"))
				receive(t, s)
				time.Sleep(time.Minute)
				synctest.Wait()
				ending := start(func() error { return end(t, server) })
				if name == "Drain" { // the expiry still bounds the wait
					wantExpiredAfter(t, 30*time.Second, s, peer)
				} else {
					peer.WantClose("the end", 1012, "server is shutting down")
					peer.WriteClose(1012, "")
					require.ErrorIs(t, wantEnded(t, s), cryo.ErrClosed)
				}
				ending.wantSuccess(t)
			})
		})
	}
}

// Nothing waits for the time of a session that has ended: neither a goroutine nor the memory.
func TestSessionThatEndsBeforeItExpiresLeavesNoTimer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, _, _, s, peer := expiring(t, cryo.ServerOptions{})
		closing := start(func() error { return s.Close(t.Context(), "") })
		peer.WantType("BYE", wire.Bye)
		peer.WriteClose(4000, "")
		closing.wantSuccess(t)
		s.SetClockForward(time.Hour)
		time.Sleep(time.Hour)
		require.ErrorIs(t, s.Err(), cryo.ErrClosed)
		require.False(t, s.Draining())
	})
}

func TestOwnerDecidesWhoTakesOverASession(t *testing.T) {
	type client struct{ token, owner, certificate string }
	for name, c := range map[string]struct {
		old, newer client
		takesOver  bool
	}{
		"the same owner with a renewed token":               {client{"old", "ann", ""}, client{"renewed", "ann", ""}, true},
		"the same owner with another certificate":           {client{"t", "ann", "1"}, client{"t", "ann", "2"}, true},
		"another owner with the same token":                 {client{"t", "ann", ""}, client{"t", "eve", ""}, false},
		"another owner with the same token and certificate": {client{"t", "ann", "1"}, client{"t", "eve", "1"}, false},
		"none with the token of an owner":                   {client{"t", "ann", ""}, client{"t", "", ""}, false},
		"an owner with the token of none":                   {client{"t", "", ""}, client{"t", "ann", ""}, false},
		"a token that is named as an owner":                 {client{"t", "ann", ""}, client{"ann", "", ""}, false},
		"none with another token":                           {client{"old", "", ""}, client{"renewed", "", ""}, false},
		"none with the same token":                          {client{"t", "", ""}, client{"t", "", ""}, true},
		"none with another certificate":                     {client{"t", "", "1"}, client{"t", "", "2"}, false},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				sessions := make(chan *cryo.Session, 2)
				server := newServer(t, cryo.ServerOptions{
					OnSession: func(s *cryo.Session, _ *cryo.Upgrade) { sessions <- s },
					Authorize: func(u *cryo.Upgrade) error {
						u.Owner = u.Request.URL.Query().Get("verified")
						return nil
					},
				})
				l := cryotest.Serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					if certificate := r.URL.Query().Get("certificate"); certificate != "" {
						r.TLS = &tls.ConnectionState{PeerCertificates: []*x509.Certificate{{Raw: []byte(certificate)}}}
					}
					server.ServeHTTP(w, r)
				}))
				dial := func(c client) error {
					s, err := cryo.Dial(t.Context(), memoryURL, &cryo.DialOptions{
						NetDial: l.Dial, Token: c.token, SessionID: sid,
						Query: url.Values{"verified": {c.owner}, "certificate": {c.certificate}},
					})
					if err == nil {
						t.Cleanup(func() { cut(s) })
					}
					return err
				}
				require.NoError(t, dial(c.old))
				s := next(t, sessions)
				err := dial(c.newer)
				if !c.takesOver {
					require.ErrorIs(t, err, cryo.ErrSessionExists)
					require.NoError(t, s.Err())
					return
				}
				require.NoError(t, err)
				require.ErrorIs(t, wantEnded(t, s), cryo.ErrTakenOver)
			})
		})
	}
}

func TestClientOfAnExpiredSessionReturnsWithARenewedToken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const life = time.Minute
		issued := func(token string) time.Time { at, _ := time.Parse(time.RFC3339, token); return at }
		server, l, sessions := serve(t, cryo.ServerOptions{Authorize: func(u *cryo.Upgrade) error {
			u.Owner, u.Expires = "ann", issued(u.Token).Add(life)
			return nil
		}})
		client, err := cryo.NewClient(memoryURL, &cryo.ClientOptions{
			DialOptions: cryo.DialOptions{NetDial: l.Dial},
			BeforeDial: func(_ context.Context, opts *cryo.DialOptions) error {
				opts.Token = time.Now().Format(time.RFC3339)
				return nil
			},
		})
		require.NoError(t, err)
		for range 3 {
			_, err := client.Await(t.Context())
			require.NoError(t, err)
			s := next(t, sessions)
			time.Sleep(life)
			require.ErrorIs(t, wantEnded(t, s), cryo.ErrExpired)
		}
		require.NoError(t, client.Close(t.Context(), ""))
		require.NoError(t, server.Shutdown(t.Context()))
	})
}
