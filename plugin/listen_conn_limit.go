package plugin

import (
	"container/list"
	"crypto/tls"
	"net"
	"net/http"
	"sync"

	"github.com/redpanda-data/benthos/v4/public/service"
)

// Connections without a session. Opening one requires no token, and each uses a file
// descriptor.

// minConnections is the limit on connections without a session if max_sessions is smaller.
const minConnections = 1024

// connLimit limits the number of connections without a session: when there are too many, it
// closes the oldest one. The connection of a client becomes a session within milliseconds, or when
// authorize_processors have returned, so the oldest one is probably not a client's. The limit is
// at least max_sessions, so that all clients can connect at the same time.
type connLimit struct {
	limit int
	log   limitedLog

	mu       sync.Mutex
	elements map[net.Conn]*list.Element
	order    *list.List // elements are net.Conn, oldest first
}

func newConnLimit(maxSessions int, log *service.Logger) *connLimit {
	return &connLimit{
		limit: max(maxSessions, minConnections), log: newLimitedLog(log),
		elements: make(map[net.Conn]*list.Element), order: list.New(),
	}
}

// changed is the ConnState hook of the HTTP server.
func (l *connLimit) changed(c net.Conn, state http.ConnState) {
	switch state {
	case http.StateNew:
		if oldest := l.add(c); oldest != nil {
			_ = oldest.Close()
			if log, ok := l.log.allow(); ok {
				log.With("remote", oldest.RemoteAddr(), "limit", l.limit).Warn("Too many connections without a session: closed the oldest")
			}
		}
	case http.StateHijacked, http.StateClosed:
		l.mu.Lock()
		defer l.mu.Unlock()
		l.remove(c)
	}
}

// add adds a connection. It returns the oldest one, to be closed, if there are too many;
// otherwise it returns nil.
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
		return secured.NetConn() // closing the TLS connection may block on the network
	}
	return oldest
}

func (l *connLimit) remove(c net.Conn) {
	if element, known := l.elements[c]; known {
		l.order.Remove(element)
		delete(l.elements, c)
	}
}
