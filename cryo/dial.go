package cryo

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"net"
	"net/http"
	"net/url"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/cryo-connect/cryo-connect/internal/redact"
	"github.com/cryo-connect/cryo-connect/internal/ws"
)

// DefaultConnectTimeout is the default of [DialOptions].
const DefaultConnectTimeout = 5 * time.Second

// The parameters of the upgrade (protocol, "Transport and handshake").
const (
	paramAuthorization = "authorization"
	paramSessionID     = "x-cryo-sid"
	bearer             = "Bearer"
)

// DialOptions are what a client can set. A zero value means its default, and a negative
// one is an error.
type DialOptions struct {
	SessionOptions

	// Token is sent as "Bearer <token>" in the URL's query, as the protocol
	// wants it. It appears in no error and no log line of this package.
	Token string
	// SessionID is the id to connect with. A client that reconnects uses the
	// one it had. Default: a random one; see [NewSessionID].
	SessionID uint64
	// Query has further parameters for the URL. Those that Dial sets, authorization
	// and x-cryo-sid, are an error.
	Query url.Values
	// Header has further headers for the upgrade.
	Header http.Header
	// TLS configures wss. Default: the system's certificates.
	TLS *tls.Config
	// Proxy gives the proxy for the upgrade request: http, https or socks5.
	// http.ProxyFromEnvironment and http.ProxyURL are such functions. The
	// request that it is asked about has the URL with http for ws, and without
	// query. Default: none.
	Proxy func(*http.Request) (*url.URL, error)
	// ConnectTimeout bounds Dial: connecting, TLS, the upgrade and the
	// handshake of Cryo. Default 5 s.
	ConnectTimeout time.Duration
	// NetDial opens the network connection. Default: net.Dialer's.
	NetDial func(ctx context.Context, network, address string) (net.Conn, error)
}

func (o *DialOptions) validate() error {
	return cmp.Or(o.SessionOptions.validate(), notNegative("ConnectTimeout", o.ConnectTimeout), checkQuery(o.Query))
}

func (o DialOptions) withDefaults() DialOptions {
	o.SessionOptions = o.SessionOptions.withDefaults()
	if o.ConnectTimeout == 0 {
		o.ConnectTimeout = DefaultConnectTimeout
	}
	if o.SessionID == 0 {
		o.SessionID = NewSessionID()
	}
	return o
}

// NewSessionID chooses a session id at random. It is never 0.
func NewSessionID() uint64 {
	for {
		var b [8]byte
		_, _ = rand.Read(b[:]) // never fails
		if id := binary.BigEndian.Uint64(b[:]); id != 0 {
			return id
		}
	}
}

// CheckURL tells why a URL can't be dialled: it must be ws or wss with a
// host, without user and password, and its query must be valid and not carry the
// parameters that Dial sets. The error does not repeat the URL's query.
func CheckURL(rawURL string) error {
	_, _, err := parseURL(rawURL)
	return err
}

func parseURL(rawURL string) (u *url.URL, query url.Values, err error) {
	u, err = url.Parse(rawURL)
	if err != nil {
		// url.Parse repeats its input, which may hold a secret.
		if e := (*url.Error)(nil); errors.As(err, &e) {
			err = e.Err
		}
		return nil, nil, fmt.Errorf("not a URL: %w", err)
	}
	query, queryErr := url.ParseQuery(u.RawQuery)
	switch {
	case u.Scheme != "ws" && u.Scheme != "wss":
		return nil, nil, fmt.Errorf("the scheme is %q, it must be ws or wss", u.Scheme)
	case u.Hostname() == "":
		return nil, nil, errors.New("the URL has no host")
	case u.User != nil:
		return nil, nil, errors.New("a WebSocket URL has no user and password, Cryo's authorization is the token")
	case queryErr != nil: // it repeats a part of the query
		return nil, nil, errors.New("the URL's query is invalid: escape each semicolon as %3B and each percent sign as %25")
	}
	if err := checkQuery(query); err != nil {
		return nil, nil, err
	}
	return u, query, nil
}

// checkQuery reports parameters that Dial sets.
func checkQuery(query url.Values) error {
	switch {
	case query.Has(paramAuthorization):
		return fmt.Errorf("the parameter %s is made from the token", paramAuthorization)
	case query.Has(paramSessionID):
		return fmt.Errorf("the parameter %s is made from the session's id", paramSessionID)
	}
	return nil
}

// Dial opens a session with a Cryo server. It returns when the server has
// acknowledged our ENDPOINT_INFO, so everything may be sent then. The context
// bounds Dial, not the session. A refusal by the server is a [*HandshakeError].
// Dial makes one attempt; a [Client] dials again.
func Dial(ctx context.Context, rawURL string, options *DialOptions) (*Session, error) {
	var opts DialOptions
	if options != nil {
		opts = *options
	}
	t, err := newTarget(rawURL, &opts)
	if err != nil {
		return nil, fmt.Errorf("dialling: %w", err)
	}
	return t.dial(ctx, opts.withDefaults())
}

// target is the address of a server.
type target struct {
	url   *url.URL
	query url.Values // the URL's and the options'
}

// newTarget returns what is wrong with the URL or the options.
func newTarget(rawURL string, o *DialOptions) (*target, error) {
	u, query, err := parseURL(rawURL)
	if err == nil {
		err = o.validate()
	}
	if err != nil {
		return nil, err
	}
	maps.Copy(query, o.Query)
	return &target{u, query}, nil
}

// String returns the address without its query, for errors and log lines.
func (t *target) String() string {
	return (&url.URL{Scheme: t.url.Scheme, Host: t.url.Host, Path: t.url.Path}).String()
}

// dial makes one attempt, with all options set.
func (t *target) dial(ctx context.Context, opts DialOptions) (*Session, error) {
	opts.token = redact.New(opts.Token)
	ctx, cancel := context.WithTimeoutCause(ctx, opts.ConnectTimeout,
		fmt.Errorf("no session after %v: %w", opts.ConnectTimeout, context.DeadlineExceeded))
	defer cancel()
	s, err := t.open(ctx, &opts)
	if err != nil {
		if d, _ := ctx.Deadline(); !time.Now().Before(d) {
			<-ctx.Done() // the connection's deadline, which is the same, was faster
		}
		// A server that has answered has refused, whatever ended its body.
		if _, refused := errors.AsType[*HandshakeError](err); ctx.Err() != nil && !refused {
			err = context.Cause(ctx)
		}
		return nil, fmt.Errorf("dialling %s: %w", t, err)
	}
	return s, nil
}

// open opens the WebSocket and the session.
func (t *target) open(ctx context.Context, opts *DialOptions) (*Session, error) {
	query := maps.Clone(t.query)
	query.Set(paramAuthorization, bearer+" "+opts.Token)
	query.Set(paramSessionID, strconv.FormatUint(opts.SessionID, 10))
	withQuery := *t.url
	withQuery.RawQuery = query.Encode()
	withQuery.Fragment = ""
	conn, resp, err := ws.Dial(ctx, &withQuery, &ws.DialOptions{Header: opts.Header, TLS: opts.TLS, Proxy: opts.Proxy, NetDial: opts.NetDial}) //nolint:bodyclose // the library leaves nothing to close
	if err != nil {
		return nil, handshakeError(err, resp, opts.token)
	}
	s := newSession(opts.SessionID, true, nil, conn, newReceiveBuffer(opts.MaxBufferBytes), opts.SessionOptions, nil)
	if err := s.sendFrame(ctx, s.endpointInfo()); err != nil {
		s.fail(err)
		<-s.done
		return nil, fmt.Errorf("handshake of Cryo: %w", err)
	}
	s.acked.Store(false) // that was only the handshake's
	return s, nil
}

var (
	sessionExistsPattern = regexp.MustCompile(`(?i)session already exists`)
	markupPattern        = regexp.MustCompile(`<[^>]*>`)
)

const (
	maxRefusal = 1024 // bytes of a refusal that are looked at; the WebSocket library keeps no more
	maxMessage = 200  // bytes of it that are repeated
)

// handshakeError makes an error of a failed upgrade in which the token does not
// appear, whatever the server answered.
func handshakeError(err error, resp *http.Response, token *redact.Secret) error {
	switch {
	case resp == nil:
		return token.Error(err)
	case resp.StatusCode == http.StatusSwitchingProtocols:
		return token.Error(fmt.Errorf("upgrade: %w", err))
	}
	body, _ := io.ReadAll(io.LimitReader(resp.Body, maxRefusal)) // what there is of it
	text := token.Text(string(body))
	if len(body) == maxRefusal {
		text = token.End(text, 1)
	}
	text = withoutMarkup(text)
	// A page of cryo-server says the status again, which the error says already.
	text = strings.TrimSpace(strings.TrimPrefix(text, fmt.Sprintf("%d %s", resp.StatusCode, http.StatusText(resp.StatusCode))))
	text = token.Text(text) // again: it may have been broken into lines
	return &HandshakeError{
		StatusCode: resp.StatusCode,
		RetryAfter: retryAfter(resp.Header.Get("Retry-After")),
		Message:    redact.Cut(strings.ToValidUTF8(text, ""), maxMessage),
		// Not of the message: the token may be a part of these words.
		exists: resp.StatusCode == http.StatusUnauthorized && sessionExistsPattern.MatchString(withoutMarkup(string(body))),
	}
}

// retryAfter returns the wait that a Retry-After asks for, in seconds or until a date
// (RFC 9110, 10.2.3); 0 if it is neither, or over.
func retryAfter(value string) time.Duration {
	if date, err := http.ParseTime(value); err == nil {
		return max(time.Until(date), 0)
	}
	seconds, err := strconv.ParseUint(value, 10, 64)
	if err != nil && !errors.Is(err, strconv.ErrRange) { // the largest number stands for larger ones
		return 0
	}
	return time.Duration(min(seconds, uint64(math.MaxInt64/time.Second))) * time.Second
}

func withoutMarkup(text string) string {
	return strings.Join(strings.Fields(markupPattern.ReplaceAllString(text, " ")), " ")
}
