package plugin

import (
	"math"
	"sync"
)

// shares are the parts of max_in_flight that clients of a listener have. None may
// have all of it, where it is more than one: a client whose messages the outputs
// refuse, or that takes no answers, would keep those of all others waiting. They go
// by session id: what is still in the pipeline when a client comes back counts for it.
type shares struct {
	limit int // of one client; 0 is none

	mu    sync.Mutex
	held  map[string]int
	freed map[string]chan struct{} // of those that wait; closed when one has less than it may
}

// newShares gives a client three quarters, and one at least.
func newShares(maxInFlight int, shared bool) *shares {
	s := &shares{held: make(map[string]int), freed: make(map[string]chan struct{})}
	if shared {
		s.limit = max(1, maxInFlight-max(1, maxInFlight/4))
	}
	return s
}

// room is how many messages more a client may have in the pipeline; where that is
// none, the channel is closed when it is worth asking again.
func (s *shares) room(id string) (n int, freed <-chan struct{}) {
	if s.limit == 0 {
		return math.MaxInt, nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if n = s.limit - s.held[id]; n > 0 {
		return n, nil
	}
	return 0, s.freedLocked(id)
}

// reserve counts n messages of a client, if they fit or are all that it has, and else
// gives a channel that is closed when it is worth asking again.
func (s *shares) reserve(id string, n int) (freed <-chan struct{}) {
	if s.limit == 0 {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if held := s.held[id]; held > 0 && held+n > s.limit {
		return s.freedLocked(id)
	}
	s.held[id] += n
	return nil
}

// take counts one that doesn't wait.
func (s *shares) take(id string) {
	if s.limit == 0 {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.held[id]++
}

func (s *shares) freedLocked(id string) <-chan struct{} {
	if s.freed[id] == nil {
		s.freed[id] = make(chan struct{})
	}
	return s.freed[id]
}

// give takes back what take has counted of these.
func (s *shares) give(items []item) {
	if s.limit == 0 {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for len(items) > 0 {
		id, n := items[0].source.id, 1
		for n < len(items) && items[n].source.id == id {
			n++
		}
		items = items[n:]
		s.giveLocked(id, n)
	}
}

func (s *shares) giveLocked(id string, n int) {
	held := s.held[id] - n
	if held < s.limit && s.freed[id] != nil {
		close(s.freed[id])
		delete(s.freed, id)
	}
	if s.held[id] = held; held == 0 {
		delete(s.held, id)
	}
}

// exhausted tells whether a client waits for room.
func (s *shares) exhausted() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.freed) > 0
}
