package plugin

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// Sending each message to all the sessions that it is for, side by side.

// broadcast is a batch of which each message is sent to all its targets.
type broadcast struct {
	*sender
	listener  *listener
	noSession string
	messages  []*outMessage

	mu      sync.Mutex
	results []broadcastResult // by message; guarded by mu
}

// broadcastResult is the result of a message at the sessions that it was sent to.
type broadcastResult struct {
	acknowledged bool // by one at least
	failed       int  // sessions that have not acknowledged it
	first        error
}

// err returns nil if a session has acknowledged the message, or it was sent to none.
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

// send sends each message to its targets and waits for the acknowledgements of all. As
// no_session has it, it waits for targets that are not connected; the messages for others do
// not wait.
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
		if m.err == nil {
			m.err = b.results[i].err()
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
	var closing sync.WaitGroup
	defer closing.Wait()
	b.queue(messages, g.sessions...).await(ctx, func(session *cryo.Session, errs []error) {
		if late := b.record(g, errs); late != nil {
			closing.Go(func() { b.closeLate(ctx, session, late) }) // which waits for the session's end
		}
	})
}

// sendStreams sends messages of which some are streams, with a goroutine for each session: a
// stream is sent step by step.
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
			if slices.ContainsFunc(errs, isNil) {
				done()
			}
			if late := b.record(g, errs); late != nil {
				b.closeLate(ctx, session, late)
			}
		})
	}
	sending.Wait()
}

// boundSlow bounds the time that slow sessions have for streams that others receive too:
// each step of a stream may take as long as ack_timeout, which makes no bound for all of it.
// When the first session is done, the others have as long again, and ack_timeout.
func (b *broadcast) boundSlow(ctx context.Context) (bounded context.Context, done, end func()) {
	bounded, cancel := context.WithCancelCause(ctx)
	began := time.Now()
	timer := time.AfterFunc(1<<62, func() {
		cancel(fmt.Errorf("a stream that another session has acknowledged: %w after twice its time and %s (%v)", errLate, fieldAckTimeout, b.ackTimeout))
	})
	done = sync.OnceFunc(func() { timer.Reset(time.Since(began) + b.ackTimeout) })
	return bounded, done, func() { timer.Stop(); cancel(nil) }
}

// record records the results of a group's messages at one of its sessions, and returns the
// first error of one that was late. errs is nil if all were acknowledged.
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
