package plugin

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// Sending to the sessions that messages are for, side by side.

// deliver sends each message to its targets and waits for all of them. It looks
// again for targets that are not there, for as long as no_session has it; other
// messages don't wait for that.
func (o *serverOutput) deliver(ctx context.Context, to targets, messages []parcel, errs []error) {
	patience, cancel := context.WithTimeout(ctx, o.ackTimeout)
	defer cancel()
	outcomes := make([]outcome, len(messages))
	var sending sync.WaitGroup
	pending := indexesOf(errs, isNil)
look:
	for {
		arrival := o.listener.arrival()
		var found []group
		found, pending = to.find(o.listener, pending)
		for _, g := range found {
			sending.Go(func() { o.sendToGroup(ctx, g, messages, outcomes) })
		}
		if len(pending) == 0 || o.noSession != noSessionWait {
			break
		}
		select {
		case <-arrival:
		case <-patience.Done():
			break look
		}
	}
	sending.Wait()
	for i := range errs {
		if errs[i] == nil {
			errs[i] = outcomes[i].err()
		}
	}
	if o.noSession != noSessionDrop {
		for _, i := range pending {
			errs[i] = to.missed(i)
		}
	}
}

// outcome is what became of a message at the sessions that it went to.
type outcome struct {
	mu           sync.Mutex
	sent         int // sessions
	acknowledged bool
	first        error
}

func (a *outcome) note(err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.sent++
	if err == nil {
		a.acknowledged = true
	} else if a.first == nil {
		a.first = err
	}
}

// err is nil when one session has acknowledged the message, or there was none.
func (a *outcome) err() error {
	switch {
	case a.acknowledged || a.sent == 0:
		return nil
	case a.sent == 1:
		return a.first
	default:
		return fmt.Errorf("not acknowledged by any of %d sessions: %w", a.sent, a.first)
	}
}

// sendToGroup sends a group's messages to its sessions.
func (o *serverOutput) sendToGroup(ctx context.Context, g group, messages []parcel, outcomes []outcome) {
	part := pick(messages, g.messages)
	var going sync.WaitGroup
	defer going.Wait()
	if slices.ContainsFunc(part, func(m parcel) bool { return m.isStream }) {
		// A stream travels step by step, with a goroutine for each session.
		paced, done, end := o.paced(ctx)
		defer end()
		for _, session := range g.sessions {
			going.Go(func() {
				errs := make([]error, len(part))
				o.send(paced, session, part, errs)
				if slices.ContainsFunc(errs, isNil) {
					done()
				}
				o.settle(ctx, g, session, errs, outcomes)
			})
		}
		going.Wait()
		return
	}
	none := make([]error, len(part))
	began := o.metrics.sending(len(part) * len(g.sessions))
	out := frames(part) // the payloads are the same memory for all sessions
	pending := make([]*cryo.Pending, len(g.sessions))
	for i, session := range g.sessions {
		pending[i] = session.Queue(out)
	}
	answers := o.awaitAcks(ctx, g.sessions, pending)
	o.metrics.awaited(ctx.Err() == nil && !slices.ContainsFunc(answers, isLate), len(part)*len(g.sessions), began)
	for i, err := range answers {
		var failed *cryo.BatchError
		if !errors.As(err, &failed) {
			o.metrics.settled(part, none)
			o.settle(ctx, g, g.sessions[i], none, outcomes)
			continue
		}
		o.metrics.settled(part, failed.Errs)
		going.Go(func() { o.settle(ctx, g, g.sessions[i], failed.Errs, outcomes) }) // closing takes its time
	}
}

// paced bounds the time that slow sessions have for streams that others get too:
// each step of a stream may take as long as ack_timeout, which makes no bound for
// all of it. When the first one is done, the others have as long again, and
// ack_timeout.
func (o *serverOutput) paced(ctx context.Context) (paced context.Context, done, end func()) {
	paced, cancel := context.WithCancelCause(ctx)
	begin := time.Now()
	late := time.AfterFunc(1<<62, func() {
		cancel(fmt.Errorf("a stream that others have got: %w twice their time and %s (%v)", errLate, fieldAckTimeout, o.ackTimeout))
	})
	done = sync.OnceFunc(func() { late.Reset(time.Since(begin) + o.ackTimeout) })
	return paced, done, func() { late.Stop(); cancel(nil) }
}

// settle notes what became of a group's messages at one of its sessions.
func (o *serverOutput) settle(ctx context.Context, g group, session *cryo.Session, errs []error, outcomes []outcome) {
	for i, at := range g.messages {
		outcomes[at].note(errs[i])
	}
	o.cutIfLate(ctx, session, errs)
}

// cutIfLate closes a session that let the time for its acknowledgement pass, so
// that it costs others that time once and not with each of its messages. One that
// max_buffer_bytes keeps us from reading may have acknowledged: it stays.
func (o *serverOutput) cutIfLate(ctx context.Context, session *cryo.Session, errs []error) {
	for _, err := range errs {
		if isLate(err) && !session.Stats().Paused && ctx.Err() == nil && session.Err() == nil {
			if log, ok := o.closeLog.allow(); ok {
				log.Warnf("Closing session %d: %v", session.ID(), err)
			}
			cut, cancel := context.WithTimeout(ctx, 0)
			defer cancel()
			_ = session.Close(cut, "no acknowledgement in time") // it doesn't read: no time for a goodbye
			return
		}
	}
}
