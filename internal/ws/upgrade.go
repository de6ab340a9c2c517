package ws

import (
	"bufio"
	"encoding/base64"
	"fmt"
	"io"
	"net"
	"net/http"
	"time"

	"github.com/gorilla/websocket"
)

// UpgradeError is returned for a request that is not upgraded.
type UpgradeError struct {
	Status   int
	Message  string      // response body
	Header   http.Header // further response headers; may be nil
	Answered bool        // the response is written and the connection closed
}

func (e *UpgradeError) Error() string { return e.Message }

// CheckUpgrade checks that a request is a valid upgrade (RFC 6455, 4.2.1), so that
// nothing is reserved for one that is not. The library also accepts HTTP/1.0, lists of versions
// and repeated headers. The caller must check the origin.
func CheckUpgrade(r *http.Request) *UpgradeError {
	version, key := r.Header.Values("Sec-WebSocket-Version"), r.Header.Values("Sec-WebSocket-Key")
	switch {
	case !websocket.IsWebSocketUpgrade(r), !r.ProtoAtLeast(1, 1): // HTTP/1.0 has no upgrades (RFC 9110, 7.8)
		return &UpgradeError{
			Status: http.StatusUpgradeRequired, Message: "This is a WebSocket server.",
			Header: http.Header{"Connection": {"upgrade"}, "Upgrade": {"websocket"}},
		}
	case r.Method != http.MethodGet:
		return &UpgradeError{
			Status: http.StatusMethodNotAllowed, Message: "The method of an upgrade must be GET.",
			Header: http.Header{"Allow": {http.MethodGet}},
		}
	case len(version) != 1 || version[0] != "13":
		return &UpgradeError{
			Status: http.StatusBadRequest, Message: "The upgrade must have one header Sec-WebSocket-Version: 13.",
			Header: http.Header{"Sec-Websocket-Version": {"13"}},
		}
	case len(key) != 1 || !isKey(key[0]):
		return &UpgradeError{
			Status: http.StatusBadRequest, Message: "The upgrade must have one header Sec-WebSocket-Key: 16 bytes in base64.",
		}
	}
	return nil
}

func isKey(key string) bool {
	nonce, err := base64.StdEncoding.DecodeString(key)
	return err == nil && len(nonce) == 16
}

var upgrader = websocket.Upgrader{
	ReadBufferSize: readSmall, WriteBufferSize: readSmall, // for the handshake alone
	CheckOrigin: func(*http.Request) bool { return true },
	Error:       func(http.ResponseWriter, *http.Request, int, error) {}, // the caller responds
}

// Upgrade accepts an upgrade that CheckUpgrade has passed, and hijacks the connection.
// The caller must respond to an [*UpgradeError] that is not Answered; any other error is the
// network's.
func Upgrade(w http.ResponseWriter, r *http.Request) (*Conn, error) {
	c, rw, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return nil, &UpgradeError{Status: http.StatusInternalServerError, Message: "This connection can't be upgraded: " + err.Error()}
	}
	if rw.Reader.Buffered() > 0 {
		e := &UpgradeError{
			Status: http.StatusBadRequest, Message: "The client must not send data before the upgrade is answered.", Answered: true,
		}
		respond(c, e)
		return nil, e
	}
	h := &handedOver{ResponseWriter: w, conn: &transport{Conn: c}, rw: rw}
	if _, err := upgrader.Upgrade(h, r, nil); err != nil {
		_ = c.Close() // unless the library did
		return nil, err
	}
	return newConn(h.conn, false), nil
}

// handedOver makes the library use a connection that can gather writes.
type handedOver struct {
	http.ResponseWriter
	conn *transport
	rw   *bufio.ReadWriter
}

func (h *handedOver) Hijack() (net.Conn, *bufio.ReadWriter, error) { return h.conn, h.rw, nil }

const (
	lingerTime  = 500 * time.Millisecond
	lingerBytes = 256 << 10
)

// respond writes a response on a connection that is no longer the HTTP server's, and closes
// it. It reads on for at most lingerTime: closing a socket with unread data resets it, and
// can discard the response.
func respond(c net.Conn, e *UpgradeError) {
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(lingerTime))
	if _, err := fmt.Fprintf(c, "HTTP/1.1 %d %s\r\nConnection: close\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: %d\r\n\r\n%s\n",
		e.Status, http.StatusText(e.Status), len(e.Message)+1, e.Message); err != nil {
		return
	}
	if half, ok := c.(interface{ CloseWrite() error }); ok {
		_ = half.CloseWrite()
	}
	_, _ = io.CopyN(io.Discard, c, lingerBytes)
}
