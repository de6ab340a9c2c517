package cryo_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/cryotest"
	"github.com/cryo-connect/cryo-connect/internal/wire"
)

// away is an answer of a gate: the server can't be reached.
const away = "connection refused"

// gate is the way to a server. It answers the next clients with the answers it has, the
// others the server's handler serves.
type gate struct {
	listener *cryotest.Listener
	then     http.Handler
	served   chan struct{} // has a token for each client that the handler serves

	mu      sync.Mutex
	answers []string
	times   []time.Time // of attempts
	queries []url.Values
}

func newGate(t *testing.T, then http.Handler, answers ...string) *gate {
	t.Helper()
	g := &gate{then: then, answers: answers, served: make(chan struct{}, 1000)}
	g.listener = cryotest.Serve(t, g)
	return g
}

// answer adds an answer n times.
func (g *gate) answer(answer string, n int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for range n {
		g.answers = append(g.answers, answer)
	}
}

func (g *gate) next() string {
	g.mu.Lock()
	defer g.mu.Unlock()
	if len(g.answers) == 0 {
		return ""
	}
	answer := g.answers[0]
	g.answers = g.answers[1:]
	return answer
}

func (g *gate) Dial(ctx context.Context, network, address string) (net.Conn, error) {
	g.mu.Lock()
	g.times = append(g.times, time.Now())
	closed := len(g.answers) > 0 && g.answers[0] == away
	g.mu.Unlock()
	if closed {
		g.next()
		return nil, &net.OpError{Op: "dial", Net: "tcp", Err: syscall.ECONNREFUSED}
	}
	return g.listener.Dial(ctx, network, address)
}

func (g *gate) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	g.mu.Lock()
	g.queries = append(g.queries, r.URL.Query())
	g.mu.Unlock()
	answer := g.next()
	if answer == "" {
		g.served <- struct{}{}
		g.then.ServeHTTP(w, r)
		return
	}
	c, _, err := http.NewResponseController(w).Hijack()
	if err == nil {
		_, _ = c.Write([]byte(answer))
		_ = c.Close()
	}
}

// attempts is how many there were.
func (g *gate) attempts() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return len(g.times)
}

// waits are the times between the attempts.
func (g *gate) waits() []time.Duration {
	g.mu.Lock()
	defer g.mu.Unlock()
	var waits []time.Duration
	for i := 1; i < len(g.times); i++ {
		waits = append(waits, g.times[i].Sub(g.times[i-1]))
	}
	return waits
}

// sent are the values of a parameter that the clients sent.
func (g *gate) sent(parameter string) []string {
	g.mu.Lock()
	defer g.mu.Unlock()
	var values []string
	for _, q := range g.queries {
		values = append(values, q.Get(parameter))
	}
	return values
}

// newClient makes a client that dials by a gate, with a token if the options have none.
func newClient(t *testing.T, g *gate, opts cryo.ClientOptions) *cryo.Client {
	t.Helper()
	opts.NetDial = g.Dial
	if opts.Token == "" && opts.BeforeDial == nil {
		opts.Token = token
	}
	c, err := cryo.NewClient(memoryURL+"/path?secret=s3cret", &opts)
	require.NoError(t, err)
	t.Cleanup(func() { cutClient(c) })
	return c
}

// cutClient closes a client without ceremony.
func cutClient(c *cryo.Client) {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	_ = c.Close(ctx, "")
}

// withPeers runs a test, in virtual time, with a client of a raw server.
func withPeers(t *testing.T, opts cryo.ClientOptions, test func(t *testing.T, c *cryo.Client, g *gate, server *cryotest.Server)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		server := cryotest.NewServer(t)
		g := newGate(t, server)
		test(t, newClient(t, g, opts), g, server)
	})
}

// connectClient connects a client to a raw server.
func connectClient(t *testing.T, c *cryo.Client, g *gate, server *cryotest.Server) (*cryo.Session, *cryotest.Peer) {
	t.Helper()
	var s *cryo.Session
	connecting := start(func() (err error) {
		s, err = c.Connect(context.Background())
		return err
	})
	peer := nextSession(t, g, server)
	connecting.wantSuccess(t)
	return s, peer
}

// nextPeer waits for the next client that gets to a raw server.
func nextPeer(t *testing.T, g *gate, server *cryotest.Server) *cryotest.Peer {
	t.Helper()
	select {
	case <-g.served:
	case <-time.After(10 * time.Minute):
		require.FailNow(t, "no client came")
	}
	return server.NextPeer()
}

// nextSession is nextPeer, and completes the handshake.
func nextSession(t *testing.T, g *gate, server *cryotest.Server) *cryotest.Peer {
	t.Helper()
	peer := nextPeer(t, g, server)
	peer.ServerHandshake()
	return peer
}

func denied(status int, sentence string, headers ...string) string {
	return fmt.Sprintf("HTTP/1.1 %d %s\r\n%s\r\n%s", status, http.StatusText(status), strings.Join(append(headers, ""), "\r\n"), sentence)
}

// doubling are the waits between attempts that fail.
var doubling = []time.Duration{
	250 * time.Millisecond, 500 * time.Millisecond, time.Second, 2 * time.Second, 4 * time.Second,
	8 * time.Second, 10 * time.Second, 10 * time.Second, 10 * time.Second,
}

// wantDoubling wants the first of those waits, each at most a quarter shorter.
func wantDoubling(t *testing.T, waits []time.Duration, n int) {
	t.Helper()
	require.Len(t, waits, n)
	jitter := false
	for i, wait := range waits {
		require.LessOrEqual(t, wait, doubling[i], "wait %d", i)
		require.Greater(t, wait, doubling[i]*3/4, "wait %d", i)
		jitter = jitter || wait < doubling[i]
	}
	require.True(t, jitter)
}

func TestNewClientChecksItsOptionsAndDoesNotDial(t *testing.T) {
	dialled := func(context.Context, string, string) (net.Conn, error) {
		t.Error("dialled")
		return nil, errors.New("dialled")
	}
	prepare := func(context.Context, *cryo.DialOptions) error { return errors.New("called") }
	for problem, opts := range map[string]cryo.ClientOptions{
		"the query parameter x-cryo-sid is set from the session id: remove it from the query": {DialOptions: cryo.DialOptions{Query: url.Values{"x-cryo-sid": {"1"}}}},
		"the query parameter authorization is set from the token: remove it from the query":   {DialOptions: cryo.DialOptions{Query: url.Values{"authorization": {"s3cret"}}}},
	} {
		_, err := cryo.NewClient(memoryURL, &opts)
		require.EqualError(t, err, "creating a client: "+problem)
	}
	_, err := cryo.NewClient("http://cryo.test?secret=s3cret", nil)
	require.EqualError(t, err, `creating a client: the scheme is "http": it must be ws or wss`)

	c, err := cryo.NewClient(memoryURL, &cryo.ClientOptions{DialOptions: cryo.DialOptions{NetDial: dialled}, BeforeDial: prepare})
	require.NoError(t, err)
	require.Nil(t, c.Session())
	require.NoError(t, c.Close(t.Context(), ""))
	c, err = cryo.NewClient(memoryURL, nil)
	require.NoError(t, err)
	require.NoError(t, c.Close(t.Context(), ""))
}

func TestClientReusesItsSessionAndItsID(t *testing.T) {
	withPeers(t, cryo.ClientOptions{}, func(t *testing.T, c *cryo.Client, g *gate, server *cryotest.Server) {
		require.Nil(t, c.Session())
		s, peer := connectClient(t, c, g, server)
		for _, get := range []func(context.Context) (*cryo.Session, error){c.Connect, c.Await} {
			same, err := get(t.Context())
			require.NoError(t, err)
			require.Same(t, s, same)
			require.Same(t, s, c.Session())
		}
		require.NotZero(t, s.ID())
		peer.Conn().Cut()
		wantEnded(t, s)
		require.Nil(t, c.Session())
		again, _ := connectClient(t, c, g, server)
		require.NotSame(t, s, again)
		require.Equal(t, s.ID(), again.ID())
		require.Equal(t, 2, g.attempts())
	})
	withPeers(t, cryo.ClientOptions{DialOptions: cryo.DialOptions{SessionID: sid}}, func(t *testing.T, c *cryo.Client, g *gate, server *cryotest.Server) {
		s, _ := connectClient(t, c, g, server)
		require.Equal(t, sid, s.ID())
	})
}

func TestClientBacksOffFromAnUnreachableServer(t *testing.T) {
	withPeers(t, cryo.ClientOptions{}, func(t *testing.T, c *cryo.Client, g *gate, server *cryotest.Server) {
		g.answer(away, 9)
		awaiting := start(func() error { _, err := c.Await(t.Context()); return err })
		nextSession(t, g, server)
		awaiting.wantSuccess(t)
		wantDoubling(t, g.waits(), 9)
	})
}

func TestLongSessionResetsTheBackoff(t *testing.T) {
	withPeers(t, cryo.ClientOptions{}, func(t *testing.T, c *cryo.Client, g *gate, server *cryotest.Server) {
		g.answer(away, 3)
		awaiting := start(func() error { _, err := c.Await(t.Context()); return err })
		peer := nextSession(t, g, server)
		awaiting.wantSuccess(t)
		time.Sleep(time.Second)
		peer.Conn().Cut()
		synctest.Wait()
		before := g.attempts()
		g.answer(away, 3)
		awaiting = start(func() error { _, err := c.Await(t.Context()); return err })
		time.Sleep(time.Second)
		require.Greater(t, g.attempts(), before, "within a second")
		nextSession(t, g, server)
		awaiting.wantSuccess(t)
		wantDoubling(t, g.waits()[before:], 3)
	})
}

func TestReconnectsOfClientsThatDisconnectTogetherAreSpread(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const n = 100
		server, _, _ := serve(t, cryo.ServerOptions{OnSession: func(*cryo.Session, *cryo.Upgrade) {}})
		var gates []*gate
		var clients []*cryo.Client
		for range n {
			g := newGate(t, server)
			c := newClient(t, g, cryo.ClientOptions{})
			_, err := c.Await(t.Context())
			require.NoError(t, err)
			gates, clients = append(gates, g), append(clients, c)
		}
		time.Sleep(time.Minute)
		ended := time.Now()
		for _, s := range server.Sessions() {
			cut(s)
		}
		synctest.Wait()
		var awaiting []*call
		for _, c := range clients {
			awaiting = append(awaiting, start(func() error { _, err := c.Await(t.Context()); return err }))
		}
		attempts := make(map[time.Duration]int) // in each tenth of the second
		for i, g := range gates {
			awaiting[i].wantSuccess(t)
			wait := g.times[1].Sub(ended)
			require.Less(t, wait, time.Second)
			attempts[wait.Truncate(100*time.Millisecond)]++
		}
		require.Greater(t, len(attempts), 5, "%v", attempts)
	})
}

func TestConnectReturnsOneFailureAndTheTimeToTheNextAttempt(t *testing.T) {
	withPeers(t, cryo.ClientOptions{}, func(t *testing.T, c *cryo.Client, g *gate, server *cryotest.Server) {
		g.answer(away, 1)
		_, err := c.Connect(t.Context())
		failed, ok := err.(*cryo.RetryError) //nolint:errorlint // that is promised
		require.True(t, ok)
		require.ErrorIs(t, err, syscall.ECONNREFUSED)
		require.EqualError(t, failed.Err, "dialling ws://cryo.test/path: dial tcp: connection refused")
		require.EqualError(t, err, fmt.Sprintf("dialling ws://cryo.test/path: dial tcp: connection refused (next attempt after %v)", failed.After.Round(time.Millisecond)))

		// The wait is absolute: who has waited by himself does not wait again.
		time.Sleep(failed.After)
		begin := time.Now()
		connectClient(t, c, g, server)
		require.Zero(t, time.Since(begin))
	})
}

func TestExistingSessionIsRetriedEverySecond(t *testing.T) {
	withPeers(t, cryo.ClientOptions{}, func(t *testing.T, c *cryo.Client, g *gate, server *cryotest.Server) {
		g.answer(denied(401, "The session already exists"), 5)
		_, err := c.Connect(t.Context())
		require.ErrorIs(t, err, cryo.ErrSessionExists)
		awaiting := start(func() error { _, err := c.Await(t.Context()); return err })
		nextSession(t, g, server)
		awaiting.wantSuccess(t)
		require.Equal(t, []time.Duration{time.Second, time.Second, time.Second, time.Second, time.Second}, g.waits())
	})
}

func TestBeforeDialChangesTheTokenOfEachAttempt(t *testing.T) {
	var asked []time.Time
	tokens := []string{"first-token", "second-token", "third-token"}
	synctest.Test(t, func(t *testing.T) {
		server, _, sessions := serve(t, cryo.ServerOptions{Authorize: cryo.Tokens("second-token", "third-token")})
		g := newGate(t, server)
		c := newClient(t, g, cryo.ClientOptions{BeforeDial: func(ctx context.Context, opts *cryo.DialOptions) error {
			require.NoError(t, ctx.Err())
			require.Empty(t, opts.Token, "an attempt does not change the next one")
			asked = append(asked, time.Now())
			opts.Token = tokens[len(asked)-1]
			return nil
		}})
		_, err := c.Connect(t.Context())
		require.ErrorIs(t, err, cryo.ErrUnauthorized)
		require.ErrorContains(t, err, "(next attempt after 30s)")
		require.NotContains(t, err.Error(), "first-token")
		begin := time.Now()
		s, err := c.Await(t.Context())
		require.NoError(t, err)
		require.Equal(t, 30*time.Second, time.Since(begin))

		// Each session knows its own.
		send := start(func() error { return s.SendText(t.Context(), "?") })
		m := receive(t, next(t, sessions))
		require.NoError(t, m.Reject("you with the second-token"))
		require.Equal(t, &cryo.RejectedError{Text: "(redacted: 25 bytes)"}, send.result(t))
		time.Sleep(time.Second)
		cut(s)
		synctest.Wait() // the server has noticed: another token may not take the session over
		s, err = c.Connect(t.Context())
		require.NoError(t, err)
		send = start(func() error { return s.SendText(t.Context(), "?") })
		require.NoError(t, receive(t, next(t, sessions)).Reject("you with the third-token"))
		require.Equal(t, &cryo.RejectedError{Text: "(redacted: 24 bytes)"}, send.result(t))
		require.Equal(t, []string{"Bearer first-token", "Bearer second-token", "Bearer third-token"}, g.sent("authorization"))
		require.Len(t, asked, 3)
	})
}

func TestBeforeDialErrorIsAFailedAttempt(t *testing.T) {
	noToken := errors.New("the vault is sealed")
	withPeers(t, cryo.ClientOptions{BeforeDial: func(context.Context, *cryo.DialOptions) error { return noToken }}, func(t *testing.T, c *cryo.Client, g *gate, _ *cryotest.Server) {
		begin := time.Now()
		var waits []time.Duration
		for range 4 {
			_, err := c.Connect(t.Context())
			require.ErrorIs(t, err, noToken)
			require.ErrorContains(t, err, "dialling ws://cryo.test/path: the vault is sealed (next attempt after ")
			waits = append(waits, time.Since(begin))
			begin = time.Now()
		}
		require.Zero(t, waits[0])
		wantDoubling(t, waits[1:], 3)
		require.Zero(t, g.attempts())
	})
	withPeers(t, cryo.ClientOptions{BeforeDial: func(ctx context.Context, _ *cryo.DialOptions) error {
		<-ctx.Done()
		return ctx.Err()
	}}, func(t *testing.T, c *cryo.Client, g *gate, _ *cryotest.Server) {
		begin := time.Now()
		_, err := c.Connect(t.Context())
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.Equal(t, cryo.DefaultConnectTimeout, time.Since(begin))
	})
}

func TestRetryAfterIsParsed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		in := func(d time.Duration) string { return time.Now().Add(d).UTC().Format(http.TimeFormat) }
		for value, want := range map[string]time.Duration{
			"0":                                      0,
			"1":                                      time.Second,
			"120":                                    2 * time.Minute,
			in(90 * time.Second):                     90 * time.Second,
			in(0):                                    0,
			in(-time.Hour):                           0,
			"Sat, 01 Jan 2000 02:00:30 GMT":          2*time.Hour + 30*time.Second,
			"Saturday, 01-Jan-00 02:00:30 GMT":       2*time.Hour + 30*time.Second, // obsolete forms
			"Sat Jan  1 02:00:30 2000":               2*time.Hour + 30*time.Second,
			"-5":                                     0,
			"+5":                                     0,
			"1.5":                                    0,
			"1e3":                                    0,
			"0x10":                                   0,
			"soon":                                   0,
			"":                                       0,
			"9223372036":                             9223372036 * time.Second,
			"9223372037":                             9223372036 * time.Second,
			"99999999999999999999999999999999999999": 9223372036 * time.Second,
			"Fri, 31 Dec 9999 23:59:59 GMT":          1<<63 - 1,
			"Sat, 99 Jan 2000 02:00:30 GMT":          0,
		} {
			for _, status := range []int{401, 429, 503} {
				err := dialAnswer(t, denied(status, "no", "Retry-After: "+value))
				failed, ok := errors.AsType[*cryo.HandshakeError](err)
				require.True(t, ok)
				require.Equal(t, want, failed.RetryAfter, "%q", value)
			}
		}
	})
}

func TestClientObeysRetryAfter(t *testing.T) {
	for name, c := range map[string]struct {
		answer  string
		atLeast time.Duration
	}{
		"seconds, full":                {denied(503, "full", "Retry-After: 7"), 7 * time.Second},
		"seconds, too many":            {denied(429, "too many", "retry-after: 60"), time.Minute},
		"seconds, a rejected token":    {denied(401, "wrong", "Retry-After: 3"), 3 * time.Second},
		"seconds, an existing session": {denied(401, "session already exists", "Retry-After: 3"), 3 * time.Second},
		"a date":                       {denied(503, "full", "Retry-After: Sat, 01 Jan 2000 00:00:20 GMT"), 20 * time.Second},
		"less than the first wait":     {denied(503, "full", "Retry-After: Sat, 01 Jan 2000 00:00:01 GMT"), time.Second},
		"absurdly long":                {denied(503, "full", "Retry-After: 99999999999999999999999"), 5 * time.Minute},
		"an absurd date":               {denied(503, "full", "Retry-After: Fri, 31 Dec 9999 23:59:59 GMT"), 5 * time.Minute},
	} {
		t.Run(name, func(t *testing.T) {
			withPeers(t, cryo.ClientOptions{}, func(t *testing.T, client *cryo.Client, g *gate, server *cryotest.Server) {
				g.answer(c.answer, 1)
				_, err := client.Connect(t.Context())
				failed, ok := errors.AsType[*cryo.RetryError](err)
				require.True(t, ok)
				require.GreaterOrEqual(t, failed.After, c.atLeast)
				require.LessOrEqual(t, failed.After, c.atLeast*5/4)
				awaiting := start(func() error { _, err := client.Await(t.Context()); return err })
				time.Sleep(failed.After - 1)
				require.Equal(t, 1, g.attempts())
				nextSession(t, g, server)
				awaiting.wantSuccess(t)
				require.Equal(t, []time.Duration{failed.After}, g.waits())
			})
		})
	}
}

func TestRetryAfterHasAMinimumWait(t *testing.T) {
	withPeers(t, cryo.ClientOptions{}, func(t *testing.T, c *cryo.Client, g *gate, _ *cryotest.Server) {
		time.Sleep(time.Second - 1)
		g.answer(denied(503, "full", "Retry-After: Sat, 01 Jan 2000 00:00:01 GMT"), 1)
		_, err := c.Connect(t.Context())
		failed, ok := errors.AsType[*cryo.RetryError](err)
		require.True(t, ok)
		require.GreaterOrEqual(t, failed.After, 250*time.Millisecond)
	})
}

func TestShortSessionsBackOff(t *testing.T) {
	withPeers(t, cryo.ClientOptions{}, func(t *testing.T, c *cryo.Client, g *gate, server *cryotest.Server) {
		for range 8 {
			awaiting := start(func() error { _, err := c.Await(context.Background()); return err })
			peer := nextSession(t, g, server)
			awaiting.wantSuccess(t)
			peer.Conn().Cut()
			synctest.Wait()
		}
		wantDoubling(t, g.waits(), 7)
	})
}

func TestShortSessionWithAnAcknowledgementResetsTheBackoff(t *testing.T) {
	withPeers(t, cryo.ClientOptions{}, func(t *testing.T, c *cryo.Client, g *gate, server *cryotest.Server) {
		g.answer(away, 5)
		for range 20 {
			sending := start(func() error {
				return c.Send(t.Context(), []cryo.OutMessage{cryo.Text("m")})
			})
			peer := nextSession(t, g, server)
			peer.Ack(peer.WantType("the message", wire.UTF8))
			sending.wantSuccess(t)
			peer.Conn().Cut()
			synctest.Wait()
		}
		for _, wait := range g.waits()[5:] {
			require.LessOrEqual(t, wait, 250*time.Millisecond)
			require.Greater(t, wait, 250*time.Millisecond*3/4, "nobody dials without a wait for ever")
		}
	})
}

func TestManyCallersShareOneAttempt(t *testing.T) {
	withPeers(t, cryo.ClientOptions{}, func(t *testing.T, c *cryo.Client, g *gate, server *cryotest.Server) {
		var calls []*call
		for range 20 {
			calls = append(calls, start(func() error { _, err := c.Connect(t.Context()); return err }))
		}
		synctest.Wait()
		require.NoError(t, nextPeer(t, g, server).WS.Close())
		var first error
		for _, call := range calls {
			err := call.result(t)
			require.Error(t, err)
			if first == nil {
				first = err
			}
			require.Same(t, first, err)
		}
		require.Equal(t, 1, g.attempts())

		sessions := make(chan *cryo.Session, 40)
		calls = nil
		for _, get := range []func(context.Context) (*cryo.Session, error){c.Connect, c.Await} {
			for range 20 {
				calls = append(calls, start(func() error { s, err := get(t.Context()); sessions <- s; return err }))
			}
		}
		nextSession(t, g, server)
		for _, call := range calls {
			call.wantSuccess(t)
			require.Same(t, c.Session(), next(t, sessions))
		}
		require.Equal(t, 2, g.attempts())
	})
}

func TestCallersContextEndsItsWaitAndNotTheAttempt(t *testing.T) {
	withPeers(t, cryo.ClientOptions{}, func(t *testing.T, c *cryo.Client, g *gate, server *cryotest.Server) {
		stop := errors.New("enough")
		ctx, cancel := context.WithCancelCause(t.Context())
		leaving := start(func() error { _, err := c.Connect(ctx); return err })
		staying := start(func() error { _, err := c.Await(t.Context()); return err })
		peer := nextPeer(t, g, server)
		cancel(stop)
		err := leaving.result(t)
		require.EqualError(t, err, "waiting for a session with ws://cryo.test/path: enough")
		require.ErrorIs(t, err, context.Canceled)
		require.ErrorIs(t, err, stop)
		staying.wantBlocked(t)
		peer.ServerHandshake()
		staying.wantSuccess(t)

		// A context that is done is an error even with a session, and dials nothing without.
		_, err = c.Connect(ctx)
		require.ErrorIs(t, err, stop)
		cut(c.Session())
		_, err = c.Await(ctx)
		require.ErrorIs(t, err, stop)
		time.Sleep(time.Minute)
		require.Equal(t, 1, g.attempts())
	})
}

func TestSessionOfAnAbandonedAttemptServesTheNextCaller(t *testing.T) {
	withPeers(t, cryo.ClientOptions{}, func(t *testing.T, c *cryo.Client, g *gate, server *cryotest.Server) {
		ctx, cancel := context.WithCancel(t.Context())
		connecting := start(func() error { _, err := c.Connect(ctx); return err })
		peer := nextPeer(t, g, server)
		cancel()
		require.ErrorIs(t, connecting.result(t), context.Canceled)
		peer.ServerHandshake()
		synctest.Wait()
		peer.WriteFrames(cryotest.Text(1, "m"))
		s, err := c.Connect(t.Context())
		require.NoError(t, err)
		require.Equal(t, "m", string(receive(t, s).Payload))
		require.Equal(t, 1, g.attempts())
	})
}

func TestEndedWaitReturnsTheLastAttemptsErrorToo(t *testing.T) {
	withPeers(t, cryo.ClientOptions{}, func(t *testing.T, c *cryo.Client, g *gate, _ *cryotest.Server) {
		g.answer(denied(401, "wrong"), 1)
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		begin := time.Now()
		_, err := c.Await(ctx)
		require.Equal(t, 20*time.Second, time.Since(begin))
		require.EqualError(t, err, "waiting for a session with ws://cryo.test/path: context deadline exceeded; "+
			"the last attempt: dialling ws://cryo.test/path: the server responded to the upgrade with 401 Unauthorized: wrong")
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.ErrorIs(t, err, cryo.ErrUnauthorized)
	})
}

func TestContextCausedByARetryErrorEndsTheWait(t *testing.T) {
	withPeers(t, cryo.ClientOptions{}, func(t *testing.T, c *cryo.Client, g *gate, server *cryotest.Server) {
		s, _ := connectClient(t, c, g, server)
		cut(s)
		ended := s.Err()
		for _, cause := range []error{&cryo.RetryError{Err: errors.New("another client's")}, ended} {
			ctx, cancel := context.WithCancelCause(t.Context())
			sending := start(func() error { return c.Send(ctx, []cryo.OutMessage{{Kind: cryo.KindText}}) })
			nextSession(t, g, server).WantType("the message", wire.UTF8)
			cancel(cause)
			require.ErrorIs(t, sending.result(t), cause)
			cut(c.Session())
			_, err := c.Await(ctx)
			require.ErrorIs(t, err, cause)
		}
	})
}

func TestConnectWaitsUntilThePreviousSessionHasEnded(t *testing.T) {
	withPeers(t, cryo.ClientOptions{}, func(t *testing.T, c *cryo.Client, g *gate, server *cryotest.Server) {
		_, peer := connectClient(t, c, g, server)
		time.Sleep(time.Second)
		// A server that sends BYE and doesn't close, as cryo-server at times.
		peer.WriteFrames(cryotest.Bye(1, "bye"))
		synctest.Wait()
		require.Nil(t, c.Session())
		begin := time.Now()
		connecting := start(func() error { _, err := c.Connect(t.Context()); return err })
		again := nextPeer(t, g, server)
		require.Equal(t, cryo.DefaultCloseTimeout, time.Since(begin), "not while the server has the session")
		require.Equal(t, peer.SID, again.SID)
		again.ServerHandshake()
		connecting.wantSuccess(t)
	})
}

func TestHooksSeeEachSessionOnce(t *testing.T) {
	var events []string
	note := func(s *cryo.Session, event string) {
		select {
		case <-s.Done():
			event += ", done"
		default:
		}
		events = append(events, event)
	}
	withPeers(t, cryo.ClientOptions{
		OnSession: func(s *cryo.Session) {
			note(s, "session")
			time.Sleep(time.Second)
			note(s, "returned")
		},
		OnSessionEnd: func(s *cryo.Session) {
			note(s, "end")
			time.Sleep(time.Second)
			note(s, "returned")
		},
	}, func(t *testing.T, c *cryo.Client, g *gate, server *cryotest.Server) {
		g.answer(away, 1)
		_, err := c.Connect(t.Context())
		require.Error(t, err)
		for range 2 {
			connecting := start(func() error {
				s, err := c.Connect(t.Context())
				if err == nil {
					note(s, "connected")
				}
				return err
			})
			peer := nextSession(t, g, server)
			connecting.wantBlocked(t)
			require.Nil(t, c.Session(), "OnSession has not returned")
			connecting.wantSuccess(t)
			peer.Conn().Cut()
			synctest.Wait()
		}
		require.NoError(t, c.Close(t.Context(), ""))
		once := []string{"session", "returned", "connected", "end, done", "returned, done"}
		require.Equal(t, append(once, once...), events)
	})
}

func TestFailedAttemptsOfAwaitAreLogged(t *testing.T) {
	lines := &lineLog{}
	opts := cryo.ClientOptions{}
	opts.Logger = slog.New(slog.NewTextHandler(lines, nil))
	withPeers(t, opts, func(t *testing.T, c *cryo.Client, g *gate, server *cryotest.Server) {
		g.answer(away, 2)
		for range 2 {
			_, err := c.Connect(t.Context())
			require.Error(t, err)
		}
		require.Empty(t, lines.all())
		g.answer(denied(401, "wrong"), 3)
		awaiting := start(func() error { _, err := c.Await(t.Context()); return err })
		sending := sendBy(c, "m")
		peer := nextSession(t, g, server)
		awaiting.wantSuccess(t)
		peer.Ack(wantTexts(t, peer, "m")...)
		sending.wantSuccess(t)
		require.Len(t, lines.all(), 3, "one an attempt, however many wait for it")
		for _, line := range lines.all() {
			require.Contains(t, line, `level=WARN msg="Connecting failed, retrying" error="dialling ws://cryo.test/path: the server responded to the upgrade with 401 Unauthorized: wrong (next attempt after 30s)"`)
		}
	})
	lines = &lineLog{}
	opts.Logger = slog.New(slog.NewTextHandler(lines, nil))
	withPeers(t, opts, func(t *testing.T, c *cryo.Client, g *gate, _ *cryotest.Server) {
		g.answer(away, 4)
		start(func() error { _, err := c.Await(t.Context()); return err })
		time.Sleep(2 * time.Second)
		require.Len(t, lines.all(), 2, "of four attempts, the last of them more than a second after the first")
	})
}

// lineLog keeps lines.
type lineLog struct {
	mu    sync.Mutex
	lines []string
}

func (l *lineLog) Write(line []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lines = append(l.lines, string(line))
	return len(line), nil
}

func (l *lineLog) all() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.lines
}

func TestClientCanBeClosedInEveryState(t *testing.T) {
	for name, c := range map[string]struct {
		opts   cryo.ClientOptions
		before func(t *testing.T, c *cryo.Client, g *gate, server *cryotest.Server)
		took   time.Duration
	}{
		"while it dials": {before: func(t *testing.T, _ *cryo.Client, g *gate, server *cryotest.Server) {
			nextPeer(t, g, server)
		}},
		"while it waits for the next attempt": {before: func(t *testing.T, _ *cryo.Client, g *gate, _ *cryotest.Server) {
			g.answer(away, 100)
			time.Sleep(time.Minute)
		}},
		"while it obtains a token": {opts: cryo.ClientOptions{BeforeDial: func(ctx context.Context, _ *cryo.DialOptions) error {
			<-ctx.Done()
			return ctx.Err()
		}}, before: func(*testing.T, *cryo.Client, *gate, *cryotest.Server) { time.Sleep(time.Second) }},
		"while it waits for the last session's end": {before: func(t *testing.T, c *cryo.Client, g *gate, server *cryotest.Server) {
			peer := nextSession(t, g, server)
			synctest.Wait() // Send has sent
			peer.WriteFrames(cryotest.Bye(1, "bye"))
			time.Sleep(time.Second)
		}, took: cryo.DefaultCloseTimeout - time.Second},
	} {
		for how, call := range map[string]func(c *cryo.Client) error{
			"Connect": func(c *cryo.Client) error {
				for {
					s, err := c.Connect(context.Background())
					if errors.Is(err, net.ErrClosed) {
						return err
					}
					if err == nil {
						<-s.Context().Done()
					}
				}
			},
			"Await": func(c *cryo.Client) error {
				for {
					s, err := c.Await(context.Background())
					if err != nil {
						return err
					}
					<-s.Context().Done()
				}
			},
			"Send": func(c *cryo.Client) error {
				return c.Send(context.Background(), []cryo.OutMessage{{Kind: cryo.KindText}})
			},
		} {
			t.Run(how+" "+name, func(t *testing.T) {
				withPeers(t, c.opts, func(t *testing.T, client *cryo.Client, g *gate, server *cryotest.Server) {
					waiting := start(func() error { return call(client) })
					c.before(t, client, g, server)
					synctest.Wait()
					begin := time.Now()
					closing := start(func() error { return client.Close(t.Context(), "") })
					err := waiting.result(t)
					if how == "Send" { // its acknowledgement may still come
						require.Equal(t, c.took, time.Since(begin))
					} else {
						require.Zero(t, time.Since(begin))
					}
					require.ErrorIs(t, err, cryo.ErrClosed)
					require.ErrorIs(t, err, net.ErrClosed)
					require.ErrorContains(t, err, "client closed by this end")
					closing.wantSuccess(t)
					require.Equal(t, c.took, time.Since(begin))

					require.NoError(t, client.Close(t.Context(), ""), "twice")
					_, err = client.Connect(t.Context())
					require.EqualError(t, err, "client closed by this end")
					require.Nil(t, client.Session())
				})
			})
		}
	}
}

func TestClientCloseSendsBye(t *testing.T) {
	withPeers(t, cryo.ClientOptions{}, func(t *testing.T, c *cryo.Client, g *gate, server *cryotest.Server) {
		s, peer := connectClient(t, c, g, server)
		closing := start(func() error { return c.Close(t.Context(), "enough") })
		require.Equal(t, "enough", string(peer.WantType("BYE", wire.Bye).Payload))
		peer.WantClose("the close frame", 4000, "enough")
		closing.wantBlocked(t)
		require.NoError(t, peer.WS.Close())
		closing.wantSuccess(t)
		require.ErrorIs(t, s.Err(), cryo.ErrClosed)
	})
	withPeers(t, cryo.ClientOptions{}, func(t *testing.T, c *cryo.Client, g *gate, server *cryotest.Server) {
		connectClient(t, c, g, server)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		begin := time.Now()
		require.ErrorIs(t, c.Close(ctx, ""), context.DeadlineExceeded)
		require.Equal(t, time.Second, time.Since(begin))
	})
}

// The attempt is over in the moment of Close: nobody loses a session that way.
func TestAttemptThatSucceedsDuringCloseLeavesNoSession(t *testing.T) {
	closed := make(chan error, 1)
	var c *cryo.Client
	synctest.Test(t, func(t *testing.T) {
		server, _, sessions := serve(t, cryo.ServerOptions{})
		c = newClient(t, newGate(t, server), cryo.ClientOptions{OnSession: func(*cryo.Session) {
			go func() { closed <- c.Close(context.Background(), "") }()
			synctest.Wait()
		}})
		s, err := c.Connect(t.Context())
		require.NoError(t, err)
		require.NoError(t, next(t, closed))
		require.ErrorIs(t, wantEnded(t, s), cryo.ErrClosed)
		wantEnded(t, next(t, sessions))
		require.Empty(t, server.Sessions())
	})
}

func TestBeforeDialChangesHeadersAndQueryOfOneAttempt(t *testing.T) {
	attempt := 0
	withPeers(t, cryo.ClientOptions{
		DialOptions: cryo.DialOptions{Header: http.Header{"X-Key": {"first"}}, Query: url.Values{"room": {"0"}}, SessionID: 7},
		BeforeDial: func(_ context.Context, opts *cryo.DialOptions) error {
			require.Equal(t, http.Header{"X-Key": {"first"}}, opts.Header)
			require.Equal(t, url.Values{"room": {"0"}}, opts.Query)
			attempt++
			opts.Header.Set("X-Key", fmt.Sprint("key of attempt ", attempt))
			opts.Query.Set("room", fmt.Sprint(attempt))
			opts.SessionID = 8
			if attempt == 3 {
				opts.Query.Set("authorization", "s3cret")
			}
			return nil
		},
	}, func(t *testing.T, c *cryo.Client, g *gate, server *cryotest.Server) {
		for n := range 2 {
			_, peer := connectClient(t, c, g, server)
			require.Equal(t, fmt.Sprint("key of attempt ", n+1), peer.Request.Header.Get("X-Key"))
			require.Equal(t, fmt.Sprint(n+1), peer.Request.URL.Query().Get("room"))
			require.Equal(t, uint64(7), peer.SID, "all sessions have the same id")
			peer.Conn().Cut()
			synctest.Wait()
			time.Sleep(time.Minute)
		}
		_, err := c.Connect(t.Context())
		require.ErrorContains(t, err, "the query parameter authorization is set from the token")
		require.NotContains(t, err.Error(), "s3cret")
	})
}
