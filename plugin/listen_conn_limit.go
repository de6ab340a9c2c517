package plugin

import (
	"container/list"
	"crypto/tls"
	"net"
	"net/http"
	"sync"

	"github.com/redpanda-data/benthos/v4/public/service"
)

// Connections that are no sessions, or not yet. They need no token, and each is a
// file descriptor.

// minPending is how many of them a listener may have, where max_sessions is less.
const minPending = 1024

// pending bounds them: another one closes the oldest. A client becomes a session
// within milliseconds, so that the oldest is one that doesn't, and the client gets
// in at once. As many as there may be sessions can all connect at the same time.
type pending struct {
	limit int
	log   limitedLog

	mu     sync.Mutex
	places map[net.Conn]*list.Element
	order  *list.List // of net.Conn, the oldest first
}

func newPending(maxSessions int, log *service.Logger) *pending {
	return &pending{
		limit: max(maxSessions, minPending), log: newLimitedLog(log),
		places: make(map[net.Conn]*list.Element), order: list.New(),
	}
}

// changed is told of the states of the HTTP server's connections.
func (p *pending) changed(c net.Conn, state http.ConnState) {
	switch state {
	case http.StateNew:
		if oldest := p.add(c); oldest != nil {
			_ = oldest.Close()
			if log, ok := p.log.allow(); ok {
				log.Warnf("Closed a connection that is no session, as there were more than %d of them: %v", p.limit, oldest.RemoteAddr())
			}
		}
	case http.StateHijacked, http.StateClosed:
		p.mu.Lock()
		defer p.mu.Unlock()
		p.remove(c)
	}
}

// add gives the connection that has to make room, or nil.
func (p *pending) add(c net.Conn) (oldest net.Conn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.places[c] = p.order.PushBack(c)
	if p.order.Len() <= p.limit {
		return nil
	}
	oldest = p.order.Front().Value.(net.Conn)
	p.remove(oldest)
	if secured, ok := oldest.(*tls.Conn); ok {
		return secured.NetConn() // to close TLS may wait for the network
	}
	return oldest
}

func (p *pending) remove(c net.Conn) {
	if place, known := p.places[c]; known {
		p.order.Remove(place)
		delete(p.places, c)
	}
}
