package plugin

import (
	"context"
	"slices"
	"sync"
	"time"

	"github.com/redpanda-data/benthos/v4/public/service"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// Sending each message to one session in turn (send_to: any).

// workQueue is a route that sends each message to one of a listener's sessions, in turn.
// Callers of next are served in the order of their calls.
type workQueue struct {
	*sender
	listener  *listener
	limit     int // number of slots of a worker: the messages that it may have in flight
	noSession string
	log       *service.Logger

	turn       chan struct{} // capacity 1; a lock that serializes callers of next
	emptySince time.Time     // when it was first noticed that there is no session; zero if there is one; guarded by turn
	released   chan struct{} // capacity 1; signals that a slot was released

	mu      sync.Mutex
	workers map[*cryo.Session]*worker
	ready   []*worker       // workers with a free slot, beginning with the next in turn
	arrival <-chan struct{} // the listener's arrival channel when workers was last updated
}

// worker is a session that receives messages from a workQueue.
type worker struct {
	session  *cryo.Session
	inFlight int // number of slots in use
}

func newWorkQueue(s *sender, ln *listener, to *targetConfig, log *service.Logger) *workQueue {
	return &workQueue{
		sender: s, listener: ln, limit: to.sessionInFlight, noSession: to.noSession, log: log,
		turn: make(chan struct{}, 1), released: make(chan struct{}, 1), workers: make(map[*cryo.Session]*worker),
	}
}

// next acquires a slot of a worker for one message. If all slots are in use, it waits for one.
// If no session is connected, no_session determines whether it waits for a session.
func (q *workQueue) next(ctx context.Context, _, _ int) (*cryo.Session, int, error) {
	began := time.Now()
	select {
	case q.turn <- struct{}{}:
		defer func() { <-q.turn }()
	case <-ctx.Done():
		return nil, 0, context.Cause(ctx)
	}
	for ctx.Err() == nil {
		arrival := q.listener.arrival()
		session, isEmpty := q.acquire(arrival)
		if session != nil {
			q.emptySince = time.Time{}
			return session, 1, nil
		}
		var timeout <-chan time.Time
		if isEmpty {
			left, err := q.timeToWait(began)
			if err != nil {
				return nil, 0, err
			}
			timeout = time.After(left)
		}
		select {
		case <-arrival:
		case <-q.released:
		case <-timeout:
		case <-ctx.Done():
		}
	}
	return nil, 0, context.Cause(ctx)
}

// timeToWait returns how much longer a caller of next may wait for a session. began is the time
// of its call. The wait ends ack_timeout after the call, or after the end of the last session
// if that was later. timeToWait returns an error if that time has passed, or if no_session does
// not allow waiting.
func (q *workQueue) timeToWait(began time.Time) (time.Duration, error) {
	if q.emptySince.IsZero() {
		q.emptySince = time.Now()
	}
	if began.Before(q.emptySince) {
		began = q.emptySince
	}
	left := time.Until(began.Add(q.ackTimeout))
	switch {
	case q.noSession == noSessionDrop:
		return 0, errDropped
	case q.noSession == noSessionReject || left <= 0:
		return 0, errNoClient
	default:
		return left, nil
	}
}

// acquire acquires a free slot, and returns the session of its worker. If there is none,
// isEmpty reports whether that is because no session is connected. arrival is the listener's
// current arrival channel.
func (q *workQueue) acquire(arrival <-chan struct{}) (session *cryo.Session, isEmpty bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.arrival != arrival {
		q.arrival = arrival
		q.updateWorkersLocked()
	}
	for len(q.ready) > 0 {
		w := q.ready[0]
		q.ready = q.ready[1:]
		if q.removeIfEndedLocked(w) {
			continue
		}
		if w.inFlight++; w.inFlight < q.limit {
			q.ready = append(q.ready, w)
		}
		return w.session, false
	}
	return nil, len(q.workers) == 0
}

// updateWorkersLocked removes sessions to which nothing can be sent any more, and adds new ones.
func (q *workQueue) updateWorkersLocked() {
	q.ready = slices.DeleteFunc(q.ready, q.removeIfEndedLocked)
	for _, s := range q.listener.sessions() {
		if q.workers[s] == nil {
			w := &worker{session: s}
			q.workers[s] = w
			q.ready = append(q.ready, w)
		}
	}
}

func (q *workQueue) removeIfEndedLocked(w *worker) bool {
	ended := isEnding(w.session)
	if ended {
		delete(q.workers, w.session)
	}
	return ended
}

// finished releases the slot of a message. If the session has ended or timed out, the message
// is to be sent on another one. A session that has timed out is closed.
func (q *workQueue) finished(ctx context.Context, session *cryo.Session, messages []*outMessage) (lost []*outMessage) {
	err := messages[0].err
	if isLate(err) {
		q.late.close(ctx, session, err)
	}
	q.release(session)
	if !isLate(err) && !isSessionEnd(err) {
		return nil
	}
	q.log.With("session", session.ID(), "error", err).Debug("Sending an unacknowledged message to another session")
	return messages
}

// release releases a slot of a session's worker, which may have been removed.
func (q *workQueue) release(session *cryo.Session) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if w := q.workers[session]; w != nil {
		w.inFlight--
		if !q.removeIfEndedLocked(w) && w.inFlight == q.limit-1 {
			q.ready = append(q.ready, w)
		}
	}
	select {
	case q.released <- struct{}{}:
	default:
	}
}
