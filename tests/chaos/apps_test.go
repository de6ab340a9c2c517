//go:build linux

package chaos

import (
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// app is an application that sends units, each until it is acknowledged.
type app struct {
	number  int
	ledger  *ledger
	client  *cryo.Client
	random  *rand.Rand
	streams bool
	acked   func(ids []int) // called after each acknowledgement
}

// apps are the applications of all routes.
type apps struct {
	t        *testing.T
	ctx      context.Context
	paused   atomic.Bool
	busy     atomic.Int64 // applications that have unacknowledged units
	failed   atomic.Int64 // sends that returned an error
	rejected atomic.Int64 // of these, by an ERROR
	running  sync.WaitGroup
	clients  []*cryo.Client
}

func newApps(t *testing.T) *apps {
	ctx, cancel := context.WithCancel(context.Background())
	a := &apps{t: t, ctx: ctx}
	t.Cleanup(func() {
		cancel()
		a.running.Wait()
	})
	return a
}

// run runs an application until the test's end.
func (a *apps) run(url string, credentials *credentials, streams bool, l *ledger, random *rand.Rand, acked func(ids []int)) {
	client, err := cryo.NewClient(url, &cryo.ClientOptions{
		DialOptions: cryo.DialOptions{
			SessionOptions: cryo.SessionOptions{HeartbeatInterval: heartbeat, CloseTimeout: time.Second, SendOnly: true},
			ConnectTimeout: connectTimeout,
		},
		BeforeDial: func(_ context.Context, options *cryo.DialOptions) error {
			options.Token, options.TLS = credentials.clientToken(), credentials.clientTLS()
			return nil
		},
	})
	require.NoError(a.t, err)
	app := &app{number: len(a.clients), ledger: l, client: client, random: random, streams: streams, acked: acked}
	a.clients = append(a.clients, client)
	a.running.Go(func() {
		a.work(app)
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		_ = client.Close(ctx, "")
	})
}

// work sends units with pauses between them.
func (a *apps) work(app *app) {
	for {
		pause := time.Duration(app.random.IntN(200)) * time.Millisecond
		select {
		case <-time.After(pause):
		case <-a.ctx.Done():
			return
		}
		a.busy.Add(1)
		if !a.paused.Load() {
			if app.streams {
				a.sendStream(app)
			} else {
				a.sendBatch(app)
			}
		}
		a.busy.Add(-1)
	}
}

// sendBatch sends messages until all are acknowledged.
func (a *apps) sendBatch(app *app) {
	var ids []int
	var batch []cryo.OutMessage
	for range 1 + app.random.IntN(20) {
		kind := cryo.KindText
		if app.random.IntN(3) == 0 {
			kind = cryo.KindBinary
		}
		id, contents := app.ledger.unit(app.number, kind, app.random)
		ids, batch = append(ids, id), append(batch, cryo.OutMessage{Kind: kind, Payload: contents})
	}
	for len(batch) > 0 && a.ctx.Err() == nil {
		err := app.client.Send(a.ctx, batch)
		var failed *cryo.BatchError
		if err != nil && !errors.As(err, &failed) {
			assert.NoError(a.t, err, "Send returns a BatchError")
			return
		}
		var acked, leftIDs []int
		var left []cryo.OutMessage
		for i, id := range ids {
			if failed == nil || failed.Errs[i] == nil {
				acked = append(acked, id)
				continue
			}
			a.count(failed.Errs[i])
			left, leftIDs = append(left, batch[i]), append(leftIDs, id)
		}
		batch, ids = left, leftIDs
		app.acked(acked)
	}
}

// sendStream sends a stream until it is acknowledged.
func (a *apps) sendStream(app *app) {
	id, contents := app.ledger.unit(app.number, cryo.KindStream, app.random)
	for a.ctx.Err() == nil {
		session, err := app.client.Await(a.ctx)
		if err != nil {
			return // at the end of the test
		}
		err = session.SendStream(a.ctx, &slowReader{contents, len(contents), app.random}, &cryo.StreamOptions{Name: streamName(id)})
		if err == nil {
			app.acked([]int{id})
			return
		}
		a.count(err)
		select { // as applications do between tries
		case <-time.After(50 * time.Millisecond):
		case <-a.ctx.Done():
		}
	}
}

// slowReader reads contents in some 20 parts, with pauses, so that faults interrupt streams.
type slowReader struct {
	left   []byte
	size   int
	random *rand.Rand
}

func (r *slowReader) Read(p []byte) (int, error) {
	if len(r.left) == 0 {
		return 0, io.EOF
	}
	time.Sleep(time.Duration(r.random.IntN(30)) * time.Millisecond)
	n := copy(p[:min(len(p), 1+r.size/20)], r.left)
	r.left = r.left[n:]
	return n, nil
}

func (a *apps) count(err error) {
	if a.ctx.Err() != nil {
		return
	}
	a.failed.Add(1)
	if rejection := (*cryo.RejectedError)(nil); errors.As(err, &rejection) {
		a.rejected.Add(1)
	}
}

// pause lets no application begin to send, or all begin again.
func (a *apps) pause(paused bool) { a.paused.Store(paused) }

// connect waits until each application is connected.
func (a *apps) connect(ctx context.Context) {
	for _, c := range a.clients {
		_, err := c.Await(ctx)
		assert.NoError(a.t, err)
	}
}

// idle reports whether everything that was sent is acknowledged, when sending is paused.
func (a *apps) idle() bool { return a.busy.Load() == 0 }
