package plugin

import (
	"math"
	"sync"
)

// shares are the parts of max_in_flight that clients of a listener have. None may
// have all of it, or one whose messages the outputs refuse, or that takes no
// answers, would keep those of all others waiting. They go by session id: what is
// still in the pipeline when a client comes back counts for it.
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
	if s.freed[id] == nil {
		s.freed[id] = make(chan struct{})
	}
	return 0, s.freed[id]
}

func (s *shares) take(id string, n int) {
	if s.limit == 0 {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.held[id] += n
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
