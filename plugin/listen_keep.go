package plugin

import (
	"context"
	"net"
	"time"

	"github.com/redpanda-data/benthos/v4/public/service"
)

// Keeping a listener while its pipeline is replaced. The engine ends the old pipeline, with all its
// components, before it builds the new one.

// keepTimeout is how long a listener without components waits for another one.
const keepTimeout = 5 * time.Second

// KeepListeners lets the listeners that are made with these resources stay open for 5 s after their last
// component has closed. A component with the same settings that starts within that time, such as one of a
// changed pipeline, takes over their sessions and unacknowledged messages. Call it in a process that replaces
// pipelines while it runs. DrainListeners and CloseListeners end it: call CloseListeners before the process exits.
func KeepListeners(res *service.Resources) { listenersOf(res).setKeeping(true) }

// CloseListeners closes the listeners that wait for a component, and returns when they have closed
// their sessions, which takes at most 10 s. Call it when the pipelines have ended, before the
// process exits: otherwise acknowledgements that are not written yet are lost, and clients send
// those messages again.
func CloseListeners(res *service.Resources) { listenersOf(res).closeKept() }

// setKeeping sets whether listeners without components wait for others. If not, those that wait close.
func (l *listeners) setKeeping(keeps bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.keeps = keeps
	for _, ln := range l.byAddr {
		if ln.kept != nil && !keeps {
			ln.kept.Reset(0)
		}
	}
}

func (l *listeners) closeKept() {
	l.setKeeping(false)
	l.mu.Lock()
	var closing []<-chan struct{}
	for _, ln := range l.byAddr {
		if len(ln.users) == 0 && ln.server != nil { // it does not start
			closing = append(closing, ln.closed)
		}
	}
	l.mu.Unlock()
	for _, closed := range closing {
		<-closed
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
		if expired { // otherwise it was adopted, or is closed by adopt
			_ = l.close(context.Background(), ln)
		}
	})
}

// adopt makes a component the first one of a listener that is kept. If their settings differ, it closes
// the listener and returns false. The mutex must be held.
func (l *listeners) adopt(ln *listener, c *serverComponent) bool {
	if ln.kept == nil {
		return false // it starts or closes
	}
	if len(ln.settings.differences(c.settings)) > 0 {
		l.closeNow(ln)
		return false
	}
	ln.kept.Stop()
	ln.kept = nil
	ln.users = []*serverComponent{c}
	ln.authorizeWith(c)
	ln.metrics.reportAs(c.meter)
	return true
}

// closingOnPort returns a listener that closes on the port of an address, which may be the same address
// in another spelling, or nil. One that is kept begins to close. The mutex must be held.
func (l *listeners) closingOnPort(address string) *listener {
	_, port, _ := net.SplitHostPort(address)
	for other, ln := range l.byAddr {
		if _, p, _ := net.SplitHostPort(other); p != port || len(ln.users) > 0 || ln.server == nil { // it starts
			continue
		}
		if ln.kept != nil {
			l.closeNow(ln)
		}
		return ln
	}
	return nil
}

// closeNow begins to close a listener that is kept, which takes at most closeTime. The channel
// closed of the listener reports the end. The mutex must be held.
func (l *listeners) closeNow(ln *listener) {
	ln.kept.Stop()
	ln.kept = nil
	go func() { _ = l.close(context.Background(), ln) }()
}
