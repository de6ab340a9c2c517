package plugin

import (
	"context"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// Sending a batch across reconnects.

// maxResendWait is the maximum of the random wait before a batch that was lost with two or more
// sessions is sent again. If another batch ends the sessions, the random wait lets each batch
// be sent ahead of that one sooner or later.
const maxResendWait = 200 * time.Millisecond

// reconnecting is the route of one batch. It sends all messages on one session. When that session
// ends, it sends those that are not acknowledged on the next one.
type reconnecting struct {
	*dialer
	session  *cryo.Session // the first session
	timeout  time.Duration // how long to wait for further sessions, counted from the first loss
	deadline time.Time     // when timeout ends; set at the first loss
}

func (r *reconnecting) next(ctx context.Context, n, lost int) (*cryo.Session, int, error) {
	switch lost {
	case 0:
		return r.session, n, nil
	case 1: // the first loss, or the first since a session acknowledged messages
		r.deadline = time.Now().Add(r.timeout)
	}
	inTime, cancel := context.WithDeadlineCause(ctx, r.deadline, fmt.Errorf("no other session connected within %s (%v)", fieldAckTimeout, r.timeout))
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
	return withError(messages, isSessionEnd)
}
