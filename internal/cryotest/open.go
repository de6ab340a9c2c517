package cryotest

import (
	"net/http"
	"net/url"
	"strconv"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/require"
)

// Server is a raw server: it lets everybody in and leaves the rest to the test.
type Server struct {
	*Listener
	tb    testing.TB
	peers chan *Peer
}

// NewServer serves in memory until the test's end.
func NewServer(tb testing.TB) *Server {
	tb.Helper()
	s := &Server{tb: tb, peers: make(chan *Peer, 16)}
	s.Listener = Serve(tb, s)
	return s
}

// ServeHTTP hands an upgraded connection to Accept.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	sid, _ := strconv.ParseUint(r.URL.Query().Get("x-cryo-sid"), 10, 64)
	ws, err := (&websocket.Upgrader{}).Upgrade(w, r, nil)
	if err == nil {
		s.peers <- newPeer(s.tb, ws, sid, r)
	}
}

// NextPeer waits for the next client, whose peer has not said anything yet.
func (s *Server) NextPeer() *Peer {
	s.tb.Helper()
	select {
	case p := <-s.peers:
		return p
	case <-time.After(Patience):
		require.FailNow(s.tb, "no client came")
		return nil
	}
}

// DialPeer opens a connection as a client that has not said anything yet. The
// dialer is a Listener's, or websocket.DefaultDialer for a real network.
func DialPeer(tb testing.TB, dialer *websocket.Dialer, rawURL, token string, sid uint64) *Peer {
	tb.Helper()
	query := url.Values{"authorization": {"Bearer " + token}, "x-cryo-sid": {strconv.FormatUint(sid, 10)}}
	ws, resp, err := dialer.Dial(rawURL+"?"+query.Encode(), nil)
	require.NoError(tb, err, "answered with %+v", resp)
	_ = resp.Body.Close()
	return newPeer(tb, ws, sid, nil)
}
