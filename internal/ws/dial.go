package ws

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strings"

	"github.com/gorilla/websocket"
)

// DialOptions are the options of Dial. A zero value means its default.
type DialOptions struct {
	Header  http.Header                                                          // further headers of the upgrade
	TLS     *tls.Config                                                          // configuration of wss. Default: the system's certificates
	Proxy   func(*http.Request) (*url.URL, error)                                // called with the URL as http, without query. Default: none
	NetDial func(ctx context.Context, network, address string) (net.Conn, error) // Default: dialHost
}

// Dial connects, through a proxy if there is one, and opens the WebSocket. If the server
// has sent another response than 101, it is returned with the error; its body holds no more
// than the WebSocket library keeps. The context bounds Dial alone.
func Dial(ctx context.Context, u *url.URL, opts *DialOptions) (*Conn, *http.Response, error) {
	proxy, err := proxyFor(u, opts.Proxy)
	if err != nil {
		return nil, nil, err
	}
	netDial := netDialFunc(opts.NetDial)
	if netDial == nil {
		netDial = dialHost
	}
	stop := func() bool { return true }
	var connect netDialFunc = func(ctx context.Context, network, address string) (net.Conn, error) {
		c, err := netDial(ctx, network, address)
		if err == nil {
			// The library watches the context's deadline, but not its cancellation, and
			// sets deadlines itself, so that it could overwrite a deadline of this package.
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
		return &finalResponse{transport: conn}, nil
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
		err = responseError(err)
	case err != nil: // not even connected
	case ended:
		err = errors.Join(ctx.Err(), conn.Close())
	default:
		if err = checkResponse(resp.Header, opts.Header); err != nil {
			_ = conn.Close()
		}
	}
	if err != nil && proxy != nil && resp == nil {
		err = fmt.Errorf("through the proxy %s: %w", proxy.Host, err)
	}
	if err != nil {
		return nil, resp, err
	}
	return newConn(conn, true), nil, nil
}

// responseError returns an error of an HTTP exchange without the parts of the response that it quotes, in
// which a server may repeat the request and its secrets.
func responseError(err error) error {
	_, isNet := errors.AsType[net.Error](err)
	switch {
	case isNet, errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, net.ErrClosed),
		errors.Is(err, websocket.ErrBadHandshake), errors.Is(err, errLargeResponse):
		return err
	}
	for _, kind := range []string{"malformed HTTP status code", "malformed HTTP version", "malformed MIME header"} {
		if strings.HasPrefix(err.Error(), kind) {
			return &redactedError{kind, err}
		}
	}
	return &redactedError{"malformed HTTP response", err}
}

// redactedError is an error with another text than its cause, which may contain a secret.
type redactedError struct {
	text  string
	cause error
}

func (e *redactedError) Error() string { return e.text }
func (e *redactedError) Unwrap() error { return e.cause }

// checkResponse checks what the library does not check in a server's 101 (RFC 6455, 4.1).
func checkResponse(response, request http.Header) error {
	if upgrade := response.Values("Upgrade"); len(upgrade) != 1 || !strings.EqualFold(upgrade[0], "websocket") {
		return errors.New("the server upgrades to something other than WebSocket alone")
	}
	if len(response.Values("Sec-WebSocket-Accept")) != 1 {
		return errors.New("the server sent more than one Sec-WebSocket-Accept")
	}
	if len(listed(response, "Sec-WebSocket-Extensions")) > 0 {
		return errors.New("the server uses a WebSocket extension that was not requested")
	}
	chosen, requested := listed(response, "Sec-WebSocket-Protocol"), listed(request, "Sec-WebSocket-Protocol")
	if len(chosen) > 1 || len(chosen) == 1 && !slices.Contains(requested, chosen[0]) {
		return errors.New("the server uses a subprotocol that was not requested")
	}
	return nil
}

// listed returns the elements of a header's list, over all its lines. The header's name
// may be in any case: the library sends a caller's names as they are.
func listed(header http.Header, name string) []string {
	var elements []string
	for key, lines := range header {
		if !strings.EqualFold(key, name) {
			continue
		}
		for element := range strings.SplitSeq(strings.Join(lines, ","), ",") {
			if element = strings.TrimSpace(element); element != "" {
				elements = append(elements, element)
			}
		}
	}
	return elements
}

// finalResponse skips the informational responses (RFC 9110, 15.2) before a server's
// final one, because the library would regard them as the final one.
type finalResponse struct {
	*transport
	found bool
	line  []byte // unread rest of the final response's first line
}

func (r *finalResponse) Read(p []byte) (int, error) {
	for !r.found {
		line, err := r.readLine()
		if err != nil && len(line) == 0 {
			return 0, err
		}
		if err == nil && informational.Match(line) {
			if err := r.skipHeaders(); err != nil {
				return 0, err
			}
			continue
		}
		r.found, r.line = true, line // an error comes again
	}
	if len(r.line) > 0 {
		n := copy(p, r.line)
		r.line = r.line[n:]
		return n, nil
	}
	return r.transport.Read(p)
}

// 101 is a final response.
var informational = regexp.MustCompile(`^HTTP/1\.[0-9] 1(?:[1-9][0-9]|0[02-9])[ \r\n]`)

func (r *finalResponse) skipHeaders() error {
	for {
		line, err := r.readLine()
		if err != nil {
			return err
		}
		if len(bytes.TrimRight(line, "\r\n")) == 0 {
			return nil
		}
	}
}

// readLine reads to the end of a line. maxResponse bounds it.
func (r *finalResponse) readLine() ([]byte, error) {
	var (
		line []byte
		b    [1]byte
	)
	for b[0] != '\n' {
		if _, err := r.transport.Read(b[:]); err != nil {
			return line, err
		}
		line = append(line, b[0])
	}
	return line, nil
}

func proxyFor(u *url.URL, proxy func(*http.Request) (*url.URL, error)) (*url.URL, error) {
	if proxy == nil {
		return nil, nil
	}
	target := &url.URL{Scheme: strings.Replace(u.Scheme, "ws", "http", 1), Host: u.Host, Path: u.Path}
	p, err := proxy(&http.Request{Method: http.MethodGet, URL: target, Host: u.Host})
	if err != nil {
		return nil, &redactedError{"choosing a proxy failed (the reason may contain the proxy's password; check HTTPS_PROXY and HTTP_PROXY)", err}
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
			err = fmt.Errorf("the server does not use TLS: check whether its URL is ws:// instead of wss://: %w", err)
		}
		return nil, errors.Join(err, c.Close())
	}
	return secured, nil
}
