// Package quota divides capacity among several holders. Those whose share allows it are served in
// turn. The unit of the capacity is the caller's.
package quota

import (
	"container/list"
	"context"
	"slices"
	"sync"
	"time"
)

// Quota is capacity for several holders. It grants while less than the limit is held, so that
// the last grant may exceed the limit, unless it is of one unit. All methods of a Quota and its
// shares may be called from any goroutine, and none but AcquireUpTo waits.
type Quota struct {
	limit  int64
	fair   func(held, free int64) bool // nil: one holder may have all capacity
	strict bool                        // fair is asked about the state after the grant

	mu      sync.Mutex
	used    int64
	leaving int64     // part of used that holders release, because Starved was true for them
	waiting list.List // *Group with requests, in the order in which they are served
}

// New returns a quota. limit must be at least 1. fair reports whether a holder of held may be
// granted more while free is available; it is called with a lock held. If fair is nil, one
// holder may have all capacity.
func New(limit int64, fair func(held, free int64) bool) *Quota {
	return &Quota{limit: limit, fair: fair}
}

// NewStrict is New with a fair that is called with what would be held and free after the grant, so
// that a holder leaves some for others however much it requests at a time. It is not called for a
// holder of nothing.
func NewStrict(limit int64, fair func(held, free int64) bool) *Quota {
	return &Quota{limit: limit, fair: fair, strict: true}
}

// Share returns the share of a new holder, which holds nothing.
func (q *Quota) Share() *Share { return q.ShareOf(nil) }

// ShareOf is Share for a member of a group, which is one holder. A nil group is none.
func (q *Quota) ShareOf(g *Group) *Share {
	s := &Share{q: q, group: g}
	if g == nil {
		s.group = &s.own
	}
	return s
}

// Group is a holder: several shares of a Quota, or one. A new one is empty. Its fields are guarded
// by the quota's mutex.
type Group struct {
	held     int64 // held by all shares of the group
	leaving  int64 // part of held that is released, because Starved was true
	requests []*Request
	turn     *list.Element // position in the quota's waiting; nil while the group has no requests
}

// Full reports whether the limit is reached, or a holder waits because it may hold no more.
func (q *Quota) Full() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.used >= q.limit || q.waiting.Len() > 0
}

// Used returns the capacity that is held.
func (q *Quota) Used() int64 {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.used
}

// allows reports whether a holder of held may be granted n while free is available.
func (q *Quota) allows(held, free, n int64) bool {
	switch {
	case free <= 0:
		return false
	case q.fair == nil, q.strict && held == 0:
		return true
	case q.strict:
		return q.fair(held+n, free-n)
	default:
		return q.fair(held, free)
	}
}

// allowsLocked reports whether a group may be granted n now. It is false for the first request of
// every waiting group, because each release grants all requests that it allows.
func (q *Quota) allowsLocked(g *Group, n int64) bool {
	return q.allows(g.held, q.limit-q.used, n)
}

// grantLocked serves the waiting groups in turn, each its requests in order of arrival. A group
// that may hold no more does not block those behind it.
func (q *Quota) grantLocked() {
	for turn := q.waiting.Front(); turn != nil && q.used < q.limit; {
		g := turn.Value.(*Group)
		next := turn.Next()
		if r := g.requests[0]; q.allowsLocked(g, r.n) {
			q.removeLocked(r)
			r.share.grantLocked(r)
			if g.turn != nil {
				q.waiting.MoveToBack(turn)
				if next == nil {
					next = turn // the only one left
				}
			}
		}
		turn = next
	}
}

// removeLocked removes a waiting request.
func (q *Quota) removeLocked(r *Request) {
	r.queued = false
	g := r.share.group
	if g.requests = slices.DeleteFunc(g.requests, func(other *Request) bool { return other == r }); len(g.requests) == 0 {
		g.requests = nil
		q.waiting.Remove(g.turn)
		g.turn = nil
	}
}

// Share is the part of a Quota that one holder has, or one member of a group. It must be released
// at its end. Its fields are guarded by the quota's mutex.
type Share struct {
	q       *Quota
	group   *Group
	own     Group // group of a share without one
	held    int64
	leaving bool // Starved was true, and not all is released
}

// canAcquireLocked reports whether the share may be granted n now. It never overtakes a request of
// its group.
func (s *Share) canAcquireLocked(n int64) bool {
	return s.group.turn == nil && s.q.allowsLocked(s.group, n)
}

// acquireUpToLocked acquires as many of n as can be granted one by one.
func (s *Share) acquireUpToLocked(n int64) (acquired int64) {
	for acquired < n && s.q.allowsLocked(s.group, 1) {
		s.addLocked(1)
		acquired++
	}
	return acquired
}

// grantLocked grants a request that can be granted.
func (s *Share) grantLocked(r *Request) {
	if r.upTo {
		r.n = s.acquireUpToLocked(r.n)
	} else {
		s.addLocked(r.n)
	}
	close(r.granted)
}

// TryAcquire acquires n if it can be granted now, and reports whether it was. It never overtakes
// a request that could be granted. If n is 0, nothing is acquired.
func (s *Share) TryAcquire(n int64) bool {
	s.q.mu.Lock()
	defer s.q.mu.Unlock()
	if !s.canAcquireLocked(n) {
		return false
	}
	s.addLocked(n)
	return true
}

// AcquireUpTo waits until one unit can be granted, and then acquires as many of n, which must be
// at least 1, as can be granted: never more than the limit and fair allow. It returns their
// number, or 0 and the cause of ctx if ctx is done first; nothing is acquired then. The quota must
// not be strict.
func (s *Share) AcquireUpTo(ctx context.Context, n int64) (acquired int64, err error) {
	s.q.mu.Lock()
	if s.canAcquireLocked(1) {
		defer s.q.mu.Unlock()
		return s.acquireUpToLocked(n), nil
	}
	r := s.enqueueLocked(n)
	r.upTo = true
	s.q.mu.Unlock()
	select {
	case <-r.granted:
		return r.n, nil
	case <-ctx.Done():
		r.Cancel()
		return 0, context.Cause(ctx)
	}
}

// Force acquires n, even beyond the limit.
func (s *Share) Force(n int64) {
	s.q.mu.Lock()
	defer s.q.mu.Unlock()
	s.addLocked(n)
}

// addLocked adds n to the amount that the share holds.
func (s *Share) addLocked(n int64) {
	s.held += n
	s.group.held += n
	s.q.used += n
	if s.leaving {
		s.group.leaving += n
		s.q.leaving += n
		s.leaving = s.held > 0
	}
}

// Release releases n.
func (s *Share) Release(n int64) {
	s.q.mu.Lock()
	defer s.q.mu.Unlock()
	s.releaseLocked(n)
}

func (s *Share) releaseLocked(n int64) {
	s.addLocked(-n)
	s.q.grantLocked()
}

// Part is a part of what a share holds.
type Part struct {
	Share *Share
	N     int64
}

// Release releases parts of several shares at once: what waits is granted afterwards. Released one by
// one, they would grant a request of AcquireUpTo piecemeal.
func (q *Quota) Release(parts []Part) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, p := range parts {
		p.Share.addLocked(-p.N)
	}
	q.grantLocked()
}

// Usage returns the held capacity of the share, and the free capacity of the quota, which is
// negative if the limit is exceeded.
func (s *Share) Usage() (held, free int64) {
	s.q.mu.Lock()
	defer s.q.mu.Unlock()
	return s.held, s.q.limit - s.q.used
}

// Starved reports whether a group has waited for a period for what this share holds: the share is
// one of that group, or the limit is reached and the group holds nothing. A group that holds capacity
// can wait for itself, and must not end what others hold. Starved returns true for as many shares as
// suffice for each such group, and once for each of them. A holder to which it returns true must
// release its share.
func (s *Share) Starved(period time.Duration) bool {
	s.q.mu.Lock()
	defer s.q.mu.Unlock()
	if s.held == 0 || s.leaving {
		return false
	}
	free := s.q.limit - s.q.used + s.q.leaving
	for turn := s.q.waiting.Front(); turn != nil; turn = turn.Next() {
		g := turn.Value.(*Group)
		r := g.requests[0]
		concerned := g == s.group || free <= 0 && g.held == g.leaving
		if concerned && time.Since(r.since) >= period && !s.q.allows(g.held-g.leaving, free, r.n) {
			s.leaving = true
			s.group.leaving += s.held
			s.q.leaving += s.held
			return true
		}
	}
	return false
}

// Request is a request for capacity. It holds none until it is granted.
type Request struct {
	share   *Share
	upTo    bool      // of AcquireUpTo
	n       int64     // of upTo, once it is granted: what was granted
	since   time.Time // time of the request
	granted chan struct{}
	queued  bool // whether it waits in its group's requests; guarded by the quota's mutex
}

// Request requests n, which is granted as soon as possible. Cancel must be called for a request
// that is not granted, and may be called for one that is.
func (s *Share) Request(n int64) *Request {
	s.q.mu.Lock()
	defer s.q.mu.Unlock()
	if s.canAcquireLocked(n) {
		r := &Request{share: s, n: n, granted: make(chan struct{})}
		s.grantLocked(r)
		return r
	}
	return s.enqueueLocked(n)
}

// enqueueLocked queues a request that cannot be granted now.
func (s *Share) enqueueLocked(n int64) *Request {
	r := &Request{share: s, n: n, since: time.Now(), granted: make(chan struct{}), queued: true}
	g := s.group
	if g.requests = append(g.requests, r); g.turn == nil {
		g.turn = s.q.waiting.PushBack(g)
	}
	return r
}

// Granted returns a channel that is closed when the request is granted; its share then holds n
// more.
func (r *Request) Granted() <-chan struct{} { return r.granted }

// Cancel ends the wait, or releases the grant. It must be called at most once, and not for a
// grant that is used.
func (r *Request) Cancel() {
	q := r.share.q
	q.mu.Lock()
	defer q.mu.Unlock()
	if !r.queued {
		r.share.releaseLocked(r.n)
		return
	}
	q.removeLocked(r)
	q.grantLocked() // in a strict quota, the next request of the group may be smaller
}
