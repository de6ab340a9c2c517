package cryo

import "time"

// maxAckTicks bounds the ticks of an AckClock: ten times the time-out.
const maxAckTicks = 20

// AckClock decides when the acknowledgement of what was just sent is late. It ticks twice
// in each time-out. Time in which a slow line still transfers what was queued by the first
// tick does not count, if at least 4 KiB of it are delivered between two ticks: a large
// message may be on its way for longer than a peer may take to acknowledge it. So a peer that
// takes nothing is late after the time-out, and one that takes everything slowly after
// ten times as long. What is delivered is known as for HeartbeatInterval of
// [SessionOptions].
//
// The zero value is not usable; see [Session.AckClock]. One goroutine at a time may use it.
type AckClock struct {
	s         *Session
	ticks     int   // so far
	missed    int   // in a row, without progress
	delivered int64 // by the connection, at the last tick
	end       int64 // delivered when all is that was queued at the first tick
}

// AckClock returns a clock for what has just been sent on the session.
func (s *Session) AckClock() AckClock { return AckClock{s: s} }

// Tick must be called each time half of the time-out has passed. It reports whether the
// acknowledgement is late.
func (c *AckClock) Tick() (late bool) {
	delivered, backlog := c.s.conn.Progress()
	left := c.end - c.delivered
	progress := c.ticks > 0 && left > 0 && delivered-c.delivered >= min(left, minProgress)
	if c.ticks == 0 {
		c.end = delivered + backlog + c.s.writer.queuedBytes() + c.s.writer.dequeuedBytes()
	}
	c.delivered = delivered
	c.ticks++
	if c.missed++; progress {
		c.missed = 0
	}
	return c.missed == 2 || c.ticks == maxAckTicks
}

// ackTimer is an AckClock that ticks by itself. Without a time-out it never ticks.
type ackTimer struct {
	AckClock
	ticker *time.Ticker
	C      <-chan time.Time
}

func (s *Session) ackTimer(timeout time.Duration) *ackTimer {
	t := &ackTimer{AckClock: s.AckClock()}
	if timeout > 0 {
		t.ticker = time.NewTicker(max(timeout/2, 1))
		t.C = t.ticker.C
	}
	return t
}

func (t *ackTimer) stop() {
	if t.ticker != nil {
		t.ticker.Stop()
	}
}
