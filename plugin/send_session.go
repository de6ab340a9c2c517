package plugin

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"sync"
	"time"

	"github.com/redpanda-data/benthos/v4/public/service"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// Sending messages to one session, or the same messages to several, and waiting for the
// acknowledgements.

// send sends messages to a session in order, and waits for their acknowledgements. It skips
// messages that already have an error.
func (s *sender) send(ctx context.Context, session *cryo.Session, messages []*outMessage) {
	if messages = withError(messages, isNil); len(messages) > 0 {
		s.begin(ctx, session, messages)()
	}
}

// begin queues messages for a session, up to the first stream. The function that it returns
// sends the other messages in order, and waits for all acknowledgements. A stream is sent when
// the messages before it have been acknowledged, and the messages after it wait for its
// acknowledgement. After a timeout, the remaining messages are sent concurrently, because each
// of them may time out as well.
func (s *sender) begin(ctx context.Context, session *cryo.Session, messages []*outMessage) (wait func()) {
	first, rest := nextRun(messages)
	waitForFirst := s.beginRun(ctx, session, first)
	if len(rest) == 0 {
		return waitForFirst
	}
	return func() {
		waitForFirst()
		late := slices.ContainsFunc(first, isLateMessage)
		var sideBySide sync.WaitGroup
		defer sideBySide.Wait()
		for run, rest := nextRun(rest); len(run) > 0; run, rest = nextRun(rest) {
			wait := s.beginRun(ctx, session, run)
			if late {
				sideBySide.Go(wait)
			} else {
				wait()
				late = slices.ContainsFunc(run, isLateMessage)
			}
		}
	}
}

// nextRun splits off the messages that are sent together, which are either one stream, or all
// messages before the next stream.
func nextRun(messages []*outMessage) (run, rest []*outMessage) {
	n := slices.IndexFunc(messages, isStream)
	switch n {
	case -1:
		n = len(messages)
	case 0:
		n = 1
	}
	return messages[:n], messages[n:]
}

func isStream(m *outMessage) bool { return m.Kind == cryo.KindStream }

// beginRun queues messages that are sent together. The function that it returns waits for their
// acknowledgements. If the run is a stream, that function also sends it.
func (s *sender) beginRun(ctx context.Context, session *cryo.Session, run []*outMessage) (wait func()) {
	if isStream(run[0]) {
		return func() { run[0].err = s.sendStream(ctx, session, run[0]) }
	}
	queued := s.queue(run, session)
	return func() {
		queued.await(ctx, func(_ *cryo.Session, errs []error) {
			for i, m := range run {
				m.err = nil
				if errs != nil {
					m.err = errs[i]
				}
			}
		})
	}
}

// queued holds messages that are queued for one or more sessions. None of them is a stream.
type queued struct {
	*sender
	messages []*outMessage
	waits    []ackWait
	one      [1]ackWait // backing array of waits for a single session
	began    time.Time
	late     bool // whether an acknowledgement was late
}

// ackWait is the wait for the acknowledgements of one session.
type ackWait struct {
	session *cryo.Session
	pending *cryo.Pending
	clock   cryo.AckClock
	settled bool // whether its result has been reported
}

// queue queues messages for each of the sessions, which share the payloads. Always call await
// on the result.
func (s *sender) queue(messages []*outMessage, sessions ...*cryo.Session) *queued {
	frames := make([]cryo.OutMessage, len(messages))
	for i, m := range messages {
		frames[i] = m.OutMessage
	}
	q := &queued{sender: s, messages: messages}
	if q.waits = q.one[:]; len(sessions) != 1 {
		q.waits = make([]ackWait, len(sessions))
	}
	q.began = s.metrics.inFlightAdd(len(messages) * len(sessions))
	for i, session := range sessions {
		q.waits[i] = ackWait{session: session, pending: session.Queue(frames), clock: session.AckClock()}
	}
	return q
}

// await waits for the acknowledgements. It calls result once for each session, never
// concurrently. A session that times out is reported even while an earlier one is still waited
// for. errs contains the errors of the messages; it is nil if the session has acknowledged all
// of them.
func (q *queued) await(ctx context.Context, result func(session *cryo.Session, errs []error)) {
	ticker := time.NewTicker(max(q.ackTimeout/2, 1))
	defer ticker.Stop()
	for i := range q.waits {
		w := &q.waits[i]
		for done := false; !done && !w.settled; {
			select {
			case <-w.pending.Done():
				done = true
			case <-ctx.Done():
				done = true
			case <-ticker.C:
				q.tick(q.waits[i:], result)
			}
		}
		if !w.settled {
			q.settle(w, w.pending.Wait(ctx), result)
		}
	}
	q.metrics.inFlightDone(ctx.Err() == nil && !q.late, len(q.messages)*len(q.waits), q.began)
}

// settle ends a wait and reports its result.
func (q *queued) settle(w *ackWait, err error, result func(session *cryo.Session, errs []error)) {
	w.settled = true
	q.late = q.late || isLate(err)
	errs := errorsOf(err, len(q.messages))
	q.metrics.countResults(q.messages, errs)
	result(w.session, errs)
}

// tick settles the waits that have timed out.
func (q *queued) tick(waits []ackWait, result func(session *cryo.Session, errs []error)) {
	timedOut, cancel := context.WithDeadlineCause(context.Background(), time.Time{},
		fmt.Errorf("%w after %s (%v)", errLate, fieldAckTimeout, q.ackTimeout))
	defer cancel()
	for i := range waits {
		w := &waits[i]
		select {
		case <-w.pending.Done():
		default:
			if !w.settled && w.clock.Tick() {
				q.settle(w, w.pending.Wait(timedOut), result)
			}
		}
	}
}

// errorsOf returns the errors of the messages, by index, from an error of [cryo.Pending.Wait].
// It returns nil only without an error. An error that names no messages is that of each.
func errorsOf(err error, messages int) []error {
	if err == nil {
		return nil
	}
	if failed, ok := errors.AsType[*cryo.BatchError](err); ok {
		return failed.Errs
	}
	return slices.Repeat([]error{err}, messages)
}

// sendStream sends a message as a stream, and waits for its acknowledgement.
func (s *sender) sendStream(ctx context.Context, session *cryo.Session, m *outMessage) error {
	s.metrics.streamsOpen.add(1)
	defer s.metrics.streamsOpen.add(-1)
	err := session.SendStream(ctx, bytes.NewReader(m.Payload), &cryo.StreamOptions{
		Name:        m.streamName,
		ChunkBytes:  s.chunkBytes,
		StepTimeout: s.ackTimeout,
	})
	if errors.Is(err, cryo.ErrStepTimeout) {
		err = fmt.Errorf("%w: %w after %s (%v)", err, errLate, fieldAckTimeout, s.ackTimeout)
	}
	s.metrics.countResults([]*outMessage{m}, []error{err})
	return err
}

// errLate is the error of an acknowledgement that was not received in time.
var errLate = errors.New("acknowledgement timed out")

func isLate(err error) bool { return errors.Is(err, errLate) }

func isLateMessage(m *outMessage) bool { return isLate(m.err) }

// isSessionEnd reports whether an error means that a session has ended before it acknowledged a
// message.
func isSessionEnd(err error) bool { return errors.Is(err, net.ErrClosed) }

// lateSessions closes the sessions of an output whose acknowledgements are late. It owns the
// goroutines that do so, each of which ends with its session.
type lateSessions struct {
	log     limitedLog
	timeout time.Duration // ack_timeout
	closed  *service.MetricCounter
	closing sync.WaitGroup

	mu     sync.Mutex
	paused map[*cryo.Session]time.Time // when sessions with paused reads were late for the first time
}

func newLateSessions(log *service.Logger, timeout time.Duration, closed *service.MetricCounter) *lateSessions {
	return &lateSessions{log: newLimitedLog(log), timeout: timeout, closed: closed, paused: make(map[*cryo.Session]time.Time)}
}

// close closes a session after a timeout, so that it delays others only once, and not with each
// message. A session whose reads are paused (max_buffer_bytes, max_messages_per_second,
// max_bytes_per_second) may be late for longer, because the acknowledgement may have arrived
// without having been read. late is the error of the timeout.
//
// It does not wait for the close handshake, which the session's close timeout bounds, and in which
// the client may still acknowledge. The close code lets the client connect again.
func (l *lateSessions) close(ctx context.Context, session *cryo.Session, late error) {
	if ctx.Err() != nil || session.Err() != nil {
		return
	}
	if stats := session.Stats(); (stats.Paused || stats.Throttled) && l.spares(session) {
		return
	}
	if log, ok := l.log.allow(); ok {
		log.With("session", session.ID(), "error", late).Warn("Closing session: acknowledgement timed out")
	}
	l.closed.Incr(1)
	l.closing.Go(func() { _ = session.CloseForRetry(context.Background(), "acknowledgement timed out") })
	<-session.Context().Done() // it has begun to end: nothing more is sent on it
}

// maxPaused is the time for which a session with paused reads may be late, in units of ack_timeout.
// A client that sends more than is received keeps its reads paused, and so would delay others
// forever. After twice that time, it begins anew.
const maxPaused = 10

// spares reports whether a session that is late and whose reads are paused is not closed yet.
func (l *lateSessions) spares(session *cryo.Session) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	first, known := l.paused[session]
	if !known {
		context.AfterFunc(session.Context(), func() {
			l.mu.Lock()
			defer l.mu.Unlock()
			delete(l.paused, session)
		})
	}
	if now := time.Now(); !known || now.Sub(first) > 2*maxPaused*l.timeout {
		first = now
		l.paused[session] = now
	}
	return time.Since(first) < (maxPaused-1)*l.timeout // the first timeout was before
}

// wait waits for the sessions that are closing. close must not be called any more.
func (l *lateSessions) wait() { l.closing.Wait() }
