package plugin

import (
	"fmt"
	"sync/atomic"
	"time"

	"github.com/redpanda-data/benthos/v4/public/service"
)

// Closing the sessions of a listener over time when the process stops. When the engine stops a
// pipeline, its inputs must not return another message, so sessions can be drained only before that,
// during the engine's shutdown_delay, while pipelines still run. drain_period is the last part of it.

const fieldDrainPeriod = "drain_period"

var drainPeriodField = durationOrZero(fieldDrainPeriod)

// shutdownDelay is the engine's shutdown_delay; nil: not known.
var shutdownDelay atomic.Pointer[time.Duration]

// SetShutdownDelay sets the time for which pipelines continue after DrainListeners: the engine's
// shutdown_delay. A drain_period that is longer is refused then. Call it before pipelines are made.
// Without it, drain_period has no effect, and a listener that has one logs that.
func SetShutdownDelay(delay time.Duration) { shutdownDelay.Store(&delay) }

// DrainListeners closes the listeners with a drain_period that were made with these resources, and
// their sessions one after the other, so that both are done when the engine's shutdown_delay is over. It
// returns immediately. Call it when shutdown_delay begins, after SetShutdownDelay.
func DrainListeners(res *service.Resources) {
	listenersOf(res).setKeeping(false)
	if delay := shutdownDelay.Load(); delay != nil {
		listenersOf(res).drain(*delay)
	}
}

// checkDrainPeriod returns an error if the period does not fit into the engine's shutdown_delay.
func checkDrainPeriod(period time.Duration) error {
	if delay := shutdownDelay.Load(); delay != nil && period > max(0, *delay) {
		return fmt.Errorf("field %s is %v, but shutdown_delay of the configuration is %v: sessions can only be closed one after the other while the pipeline still runs, so set shutdown_delay to at least %v",
			fieldDrainPeriod, period, *delay, period)
	}
	return nil
}

func (l *listeners) drain(delay time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, ln := range l.byAddr {
		if len(ln.users) > 0 && ln.settings.DrainPeriod > 0 { // close waits for drains once there are no users
			ln.drains.Go(func() { ln.drain(delay - ln.settings.DrainPeriod) })
		}
	}
}

// drain waits, stops accepting clients, and closes the sessions over drain_period. It returns early
// when the listener closes.
func (ln *listener) drain(wait time.Duration) {
	select {
	case <-time.After(wait):
	case <-ln.draining.Done():
		return
	}
	ln.refuse()
	ln.log.With("address", ln.address, "sessions", len(ln.server.Sessions()), "period", ln.settings.DrainPeriod).
		Info("Draining: no client can connect, and sessions are closed one by one")
	_ = ln.server.DrainOver(ln.draining, ln.settings.DrainPeriod) // close ends the remaining sessions
}
