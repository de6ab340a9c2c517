package tests

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// resender sends messages until each is acknowledged, on whatever session there
// is, as an application would.
type resender struct {
	mu       sync.Mutex
	todo     []string
	acked    []string
	unclear  map[string]int // sends of which nobody knows whether they were delivered
	sends    int
	progress chan struct{}      // closed and replaced with each acknowledgement
	session  *cryo.Session      // the newest; nil before the first
	came     chan struct{}      // closed and replaced with each session
	stop     context.CancelFunc // ends the workers
	working  sync.WaitGroup
}

func newResender(sessions <-chan *cryo.Session, texts []string, workers int) *resender {
	r := &resender{todo: slices.Clone(texts), unclear: make(map[string]int), progress: make(chan struct{}), came: make(chan struct{})}
	var ctx context.Context
	ctx, r.stop = context.WithCancel(context.Background())
	r.working.Go(func() {
		for {
			select {
			case s := <-sessions:
				r.mu.Lock()
				r.session = s
				close(r.came)
				r.came = make(chan struct{})
				r.mu.Unlock()
			case <-ctx.Done():
				return
			}
		}
	})
	for range workers {
		r.working.Go(func() { r.work(ctx) })
	}
	return r
}

func (r *resender) work(ctx context.Context) {
	for ctx.Err() == nil {
		r.mu.Lock()
		if len(r.todo) == 0 {
			r.mu.Unlock()
			return
		}
		text := r.todo[0]
		r.todo = r.todo[1:]
		session, came := r.session, r.came
		if session != nil {
			r.sends++
		}
		r.mu.Unlock()

		err := fmt.Errorf("nobody is connected")
		if session != nil {
			err = session.SendText(ctx, text)
		}
		r.mu.Lock()
		if err == nil {
			r.acked = append(r.acked, text)
			close(r.progress)
			r.progress = make(chan struct{})
		} else {
			r.todo = append(r.todo, text)
			if closed := (*cryo.PeerClosedError)(nil); session != nil && !errors.As(err, &closed) {
				r.unclear[text]++
			}
		}
		another := r.session != session
		r.mu.Unlock()
		if err != nil && !another {
			select {
			case <-came:
			case <-ctx.Done():
			}
		}
	}
}

// acknowledged gives what is acknowledged by now.
func (r *resender) acknowledged() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.acked)
}

// wait waits until so many are acknowledged.
func (r *resender) wait(t *testing.T, n int) {
	t.Helper()
	deadline := time.After(patience)
	for {
		r.mu.Lock()
		acked, progress := len(r.acked), r.progress
		r.mu.Unlock()
		if acked >= n {
			return
		}
		select {
		case <-progress:
		case <-deadline:
			require.FailNow(t, "too few are acknowledged", "%d of %d", acked, n)
		}
	}
}

// redial is a client that has a session whenever somebody listens, until the
// test's end.
func redial(t *testing.T, address string) <-chan *cryo.Session {
	t.Helper()
	sessions := make(chan *cryo.Session)
	ctx, cancel := context.WithCancel(context.Background())
	var dialling sync.WaitGroup
	id := cryo.NewSessionID()
	dialling.Go(func() {
		for ctx.Err() == nil {
			s, err := cryo.Dial(ctx, "ws://"+address, &cryo.DialOptions{Token: token, SessionID: id})
			if err != nil {
				select {
				case <-time.After(20 * time.Millisecond): // as any client would
				case <-ctx.Done():
				}
				continue
			}
			select {
			case sessions <- s:
				select {
				case <-s.Done():
				case <-ctx.Done():
				}
			case <-ctx.Done():
			}
			cut, cut2 := context.WithTimeout(context.Background(), time.Second)
			_ = s.Close(cut, "")
			cut2()
		}
	})
	t.Cleanup(func() { cancel(); dialling.Wait() })
	return sessions
}
