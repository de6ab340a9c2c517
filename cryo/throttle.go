package cryo

import (
	"sync/atomic"
	"time"

	"github.com/cryo-connect/cryo-connect/internal/wire"
)

// throttle limits the rates at which a session receives messages and bytes: reads are paused
// while a rate is exceeded. A frame is charged before its payload is read, so that what waits is
// held by the network alone. Its methods must be called by the reading goroutine, except recent.
type throttle struct {
	messages, bytes bucket
	begin           func()                    // called before the first pause
	end             func(time.Duration)       // called after each pause, with its duration
	until           atomic.Pointer[time.Time] // end of the last pause; nil before there was one
}

// charge counts a data frame or TX_START of which size bytes of payload are announced, and
// returns the time to wait before it is read. A stream is one message, at its TX_START.
func (t *throttle) charge(f *wire.Frame, size int) time.Duration {
	if t.messages.rate == 0 && t.bytes.rate == 0 {
		return 0
	}
	now, messages := time.Now(), 1
	if f.Type == wire.TxChunk {
		messages = 0
	}
	return max(t.messages.charge(now, messages), t.bytes.charge(now, size))
}

// chargeMore counts a further fragment of a message that is being read. Its time is added to the
// wait of the next frame: a wait in a message would occupy capacity that others wait for.
func (t *throttle) chargeMore(size int) { t.bytes.charge(time.Now(), size) }

// recent reports whether reads were paused within the last second. Any goroutine.
func (t *throttle) recent() bool {
	until := t.until.Load()
	return until != nil && time.Since(*until) < time.Second
}

// setUntil sets the end of a pause.
func (t *throttle) setUntil(end time.Time) {
	if t.until.Swap(&end) == nil {
		t.begin()
	}
}

// bucket is a token bucket that is charged before it is known to have tokens. It holds those of
// one second at most. In contrast to rate.Limiter, a single charge may exceed them: a message may
// be larger than the bytes of a second.
type bucket struct {
	rate int       // tokens per second; 0: no limit
	paid time.Time // time at which all that was charged is paid; up to a second in the past
}

// charge takes n tokens, and returns the time until the bucket has had them all.
func (b *bucket) charge(now time.Time, n int) time.Duration {
	if b.rate == 0 {
		return 0
	}
	if full := now.Add(-time.Second); b.paid.Before(full) {
		b.paid = full
	}
	b.paid = b.paid.Add(time.Duration(n) * time.Second / time.Duration(b.rate)) // n is at most 16 MiB
	return max(0, b.paid.Sub(now))
}
