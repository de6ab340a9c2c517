package cryo_test

import (
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/cryotest"
)

const tooManyConnects = "Too many clients are connecting at the same time."

// queryOf is the query of a client's request.
func queryOf(id uint64, token string) string {
	return fmt.Sprintf("x-cryo-sid=%d&authorization=%s", id, url.QueryEscape("Bearer "+token))
}

func TestClientsAreAcceptedWhenATokenBucketAllowsIt(t *testing.T) {
	const rounding = 1000 // billionths of a client
	rapid.Check(t, func(rt *rapid.T) {
		perSecond := rapid.SampledFrom([]int{1, 2, 5, 20}).Draw(rt, "per second")
		waits := rapid.SliceOfN(rapid.OneOf(rapid.Just(0), rapid.IntRange(0, 1500)), 1, 60).Draw(rt, "waits")
		var want, got []int
		synctest.Test(t, func(t *testing.T) {
			_, l, _ := serve(t, cryo.ServerOptions{MaxConnectsPerSecond: perSecond})
			level, last := perSecond*1e9, time.Now() // billionths of a client
			for id, wait := range waits {
				time.Sleep(time.Duration(wait) * time.Millisecond)
				level = min(level+int(time.Since(last))*perSecond, perSecond*1e9)
				last = time.Now()
				status, _, _ := knock(t, l, queryOf(uint64(id), token), upgrade())
				got = append(got, status)
				// At the exact time of a token, either is right: the limiter rounds.
				if level >= 1e9+rounding || level >= 1e9-rounding && status == 101 {
					level -= 1e9
					want = append(want, 101)
				} else {
					want = append(want, 503)
				}
			}
		})
		require.Equal(rt, want, got)
	})
}

func TestClientsOverTheRateAreDeniedBeforeAuthorize(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var asked atomic.Int64
		var log logged
		denied := make(chan int, 100)
		_, l, _ := serve(t, cryo.ServerOptions{
			SessionOptions:       cryo.SessionOptions{Logger: slog.New(log.handler())},
			MaxConnectsPerSecond: 3,
			Authorize: func(*cryo.Upgrade) error {
				asked.Add(1)
				return nil
			},
			OnDeny: func(status int) { denied <- status },
		})
		for id := range uint64(3) {
			join(t, l, id).ClientHandshake()
		}
		for id := range uint64(50) {
			status, _, body := knock(t, l, queryOf(10+id, token), upgrade())
			require.Equal(t, 503, status)
			require.Equal(t, tooManyConnects, body)
			require.Equal(t, 503, next(t, denied))
		}
		require.EqualValues(t, 3, asked.Load())
		require.Equal(t, 1, strings.Count(log.text(), "\n"), log.text())
		require.Contains(t, log.text(), `cause="`+tooManyConnects+`"`)

		time.Sleep(time.Second)
		join(t, l, 3).ClientHandshake()
	})
}

func TestClientsWithoutATokenDoNotExhaustTheRate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, l, _ := serve(t, cryo.ServerOptions{MaxConnectsPerSecond: 2})
		for id := range uint64(100) {
			status, _, _ := knock(t, l, queryOf(id, "wrong"), upgrade())
			require.Equal(t, 401, status)
		}
		for id := range uint64(2) {
			join(t, l, id).ClientHandshake()
		}
	})
}

func TestDenialsForATimeHaveARetryAfter(t *testing.T) {
	full := func(t *testing.T, opts cryo.ServerOptions) *cryotest.Listener {
		_, l, _ := serve(t, opts)
		join(t, l, 1).ClientHandshake()
		return l
	}
	shuttingDown := func(t *testing.T) *cryotest.Listener {
		server, l, _ := serve(t, cryo.ServerOptions{})
		require.NoError(t, server.Shutdown(t.Context()))
		return l
	}
	denying := func(t *testing.T, err error) *cryotest.Listener {
		_, l, _ := serve(t, cryo.ServerOptions{Authorize: func(*cryo.Upgrade) error { return err }})
		return l
	}
	for name, tt := range map[string]struct {
		server    func(t *testing.T) *cryotest.Listener
		status    int
		low, high int // seconds; 0: no header
	}{
		"max sessions": {func(t *testing.T) *cryotest.Listener {
			return full(t, cryo.ServerOptions{MaxSessions: 1})
		}, 503, 5, 15},
		"max sessions of an address": {func(t *testing.T) *cryotest.Listener {
			return full(t, cryo.ServerOptions{MaxSessionsPerAddress: 1})
		}, 429, 5, 15},
		"max connects": {func(t *testing.T) *cryotest.Listener {
			return full(t, cryo.ServerOptions{MaxConnectsPerSecond: 1})
		}, 503, 3, 9},
		"overloaded": {func(t *testing.T) *cryotest.Listener {
			_, l, _ := serve(t, cryo.ServerOptions{Full: func() bool { return true }})
			return l
		}, 503, 5, 15},
		"shutting down": {shuttingDown, 503, 1, 3},
		"denied by the application, for a time": {func(t *testing.T) *cryotest.Listener {
			return denying(t, &cryo.AdmissionError{StatusCode: 503, Message: "later"})
		}, 503, 5, 15},
		"denied by the application": {func(t *testing.T) *cryotest.Listener {
			return denying(t, &cryo.AdmissionError{Message: "never"})
		}, 403, 0, 0},
		"denied": {func(t *testing.T) *cryotest.Listener { return denying(t, errors.New("no")) }, 401, 0, 0},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l := tt.server(t)
				seen := make(map[int]bool)
				for range 300 {
					status, header, _ := knock(t, l, queryOf(2, token), upgrade())
					require.Equal(t, tt.status, status)
					if tt.low == 0 {
						require.Empty(t, header.Values("Retry-After"))
						continue
					}
					seconds, err := strconv.Atoi(header.Get("Retry-After"))
					require.NoError(t, err)
					seen[seconds] = true
				}
				for seconds := range seen {
					require.LessOrEqual(t, tt.low, seconds)
					require.LessOrEqual(t, seconds, tt.high)
				}
				if tt.low > 0 {
					require.Len(t, seen, tt.high-tt.low+1, "clients come back at different times")
				}
			})
		})
	}
}

func TestClientThatObeysRetryAfterIsAccepted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, l, _ := serve(t, cryo.ServerOptions{MaxConnectsPerSecond: 1})
		join(t, l, 1).ClientHandshake()
		begin := time.Now()
		client, err := cryo.NewClient(memoryURL, &cryo.ClientOptions{DialOptions: cryo.DialOptions{NetDial: l.Dial, Token: token}})
		require.NoError(t, err)
		_, err = client.Await(t.Context())
		require.NoError(t, err)
		require.GreaterOrEqual(t, time.Since(begin), 3*time.Second)
		require.NoError(t, client.Close(t.Context(), ""))
	})
}
