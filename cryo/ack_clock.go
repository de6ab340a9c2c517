package cryo

import "time"

// maxAckTicks bounds the ticks of an AckClock: ten times the timeout.
const maxAckTicks = 20

// AckClock decides when the acknowledgement of a message that was just sent is late. It ticks
// twice per timeout. Time spent transferring, over a slow connection, data that was queued at the first
// tick does not count, if at least 4 KiB of it are delivered between two ticks: the transfer of
// a large message may take longer than the timeout. Less than 4 KiB at the first tick, such as
// a ping, do not count at all. A peer that receives nothing is late after
// the timeout, and one that receives slowly after at most ten times as long. Delivered data is
// determined as described at HeartbeatInterval in [SessionOptions].
//
// The zero value is not usable; see [Session.AckClock]. One goroutine at a time may use it.
type AckClock struct {
	s         *Session
	ticks     int   // number of ticks so far
	missed    int   // number of ticks in a row without progress
	delivered int64 // bytes delivered by the connection at the last tick
	end       int64 // value of delivered once all data queued at the first tick is delivered, if it was enough to count
}

// AckClock returns a clock for messages that were just sent on the session.
func (s *Session) AckClock() AckClock { return AckClock{s: s} }

// Tick must be called at every half of the timeout. It reports whether the acknowledgement is
// late.
func (c *AckClock) Tick() (late bool) {
	delivered, backlog := c.s.conn.Progress()
	left := c.end - c.delivered
	progress := c.ticks > 0 && left > 0 && delivered-c.delivered >= min(left, minProgress)
	if c.ticks == 0 {
		c.end = delivered
		if left := backlog + c.s.writer.queuedBytes() + c.s.writer.dequeuedBytes(); left >= minProgress {
			c.end += left
		}
	}
	c.delivered = delivered
	c.ticks++
	if c.missed++; progress {
		c.missed = 0
	}
	return c.missed == 2 || c.ticks == maxAckTicks
}

// ackTimer is an AckClock with a ticker. Without a timeout it never ticks.
type ackTimer struct {
	AckClock
	ticker *time.Ticker
	C      <-chan time.Time
}

// ackTimer starts the timer of one step. The caller must stop it.
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
