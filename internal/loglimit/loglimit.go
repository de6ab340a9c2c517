// Package loglimit limits how often a log line is written.
package loglimit

import (
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"
)

// Limit allows one log line per second. Its methods may be called from any goroutine.
type Limit struct {
	rate       *rate.Limiter
	suppressed atomic.Int64
}

// New returns a limit that allows the first line.
func New() *Limit { return &Limit{rate: rate.NewLimiter(rate.Every(time.Second), 1)} }

// Allow reports whether a line may be written now. If so, suppressed is the number of lines
// that were not allowed since the last one that was; the line should report it.
func (l *Limit) Allow() (suppressed int64, ok bool) {
	if !l.rate.Allow() {
		l.suppressed.Add(1)
		return 0, false
	}
	return l.suppressed.Swap(0), true
}

// ByValue allows one log line per second for each value, such as an HTTP status. There must be few
// values, and a peer must not choose them. The zero value is ready to use. Its methods may be called
// from any goroutine.
type ByValue struct{ limits sync.Map } // the values are of type *Limit

// Allow is that of [Limit], for a value.
func (b *ByValue) Allow(value int) (suppressed int64, ok bool) {
	limit, known := b.limits.Load(value)
	if !known {
		limit, _ = b.limits.LoadOrStore(value, New())
	}
	return limit.(*Limit).Allow()
}
