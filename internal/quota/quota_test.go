package quota_test

import (
	"math"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/internal/quota"
)

// eightTimes is the fairness of a receive buffer.
func eightTimes(held, free int64) bool { return (held+7)/8 <= free }

func granted(r *quota.Request) bool {
	select {
	case <-r.Granted():
		return true
	default:
		return false
	}
}

func wantUsage(t *testing.T, s *quota.Share, held, free int64) {
	t.Helper()
	h, f := s.Usage()
	require.Equal(t, []int64{held, free}, []int64{h, f}, "held and free")
}

func TestLastGrantMayExceedTheLimit(t *testing.T) {
	q := quota.New(10, nil)
	a, b := q.Share(), q.Share()
	require.True(t, a.TryAcquire(9))
	require.True(t, b.TryAcquire(100))
	wantUsage(t, b, 100, -99)
	require.False(t, a.TryAcquire(1))
	require.False(t, a.TryAcquire(0), "nothing is free")
	a.Force(5)
	wantUsage(t, a, 14, -104)
	b.Release(100)
	wantUsage(t, b, 0, -4)
	require.False(t, b.TryAcquire(0))
	a.Release(14)
	wantUsage(t, a, 0, 10)
}

func TestRequestsAreGrantedInOrderOfArrival(t *testing.T) {
	q := quota.New(10, nil)
	a := q.Share()
	a.Force(10)
	var requests []*quota.Request
	for _, n := range []int64{6, 5, 0, 1} {
		requests = append(requests, q.Share().Request(n))
	}
	state := func() (all []bool) {
		for _, r := range requests {
			all = append(all, granted(r))
		}
		return all
	}
	require.Equal(t, []bool{false, false, false, false}, state())
	a.Release(1)
	require.Equal(t, []bool{true, false, false, false}, state())
	a.Release(5)
	require.Equal(t, []bool{true, false, false, false}, state(), "the first has exceeded the limit by as much")
	a.Release(4)
	require.Equal(t, []bool{true, true, false, false}, state())
	requests[0].Cancel()
	require.Equal(t, []bool{true, true, true, true}, state(), "what was granted is free again")
}

func TestHolderOverItsShareDoesNotBlockOthers(t *testing.T) {
	q := quota.New(100, eightTimes)
	greedy, modest := q.Share(), q.Share()
	greedy.Force(95)
	r := greedy.Request(1)
	require.False(t, granted(r), "it may hold eight times what is free")
	require.True(t, modest.TryAcquire(1))
	require.True(t, granted(modest.Request(1)))
	modest.Release(2)
	require.False(t, granted(r))
	greedy.Release(7)
	require.True(t, granted(r))
	wantUsage(t, greedy, 89, 11)
}

func TestGroupIsOneHolder(t *testing.T) {
	q := quota.New(100, eightTimes)
	group := new(quota.Group)
	a, b, other := q.ShareOf(group), q.ShareOf(group), q.Share()
	a.Force(90)
	require.False(t, b.TryAcquire(1), "the group has more than eight times what is free")
	r := b.Request(1)
	require.True(t, other.TryAcquire(1))
	require.False(t, granted(r))
	a.Release(3)
	require.True(t, granted(r), "what one share releases, another one of the group may have")
	wantUsage(t, a, 87, 11)
	wantUsage(t, b, 1, 11)
	b.Release(1)
	wantUsage(t, b, 0, 12)
}

func TestCancelledRequestHoldsNothing(t *testing.T) {
	q := quota.New(1, nil)
	a, b, c := q.Share(), q.Share(), q.Share()
	a.Force(1)
	cancelled, next := b.Request(1), c.Request(1)
	cancelled.Cancel()
	a.Release(1)
	require.False(t, granted(cancelled))
	require.True(t, granted(next))
	wantUsage(t, b, 0, 0)
	next.Cancel()
	wantUsage(t, c, 0, 1)
}

func TestLargestLimitDoesNotOverflow(t *testing.T) {
	for _, limit := range []int64{math.MaxInt64, math.MaxInt64 - 1, math.MaxInt64/8 + 1} {
		s := quota.New(limit, eightTimes).Share()
		for range 3 {
			require.True(t, s.TryAcquire(1<<40))
		}
		s.Release(3 << 40)
		wantUsage(t, s, 0, limit)
	}
}

func TestStarvedReportsNoMoreHoldersThanNeeded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const period = time.Minute
		q := quota.New(10, nil)
		a, b, c, idle := q.Share(), q.Share(), q.Share(), q.Share()
		a.Force(5)
		b.Force(5)
		c.Force(5)
		time.Sleep(time.Hour)
		require.False(t, a.Starved(period), "nobody waits")
		first := q.Share().Request(5)
		time.Sleep(period - time.Nanosecond)
		second := q.Share().Request(5)
		require.False(t, a.Starved(period))
		time.Sleep(time.Nanosecond)
		require.False(t, idle.Starved(period), "it holds nothing")
		require.True(t, a.Starved(period))
		require.False(t, a.Starved(period), "once")
		require.True(t, b.Starved(period), "what the first one holds is not enough")
		require.False(t, c.Starved(period), "two suffice")
		a.Release(5)
		b.Release(5)
		require.True(t, granted(first))
		require.False(t, granted(second))
		require.False(t, c.Starved(period), "the second has not waited for long")
		time.Sleep(period)
		require.True(t, c.Starved(period))
		c.Release(5)
		require.True(t, granted(second))
		c.Force(5)
		require.False(t, c.Starved(period), "nobody waits for what it has acquired since")
		third := q.Share().Request(5)
		time.Sleep(period)
		require.True(t, c.Starved(period))
		third.Cancel()
	})
}

// A group that waits for what it holds itself ends none of the others.
func TestStarvedReportsOnlyHoldersThatAnotherGroupWaitsFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const period = time.Minute
		q := quota.NewStrict(100, eightTimes)
		group := new(quota.Group)
		a, b, other := q.ShareOf(group), q.ShareOf(group), q.Share()
		a.Force(50)
		other.Force(10)
		r := b.Request(40)
		require.False(t, granted(r), "nothing would be left for others")
		time.Sleep(period)
		require.False(t, other.Starved(period))
		require.True(t, a.Starved(period))
		a.Release(50)
		require.True(t, granted(r))
	})
}

// A client could otherwise end the messages of others by many sessions that send large ones: as long
// as each of its own is complete within the period, one of them always waits for longer.
func TestStarvedReportsNoHolderWhileAGroupThatHoldsCapacityWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const period = time.Minute
		q := quota.NewStrict(20, eightTimes)
		group := new(quota.Group)
		a, b, other := q.ShareOf(group), q.ShareOf(group), q.Share()
		require.True(t, a.TryAcquire(10))
		require.True(t, other.TryAcquire(15))
		r := b.Request(10)
		time.Sleep(time.Hour)
		require.False(t, other.Starved(period))
		require.True(t, a.Starved(period))
		require.False(t, other.Starved(period), "what is released suffices")
		other.Force(10)
		require.True(t, other.Starved(period), "the group will hold nothing, and nothing will be free")
		a.Release(10)
		require.False(t, granted(r))
		other.Release(25)
		require.True(t, granted(r))
	})
}

func TestStrictQuotaLeavesSomeForOthers(t *testing.T) {
	q := quota.NewStrict(90, eightTimes)
	group := new(quota.Group)
	a, b, other := q.ShareOf(group), q.ShareOf(group), q.Share()
	require.True(t, a.TryAcquire(40))
	require.False(t, b.TryAcquire(41))
	large := b.Request(50)
	require.False(t, b.TryAcquire(1), "it does not overtake the other of its group")
	small := a.Request(40)
	require.True(t, other.TryAcquire(9), "others have what is left")
	other.Release(9)
	large.Cancel()
	require.True(t, granted(small), "the holder has eight times what is free")
	require.True(t, other.TryAcquire(1000), "a holder of nothing may exceed the limit")
	require.False(t, q.Share().TryAcquire(1))
}

func TestHoldersAreServedInTurn(t *testing.T) {
	q := quota.New(1, nil)
	holder := q.Share()
	holder.Force(1)
	group := new(quota.Group)
	var greedy []*quota.Request
	for range 3 {
		greedy = append(greedy, q.ShareOf(group).Request(1))
	}
	modest := q.Share().Request(1)
	holder.Release(1)
	require.True(t, granted(greedy[0]))
	greedy[0].Cancel()
	require.True(t, granted(modest), "it came last, and waits for one of the group only")
	require.False(t, granted(greedy[1]))
	modest.Cancel()
	greedy[1].Cancel()
	require.True(t, granted(greedy[2]))
}

// turns is the order in which waiting shares are served.
type turns []int

// grant serves them in turn, until none can be granted anything. waiting returns the shares of the
// waiting requests in order of arrival; try grants the request with an index of these, if it can be.
func (o *turns) grant(waiting func() []int, try func(first int) bool) {
	for served := true; served; {
		served = false
		shares := waiting()
		*o = slices.DeleteFunc(*o, func(s int) bool { return !slices.Contains(shares, s) })
		for _, s := range shares {
			if !slices.Contains(*o, s) {
				*o = append(*o, s)
			}
		}
		for i, s := range *o {
			if try(slices.Index(shares, s)) {
				*o = slices.Delete(*o, i, i+1)
				served = true
				break
			}
		}
	}
}

// oracle does what a quota is to do, in the simplest way.
type oracle struct {
	limit   int64
	strict  bool
	held    []int64 // by share
	waiting []waiting
	granted []waiting
	turns   turns
}

type waiting struct {
	share   int
	n       int64
	request *quota.Request
}

func (o *oracle) used() (sum int64) {
	for _, n := range o.held {
		sum += n
	}
	return sum
}

func (o *oracle) allows(share int, n int64) bool {
	held, free := o.held[share], o.limit-o.used()
	switch {
	case free <= 0:
		return false
	case !o.strict:
		return eightTimes(held, free)
	default:
		return held == 0 || eightTimes(held+n, free-n)
	}
}

// overtakes reports whether the share has a waiting request.
func (o *oracle) overtakes(share int) bool {
	return slices.ContainsFunc(o.waiting, func(w waiting) bool { return w.share == share })
}

// grant grants what can be granted, in turn.
func (o *oracle) grant() {
	o.turns.grant(func() (shares []int) {
		for _, w := range o.waiting {
			shares = append(shares, w.share)
		}
		return shares
	}, func(first int) bool {
		w := o.waiting[first]
		if !o.allows(w.share, w.n) {
			return false
		}
		o.held[w.share] += w.n
		o.granted = append(o.granted, w)
		o.waiting = slices.Delete(o.waiting, first, first+1)
		return true
	})
}

// one takes one of a list at random, if there is any.
func one(r *rand.Rand, list *[]waiting) (w waiting, ok bool) {
	if len(*list) == 0 {
		return w, false
	}
	i := r.IntN(len(*list))
	w = (*list)[i]
	*list = slices.Delete(*list, i, i+1)
	return w, true
}

// seeded returns random numbers, with the seed of CRYO_SEED if it is set.
func seeded(t *testing.T) *rand.Rand {
	t.Helper()
	seed := uint64(time.Now().UnixNano())
	if given := os.Getenv("CRYO_SEED"); given != "" {
		var err error
		seed, err = strconv.ParseUint(given, 10, 64)
		require.NoError(t, err, "CRYO_SEED")
	}
	t.Logf("CRYO_SEED=%d makes the same random choices", seed)
	return rand.New(rand.NewPCG(seed, 0))
}

func TestQuotaMatchesAnOracle(t *testing.T) {
	r := seeded(t)
	for i := range 100 {
		o := oracle{limit: 1 + r.Int64N(200), strict: i%2 == 0, held: make([]int64, 1+r.IntN(6))}
		q := quota.New(o.limit, eightTimes)
		if o.strict {
			q = quota.NewStrict(o.limit, eightTimes)
		}
		shares := make([]*quota.Share, len(o.held))
		for i := range shares {
			shares[i] = q.Share()
		}
		for range 300 {
			i, n := r.IntN(len(shares)), r.Int64N(20)
			switch r.IntN(7) {
			case 0:
				allowed := o.allows(i, n) && !o.overtakes(i)
				require.Equal(t, allowed, shares[i].TryAcquire(n))
				if allowed {
					o.held[i] += n
					o.granted = append(o.granted, waiting{share: i, n: n})
				}
			case 1, 2:
				o.waiting = append(o.waiting, waiting{i, n, shares[i].Request(n)})
			case 3:
				if r.IntN(4) == 0 {
					shares[i].Force(n)
					o.held[i] += n
					o.granted = append(o.granted, waiting{share: i, n: n})
				}
			case 4, 5:
				if w, ok := one(r, &o.granted); ok {
					if w.request != nil && r.IntN(3) == 0 {
						w.request.Cancel() // it was not seen that it was granted
					} else {
						shares[w.share].Release(w.n)
					}
					o.held[w.share] -= w.n
				}
			case 6:
				if w, ok := one(r, &o.waiting); ok {
					w.request.Cancel()
				}
			}
			o.grant()
			for _, w := range o.granted {
				require.True(t, w.request == nil || granted(w.request))
			}
			for _, w := range o.waiting {
				require.False(t, granted(w.request))
			}
			for i, s := range shares {
				held, free := s.Usage()
				require.Equal(t, o.held[i], held)
				require.Equal(t, o.limit-o.used(), free)
			}
		}
	}
}

// However many acquire concurrently, only the last grant may exceed the limit, and nothing
// is held in the end.
func TestConcurrentHoldersRespectTheLimit(t *testing.T) {
	const limit, most = 100, 7
	q := quota.New(limit, eightTimes)
	var all sync.WaitGroup
	for range 20 {
		all.Go(func() {
			s := q.Share()
			for i := range 500 {
				n := int64(1 + i%most)
				if i%3 != 0 || !s.TryAcquire(n) {
					r := s.Request(n)
					if i%5 == 0 {
						r.Cancel()
						continue
					}
					<-r.Granted()
				}
				if _, free := s.Usage(); free <= -most {
					t.Error("too much is granted:", -free)
				}
				s.Release(n)
			}
		})
	}
	all.Wait()
	wantUsage(t, q.Share(), 0, limit)
}
