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

// workQueue is the route of messages that go to the sessions of a listener in turn, each to
// one. Callers of next are served in order of arrival.
type workQueue struct {
	*sender
	listener  *listener
	limit     int // slots of a worker
	noSession string
	log       *service.Logger

	turn       chan struct{} // capacity 1; held by the caller of next that is served
	emptySince time.Time     // when next found no session for the first time since it acquired a slot; owned by the holder of turn
	released   chan struct{} // capacity 1; signals the holder of turn that a slot was released

	mu      sync.Mutex
	workers map[*cryo.Session]*worker
	ready   []*worker       // those with a free slot, the next one first
	arrival <-chan struct{} // of the listener: sessions that connected before it are in workers
}

// worker is a session that receives messages.
type worker struct {
	session  *cryo.Session
	inFlight int // slots in use
}

func newWorkQueue(s *sender, ln *listener, to *targetConfig, log *service.Logger) *workQueue {
	return &workQueue{
		sender: s, listener: ln, limit: to.sessionInFlight, noSession: to.noSession, log: log,
		turn: make(chan struct{}, 1), released: make(chan struct{}, 1), workers: make(map[*cryo.Session]*worker),
	}
}

// next acquires a slot of a worker, for one message. If all are in use, it waits for one; if
// no session is connected, for one to connect, as no_session has it.
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

// timeToWait returns how long a caller of next still waits for a session to connect: until
// ack_timeout after its call, or after the end of the last session if that was later. Then, or
// if no_session allows no wait, it returns the error of the message.
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
		return 0, errNobody
	default:
		return left, nil
	}
}

// acquire acquires a slot if one is free. If not, isEmpty reports that no session is connected.
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

// updateWorkersLocked removes the sessions that have ended and adds those that have connected.
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
	ended := w.session.Err() != nil
	if ended {
		delete(q.workers, w.session)
	}
	return ended
}

// finished releases the slot of a message. One whose worker has ended or is late goes to
// another; a late worker is closed, so that it receives no more.
func (q *workQueue) finished(ctx context.Context, session *cryo.Session, messages []*outMessage) (lost []*outMessage) {
	err := messages[0].err
	if isLate(err) {
		q.closeLate(ctx, session, err)
	}
	q.release(session)
	if !isLate(err) && !isEnd(err) {
		return nil
	}
	q.log.With("session", session.ID(), "error", err).Debug("Sending an unacknowledged message to another session")
	return messages
}

// release releases a slot. The worker may have been removed.
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
