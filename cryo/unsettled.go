package cryo

import (
	"sync"
	"sync/atomic"
)

// unsettledMessages counts the messages of a session that are neither settled nor dropped. No
// message is added while the session drains.
type unsettledMessages struct {
	n         atomic.Int64
	draining  atomic.Bool
	closeNone sync.Once
	none      chan struct{} // closed when the session drains and n is 0
}

func newUnsettled() *unsettledMessages { return &unsettledMessages{none: make(chan struct{})} }

// add counts a message. It returns false, and counts nothing, when the session drains. It
// increments n before it reads draining, and drain sets draining before it reads n: so at least
// one of the two sees the other.
func (u *unsettledMessages) add() bool {
	u.n.Add(1)
	if u.draining.Load() {
		u.remove(1)
		return false
	}
	return true
}

// remove counts n messages as settled or dropped.
func (u *unsettledMessages) remove(n int) {
	if u.n.Add(-int64(n)) == 0 && u.draining.Load() {
		u.closeNone.Do(func() { close(u.none) })
	}
}

// drain makes add reject messages, and returns a channel that is closed when none is left.
func (u *unsettledMessages) drain() <-chan struct{} {
	u.draining.Store(true)
	if u.n.Load() == 0 {
		u.closeNone.Do(func() { close(u.none) })
	}
	return u.none
}
