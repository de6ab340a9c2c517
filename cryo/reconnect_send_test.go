package cryo_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/cryotest"
	"github.com/cryo-connect/cryo-connect/internal/wire"
)

func textMessages(texts ...string) []cryo.OutMessage {
	messages := make([]cryo.OutMessage, len(texts))
	for i, text := range texts {
		messages[i] = cryo.Text(text)
	}
	return messages
}

// sendBy sends texts by a client.
func sendBy(c *cryo.Client, texts ...string) *call {
	return start(func() error { return c.Send(context.Background(), textMessages(texts...)) })
}

// wantTexts wants exactly these messages next.
func wantTexts(t *testing.T, peer *cryotest.Peer, texts ...string) []wire.Frame {
	t.Helper()
	frames := make([]wire.Frame, len(texts))
	for i, text := range texts {
		frames[i] = peer.WantType(text, wire.UTF8)
		require.Equal(t, text, string(frames[i].Payload))
	}
	return frames
}

// errsOf are the errors of messages, by index.
func errsOf(t *testing.T, err error) []error {
	t.Helper()
	failed, ok := err.(*cryo.BatchError) //nolint:errorlint // that is promised
	require.True(t, ok, "%v", err)
	return failed.Errs
}

func TestSendConnects(t *testing.T) {
	withPeers(t, cryo.ClientOptions{}, func(t *testing.T, c *cryo.Client, g *gate, server *cryotest.Server) {
		require.NoError(t, c.Send(t.Context(), nil))
		require.Zero(t, g.attempts(), "for nothing")
		g.answer(away, 5)
		sending := sendBy(c, "a", "b")
		peer := nextSession(t, g, server)
		frames := wantTexts(t, peer, "a", "b")
		peer.Ack(frames[1])
		sending.wantBlocked(t)
		peer.Ack(frames[0])
		sending.wantSuccess(t)

		sending = sendBy(c, "c")
		peer.Ack(wantTexts(t, peer, "c")...)
		sending.wantSuccess(t)
		require.Equal(t, 6, g.attempts())
	})
}

func TestSendResendsOnlyUnacknowledgedMessages(t *testing.T) {
	withPeers(t, cryo.ClientOptions{}, func(t *testing.T, c *cryo.Client, g *gate, server *cryotest.Server) {
		sending := sendBy(c, "a", "b", "not \xff text", "c", "d", "e")
		peer := nextSession(t, g, server)
		frames := wantTexts(t, peer, "a", "b", "c", "d", "e")
		peer.Ack(frames[1])
		peer.WriteFrames(cryotest.Error(frames[3].Ack, "no"))
		synctest.Wait()
		peer.Conn().Cut()

		g.answer(away, 2)
		peer = nextSession(t, g, server)
		frames = wantTexts(t, peer, "a", "c", "e")
		peer.Ack(frames[2])
		peer.WriteFrames(cryotest.Bye(1, "bye")) // behind the acknowledgement
		synctest.Wait()
		require.NoError(t, peer.WS.Close())

		peer = nextSession(t, g, server)
		frames = wantTexts(t, peer, "a", "c")
		peer.Ack(frames...)
		errs := errsOf(t, sending.result(t))
		for i, problem := range []string{2: "text of 10 bytes is not valid UTF-8: send it as binary", 4: `rejected by the peer: "no"`, 5: ""} {
			if problem == "" {
				require.NoError(t, errs[i], "%d", i)
			} else {
				require.EqualError(t, errs[i], problem)
			}
		}
		require.Len(t, errs, 6)
		peer.WantIdle("no more", time.Minute-time.Second)
	})
}

// The acknowledgement may come with the end itself.
func TestMessageAcknowledgedAtTheEndIsNotResent(t *testing.T) {
	withPeers(t, cryo.ClientOptions{}, func(t *testing.T, c *cryo.Client, g *gate, server *cryotest.Server) {
		sending := sendBy(c, "a", "b")
		peer := nextSession(t, g, server)
		frames := wantTexts(t, peer, "a", "b")
		peer.WriteFrames(cryotest.Bye(1, "bye"))
		peer.Ack(frames[1]) // still read: the session waits for the end of the connection
		require.NoError(t, peer.WS.Close())
		peer = nextSession(t, g, server)
		peer.Ack(wantTexts(t, peer, "a")...)
		sending.wantSuccess(t)
	})
}

func TestMessageThatEndsEverySessionFailsAfterTen(t *testing.T) {
	withPeers(t, cryo.ClientOptions{}, func(t *testing.T, c *cryo.Client, g *gate, server *cryotest.Server) {
		sending := sendBy(c, "good", "poison", "after it")
		for i := range 11 {
			peer := nextSession(t, g, server)
			if i == 0 {
				peer.Ack(wantTexts(t, peer, "good", "poison", "after it")[0])
				synctest.Wait()
			} else {
				begin := time.Now()
				wantTexts(t, peer, "poison", "after it")
				if wait := time.Since(begin); i < 2 {
					require.Zero(t, wait)
				} else {
					require.LessOrEqual(t, wait, 200*time.Millisecond, "others go first at times")
				}
			}
			sending.wantBlocked(t)
			if i == 9 {
				break
			}
			peer.Conn().Cut()
		}
		// The tenth one; the first did acknowledge something.
		server.Listener.Close()
		cut(c.Session())
		errs := errsOf(t, sending.result(t))
		require.NoError(t, errs[0])
		for _, err := range errs[1:] {
			require.EqualError(t, err, "10 sessions in a row ended without acknowledging the message; last error: session ended: closed by this end")
			require.ErrorIs(t, err, net.ErrClosed)
		}
		require.Equal(t, 10, g.attempts())
	})
}

func TestSessionWithoutASendDoesNotCountAsLost(t *testing.T) {
	withPeers(t, cryo.ClientOptions{}, func(t *testing.T, c *cryo.Client, g *gate, server *cryotest.Server) {
		sending := sendBy(c, "m")
		for range 2 {
			peer := nextSession(t, g, server)
			wantTexts(t, peer, "m")
			peer.Conn().Cut()
		}
		for range 12 { // sessions that end before it is sent
			peer := nextSession(t, g, server)
			synctest.Wait()
			peer.Conn().Cut()
			synctest.Wait()
			sending.wantBlocked(t)
		}
		peer := nextSession(t, g, server)
		peer.Ack(wantTexts(t, peer, "m")...)
		sending.wantSuccess(t)
	})
}

func TestBatchIsDeliveredOneMessagePerSession(t *testing.T) {
	withPeers(t, cryo.ClientOptions{}, func(t *testing.T, c *cryo.Client, g *gate, server *cryotest.Server) {
		var texts []string
		for i := range 25 {
			texts = append(texts, fmt.Sprint(i))
		}
		sending := sendBy(c, texts...)
		for len(texts) > 0 {
			peer := nextSession(t, g, server)
			frames := wantTexts(t, peer, texts...)
			one := rand.IntN(len(texts))
			peer.Ack(frames[one])
			synctest.Wait()
			peer.Conn().Cut()
			texts = append(texts[:one], texts[one+1:]...)
		}
		sending.wantSuccess(t)
	})
}

func TestContextBoundsAllOfASend(t *testing.T) {
	enough := errors.New("enough")
	for name, c := range map[string]struct {
		prepare func(t *testing.T, c *cryo.Client, g *gate, server *cryotest.Server)
		problem string
	}{
		"before there is a session": {func(_ *testing.T, _ *cryo.Client, g *gate, _ *cryotest.Server) {
			g.answer(away, 100)
		}, "waiting for a session with ws://cryo.test/path: enough; the last attempt: dialling ws://cryo.test/path: dial tcp: connection refused"},
		"while the acknowledgement is awaited": {func(t *testing.T, _ *cryo.Client, g *gate, server *cryotest.Server) {
			peer := nextSession(t, g, server)
			peer.AnswerPings()
		}, "waiting for the acknowledgement: enough"},
		"after the session was lost": {func(t *testing.T, _ *cryo.Client, g *gate, server *cryotest.Server) {
			peer := nextSession(t, g, server)
			wantTexts(t, peer, "m")
			g.answer(away, 100)
			require.NoError(t, peer.WS.Close())
		}, "session ended: connection lost: unexpected EOF; " +
			"waiting for a session with ws://cryo.test/path: enough; the last attempt: dialling ws://cryo.test/path: dial tcp: connection refused"},
	} {
		t.Run(name, func(t *testing.T) {
			withPeers(t, cryo.ClientOptions{}, func(t *testing.T, client *cryo.Client, g *gate, server *cryotest.Server) {
				ctx, cancel := context.WithTimeoutCause(t.Context(), time.Minute, enough)
				defer cancel()
				begin := time.Now()
				sending := start(func() error { return client.Send(ctx, textMessages("m")) })
				c.prepare(t, client, g, server)
				<-ctx.Done()
				errs := errsOf(t, sending.result(t))
				require.Equal(t, time.Minute, time.Since(begin))
				require.Len(t, errs, 1)
				require.EqualError(t, errs[0], c.problem)
				require.ErrorIs(t, errs[0], enough)
				require.ErrorIs(t, errs[0], context.DeadlineExceeded)
			})
		})
	}
}

func TestClientCloseDoesNotCompleteASend(t *testing.T) {
	withPeers(t, cryo.ClientOptions{}, func(t *testing.T, c *cryo.Client, g *gate, server *cryotest.Server) {
		sending := sendBy(c, "a", "b")
		peer := nextSession(t, g, server)
		peer.Ack(wantTexts(t, peer, "a", "b")[0])
		synctest.Wait()
		cutClient(c)
		errs := errsOf(t, sending.result(t))
		require.NoError(t, errs[0])
		require.EqualError(t, errs[1], "session ended: closed by this end; client closed by this end")
		require.ErrorIs(t, errs[1], cryo.ErrClosed)
		require.Equal(t, 1, g.attempts())
	})
}

// Whatever becomes of the connections.
func TestSendReturnsExactResultsAndRepeatsNoAcknowledgedMessage(t *testing.T) {
	withPeers(t, cryo.ClientOptions{}, func(t *testing.T, c *cryo.Client, g *gate, server *cryotest.Server) {
		const senders, each = 10, 20
		type result struct {
			texts []string
			err   error
		}
		results := make(chan result, senders)
		for i := range senders {
			var texts []string
			for j := range each {
				texts = append(texts, fmt.Sprint(i, " ", j))
			}
			go func() { results <- result{texts, c.Send(context.Background(), textMessages(texts...))} }()
		}
		acked := make(map[string]bool)
		var done []result
		for len(done) < senders {
			g.answer(away, rand.IntN(3))
			select {
			case r := <-results:
				done = append(done, r)
				continue
			case <-g.served:
			}
			peer := server.NextPeer()
			peer.ServerHandshake()
			time.Sleep(time.Duration(rand.IntN(250)) * time.Millisecond)
			frames := peer.Taken()
			for _, f := range frames[:rand.IntN(len(frames)+1)] {
				require.False(t, acked[string(f.Payload)], "acknowledged before")
				if rand.IntN(3) > 0 {
					peer.Ack(f)
					acked[string(f.Payload)] = true
				}
			}
			synctest.Wait() // what was written has been read
			peer.Conn().Cut()
			synctest.Wait()
		}
		for _, r := range done {
			errs := make([]error, each)
			if r.err != nil {
				errs = errsOf(t, r.err)
			}
			for i, text := range r.texts {
				require.Equal(t, acked[text], errs[i] == nil, "%s: %v", text, errs[i])
			}
		}
		require.Greater(t, len(acked), senders*each/2)
	})
}
