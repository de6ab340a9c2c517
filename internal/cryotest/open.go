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

// Server is a raw server: it upgrades every request, and leaves the session to the test.
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

// ServeHTTP upgrades a connection, for NextPeer.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	sid, _ := strconv.ParseUint(r.URL.Query().Get("x-cryo-sid"), 10, 64)
	ws, err := (&websocket.Upgrader{}).Upgrade(w, r, nil)
	if err == nil {
		s.peers <- newPeer(s.tb, ws, sid, r)
	}
}

// NextPeer waits for the next client. Its peer has not sent a frame.
func (s *Server) NextPeer() *Peer {
	s.tb.Helper()
	select {
	case p := <-s.peers:
		return p
	case <-time.After(Patience):
		require.FailNow(s.tb, "timed out waiting for a client")
		return nil
	}
}

// DialPeer opens a connection as a client that has not sent a frame. The dialer is a Listener's, or websocket.DefaultDialer for a real network.
func DialPeer(tb testing.TB, dialer *websocket.Dialer, rawURL, token string, sid uint64) *Peer {
	tb.Helper()
	query := url.Values{"authorization": {"Bearer " + token}, "x-cryo-sid": {strconv.FormatUint(sid, 10)}}
	ws, resp, err := dialer.Dial(rawURL+"?"+query.Encode(), nil)
	require.NoError(tb, err, "response: %+v", resp)
	_ = resp.Body.Close()
	return newPeer(tb, ws, sid, nil)
}
