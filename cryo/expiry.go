package cryo

import (
	"context"
	"fmt"
	"math/rand/v2"
	"time"
)

// expiryDrainTimeout is the time limit for the messages of an expired session to be
// settled. It is the time that senders usually wait for an acknowledgement.
const expiryDrainTimeout = 30 * time.Second

// wallClockInterval is the interval at which an expiry is compared with the wall clock. A timer
// is not enough: it follows neither a change of the wall clock nor the time for which the
// machine is suspended.
const wallClockInterval = 15 * time.Second

// expiry is the end of the time for which a session may be connected.
type expiry struct {
	at    time.Time // without a monotonic reading, so that time.Until compares wall clocks; zero: never
	cause error     // error of the session when it ends
	code  int       // close code
	timer *time.Timer
}

// expiryOf returns the expiry of a session that begins now. A client whose token has expired must
// get another one, so it must not reconnect automatically with the old one: code 4000 informs the
// published clients that the session is over. A client whose session has reached its maximum age
// can reconnect immediately; sessions that began together, as after a restart of the server, must
// not end together.
func (o *ServerOptions) expiryOf(u *Upgrade) expiry {
	var e expiry
	if !u.Expires.IsZero() {
		e = expiry{at: u.Expires.Add(o.ExpiryGrace).Round(0), cause: ErrExpired, code: closeGraceful}
	}
	if o.MaxSessionAge > 0 {
		age := o.MaxSessionAge - rand.N(o.MaxSessionAge/10+1) //nolint:gosec // not a secret
		oldest := time.Now().Add(age).Round(0)
		if e.at.IsZero() || oldest.Before(e.at) {
			e = expiry{at: oldest, cause: fmt.Errorf("%w: maximum age of %v reached", ErrExpired, o.MaxSessionAge), code: closeTryAgain}
		}
	}
	return e
}

// setExpiry sets the expiry of a new session.
func (s *Session) setExpiry(e expiry) {
	if e.at.IsZero() {
		return
	}
	s.mu.Lock()
	s.expiry = e
	s.mu.Unlock()
	s.awaitExpiry()
}

// awaitExpiry sets the timer, which calls it again, or begins the end of the session when the
// wall clock has reached its expiry.
func (s *Session) awaitExpiry() {
	s.mu.Lock()
	defer s.mu.Unlock()
	left := min(time.Until(s.expiry.at), wallClockInterval)
	switch {
	case s.stopped: // finish may be waiting for closers
	case left <= 0:
		s.closers.Go(s.expire)
	case s.expiry.timer == nil:
		s.expiry.timer = time.AfterFunc(left, s.awaitExpiry)
	default:
		s.expiry.timer.Reset(left)
	}
}

// expire drains an expired session and closes it. If something else ends the session first, such
// as a takeover or Close, it does nothing: the first cause wins.
func (s *Session) expire() {
	ctx, cancel := context.WithTimeout(s.ctx, expiryDrainTimeout)
	defer cancel()
	_ = s.settle(ctx, s.expiry.cause) // messages that are not acknowledged by then are sent again by the client
	s.sendClose(s.expiry.cause, s.expiry.code, s.expiry.cause.Error(), nil)
}
