package plugin

import "sync"

// places are those of the streams that are taken at a time. Where sessions share
// them, none may have more than it leaves free, or else a single client that holds
// its streams open would keep those of all others waiting; but one that has none
// may have any that is free.
type places struct {
	shared bool

	mu      sync.Mutex
	free    int
	held    map[*source]int
	changed chan struct{} // closed and replaced when a place becomes free
}

func newPlaces(n int, shared bool) *places {
	return &places{shared: shared, free: n, held: make(map[*source]int), changed: make(chan struct{})}
}

// take takes a place for a stream of a session, or gives a channel that is closed
// when it is worth asking again.
func (p *places) take(src *source) <-chan struct{} {
	p.mu.Lock()
	defer p.mu.Unlock()
	held := p.held[src]
	if p.free == 0 || p.shared && held > 0 && held >= p.free {
		return p.changed
	}
	p.free--
	p.held[src] = held + 1
	return nil
}

// give gives a place back.
func (p *places) give(src *source) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.free++
	if p.held[src]--; p.held[src] == 0 {
		delete(p.held, src)
	}
	close(p.changed)
	p.changed = make(chan struct{})
}
