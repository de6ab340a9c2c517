// Package quota shares capacity among holders: first come, first served among those
// whose share allows it. It knows nothing of what the capacity is.
package quota

import (
	"container/list"
	"sync"
	"time"
)

// Quota is capacity for several holders. It is granted while less than the limit is
// held, so that the last grant may exceed the limit by what it grants. All methods of a
// Quota and its shares may be called from any goroutine, and none waits.
type Quota struct {
	limit int64
	fair  func(held, free int64) bool // nil: all that is free may go to one holder

	mu      sync.Mutex
	used    int64
	waiting list.List // of *Request, in order of arrival
	since   time.Time // while requests wait: of the last grant, of the first request, or of the last Starved
}

// New returns a quota. fair reports whether a holder of so much may be granted more while
// so much is free, and is called with a lock held; without it a holder may have all.
// limit is at least 1.
func New(limit int64, fair func(held, free int64) bool) *Quota {
	return &Quota{limit: limit, fair: fair}
}

// Share returns the share of a new holder, which holds nothing.
func (q *Quota) Share() *Share { return &Share{q: q} }

// allowsLocked reports whether a share may be granted more now. That is true of no request
// that waits: each release grants what it can, and nothing else makes it true.
func (q *Quota) allowsLocked(s *Share) bool {
	return q.used < q.limit && (q.fair == nil || q.fair(s.held, q.limit-q.used))
}

func (q *Quota) acquireLocked(s *Share, n int64) {
	s.held += n
	q.used += n
	if q.waiting.Len() > 0 {
		q.since = time.Now()
	}
}

func (q *Quota) releaseLocked(s *Share, n int64) {
	s.held -= n
	q.used -= n
	q.grantLocked()
}

// grantLocked grants what can be granted, in order of arrival. Those over their own share
// hold up nobody behind them.
func (q *Quota) grantLocked() {
	for e := q.waiting.Front(); e != nil && q.used < q.limit; {
		r := e.Value.(*Request)
		e = e.Next()
		if q.allowsLocked(r.share) {
			q.removeLocked(r)
			q.acquireLocked(r.share, r.n)
			close(r.granted)
		}
	}
}

func (q *Quota) removeLocked(r *Request) {
	q.waiting.Remove(r.entry)
	r.entry = nil
}

// Share is what one holder has of a Quota. A holder that is gone must have released it.
type Share struct {
	q    *Quota
	held int64 // guarded by the quota's mutex
}

// TryAcquire acquires n if that can be granted now, ahead of no request that could be. n may
// be 0: then nothing is held, and the answer is that of the moment.
func (s *Share) TryAcquire(n int64) bool {
	s.q.mu.Lock()
	defer s.q.mu.Unlock()
	if !s.q.allowsLocked(s) {
		return false
	}
	s.q.acquireLocked(s, n)
	return true
}

// Force acquires n, whatever the limit.
func (s *Share) Force(n int64) {
	s.q.mu.Lock()
	defer s.q.mu.Unlock()
	s.held += n
	s.q.used += n
}

// Release returns n of what is held.
func (s *Share) Release(n int64) {
	s.q.mu.Lock()
	defer s.q.mu.Unlock()
	s.q.releaseLocked(s, n)
}

// Usage returns what the holder has, and what is free: below 0 where the limit is exceeded.
func (s *Share) Usage() (held, free int64) {
	s.q.mu.Lock()
	defer s.q.mu.Unlock()
	return s.held, s.q.limit - s.q.used
}

// Starved reports that requests wait, and nothing was granted for a period: once a
// period, to a holder. The one that is told so is to blame for it.
func (s *Share) Starved(period time.Duration) bool {
	s.q.mu.Lock()
	defer s.q.mu.Unlock()
	if s.held == 0 || s.q.waiting.Len() == 0 || time.Since(s.q.since) < period {
		return false
	}
	s.q.since = time.Now()
	return true
}

// Request is one that waits for capacity, and holds none until it is granted.
type Request struct {
	share   *Share
	n       int64
	granted chan struct{}
	entry   *list.Element // its place; nil once it is granted or cancelled. Guarded by the quota's mutex
}

// Request asks for n, which is granted as soon as it can be. Cancel must be called for a
// request that is not granted, and may be for one that is.
func (s *Share) Request(n int64) *Request {
	s.q.mu.Lock()
	defer s.q.mu.Unlock()
	r := &Request{share: s, n: n, granted: make(chan struct{})}
	if s.q.allowsLocked(s) {
		s.q.acquireLocked(s, n)
		close(r.granted)
		return r
	}
	if s.q.waiting.Len() == 0 {
		s.q.since = time.Now()
	}
	r.entry = s.q.waiting.PushBack(r)
	return r
}

// Granted is closed when the request is granted: its share holds n more by then.
func (r *Request) Granted() <-chan struct{} { return r.granted }

// Cancel ends the wait, and releases what was granted meanwhile. It must be called once
// at most, and not when the grant is used.
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
