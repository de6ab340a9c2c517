// Package quota divides capacity among several holders: first come, first served among those
// whose share allows it. The unit of the capacity is the caller's.
package quota

import (
	"container/list"
	"context"
	"sync"
	"time"
)

// Quota is capacity for several holders. It grants while less than the limit is held, so that
// the last grant may exceed the limit, unless it is of one unit. All methods of a Quota and its
// shares may be called from any goroutine, and none but AcquireUpTo waits.
type Quota struct {
	limit int64
	fair  func(held, free int64) bool // nil: one holder may have all capacity

	mu      sync.Mutex
	used    int64
	waiting list.List // *Request, in order of arrival
	since   time.Time // while requests wait: time of the last grant, of the first request, or of the last true Starved
}

// New returns a quota. limit must be at least 1. fair reports whether a holder of held may be
// granted more while free is available; it is called with a lock held. If fair is nil, one
// holder may have all capacity.
func New(limit int64, fair func(held, free int64) bool) *Quota {
	return &Quota{limit: limit, fair: fair}
}

// Share returns the share of a new holder, which holds nothing.
func (q *Quota) Share() *Share { return q.ShareOf(nil) }

// ShareOf is Share for a member of a group, which is one holder to fair. A nil group is none.
func (q *Quota) ShareOf(g *Group) *Share { return &Share{q: q, group: g} }

// Group is what several shares of a Quota have in common. A new one is empty.
type Group struct {
	_    *byte // no tiny allocation, which could keep weak pointers to the group alive
	held int64 // held by all shares of the group; guarded by the quota's mutex
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

// allowsLocked reports whether a share may be granted more now. It is false for every waiting
// request, because each release grants all requests that it allows.
func (q *Quota) allowsLocked(s *Share) bool {
	return q.used < q.limit && (q.fair == nil || q.fair(s.fairLocked(), q.limit-q.used))
}

func (q *Quota) acquireLocked(s *Share, n int64) {
	s.addLocked(n)
	q.grantedLocked()
}

// acquireUpToLocked acquires as many of n as can be granted one by one.
func (q *Quota) acquireUpToLocked(s *Share, n int64) (acquired int64) {
	for acquired < n && q.allowsLocked(s) {
		s.addLocked(1)
		acquired++
	}
	if acquired > 0 {
		q.grantedLocked()
	}
	return acquired
}

func (q *Quota) grantedLocked() {
	if q.waiting.Len() > 0 {
		q.since = time.Now()
	}
}

func (q *Quota) releaseLocked(s *Share, n int64) {
	s.addLocked(-n)
	q.grantLocked()
}

// grantLocked grants waiting requests in order of arrival. A request that fair rejects does not
// block those behind it.
func (q *Quota) grantLocked() {
	for e := q.waiting.Front(); e != nil && q.used < q.limit; {
		r := e.Value.(*Request)
		e = e.Next()
		if q.allowsLocked(r.share) {
			q.removeLocked(r)
			if r.upTo {
				r.n = q.acquireUpToLocked(r.share, r.n)
			} else {
				q.acquireLocked(r.share, r.n)
			}
			close(r.granted)
		}
	}
}

func (q *Quota) removeLocked(r *Request) {
	q.waiting.Remove(r.entry)
	r.entry = nil
}

// Share is the part of a Quota that one holder has. The holder must release it at its end.
type Share struct {
	q     *Quota
	group *Group // nil: the share is a holder of its own
	held  int64  // guarded by the quota's mutex
}

// TryAcquire acquires n if it can be granted now, and reports whether it was. It never overtakes
// a request that could be granted. If n is 0, nothing is acquired.
func (s *Share) TryAcquire(n int64) bool {
	s.q.mu.Lock()
	defer s.q.mu.Unlock()
	if !s.q.allowsLocked(s) {
		return false
	}
	s.q.acquireLocked(s, n)
	return true
}

// AcquireUpTo waits until one unit can be granted, and then acquires as many of n, which must be
// at least 1, as can be granted: never more than the limit and fair allow. It returns their
// number, or 0 and the cause of ctx if ctx is done first; nothing is acquired then.
func (s *Share) AcquireUpTo(ctx context.Context, n int64) (acquired int64, err error) {
	s.q.mu.Lock()
	if acquired = s.q.acquireUpToLocked(s, n); acquired > 0 {
		s.q.mu.Unlock()
		return acquired, nil
	}
	r := s.q.enqueueLocked(s, n)
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

// addLocked adds to what the share holds.
func (s *Share) addLocked(n int64) {
	s.held += n
	s.q.used += n
	if s.group != nil {
		s.group.held += n
	}
}

// fairLocked returns what counts for fair.
func (s *Share) fairLocked() int64 {
	if s.group != nil {
		return s.group.held
	}
	return s.held
}

// Release releases n.
func (s *Share) Release(n int64) {
	s.q.mu.Lock()
	defer s.q.mu.Unlock()
	s.q.releaseLocked(s, n)
}

// Usage returns the held capacity of the share, and the free capacity of the quota, which is
// negative if the limit is exceeded.
func (s *Share) Usage() (held, free int64) {
	s.q.mu.Lock()
	defer s.q.mu.Unlock()
	return s.held, s.q.limit - s.q.used
}

// Starved reports whether requests wait and nothing was granted for a period. It returns true
// once a period, to a single holder, which must then release its share.
func (s *Share) Starved(period time.Duration) bool {
	s.q.mu.Lock()
	defer s.q.mu.Unlock()
	if s.held == 0 || s.q.waiting.Len() == 0 || time.Since(s.q.since) < period {
		return false
	}
	s.q.since = time.Now()
	return true
}

// Request is a request for capacity. It holds none until it is granted.
type Request struct {
	share   *Share
	upTo    bool  // of AcquireUpTo
	n       int64 // of upTo, once it is granted: what was granted
	granted chan struct{}
	entry   *list.Element // position in waiting; nil once it is granted or cancelled. Guarded by the quota's mutex
}

// Request requests n, which is granted as soon as possible. Cancel must be called for a request
// that is not granted, and may be called for one that is.
func (s *Share) Request(n int64) *Request {
	s.q.mu.Lock()
	defer s.q.mu.Unlock()
	if s.q.allowsLocked(s) {
		r := &Request{share: s, n: n, granted: make(chan struct{})}
		s.q.acquireLocked(s, n)
		close(r.granted)
		return r
	}
	return s.q.enqueueLocked(s, n)
}

// enqueueLocked queues a request that cannot be granted now.
func (q *Quota) enqueueLocked(s *Share, n int64) *Request {
	if q.waiting.Len() == 0 {
		q.since = time.Now()
	}
	r := &Request{share: s, n: n, granted: make(chan struct{})}
	r.entry = q.waiting.PushBack(r)
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
	if r.entry == nil {
		q.releaseLocked(r.share, r.n)
		return
	}
	q.removeLocked(r)
}
