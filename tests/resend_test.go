package tests

import (
	"context"
	"errors"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/testkit"
)

// resender is an application that sends messages on its newest session, each until it
// is acknowledged.
type resender struct {
	mu             sync.Mutex
	todo           []string
	acked          []string
	maybeDelivered map[string]int // failed sends that may have been delivered
	sends          int
	progress       chan struct{}      // closed and replaced with each acknowledgement
	session        *cryo.Session      // the newest; nil before the first
	renewed        chan struct{}      // closed and replaced with each session
	stop           context.CancelFunc // ends the workers
	working        sync.WaitGroup
}

// newResender sends texts with a number of workers, until stop is called.
func newResender(sessions <-chan *cryo.Session, texts []string, workers int) *resender {
	r := &resender{todo: slices.Clone(texts), maybeDelivered: make(map[string]int), progress: make(chan struct{}), renewed: make(chan struct{})}
	var ctx context.Context
	ctx, r.stop = context.WithCancel(context.Background())
	r.working.Go(func() {
		for {
			select {
			case s := <-sessions:
				r.mu.Lock()
				r.session = s
				close(r.renewed)
				r.renewed = make(chan struct{})
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

// work sends one message after the other until all are acknowledged.
func (r *resender) work(ctx context.Context) {
	for ctx.Err() == nil {
		r.mu.Lock()
		if len(r.todo) == 0 {
			r.mu.Unlock()
			return
		}
		text := r.todo[0]
		r.todo = r.todo[1:]
		session, renewed := r.session, r.renewed
		if session != nil {
			r.sends++
		}
		r.mu.Unlock()

		err := errors.New("no session yet")
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
				r.maybeDelivered[text]++
			}
		}
		another := r.session != session
		r.mu.Unlock()
		if err != nil && !another {
			select {
			case <-renewed:
			case <-ctx.Done():
			}
		}
	}
}

// acknowledged returns the messages that are acknowledged up to now.
func (r *resender) acknowledged() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.acked)
}

// wait waits until n messages are acknowledged.
func (r *resender) wait(t *testing.T, n int) {
	t.Helper()
	deadline := time.After(testkit.Patience)
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
			require.FailNow(t, "timed out waiting for acknowledgements", "%d of %d", acked, n)
		}
	}
}
