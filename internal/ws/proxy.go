package ws

import (
	"bufio"
	"cmp"
	"context"
	"crypto/tls"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"

	"golang.org/x/net/proxy"
)

// Connecting through a proxy. The WebSocket library can do so too, but then adds TLS on top
// of the connection by itself, so that the connection could not be wrapped.

type netDialFunc func(ctx context.Context, network, address string) (net.Conn, error)

// DialContext and Dial are for [proxy.FromURL].
func (f netDialFunc) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	return f(ctx, network, address)
}

func (f netDialFunc) Dial(network, address string) (net.Conn, error) {
	return f(context.Background(), network, address)
}

// through returns a function that dials through a proxy.
func (f netDialFunc) through(via *url.URL, config *tls.Config) (netDialFunc, error) {
	switch via.Scheme {
	case "http", "https":
		return func(ctx context.Context, network, address string) (net.Conn, error) {
			return f.connect(ctx, via, config, network, address)
		}, nil
	default:
		d, err := proxy.FromURL(via, f)
		if err != nil {
			return nil, err
		}
		dialer, ok := d.(proxy.ContextDialer)
		if !ok {
			return nil, fmt.Errorf("unsupported proxy scheme %q: it must be http, https or socks5", via.Scheme)
		}
		return dialer.DialContext, nil
	}
}

// connect requests a tunnel from an HTTP proxy.
func (f netDialFunc) connect(ctx context.Context, via *url.URL, config *tls.Config, network, address string) (net.Conn, error) {
	host := net.JoinHostPort(via.Hostname(), cmp.Or(via.Port(), map[string]string{"http": "80", "https": "443"}[via.Scheme]))
	var (
		c   net.Conn
		err error
	)
	if via.Scheme == "https" {
		c, err = dialTLS(ctx, f, network, host, config)
	} else {
		c, err = f(ctx, network, host)
	}
	if err != nil {
		return nil, err
	}
	if err := requestTunnel(c, via.User, address); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return c, nil
}

func requestTunnel(c net.Conn, user *url.Userinfo, address string) error {
	req := &http.Request{Method: http.MethodConnect, URL: &url.URL{Opaque: address}, Host: address, Header: make(http.Header)}
	if user != nil {
		password, _ := user.Password()
		req.Header.Set("Proxy-Authorization", "Basic "+base64.StdEncoding.EncodeToString([]byte(user.Username()+":"+password)))
	}
	if err := req.Write(c); err != nil {
		return err
	}
	// Nothing is lost with the reader: the client sends first through the tunnel.
	response := bufio.NewReader(io.LimitReader(c, maxResponse))
	resp, err := http.ReadResponse(response, req) //nolint:bodyclose // closing would wait for an unused body
	if err != nil {
		return responseError(err)
	}
	if resp.StatusCode != http.StatusOK { // its reason phrase may repeat the request
		return fmt.Errorf("status %d %s", resp.StatusCode, http.StatusText(resp.StatusCode))
	}
	return nil
}
