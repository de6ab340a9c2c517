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
	"strings"

	"golang.org/x/net/proxy"
)

// Connecting through a proxy. The WebSocket library could, but puts TLS on top of
// the connection then, where nothing of ours can be.

// maxProxyWords bounds what is repeated of a proxy's words, in bytes.
const maxProxyWords = 200

type netDialFunc func(ctx context.Context, network, address string) (net.Conn, error)

// DialContext and Dial are for [proxy.FromURL].
func (f netDialFunc) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	return f(ctx, network, address)
}

func (f netDialFunc) Dial(network, address string) (net.Conn, error) {
	return f(context.Background(), network, address)
}

// through gives a function that dials through a proxy.
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
			return nil, fmt.Errorf("no proxies of the kind %s", via.Scheme)
		}
		return dialer.DialContext, nil
	}
}

// connect asks an HTTP proxy for a tunnel.
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
	if err := askForTunnel(c, via.User, address); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return c, nil
}

func askForTunnel(c net.Conn, user *url.Userinfo, address string) error {
	req := &http.Request{Method: http.MethodConnect, URL: &url.URL{Opaque: address}, Host: address, Header: make(http.Header)}
	if user != nil {
		password, _ := user.Password()
		req.Header.Set("Proxy-Authorization", "Basic "+base64.StdEncoding.EncodeToString([]byte(user.Username()+":"+password)))
	}
	if err := req.Write(c); err != nil {
		return err
	}
	// Nothing is lost with the reader: behind the tunnel the client speaks first.
	answer := bufio.NewReader(io.LimitReader(c, maxAnswer))
	resp, err := http.ReadResponse(answer, req) //nolint:bodyclose // that would wait for a body of which nothing is wanted
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		words := strings.TrimSpace(strings.TrimPrefix(resp.Status, fmt.Sprint(resp.StatusCode)))
		words = words[:min(len(words), maxProxyWords)]
		return errors.New(cmp.Or(strings.ToValidUTF8(words, ""), fmt.Sprintf("status %d", resp.StatusCode)))
	}
	return nil
}
