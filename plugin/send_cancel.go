package plugin

import (
	"context"
	"errors"
	"sync/atomic"
	"time"

	"github.com/redpanda-data/benthos/v4/public/service"
)

// Cancelling sends when the process stops. The engine first waits until the inputs have results
// for all their messages, and an output learns of the stop only when the engine gives up on that.

// errStopping is the error of sends that CancelSends has cancelled.
var errStopping = errors.New("send cancelled: the process is stopping")

// CancelSends cancels all sends of the outputs cryo that were made with these resources, and lets
// all later ones fail: none of their messages counts as delivered. Without it, a stop waits for a
// server that acknowledges nothing until three quarters of the engine's shutdown_timeout have
// passed, or until ack_timeout. Call it while the engine stops.
func CancelSends(res *service.Resources) { sendsOf(res).cancel(errStopping) }

// sends is the lifetime of the sends of all outputs cryo that share resources, such as those of a
// process.
type sends struct {
	ctx    context.Context //nolint:containedctx // it is the lifetime
	cancel context.CancelCauseFunc
}

type sendsKey struct{}

func sendsOf(res *service.Resources) *sends {
	ctx, cancel := context.WithCancelCause(context.Background())
	shared, _ := res.GetOrSetGeneric(sendsKey{}, &sends{ctx, cancel})
	return shared.(*sends)
}

// err returns errStopping once the sends are cancelled.
func (s *sends) err() error { return context.Cause(s.ctx) }

// bound returns a context that is also done when the sends are cancelled. Always call release.
func (s *sends) bound(ctx context.Context) (bounded context.Context, release func()) {
	bounded, cancel := context.WithCancelCause(ctx)
	stop := context.AfterFunc(s.ctx, func() { cancel(s.err()) })
	return bounded, func() {
		stop()
		cancel(nil)
	}
}

// After the sends are cancelled, an output fails this many batches immediately, more than inputs
// have in flight by default. Each further one waits before it fails, because something, such as a
// buffer, repeats them immediately, which must neither occupy a CPU nor flood the log.
const (
	immediateFailures = 1024
	failureWait       = 100 * time.Millisecond
)

// cancelledSends counts the batches that an output was to send after the sends were cancelled.
type cancelledSends struct{ n atomic.Int64 }

// fail waits until the next such batch may fail, or the context is done.
func (c *cancelledSends) fail(ctx context.Context) {
	if c.n.Add(1) <= immediateFailures {
		return
	}
	timer := time.NewTimer(failureWait)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}
