package plugin

import (
	"context"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// Sending a batch on one session after the other, as each is lost.

// maxResendWait bounds the wait before a batch that has lost two sessions is sent on the
// next. Another batch may be what ends them: with waits of random length, each of those that
// wait is sent before it at times.
const maxResendWait = 200 * time.Millisecond

// reconnecting is the route of one batch: all its messages go to the session, and what is
// unacknowledged when that ends, to the next one.
type reconnecting struct {
	*dialer
	session  *cryo.Session // the first
	timeout  time.Duration // for the others, from the first loss
	deadline time.Time     // set by the first loss
}

func (r *reconnecting) next(ctx context.Context, n, lost int) (*cryo.Session, int, error) {
	switch lost {
	case 0:
		return r.session, n, nil
	case 1: // the first loss, or the last session has acknowledged something
		r.deadline = time.Now().Add(r.timeout)
	}
	inTime, cancel := context.WithDeadlineCause(ctx, r.deadline, fmt.Errorf("no other session within %s (%v)", fieldAckTimeout, r.timeout))
	defer cancel()
	session, err := r.await(inTime)
	if err == nil && lost > 1 {
		select {
		case <-time.After(rand.N(maxResendWait)): //nolint:gosec // no secret
		case <-ctx.Done():
			err = context.Cause(ctx)
		}
	}
	return session, n, err
}

func (r *reconnecting) finished(_ context.Context, _ *cryo.Session, messages []*outMessage) (lost []*outMessage) {
	return withError(messages, isEnd)
}
