package cryo

import (
	"math"
	"sync/atomic"
	"time"

	"github.com/cryo-connect/cryo-connect/internal/wire"
)

const (
	// othersPerMessage and minOthers are the limit of frames that carry no message: pings, frames
	// of unknown types, answers to nothing, chunks and fragments of less than smallFrame, and data
	// that is discarded. They have a separate limit, because the handshake, heartbeats and the ends
	// of streams must not delay messages: per second, othersPerMessage for each message that
	// MaxMessagesPerSecond allows or, without that limit, one for each bytesPerOther bytes, and at
	// least minOthers.
	othersPerMessage = 4
	bytesPerOther    = 256
	minOthers        = 100
	smallFrame       = 1 << 10
	// minCharge is the minimum that a message, stream or chunk counts, in bytes.
	minCharge = 64
	// unreportedPauses bounds the pauses of a session that are not reported, in total: a session
	// begins without tokens, so that the first messages of any peer have to wait.
	unreportedPauses = time.Second
)

// throttle limits the rates at which a session receives messages, bytes and other frames: reads are
// paused while a rate is exceeded. A data frame is charged before its payload is read, so that
// waiting data is held by the network alone. A session never receives more messages or bytes than
// their rate allows since its start, so that a client gains nothing by connecting again. Its
// methods must be called by the reading goroutine, except recent.
type throttle struct {
	limited         bool
	messages, bytes bucket
	others          bucket
	begin           func()                    // called before the first pause that is reported
	end             func(time.Duration)       // called after each pause that is reported, with its duration
	unreported      time.Duration             // remainder of unreportedPauses
	began           bool                      // begin was called
	until           atomic.Pointer[time.Time] // end of the last pause; nil before there was one
}

// limit sets the rates of a session that begins now; 0 is no limit.
func (t *throttle) limit(messages, bytes int) {
	now := time.Now()
	t.limited = messages > 0 || bytes > 0
	t.messages, t.bytes = bucket{messages, now}, bucket{bytes, now}
	switch {
	case messages > 0:
		t.others.rate = max(minOthers, othersPerMessage*min(messages, math.MaxInt/othersPerMessage))
	case bytes > 0:
		t.others.rate = max(minOthers, bytes/bytesPerOther)
	default:
		return
	}
	t.others.paid = now.Add(-minOthers * time.Second / time.Duration(t.others.rate))
	t.unreported = unreportedPauses
}

// charge counts a data frame or TX_START of which size bytes of payload are announced, and
// returns the time to wait before it is read. A stream is one message, at its TX_START.
func (t *throttle) charge(f *wire.Frame, size int) time.Duration {
	if !t.limited {
		return 0
	}
	now := time.Now()
	wait := t.bytes.charge(now, max(size, minCharge))
	switch {
	case f.Type != wire.TxChunk:
		return max(wait, t.messages.charge(now, 1))
	case size < smallFrame:
		return max(wait, t.others.charge(now, 1))
	default:
		return wait
	}
}

// chargeOther counts a frame that carries no message, and size bytes that are discarded with it.
// It returns the time to wait before the next frame is read.
func (t *throttle) chargeOther(size int) time.Duration {
	if !t.limited {
		return 0
	}
	now := time.Now()
	wait := t.others.charge(now, 1)
	if size > 0 {
		wait = max(wait, t.bytes.charge(now, size))
	}
	return wait
}

// chargeMore counts a further fragment of a message that is being read. Its time is added to the
// wait of the next frame: a wait in a message would occupy capacity that others wait for.
func (t *throttle) chargeMore(size int) {
	if t.limited {
		t.bytes.charge(time.Now(), size)
	}
}

// recent reports whether reads were paused within the last second. Any goroutine.
func (t *throttle) recent() bool {
	until := t.until.Load()
	return until != nil && time.Since(*until) < time.Second
}

// pause is called before a pause of reads, and returns the function to call at its end.
func (t *throttle) pause(now time.Time, wait time.Duration) (resume func(now time.Time)) {
	until := now.Add(wait)
	t.until.Store(&until)
	reported := wait > t.unreported
	if !reported {
		t.unreported -= wait
	} else if !t.began {
		t.began = true
		t.begin()
	}
	return func(end time.Time) {
		t.until.Store(&end)
		if reported {
			t.end(end.Sub(now))
		}
	}
}

// bucket is a token bucket that is charged before it is known to have tokens. It holds at most
// those of one second. In contrast to rate.Limiter, a single charge may exceed them: a message may
// be larger than the bytes of a second.
type bucket struct {
	rate int       // tokens per second; 0: no limit
	paid time.Time // time at which all that was charged is paid; up to a second in the past
}

// charge takes n tokens, and returns the time until the bucket has produced them all.
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
