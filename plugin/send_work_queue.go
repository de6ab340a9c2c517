package plugin

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// Sending each message to one session in turn (send_to: any).

// workQueue gives out places at the sessions of a listener, in turn.
type workQueue struct {
	listener *listener
	limit    int // places of one session

	mu      sync.Mutex
	workers map[*cryo.Session]*worker
	ready   []*worker       // that have a free place; the first one's turn it is
	known   <-chan struct{} // the arrival up to which sessions are known
	waiting int             // for a place
	freed   chan struct{}   // closed and replaced when a place is free and somebody waits
}

// worker is a session that takes part. It is among the ready ones as long as it
// has a free place.
type worker struct {
	session *cryo.Session
	taken   int // places
}

func newWorkQueue(ln *listener, limit int) *workQueue {
	return &workQueue{listener: ln, limit: limit, workers: make(map[*cryo.Session]*worker), freed: make(chan struct{})}
}

// take takes a place. As long as all are taken it waits. Where there is no session
// at all, it waits for one for as long as patience says, and gives errNobody.
func (q *workQueue) take(ctx context.Context, patience time.Duration) (*worker, error) {
	var late <-chan time.Time // runs while there is no session
	for {
		arrival := q.listener.arrival()
		w, freed, nobody := q.tryTake(arrival)
		switch {
		case w != nil:
			return w, nil
		case !nobody:
			late = nil
		case patience == 0:
			q.stopWaiting()
			return nil, errNobody
		case late == nil:
			late = time.After(patience)
		}
		var err error
		select {
		case <-arrival:
		case <-freed:
		case <-late:
			err = errNobody
		case <-ctx.Done():
			err = context.Cause(ctx)
		}
		q.stopWaiting()
		if err != nil {
			return nil, err
		}
	}
}

// tryTake takes a place if one is free. If not, the caller waits from now on: for
// a free place, or for an arrival if nobody is there.
func (q *workQueue) tryTake(arrival <-chan struct{}) (w *worker, freed <-chan struct{}, nobody bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.known != arrival {
		q.known = arrival
		q.ready = slices.DeleteFunc(q.ready, q.forgotten)
		q.welcome()
	}
	for len(q.ready) > 0 {
		w := q.ready[0]
		q.ready = q.ready[1:]
		if q.forgotten(w) {
			continue
		}
		if w.taken++; w.taken < q.limit {
			q.ready = append(q.ready, w)
		}
		return w, nil, false
	}
	q.waiting++
	return nil, q.freed, len(q.workers) == 0
}

// welcome takes in those who have come.
func (q *workQueue) welcome() {
	for _, s := range q.listener.sessions() {
		if q.workers[s] == nil {
			w := &worker{session: s}
			q.workers[s] = w
			q.ready = append(q.ready, w)
		}
	}
}

// forgotten forgets a worker that has gone.
func (q *workQueue) forgotten(w *worker) bool {
	gone := w.session.Err() != nil
	if gone {
		delete(q.workers, w.session)
	}
	return gone
}

func (q *workQueue) stopWaiting() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.waiting--
}

// free gives a place back.
func (q *workQueue) free(w *worker) {
	q.mu.Lock()
	defer q.mu.Unlock()
	w.taken--
	switch {
	case w.taken < q.limit-1: // it is among the ready ones
	case !q.forgotten(w):
		q.ready = append(q.ready, w)
	}
	if q.waiting > 0 {
		close(q.freed)
		q.freed = make(chan struct{})
	}
}

// share sends each message to one session, in turn, and waits for all of them.
func (o *serverOutput) share(ctx context.Context, messages []parcel, errs []error) {
	var sending sync.WaitGroup
	for _, i := range indexesOf(errs, isNil) {
		w, err := o.queue.take(ctx, o.patience())
		if err != nil {
			// Each of those behind it would wait as long.
			o.failRest(errs[i:], err)
			break
		}
		wait := o.begin(ctx, w.session, messages[i:i+1], errs[i:i+1]) // here, so that messages leave in order
		sending.Go(func() { o.handOn(ctx, w, messages[i:i+1], errs[i:i+1], wait) })
	}
	sending.Wait()
}

// patience is how long a session is waited for.
func (o *serverOutput) patience() time.Duration {
	if o.noSession == noSessionWait {
		return o.ackTimeout
	}
	return 0
}

func (o *serverOutput) failRest(errs []error, err error) {
	for i := range errs {
		if errs[i] == nil {
			errs[i] = o.unlessDropped(err)
		}
	}
}

// unlessDropped counts a message as delivered that nobody was there for.
func (o *serverOutput) unlessDropped(err error) error {
	if o.noSession == noSessionDrop && errors.Is(err, errNobody) {
		return nil
	}
	return err
}

// handOn waits for a session's acknowledgement of a message, and hands it on to the
// next one when the session has gone. One that lets the time for it pass is closed,
// so that it gets no more.
func (o *serverOutput) handOn(ctx context.Context, w *worker, message []parcel, result []error, wait func()) {
	for gone := 1; ; gone++ {
		wait()
		err := result[0]
		if err != nil {
			o.cutIfLate(ctx, w.session, result)
		}
		o.queue.free(w)
		switch {
		case err == nil || ctx.Err() != nil:
			return
		case !isLate(err) && !isEnd(err):
			return // it is the message that the session didn't take
		case gone == maxSessions:
			result[0] = errLeft(err)
			return
		}
		o.log.Debugf("Session %d has gone without acknowledging a message, which goes to another: %v", w.session.ID(), err)
		if w, result[0] = o.queue.take(ctx, o.patience()); result[0] != nil {
			result[0] = o.unlessDropped(result[0])
			return
		}
		wait = o.begin(ctx, w.session, message, result)
	}
}
