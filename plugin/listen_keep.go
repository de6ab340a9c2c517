package plugin

import (
	"context"
	"time"

	"github.com/redpanda-data/benthos/v4/public/service"
)

// Keeping a listener while its pipeline is replaced. The engine ends the old pipeline, with all its
// components, before it builds the new one.

// keepTimeout is how long a listener without components waits for another one.
const keepTimeout = 5 * time.Second

// KeepListeners lets the listeners that are made with these resources stay open for 5 s after their last
// component has closed. A component with the same settings that starts meanwhile, as one of a changed
// pipeline does, has their sessions and what these have sent. Call it in a process that replaces pipelines
// while it runs. DrainListeners ends that, and closes those that wait for a component, so that a process that
// stops closes its listeners at once.
func KeepListeners(res *service.Resources) { listenersOf(res).setKeeping(true) }

func (l *listeners) setKeeping(keeps bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.keeps = keeps
	for _, ln := range l.byAddr {
		if !keeps && ln.kept != nil {
			l.endKeeping(ln)
		}
	}
}

// keep closes a listener without components after keepTimeout, unless a component adopts it. The
// messages of its sessions wait: they are neither acknowledged nor rejected. The mutex must be held.
func (l *listeners) keep(ln *listener) {
	ln.kept = time.AfterFunc(keepTimeout, func() {
		l.mu.Lock()
		expired := ln.kept != nil
		ln.kept = nil
		l.mu.Unlock()
		if expired { // otherwise it was adopted, or endKeeping closes it
			_ = l.close(context.Background(), ln)
		}
	})
}

// endKeeping closes a listener that is kept, in the background and in at most closeTime. The mutex must be held.
func (l *listeners) endKeeping(ln *listener) {
	ln.kept.Stop()
	ln.kept = nil
	go func() { _ = l.close(context.Background(), ln) }()
}

// adopt makes a component the first one of a listener that is kept. If their settings differ, it closes
// the listener and returns false. The mutex must be held.
func (l *listeners) adopt(ln *listener, c *serverComponent) bool {
	if ln.kept == nil {
		return false // it starts or closes
	}
	if len(ln.settings.differences(c.settings)) > 0 {
		l.endKeeping(ln) // c waits for it
		return false
	}
	ln.kept.Stop()
	ln.kept = nil
	ln.users = []*serverComponent{c}
	ln.authorizeWith(c)
	ln.metrics.reportAs(c.meter)
	return true
}
