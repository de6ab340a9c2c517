package plugin

import (
	"container/heap"
	"container/list"
	"crypto/tls"
	"net"
	"net/http"
	"net/netip"
	"sync"

	"github.com/redpanda-data/benthos/v4/public/service"

	"github.com/cryo-connect/cryo-connect/internal/network"
)

// Connections without a session. Opening one requires no token, and each uses a file
// descriptor.

// minConnections is the limit on connections without a session if max_sessions is smaller.
const minConnections = 1024

// connLimit limits the number of connections without a session: when there are too many, it
// closes the oldest one of the address that has the most, so that a peer which opens many closes
// its own. The connection of a client becomes a session within the round trips of its handshake, or
// when authorize_processors have returned. The limit is at least max_sessions, so that all clients
// can connect at the same time.
type connLimit struct {
	limit int
	log   limitedLog

	mu     sync.Mutex
	conns  map[net.Conn]limitedConn
	peers  map[netip.Prefix]*connPeer
	ranked connPeers // a heap of the values of peers
	opened uint64
}

// connPeer is a network with connections without a session.
type connPeer struct {
	network netip.Prefix
	order   *list.List // elements are numberedConn, oldest first
	index   int        // in the heap
}

type limitedConn struct {
	peer    *connPeer
	element *list.Element // of order
}

type numberedConn struct {
	net.Conn
	number uint64 // the higher, the younger
}

func (p *connPeer) oldest() numberedConn { return p.order.Front().Value.(numberedConn) }

func newConnLimit(maxSessions int, log *service.Logger) *connLimit {
	return &connLimit{
		limit: max(maxSessions, minConnections), log: newLimitedLog(log),
		conns: make(map[net.Conn]limitedConn), peers: make(map[netip.Prefix]*connPeer),
	}
}

// changed is the ConnState hook of the HTTP server.
func (l *connLimit) changed(c net.Conn, state http.ConnState) {
	switch state {
	case http.StateNew:
		if oldest := l.add(c); oldest != nil {
			_ = oldest.Close()
			if log, ok := l.log.allow(); ok {
				log.With("remote", oldest.RemoteAddr(), "limit", l.limit).Warn("Too many connections without a session: closed the oldest one from the busiest address")
			}
		}
	case http.StateHijacked, http.StateClosed:
		l.mu.Lock()
		defer l.mu.Unlock()
		l.remove(c)
	}
}

// add adds a connection. It returns the one to be closed if there are too many; otherwise it
// returns nil.
func (l *connLimit) add(c net.Conn) (oldest net.Conn) {
	from := networkOfSocket(c)
	l.mu.Lock()
	defer l.mu.Unlock()
	peer, known := l.peers[from]
	if !known {
		peer = &connPeer{network: from, order: list.New()}
		l.peers[from] = peer
	}
	l.opened++
	l.conns[c] = limitedConn{peer, peer.order.PushBack(numberedConn{c, l.opened})}
	if known {
		heap.Fix(&l.ranked, peer.index)
	} else {
		heap.Push(&l.ranked, peer)
	}
	if len(l.conns) <= l.limit {
		return nil
	}
	oldest = l.ranked[0].oldest().Conn
	l.remove(oldest)
	return withoutTLS(oldest) // closing a TLS connection may block on the network
}

func (l *connLimit) remove(c net.Conn) {
	conn, known := l.conns[c]
	if !known {
		return
	}
	delete(l.conns, c)
	peer := conn.peer
	if peer.order.Len() == 1 {
		heap.Remove(&l.ranked, peer.index)
		delete(l.peers, peer.network)
		return
	}
	peer.order.Remove(conn.element)
	heap.Fix(&l.ranked, peer.index)
}

func withoutTLS(c net.Conn) net.Conn {
	if secured, ok := c.(*tls.Conn); ok {
		return secured.NetConn()
	}
	return c
}

// networkOfSocket returns the network of a connection's peer. That of a proxy is the proxy's own,
// because its header has not arrived yet.
func networkOfSocket(c net.Conn) netip.Prefix {
	c = withoutTLS(c)
	if proxied, ok := c.(*proxiedConn); ok {
		c = proxied.Raw()
	}
	return network.Of(c.RemoteAddr().String())
}

// connPeers is a heap, with the peer whose connection is closed next at the top: the one with the
// most connections and, of several, the one with the oldest.
type connPeers []*connPeer

func (p connPeers) Len() int { return len(p) }

func (p connPeers) Less(i, j int) bool {
	a, b := p[i], p[j]
	if a.order.Len() != b.order.Len() {
		return a.order.Len() > b.order.Len()
	}
	return a.oldest().number < b.oldest().number
}

func (p connPeers) Swap(i, j int) {
	p[i], p[j] = p[j], p[i]
	p[i].index, p[j].index = i, j
}

func (p *connPeers) Push(peer any) {
	added := peer.(*connPeer)
	added.index = len(*p)
	*p = append(*p, added)
}

func (p *connPeers) Pop() any {
	last := len(*p) - 1
	removed := (*p)[last]
	(*p)[last] = nil
	*p = (*p)[:last]
	return removed
}
