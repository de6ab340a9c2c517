package cryo

import (
	"sync"
	"sync/atomic"
)

// unsettledMessages counts the messages of a session that are neither settled nor dropped. While it
// drains, none comes to them.
type unsettledMessages struct {
	n         atomic.Int64
	draining  atomic.Bool
	closeNone sync.Once
	none      chan struct{} // closed when the session drains and there are none left
}

func newUnsettled() *unsettledMessages { return &unsettledMessages{none: make(chan struct{})} }

// add counts a message, and reports false when the session drains. It counts before it
// asks, and drain asks for the number behind that: so one of the two sees the other.
func (u *unsettledMessages) add() bool {
	u.n.Add(1)
	if u.draining.Load() {
		u.remove(1)
		return false
	}
	return true
}

func (u *unsettledMessages) remove(n int) {
	if u.n.Add(-int64(n)) == 0 && u.draining.Load() {
		u.closeNone.Do(func() { close(u.none) })
	}
}

// drain lets no more messages come, and returns none.
func (u *unsettledMessages) drain() <-chan struct{} {
	u.draining.Store(true)
	if u.n.Load() == 0 {
		u.closeNone.Do(func() { close(u.none) })
	}
	return u.none
}
