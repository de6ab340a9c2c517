package plugin

import (
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/pires/go-proxyproto"
	"github.com/redpanda-data/benthos/v4/public/service"
)

// The PROXY protocol, by which a proxy that does not speak HTTP reports the address of a client. It
// sends a header before the first byte of the client, and before TLS.

const fieldProxyProtocol = "proxy_protocol"

var proxyProtocolField = boolean(fieldProxyProtocol, false)

// proxyListener accepts the connections of proxies. Those of other peers are returned unchanged, so a
// header from them is a malformed request.
type proxyListener struct {
	net.Listener
	settings proxySettings
	timeout  time.Duration // for the header
	log      limitedLog
}

func newProxyListener(l net.Listener, settings listenSettings, log *service.Logger) *proxyListener {
	return &proxyListener{l, settings.proxySettings, settings.HandshakeTimeout, newLimitedLog(log)}
}

// Accept does not wait for a header.
func (l *proxyListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil || !l.settings.trusts(c.RemoteAddr().String()) {
		return c, err
	}
	return &proxiedConn{log: l.log, Conn: proxyproto.NewConn(c,
		proxyproto.WithPolicy(proxyproto.REQUIRE),
		proxyproto.ValidateHeader(checkProxyHeader),
		proxyproto.SetReadHeaderTimeout(l.timeout),
	)}, nil
}

// checkProxyHeader rejects the addresses of sockets other than TCP: a proxy that listens on one has no
// client with an IP address.
func checkProxyHeader(h *proxyproto.Header) error {
	if _, isTCP := h.SourceAddr.(*net.TCPAddr); !isTCP && !h.Command.IsLocal() {
		return fmt.Errorf("the header has an address of type %v instead of TCP", h.TransportProtocol)
	}
	return nil
}

// proxiedConn is a connection of a proxy, which must begin with a header. Until the header is read,
// every method except Close and those that set deadlines waits for it. The HTTP server calls
// RemoteAddr first, on the goroutine of the connection.
type proxiedConn struct {
	*proxyproto.Conn
	log  limitedLog
	once sync.Once
}

// TCPConn lets a session find its socket, whose kernel reports the bytes that the peer has
// acknowledged.
var _ interface {
	TCPConn() (*net.TCPConn, bool)
	CloseWrite() error
} = (*proxiedConn)(nil)

// RemoteAddr returns the client's address. It is the proxy's own if the proxy itself has connected, as
// for a health check, or if the header is missing or malformed; then nothing can be read or written.
func (c *proxiedConn) RemoteAddr() net.Addr {
	address := c.Conn.RemoteAddr()
	c.once.Do(func() {
		if c.ProxyHeader() != nil {
			return
		}
		_, err := c.Write(nil) // returns the error of the header
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if log, ok := c.log.allow(); ok {
			log.With("remote", address, "error", err).Warn("Closing a connection from a trusted proxy: it sent no valid PROXY protocol header")
		}
	})
	return address
}

// CloseWrite half-closes the connection. Connections of package proxyproto lack it.
func (c *proxiedConn) CloseWrite() error {
	if half, ok := c.Raw().(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return nil
}
