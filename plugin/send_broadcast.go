package plugin

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/redpanda-data/benthos/v4/public/service"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// Sending messages to several sessions concurrently.

// broadcast sends each message of a batch to several sessions.
type broadcast struct {
	*sender
	listener  *listener
	noSession string
	missed    *service.MetricCounter
	messages  []*outMessage

	mu      sync.Mutex
	results []broadcastResult // by index of the message; guarded by mu
}

// broadcastResult is the combined result of a message on all its sessions.
type broadcastResult struct {
	acknowledged bool  // whether at least one session has acknowledged the message
	failed       int   // number of sessions that did not acknowledge the message
	first        error // the first error of a session
}

// err returns nil if a session has acknowledged the message, or if the message was sent to no
// session.
func (r *broadcastResult) err() error {
	switch {
	case r.acknowledged || r.failed == 0:
		return nil
	case r.failed == 1:
		return r.first
	default:
		return fmt.Errorf("not acknowledged by any of %d sessions: %w", r.failed, r.first)
	}
}

// send sends each message to its targets, and waits for all acknowledgements. With no_session:
// wait, it also waits for targets that are not connected. Messages to connected targets are
// sent immediately.
func (b *broadcast) send(ctx context.Context, to targets) {
	b.results = make([]broadcastResult, len(b.messages))
	var missing []int
	for i, m := range b.messages {
		if m.err == nil {
			missing = append(missing, i)
		}
	}
	var sending sync.WaitGroup
	var timeout <-chan time.Time
	for waiting := true; waiting; {
		arrival := b.listener.arrival()
		var found []group
		found, missing = to.find(b.listener, missing)
		for _, g := range found {
			sending.Go(func() { b.sendGroup(ctx, g) })
		}
		if len(missing) == 0 || b.noSession != noSessionWait {
			break
		}
		if timeout == nil {
			timeout = time.After(b.ackTimeout)
		}
		select {
		case <-arrival:
		case <-timeout:
			waiting = false
		case <-ctx.Done():
			waiting = false
		}
	}
	sending.Wait()
	for i, m := range b.messages {
		if m.err != nil {
			continue
		}
		result := &b.results[i]
		if m.err = result.err(); m.err == nil {
			b.missed.Incr(int64(result.failed)) // not sent again, because the message is delivered
		}
	}
	if b.noSession != noSessionDrop {
		for _, i := range missing {
			b.messages[i].err = to.missing(i)
		}
	}
}

// sendGroup sends a group's messages to its sessions.
func (b *broadcast) sendGroup(ctx context.Context, g group) {
	messages := make([]*outMessage, len(g.messages))
	for i, at := range g.messages {
		messages[i] = b.messages[at]
	}
	if slices.ContainsFunc(messages, isStream) {
		b.sendStreams(ctx, g, messages)
		return
	}
	b.queue(messages, g.sessions...).await(ctx, func(session *cryo.Session, errs []error) {
		if late := b.record(g, errs); late != nil {
			b.late.close(ctx, session, late)
		}
	})
}

// sendStreams sends messages that include streams to the sessions of a group. Each session has
// a goroutine, because each step of a stream waits for the session.
func (b *broadcast) sendStreams(ctx context.Context, g group, messages []*outMessage) {
	bounded, done, end := b.boundSlow(ctx)
	defer end()
	var sending sync.WaitGroup
	for _, session := range g.sessions {
		sending.Go(func() {
			copies, errs := make([]*outMessage, len(messages)), make([]error, len(messages))
			for i, m := range messages {
				copies[i] = &outMessage{OutMessage: m.OutMessage, streamName: m.streamName}
			}
			b.sender.send(bounded, session, copies)
			for i, m := range copies {
				errs[i] = m.err
			}
			if slices.ContainsFunc(copies, func(m *outMessage) bool { return isStream(m) && m.err == nil }) {
				done()
			}
			if late := b.record(g, errs); late != nil {
				b.late.close(ctx, session, late)
			}
		})
	}
	sending.Wait()
}

// boundSlow limits how long slow sessions may take for streams, because ack_timeout limits only
// each step of a stream. Call done when a session has acknowledged its streams. After the first
// call, the other sessions have as much time again as that session took, plus ack_timeout; then
// bounded is cancelled. Call end when all sessions are done.
func (b *broadcast) boundSlow(ctx context.Context) (bounded context.Context, done, end func()) {
	bounded, cancel := context.WithCancelCause(ctx)
	began := time.Now()
	timer := time.AfterFunc(1<<62, func() {
		cancel(fmt.Errorf("stream sent more slowly than to another session: %w after twice the time of that session plus %s (%v)", errLate, fieldAckTimeout, b.ackTimeout))
	})
	done = sync.OnceFunc(func() { timer.Reset(time.Since(began) + b.ackTimeout) })
	return bounded, done, func() { timer.Stop(); cancel(nil) }
}

// record records the results of a group's messages on one session. errs contains their errors;
// it is nil if all messages were acknowledged. It returns the first error that is a timeout, or
// nil.
func (b *broadcast) record(g group, errs []error) (late error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for i, at := range g.messages {
		r := &b.results[at]
		if errs == nil || errs[i] == nil {
			r.acknowledged = true
			continue
		}
		if r.failed++; r.first == nil {
			r.first = errs[i]
		}
		if late == nil && isLate(errs[i]) {
			late = errs[i]
		}
	}
	return late
}
