package tests

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/testkit"
)

const stormPipeline = `
input:
  label: clients
  cryo_server:
    address: 127.0.0.1:0
    path: /cryo
    tokens: [ '${CRYO_TOKEN}' ]
    max_sessions: 20000
output:
  drop: {}
`

// storm is a crowd of all kinds of clients that connect at the same time.
type storm struct {
	address string
	opened  chan *cryo.Session // of well-behaved clients
	halves  chan net.Conn      // connections with half a request
	counts  [6]atomic.Int64    // clients by kind
}

// Kinds of clients in a storm. There are several well-behaved ones for each of the others.
const (
	stormWrongToken = iota
	stormHalf
	stormHealthCheck
	stormWrongPath
	stormNoUpgrade
	stormGood
)

// dialer connects from several addresses: one has too few ports for many thousands.
func (*storm) dialer(i int) *net.Dialer {
	return &net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, byte(1+i%8))}, Timeout: testkit.Patience}
}

func (s *storm) dial(ctx context.Context, i int, path, token string, id uint64) (*cryo.Session, error) {
	return cryo.Dial(ctx, "ws://"+s.address+path, &cryo.DialOptions{
		Token: token, SessionID: id, ConnectTimeout: testkit.Patience, NetDial: s.dialer(i).DialContext,
	})
}

// connect is the client with index i. It returns an error if the server does not respond as it should.
func (s *storm) connect(ctx context.Context, i int) error {
	kind := min(i%8, stormGood)
	s.counts[kind].Add(1)
	denied := func(path, token string, status int) error {
		session, err := s.dial(ctx, i, path, token, 0)
		if err == nil {
			_ = session.CloseNow()
		}
		var denial *cryo.HandshakeError
		if !errors.As(err, &denial) || denial.StatusCode != status {
			return fmt.Errorf("want status %d: %w", status, err)
		}
		return nil
	}
	switch kind {
	case stormWrongToken:
		return denied("/cryo", "wrong", http.StatusUnauthorized)
	case stormWrongPath:
		return denied("/", token, http.StatusNotFound)
	case stormHealthCheck:
		return s.get(ctx, i, "/cryo")
	case stormNoUpgrade:
		return s.get(ctx, i, "/cryo?x-cryo-sid=1&authorization="+url.QueryEscape("Bearer "+token))
	case stormHalf:
		conn, err := s.dialer(i).DialContext(ctx, "tcp", s.address)
		if err == nil {
			s.halves <- conn
			_, err = io.WriteString(conn, "GET /cryo?x-cryo-sid=")
		}
		return err
	default:
		session, err := s.dial(ctx, i, "/cryo", token, 0)
		if err == nil {
			s.opened <- session
		}
		return err
	}
}

// get makes a plain request, which must be answered with 426.
func (s *storm) get(ctx context.Context, i int, target string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+s.address+target, nil)
	if err != nil {
		return err
	}
	resp, err := testkit.Do(&http.Transport{DialContext: s.dialer(i).DialContext}, req)
	if err == nil && resp.Status != http.StatusUpgradeRequired {
		err = fmt.Errorf("status %d", resp.Status)
	}
	return err
}

// war is two clients with the same session id, each of which connects again as soon as the other one has
// ended its session. It returns how often they were denied: while the other one is in its handshake.
func (s *storm) war(ctx context.Context) (denied int64) {
	var not atomic.Int64
	var both sync.WaitGroup
	for i := range 2 {
		both.Go(func() {
			for ctx.Err() == nil {
				session, err := s.dial(context.Background(), i, "/cryo", token, 77) // to the end: each denial counts
				if denial := (*cryo.HandshakeError)(nil); errors.As(err, &denial) && denial.StatusCode == http.StatusUnauthorized {
					not.Add(1)
				}
				if err != nil {
					continue
				}
				select {
				case <-session.Done():
				case <-ctx.Done():
					testkit.HangUp(session)
				}
			}
		})
	}
	both.Wait()
	return not.Load()
}

// What distinguishes the kinds of log lines.
var (
	messageOfLine = regexp.MustCompile(`level=\w+ msg="?[^"]*`)
	statusOfLine  = regexp.MustCompile(` status=\d+`)
)

func TestFloodOfClientsDisruptsNoSessionAndIsLoggedOncePerSecond(t *testing.T) {
	n := 2000
	if testkit.LongTests() {
		n = 10_000
	}
	allowFiles(t, uint64(n)+500)
	p, service := runServing(t, stormPipeline)
	s := &storm{address: p.Listening(), opened: make(chan *cryo.Session, n), halves: make(chan net.Conn, n)}
	begin, before := time.Now(), len(p.All())

	// Sessions that send all the time.
	stormCtx, over := context.WithCancel(t.Context())
	defer over()
	var running sync.WaitGroup
	steady := make([]error, 20)
	for i := range steady {
		session, err := s.dial(t.Context(), i, "/cryo", token, 0)
		require.NoError(t, err)
		t.Cleanup(func() { testkit.HangUp(session) })
		running.Go(func() {
			for k := 0; stormCtx.Err() == nil && steady[i] == nil; k++ {
				steady[i] = session.SendText(context.Background(), strconv.Itoa(k))
			}
		})
	}
	var deniedInWar int64
	running.Go(func() { deniedInWar = s.war(stormCtx) })

	errs := make([]error, n)
	var crowd sync.WaitGroup
	for i := range n {
		crowd.Go(func() { errs[i] = s.connect(t.Context(), i) })
	}
	crowd.Wait()
	t.Logf("%d clients in %v", n, time.Since(begin))
	require.NoError(t, errors.Join(errs...))
	over()
	running.Wait()
	require.NoError(t, errors.Join(steady...), "sessions that were connected before")
	close(s.halves)
	for conn := range s.halves {
		_ = conn.Close()
	}
	close(s.opened)
	var senders sync.WaitGroup
	for session := range s.opened {
		t.Cleanup(func() { _ = session.CloseNow() })
		senders.Go(func() {
			if err := session.SendText(context.Background(), "I am connected"); err != nil {
				t.Error(err)
			}
		})
	}
	senders.Wait()

	var series map[string]string
	count := func(name, labels string) int64 {
		value, _ := strconv.ParseInt(series[name+`{label="clients",path="root.input"`+labels+`}`], 10, 64)
		return value
	}
	testkit.Eventually(t, func(c *assert.CollectT) { // when the server has noticed the end of the others
		series = scrape(t, service)
		assert.Equal(c, s.counts[stormGood].Load()+int64(len(steady)), count("cryo_sessions", ""), "the well-behaved ones")
	})
	require.Equal(t, s.counts[stormWrongToken].Load()+deniedInWar, count("cryo_sessions_denied", `,status="401"`))
	require.Equal(t, s.counts[stormWrongPath].Load(), count("cryo_sessions_denied", `,status="404"`))
	require.Equal(t, s.counts[stormNoUpgrade].Load(), count("cryo_sessions_denied", `,status="426"`), "health checks do not count")
	require.Positive(t, count("cryo_sessions_taken_over", ""))

	most := 1 + int(time.Since(begin)/time.Second)
	kinds := make(map[string]int)
	for _, line := range p.All()[before:] {
		kinds[messageOfLine.FindString(line)+statusOfLine.FindString(line)]++
	}
	for kind, lines := range kinds {
		require.LessOrEqual(t, lines, most, kind)
	}
	for _, status := range []int{401, 404, 426} {
		require.True(t, hasStatus(kinds, status), "%d is logged: %v", status, kinds)
	}
	require.Contains(t, kinds, `level=info msg="Session taken over: a client connected with the same session id`)
	p.Interrupt()
}

// hasStatus reports whether there are lines with a status.
func hasStatus(kinds map[string]int, status int) bool {
	for kind := range kinds {
		if strings.HasSuffix(kind, " status="+strconv.Itoa(status)) {
			return true
		}
	}
	return false
}
