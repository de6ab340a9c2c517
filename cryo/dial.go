package cryo

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/tls"
	"encoding/base64"
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
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/cryo-connect/cryo-connect/internal/redact"
	"github.com/cryo-connect/cryo-connect/internal/ws"
)

// DefaultConnectTimeout is the default of [DialOptions].
const DefaultConnectTimeout = 5 * time.Second

// Query parameters of the upgrade (protocol, "Transport and handshake").
const (
	paramAuthorization = "authorization"
	paramSessionID     = "x-cryo-sid"
	bearer             = "Bearer"
)

// DialOptions are the options of [Dial]. A zero value means its default, and a negative
// one is an error.
type DialOptions struct {
	SessionOptions

	// Token is sent as "Bearer <token>" in the URL's query, as the protocol requires. No error
	// and no log line of this package contains it, or a value of Query, Header or the URL's query.
	Token string
	// SessionID is the id of the session. A client that reconnects must use the same id
	// again. Default: a random one; see [NewSessionID].
	SessionID uint64
	// Query has further parameters of the URL. Those that Dial sets, authorization
	// and x-cryo-sid, are an error.
	Query url.Values
	// Header has further headers of the upgrade.
	Header http.Header
	// TLS is the configuration of wss. Default: the system's certificates.
	TLS *tls.Config
	// Proxy returns the proxy for the upgrade request: http, https or socks5; nil is none.
	// http.ProxyFromEnvironment and http.ProxyURL are such functions. The URL of its
	// request has the scheme http or https for ws or wss, and no query. Caller's goroutine.
	// Default: no proxy.
	Proxy func(*http.Request) (*url.URL, error)
	// ConnectTimeout bounds Dial: the connection, TLS, the upgrade and the
	// Cryo handshake. Default 5 s.
	ConnectTimeout time.Duration
	// NetDial opens the network connection, and must return when the context is done.
	// Default: TCP. The host is resolved for each attempt, and its addresses, IPv6 and IPv4 in turn, are
	// dialled at intervals of up to 250 ms until one answers (RFC 8305); each has at least half of
	// the ConnectTimeout that remains after the lookup. At most 64 addresses are dialled.
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

// NewSessionID returns a random session id, which is never 0.
func NewSessionID() uint64 {
	for {
		var b [8]byte
		_, _ = rand.Read(b[:]) // never fails
		if id := binary.BigEndian.Uint64(b[:]); id != 0 {
			return id
		}
	}
}

// CheckURL returns an error if a URL can't be dialled: its scheme must be ws or wss, it must
// have a host, a port from 1 to 65535 if it has one, and no user and password, and its query must be valid and not contain the
// parameters that Dial sets. The error does not repeat the URL's query.
func CheckURL(rawURL string) error {
	_, _, err := parseURL(rawURL)
	return err
}

func parseURL(rawURL string) (u *url.URL, query url.Values, err error) {
	u, err = url.Parse(rawURL)
	if err != nil {
		// url.Parse repeats its input, which may hold a secret; its reason may repeat a part of
		// a password.
		if e := (*url.Error)(nil); errors.As(err, &e) && !strings.Contains(rawURL, "@") {
			return nil, nil, fmt.Errorf("not a URL: %w", e.Err)
		}
		return nil, nil, errors.New("not a URL")
	}
	query, queryErr := url.ParseQuery(u.RawQuery)
	switch {
	case u.Scheme != "ws" && u.Scheme != "wss":
		return nil, nil, fmt.Errorf("the scheme is %q: it must be ws or wss", u.Scheme)
	case u.Hostname() == "":
		return nil, nil, errors.New("the URL has no host")
	case u.User != nil:
		return nil, nil, errors.New("the URL must not contain a user or password: set the token instead")
	case !validPort(u):
		return nil, nil, errors.New("the URL's port must be from 1 to 65535")
	case queryErr != nil: // queryErr repeats a part of the query
		return nil, nil, errors.New("the URL's query is invalid: escape each semicolon as %3B and each percent sign as %25")
	}
	if err := checkQuery(query); err != nil {
		return nil, nil, err
	}
	return u, query, nil
}

// validPort reports whether the URL has no port, or one that can be dialled.
func validPort(u *url.URL) bool {
	if u.Port() == "" {
		return !strings.HasSuffix(u.Host, ":")
	}
	port, err := strconv.ParseUint(u.Port(), 10, 16)
	return err == nil && port > 0
}

// checkQuery returns an error if the query has parameters that Dial sets.
func checkQuery(query url.Values) error {
	switch {
	case query.Has(paramAuthorization):
		return fmt.Errorf("the query parameter %s is set from the token: remove it from the query", paramAuthorization)
	case query.Has(paramSessionID):
		return fmt.Errorf("the query parameter %s is set from the session id: remove it from the query", paramSessionID)
	}
	return nil
}

// Dial opens a session with a Cryo server. It returns when the server has
// acknowledged our ENDPOINT_INFO, so that everything may be sent. The context
// bounds Dial, not the session. If the server rejects the upgrade, the error is a
// [*HandshakeError]. Dial makes one attempt; a [Client] reconnects.
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
	query url.Values // parameters of the URL
}

// newTarget checks the URL and the options.
func newTarget(rawURL string, o *DialOptions) (*target, error) {
	u, query, err := parseURL(rawURL)
	if err == nil {
		err = o.validate()
	}
	if err != nil {
		return nil, err
	}
	return &target{u, query}, nil
}

// String returns the address without its query, for errors and log lines.
func (t *target) String() string {
	return (&url.URL{Scheme: t.url.Scheme, Host: t.url.Host, Path: t.url.Path}).String()
}

// dial makes one attempt. The options must have their defaults.
func (t *target) dial(ctx context.Context, opts DialOptions) (*Session, error) {
	opts.secrets = redact.New(t.secrets(&opts)...)
	if choose := opts.Proxy; choose != nil {
		opts.Proxy = func(r *http.Request) (*url.URL, error) {
			via, err := choose(r)
			if via != nil { // a proxy, which receives its password, can impersonate the server
				password, _ := via.User.Password()
				opts.secrets = redact.New(appendSecret(t.secrets(&opts), password)...)
			}
			return via, err
		}
	}
	ctx, cancel := context.WithTimeoutCause(ctx, opts.ConnectTimeout,
		fmt.Errorf("timed out after %v: %w", opts.ConnectTimeout, context.DeadlineExceeded))
	defer cancel()
	s, err := t.open(ctx, &opts)
	if err != nil {
		if d, _ := ctx.Deadline(); !time.Now().Before(d) {
			<-ctx.Done() // the connection has the same deadline, and may report it first
		}
		// A response is a rejection, even if its body was cut off by the timeout.
		if _, denied := errors.AsType[*HandshakeError](err); ctx.Err() != nil && !denied {
			err = context.Cause(ctx)
		}
		return nil, fmt.Errorf("dialling %s: %w", t, err)
	}
	return s, nil
}

// minSecret is the length from which a password, or a value of a header or of the query, is regarded
// as a secret.
const minSecret = 4

// secrets returns the values that are sent to the server and must not appear in errors or log lines.
func (t *target) secrets(opts *DialOptions) []string {
	secrets := []string{opts.Token}
	for _, values := range []map[string][]string{t.query, opts.Query, opts.Header} {
		for _, value := range slices.Concat(slices.Collect(maps.Values(values))...) {
			// An authorization scheme is not secret, and a common word in texts.
			if scheme, rest, ok := strings.Cut(value, " "); ok && (strings.EqualFold(scheme, bearer) || strings.EqualFold(scheme, "Basic")) {
				value = rest
				if decoded, err := base64.StdEncoding.DecodeString(rest); err == nil {
					_, password, _ := strings.Cut(string(decoded), ":") // the user's name is not secret
					secrets = appendSecret(secrets, password)
				}
			}
			secrets = appendSecret(secrets, value)
		}
	}
	return secrets
}

// appendSecret appends a value, unless it is short.
func appendSecret(secrets []string, value string) []string {
	if len(value) < minSecret {
		return secrets
	}
	return append(secrets, value)
}

// open opens the WebSocket and the session.
func (t *target) open(ctx context.Context, opts *DialOptions) (*Session, error) {
	query := maps.Clone(t.query)
	maps.Copy(query, opts.Query)
	query.Set(paramAuthorization, bearer+" "+opts.Token)
	query.Set(paramSessionID, strconv.FormatUint(opts.SessionID, 10))
	withQuery := *t.url
	withQuery.RawQuery = query.Encode()
	withQuery.Fragment = ""
	conn, resp, err := ws.Dial(ctx, &withQuery, &ws.DialOptions{Header: opts.Header, TLS: opts.TLS, Proxy: opts.Proxy, NetDial: opts.NetDial}) //nolint:bodyclose // the library leaves nothing to close
	if err != nil {
		return nil, handshakeError(err, resp, opts.secrets)
	}
	s := newSession(opts.SessionID, true, nil, conn, newReceiveBuffer(opts.MaxBufferBytes), opts.SessionOptions, nil)
	if err := s.sendFrame(ctx, s.endpointInfo()); err != nil {
		s.fail(err)
		<-s.done
		return nil, fmt.Errorf("protocol handshake: %w", err)
	}
	s.peerAcked.Store(false) // it was ENDPOINT_INFO
	return s, nil
}

var (
	sessionExistsPattern = regexp.MustCompile(`(?i)session already exists`)
	markupPattern        = regexp.MustCompile(`<[^>]*>`)
)

const (
	maxDenialBody    = 1024 // bytes of a denial's body that are read; the WebSocket library keeps no more
	maxDenialMessage = 200  // bytes of HandshakeError.Message
)

// handshakeError returns the error of a failed upgrade. It quotes no part of the server's response
// that may contain a secret.
func handshakeError(err error, resp *http.Response, secrets *redact.Secrets) error {
	switch {
	case resp == nil:
		return connectError(err, secrets)
	case resp.StatusCode == http.StatusSwitchingProtocols:
		return fmt.Errorf("upgrade: %w", err)
	}
	body, _ := io.ReadAll(io.LimitReader(resp.Body, maxDenialBody)) // may be incomplete
	text := withoutMarkup(string(body))
	denied := &HandshakeError{
		StatusCode: resp.StatusCode,
		RetryAfter: retryAfter(resp.Header.Get("Retry-After")),
		exists:     resp.StatusCode == http.StatusUnauthorized && sessionExistsPattern.MatchString(text),
	}
	// cryo-server's page repeats the status, which the error has already.
	text = strings.TrimSpace(strings.TrimPrefix(text, fmt.Sprintf("%d %s", resp.StatusCode, http.StatusText(resp.StatusCode))))
	whole := text
	if len(body) == maxDenialBody {
		whole += " %" // a truncated text is not plain, because it may end within a secret
	}
	location := redirect(resp.Header.Get("Location"), secrets)
	switch {
	case location != "" && resp.StatusCode/100 == 3:
		denied.Message = "redirect to " + location
	case secrets.Plain(whole):
		denied.Message = redact.Cut(strings.ToValidUTF8(text, ""), maxDenialMessage)
	default:
		denied.Message = fmt.Sprintf("(redacted: %s of %d bytes)", contentType(resp), len(body))
		if denied.exists {
			denied.Message = "session already exists " + denied.Message
		}
	}
	return denied
}

// redirect returns the target of a redirect without its query, or "" if there is none that may be
// repeated.
func redirect(location string, secrets *redact.Secrets) string {
	u, err := url.Parse(location)
	if err != nil || u.User != nil || u.Opaque != "" || location == "" {
		return ""
	}
	target := (&url.URL{Scheme: u.Scheme, Host: u.Host, Path: u.Path}).String()
	if !secrets.Plain(target) {
		return ""
	}
	return redact.Cut(target, maxDenialMessage)
}

// contentType returns the content type of a response if it is one of the usual types.
func contentType(resp *http.Response) string {
	switch kind, _, _ := strings.Cut(resp.Header.Get("Content-Type"), ";"); kind {
	case "text/html", "text/plain", "application/json", "application/problem+json":
		return kind
	}
	return "a body"
}

// retryAfter parses a Retry-After, in seconds or as a date (RFC 9110, 10.2.3). It returns 0 if
// the value is malformed or in the past.
func retryAfter(value string) time.Duration {
	if date, err := http.ParseTime(value); err == nil {
		return max(time.Until(date), 0)
	}
	seconds, err := strconv.ParseUint(value, 10, 64)
	if err != nil && !errors.Is(err, strconv.ErrRange) { // on ErrRange, seconds is the largest number
		return 0
	}
	return time.Duration(min(seconds, uint64(math.MaxInt64/time.Second))) * time.Second
}

func withoutMarkup(text string) string {
	return strings.Join(strings.Fields(markupPattern.ReplaceAllString(text, " ")), " ")
}
