package ws

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"strings"

	"github.com/gorilla/websocket"
)

// DialOptions are how a connection is opened. A zero value means its default.
type DialOptions struct {
	Header  http.Header                                                          // further headers of the upgrade
	TLS     *tls.Config                                                          // of wss. Default: the system's certificates
	Proxy   func(*http.Request) (*url.URL, error)                                // asked with the URL as http, without query. Default: none
	NetDial func(ctx context.Context, network, address string) (net.Conn, error) // Default: net.Dialer's
}

// Dial connects, through a proxy if there is one, and opens the WebSocket. The response is
// that of a server that has answered something else, with the error; its body holds no
// more than the WebSocket library keeps. The context bounds Dial alone.
func Dial(ctx context.Context, u *url.URL, opts *DialOptions) (*Conn, *http.Response, error) {
	proxy, err := proxyFor(u, opts.Proxy)
	if err != nil {
		return nil, nil, err
	}
	netDial := netDialFunc(opts.NetDial)
	if netDial == nil {
		netDial = (&net.Dialer{}).DialContext
	}
	stop := func() bool { return true }
	var connect netDialFunc = func(ctx context.Context, network, address string) (net.Conn, error) {
		c, err := netDial(ctx, network, address)
		if err == nil {
			// The library watches the context's deadline, but not its end. It sets
			// deadlines, so that one of ours would not be sure to last.
			stop = context.AfterFunc(ctx, func() { _ = c.Close() })
		}
		return c, err
	}
	if proxy != nil {
		if connect, err = connect.through(proxy, opts.TLS); err != nil {
			return nil, nil, err
		}
	}
	var conn *transport
	wrap := func(c net.Conn, err error) (net.Conn, error) {
		if err != nil {
			return nil, err
		}
		conn = &transport{Conn: c}
		return conn, nil
	}
	dialer := &websocket.Dialer{ReadBufferSize: readSmall, WriteBufferSize: readSmall} // for the handshake alone
	dialer.NetDialContext = func(ctx context.Context, network, address string) (net.Conn, error) {
		return wrap(connect(ctx, network, address))
	}
	dialer.NetDialTLSContext = func(ctx context.Context, network, address string) (net.Conn, error) {
		return wrap(dialTLS(ctx, connect, network, address, opts.TLS))
	}

	_, resp, err := dialer.DialContext(ctx, u.String(), opts.Header)
	ended := !stop()
	switch {
	case err != nil && conn != nil:
		_ = conn.Close() // unless the library did
	case err != nil: // not even connected
	case ended:
		err = errors.Join(ctx.Err(), conn.Close())
	case resp.Header.Get("Sec-WebSocket-Extensions") != "":
		err = errors.Join(errors.New("the server uses a WebSocket extension that was not asked for"), conn.Close())
	}
	if err != nil && proxy != nil && resp == nil {
		err = fmt.Errorf("through the proxy %s: %w", proxy.Host, err)
	}
	if err != nil {
		return nil, resp, err
	}
	return &Conn{t: conn, masks: true}, nil, nil
}

func proxyFor(u *url.URL, proxy func(*http.Request) (*url.URL, error)) (*url.URL, error) {
	if proxy == nil {
		return nil, nil
	}
	asked := &url.URL{Scheme: strings.Replace(u.Scheme, "ws", "http", 1), Host: u.Host, Path: u.Path}
	p, err := proxy(&http.Request{Method: http.MethodGet, URL: asked, Host: u.Host})
	if err != nil {
		return nil, fmt.Errorf("choosing a proxy: %w", err)
	}
	return p, nil
}

func dialTLS(ctx context.Context, dial netDialFunc, network, address string, config *tls.Config) (net.Conn, error) {
	c, err := dial(ctx, network, address)
	if err != nil {
		return nil, err
	}
	if config == nil {
		config = &tls.Config{MinVersion: tls.VersionTLS12}
	}
	config = config.Clone()
	if config.ServerName == "" {
		if config.ServerName, _, err = net.SplitHostPort(address); err != nil {
			return nil, errors.Join(err, c.Close())
		}
	}
	secured := tls.Client(c, config)
	if err := secured.HandshakeContext(ctx); err != nil {
		if _, ok := errors.AsType[tls.RecordHeaderError](err); ok {
			err = fmt.Errorf("this server does not speak TLS, is its URL ws:// instead of wss://? %w", err)
		}
		return nil, errors.Join(err, c.Close())
	}
	return secured, nil
}
