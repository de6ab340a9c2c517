package ws

import (
	"bufio"
	"errors"
	"net"
	"net/http"

	"github.com/gorilla/websocket"
)

// Upgrader accepts WebSockets. It is safe for concurrent use.
type Upgrader struct{ upgrader websocket.Upgrader }

// NewUpgrader makes one. refuse answers a request that is no valid upgrade, with the
// status and why. Origins are the caller's to check.
func NewUpgrader(refuse func(w http.ResponseWriter, r *http.Request, status int, reason error)) *Upgrader {
	return &Upgrader{websocket.Upgrader{
		ReadBufferSize: readSmall, WriteBufferSize: readSmall, // for the handshake alone
		CheckOrigin: func(*http.Request) bool { return true },
		Error:       refuse,
	}}
}

// Upgrade answers an upgrade and takes the connection over. An error has been answered.
func (u *Upgrader) Upgrade(w http.ResponseWriter, r *http.Request) (*Conn, error) {
	h := &hijacker{ResponseWriter: w}
	if _, err := u.upgrader.Upgrade(h, r, nil); err != nil {
		return nil, err
	}
	return &Conn{t: h.conn}, nil
}

// hijacker gives the upgrader a connection that can gather writes.
type hijacker struct {
	http.ResponseWriter
	conn *transport
}

func (h *hijacker) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	c, rw, err := http.NewResponseController(h.ResponseWriter).Hijack()
	if err != nil {
		return nil, nil, err
	}
	if rw.Reader.Buffered() > 0 {
		// No client sends before the answer; one that does is not let in.
		return nil, nil, errors.Join(errors.New("data before the upgrade's answer"), c.Close())
	}
	h.conn = &transport{Conn: c}
	return h.conn, rw, nil
}
