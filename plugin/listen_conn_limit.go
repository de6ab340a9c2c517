package plugin

import (
	"container/list"
	"crypto/tls"
	"net"
	"net/http"
	"sync"

	"github.com/redpanda-data/benthos/v4/public/service"
)

// Connections that are not, or not yet, those of sessions. They need no token, and each has a file
// descriptor.

// minConnections is the lowest bound of their number, for a smaller max_sessions.
const minConnections = 1024

// connLimit bounds them: another one closes the oldest. A client becomes a session
// within milliseconds, so the oldest is one that does not, and the client connects
// at once. All clients that max_sessions allows can connect at the same time.
type connLimit struct {
	limit int
	log   limitedLog

	mu       sync.Mutex
	elements map[net.Conn]*list.Element
	order    *list.List // of net.Conn, the oldest first
}

func newConnLimit(maxSessions int, log *service.Logger) *connLimit {
	return &connLimit{
		limit: max(maxSessions, minConnections), log: newLimitedLog(log),
		elements: make(map[net.Conn]*list.Element), order: list.New(),
	}
}

// changed is the HTTP server's ConnState.
func (l *connLimit) changed(c net.Conn, state http.ConnState) {
	switch state {
	case http.StateNew:
		if oldest := l.add(c); oldest != nil {
			_ = oldest.Close()
			if log, ok := l.log.allow(); ok {
				log.Warnf("Closed a connection without a session, because there are more than %d of them: %v", l.limit, oldest.RemoteAddr())
			}
		}
	case http.StateHijacked, http.StateClosed:
		l.mu.Lock()
		defer l.mu.Unlock()
		l.remove(c)
	}
}

// add returns the connection to close, or nil.
func (l *connLimit) add(c net.Conn) (oldest net.Conn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.elements[c] = l.order.PushBack(c)
	if l.order.Len() <= l.limit {
		return nil
	}
	oldest = l.order.Front().Value.(net.Conn)
	l.remove(oldest)
	if secured, ok := oldest.(*tls.Conn); ok {
		return secured.NetConn() // to close TLS may wait for the network
	}
	return oldest
}

func (l *connLimit) remove(c net.Conn) {
	if element, known := l.elements[c]; known {
		l.order.Remove(element)
		delete(l.elements, c)
	}
}
