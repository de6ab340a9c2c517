package quota_test

import (
	"context"
	"errors"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/internal/quota"
)

// acquisition is a call of AcquireUpTo that waits, or has returned.
type acquisition struct {
	share  int
	n      int64
	cancel context.CancelCauseFunc
	result chan result
}

type result struct {
	acquired int64
	err      error
}

func startAcquiring(share *quota.Share, i int, n int64) *acquisition {
	ctx, cancel := context.WithCancelCause(context.Background())
	a := &acquisition{share: i, n: n, cancel: cancel, result: make(chan result, 1)}
	go func() {
		acquired, err := share.AcquireUpTo(ctx, n)
		a.result <- result{acquired, err}
	}()
	return a
}

func (a *acquisition) returned() (result, bool) {
	select {
	case r := <-a.result:
		return r, true
	default:
		return result{}, false
	}
}

// unitModel is a quota that is acquired in units, in the simplest way.
type unitModel struct {
	limit   int64
	fair    func(held, free int64) bool
	held    []int64
	waiting []*acquisition
	turns   turns
}

func (m *unitModel) used() (sum int64) {
	for _, n := range m.held {
		sum += n
	}
	return sum
}

func (m *unitModel) acquire(share int, n int64) (acquired int64) {
	for acquired < n && m.used() < m.limit && (m.fair == nil || m.fair(m.held[share], m.limit-m.used())) {
		m.held[share]++
		acquired++
	}
	return acquired
}

// grant grants what can be granted, in turn.
func (m *unitModel) grant() map[*acquisition]int64 {
	granted := make(map[*acquisition]int64)
	m.turns.grant(func() (shares []int) {
		for _, a := range m.waiting {
			shares = append(shares, a.share)
		}
		return shares
	}, func(first int) bool {
		a := m.waiting[first]
		n := m.acquire(a.share, a.n)
		if n > 0 {
			granted[a] = n
			m.waiting = slices.Delete(m.waiting, first, first+1)
		}
		return n > 0
	})
	return granted
}

var errGaveUp = errors.New("gave up")

func TestAcquireUpToMatchesAModel(t *testing.T) {
	fairness := map[string]func(limit int64) func(held, free int64) bool{
		"one holder may have all": func(int64) func(held, free int64) bool { return nil },
		"three quarters": func(limit int64) func(held, free int64) bool {
			most := max(1, limit-max(1, limit/4))
			return func(held, _ int64) bool { return held < most }
		},
		"less than is free": func(int64) func(held, free int64) bool {
			return func(held, free int64) bool { return held < free }
		},
	}
	for name, fair := range fairness {
		t.Run(name, func(t *testing.T) {
			r := seeded(t)
			for range 40 {
				limit := 1 + r.Int64N(12)
				synctest.Test(t, func(t *testing.T) { againstAModel(t, r, limit, fair(limit)) })
			}
		})
	}
}

func againstAModel(t *testing.T, r *rand.Rand, limit int64, fair func(held, free int64) bool) {
	m := &unitModel{limit: limit, fair: fair, held: make([]int64, 1+r.IntN(5))}
	q := quota.New(limit, fair)
	shares := make([]*quota.Share, len(m.held))
	for i := range shares {
		shares[i] = q.Share()
	}
	forced := false
	release := func(i int) int64 {
		n := min(1+r.Int64N(4), m.held[i])
		shares[i].Release(n)
		m.held[i] -= n
		return n
	}
	wantReturned := func(granted map[*acquisition]int64) {
		synctest.Wait()
		for a, n := range granted {
			got, ok := a.returned()
			require.True(t, ok, "granted to nobody")
			require.Equal(t, result{acquired: n}, got)
			a.cancel(nil)
		}
		for _, a := range m.waiting {
			_, ok := a.returned()
			require.False(t, ok, "granted too early")
		}
	}
	for range 150 {
		i := r.IntN(len(shares))
		switch r.IntN(7) {
		case 0, 1:
			a := startAcquiring(shares[i], i, 1+r.Int64N(6))
			synctest.Wait()
			m.waiting = append(m.waiting, a)
			wantReturned(m.grant())
		case 2, 3:
			release(i)
			wantReturned(m.grant())
		case 4: // cancelled while it waits, or while it is granted
			if len(m.waiting) == 0 {
				continue
			}
			a := m.waiting[r.IntN(len(m.waiting))]
			if r.IntN(2) == 0 {
				release(i)
			}
			a.cancel(errGaveUp)
			granted := m.grant()
			n, wasGranted := granted[a]
			delete(granted, a)
			synctest.Wait()
			got, ok := a.returned()
			require.True(t, ok, "cancelled, and waits")
			if got.err != nil {
				require.ErrorIs(t, got.err, errGaveUp)
				require.Zero(t, got.acquired)
				m.waiting = slices.DeleteFunc(m.waiting, func(b *acquisition) bool { return a == b })
				m.held[a.share] -= n
				maps.Copy(granted, m.grant())
			} else {
				require.True(t, wasGranted)
				require.Equal(t, n, got.acquired)
			}
			wantReturned(granted)
		case 5:
			if r.IntN(5) == 0 {
				forced = true
				shares[i].Force(1)
				m.held[i]++
			}
		case 6: // several at once, some of them in several parts
			var parts []quota.Part
			for range r.IntN(2 * len(shares)) {
				i := r.IntN(len(shares))
				n := r.Int64N(m.held[i] + 1)
				parts = append(parts, quota.Part{Share: shares[i], N: n})
				m.held[i] -= n
			}
			q.Release(parts)
			wantReturned(m.grant())
		}
		require.Equal(t, m.used(), q.Used())
		require.Equal(t, m.used() >= limit || len(m.waiting) > 0, q.Full())
		if !forced {
			require.LessOrEqual(t, q.Used(), limit)
		}
		for i, s := range shares {
			held, _ := s.Usage()
			require.Equal(t, m.held[i], held)
		}
	}
	for _, a := range m.waiting {
		a.cancel(errGaveUp)
	}
	synctest.Wait()
}

func TestAcquireUpToDoesNotWaitForTheFullAmount(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := quota.New(3, nil)
		a, b := q.Share(), q.Share()
		n, err := a.AcquireUpTo(t.Context(), 2)
		require.NoError(t, err)
		require.Equal(t, int64(2), n)
		n, err = a.AcquireUpTo(t.Context(), 100)
		require.NoError(t, err)
		require.Equal(t, int64(1), n, "as many as there are")
		many := startAcquiring(a, 0, 100)
		synctest.Wait()
		one := startAcquiring(b, 1, 1)
		synctest.Wait()
		a.Release(1)
		synctest.Wait()
		got, ok := many.returned()
		require.True(t, ok, "it came first, and does not wait for more")
		require.Equal(t, result{acquired: 1}, got)
		_, ok = one.returned()
		require.False(t, ok)
		a.Release(3)
		synctest.Wait()
		got, _ = one.returned()
		require.Equal(t, result{acquired: 1}, got)
		many.cancel(nil)
		one.cancel(nil)
	})
}

func TestAcquireUpToReturnsTheContextsCause(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := quota.New(1, nil)
		s := q.Share()
		s.Force(1)
		ctx, cancel := context.WithTimeoutCause(t.Context(), time.Second, errGaveUp)
		defer cancel()
		n, err := s.AcquireUpTo(ctx, 1)
		require.Zero(t, n)
		require.ErrorIs(t, err, errGaveUp)
		require.Equal(t, int64(1), q.Used())
	})
}
