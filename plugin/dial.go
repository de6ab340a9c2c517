package plugin

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"net/url"
	"slices"
	"sync"
	"time"

	"github.com/redpanda-data/benthos/v4/public/service"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// Having a session by dialling a Cryo server.

const (
	fieldURL               = "url"
	fieldToken             = "token"
	fieldQueryParameters   = "query_parameters"
	fieldHeaders           = "headers"
	fieldTLS               = "tls"
	fieldProxyURL          = "proxy_url"
	fieldConnectTimeout    = "connect_timeout"
	fieldHeartbeatInterval = "heartbeat_interval"

	// ghostWait is how soon a client whose lost session is still alive for the
	// server tries again, and tokenWait one whose token was refused. After any
	// other failure the wait doubles from firstWait to mostWait. A session that
	// didn't last, and on which nothing was acknowledged, counts as a failure too, or
	// a server that lets us in only to send us away would be dialled ten times a second.
	ghostWait = time.Second
	tokenWait = 30 * time.Second
	firstWait = 250 * time.Millisecond
	mostWait  = 10 * time.Second
	lasting   = time.Second
	closeTime = 10 * time.Second // for the goodbye; the engine sets no limit
)

func dialFields() []*service.ConfigField {
	return []*service.ConfigField{
		service.NewStringField(fieldURL).
			Description("The address of the Cryo server: `ws://` (or `wss://` for TLS), host, port if it is not 80 (443), and path if it is not `/`.").
			Example("ws://localhost:8080").
			Example("wss://cryo.example.com/feed").
			LintRule(`
let url = this.string().catch("")
root = if !$url.re_match("(?i)^wss?://") {
  "field url has to begin with ws:// or wss://"
} else if $url.re_match("^[a-zA-Z]+://[^/?#]*@") {
  "field url has no place for user and password: Cryo's authorization is the token"
} else if !$url.re_match("^[a-zA-Z]+://[^/?#:]") {
  "field url has no host"
} else if $url.re_match("[?&](authorization|x-cryo-sid)([=&#]|$)") {
  "field url has a parameter that is made from the token or the session: authorization or x-cryo-sid"
}`),
		service.NewStringField(fieldToken).
			Description("The secret by which the server knows who may connect, without the word `Bearer`. Cryo carries it in the query of the URL: use `wss://` where others could listen, and mind the access logs of proxies. It appears in none of our log lines, errors or metrics; a text with one of fewer than 6 bytes in it is left out as a whole.").
			Default("").
			Secret(),
		service.NewStringMapField(fieldQueryParameters).
			Description("Further parameters for the query of the URL, for servers that look at them, such as a tenant or a room.").
			Default(map[string]any{}).
			Advanced().
			LintRule(`root = if this.type() == "object" && this.keys().any(k -> [ "authorization", "x-cryo-sid" ].contains(k)) { "field query_parameters has one that is made from the token or the session: authorization or x-cryo-sid" }`),
		service.NewStringMapField(fieldHeaders).
			Description("Further headers for the HTTP request that opens the WebSocket, for proxies and gateways that look at them.").
			Default(map[string]any{}).
			Advanced(),
		service.NewTLSToggledField(fieldTLS).
			Description("Settings for `wss://`: own certificate authorities, client certificates. They need `enabled: true`. Without it `wss://` works too, and the authorities that the system trusts decide."),
		service.NewURLField(fieldProxyURL).
			Description("A proxy to connect through: `http://`, `https://` or `socks5://`. Without it, HTTPS_PROXY, HTTP_PROXY and NO_PROXY of the environment decide.").
			Default("").
			Advanced().
			LintRule(`root = if this.type() == "string" && this != "" && !this.re_match("(?i)^(http|https|socks5|socks5h)://[^/?#]") { "field proxy_url has to be http://, https:// or socks5:// and a host" }`),
		positiveDuration(fieldConnectTimeout).
			Description("How long one attempt to connect may take, from the TCP connection to the end of the handshake. While attempts fail, the next one follows after 250 ms, then ever later, up to 10 s; after 30 s when the token was refused.").
			Default("5s").
			Advanced(),
		heartbeatField(),
	}
}

func heartbeatField() *service.ConfigField {
	return positiveDuration(fieldHeartbeatInterval).
		Description("How often the other end is pinged, by a WebSocket ping. It is given up within three intervals when nothing at all was received from it, and nothing of what waits to be sent gets through: on a slow line, 4 KiB of a large message an interval are enough.").
		Default("15s").
		Advanced()
}

// dialLint finds TLS settings that would have no effect.
const dialLint = `if this.tls.enabled.or(false) == true && this.url.string().catch("").re_match("(?i)^ws://") {
  "field tls is enabled, but the url is ws://: use wss://"
}`

// dialer keeps one session with a server, and dials again when it has ended. Calls
// that want a session while there is none share one attempt.
type dialer struct {
	url   string
	name  string // of the server, for people
	opts  cryo.DialOptions
	log   *service.Logger
	lines *sparing // log lines of failed attempts

	metrics dialMetrics

	mu       sync.Mutex
	session  *cryo.Session // the last one; nil before the first
	gone     chan struct{} // closed when nothing is left of it, and its end is logged
	returned *cryo.Session // the last one that connect returned
	attempt  *attempt      // in flight; nil if none is
	worked   bool          // something was acknowledged on session
	failures int           // attempts, and sessions that were short and useless, in a row
	due      time.Time     // earliest time of the next dial
	closed   bool
}

// attempt is one attempt to connect. No caller's context bounds it, because others
// may wait for it too.
type attempt struct {
	cancel context.CancelFunc
	logged bool // a batch waits, so a failure is logged here; the engine logs those of Connect. Guarded by the dialer's mutex

	done    chan struct{} // closed at the end, when the following are set
	session *cryo.Session
	err     error
}

// errDialerClosed is the end of all attempts.
var errDialerClosed = errors.New("the component is closed")

func dialerFromParsed(conf *service.ParsedConfig, res *service.Resources) (*dialer, error) {
	d := &dialer{log: res.Logger(), lines: newSparing(), metrics: newDialMetrics(meterOf(res))}
	d.opts.SessionID = cryo.NewSessionID() // the same on every connection
	d.opts.Logger = libraryLogger(d.log)
	d.metrics.watch(&d.opts.SessionOptions)
	var err error
	if d.url, err = conf.FieldString(fieldURL); err != nil {
		return nil, err
	}
	if err := cryo.CheckURL(d.url); err != nil {
		return nil, fmt.Errorf("field %s: %w", fieldURL, err)
	}
	u, err := url.Parse(d.url)
	if err != nil {
		return nil, err
	}
	d.name = (&url.URL{Scheme: u.Scheme, Host: u.Host, Path: u.Path}).String()

	if d.opts.Token, err = conf.FieldString(fieldToken); err != nil {
		return nil, err
	}
	parameters, err := conf.FieldStringMap(fieldQueryParameters)
	if err != nil {
		return nil, err
	}
	d.opts.Query = make(url.Values)
	for name, value := range parameters {
		if name == "authorization" || name == "x-cryo-sid" {
			return nil, fmt.Errorf("field %s has one that is made from the token or the session: %s", fieldQueryParameters, name)
		}
		d.opts.Query.Set(name, value)
	}
	headers, err := conf.FieldStringMap(fieldHeaders)
	if err != nil {
		return nil, err
	}
	d.opts.Header = make(http.Header)
	for name, value := range headers {
		d.opts.Header.Set(name, value)
	}
	if d.opts.TLS, err = tlsFromParsed(conf, u.Scheme); err != nil {
		return nil, err
	}
	if d.opts.Proxy, err = proxyFromParsed(conf); err != nil {
		return nil, err
	}
	if d.opts.ConnectTimeout, err = fieldPositiveDuration(conf, fieldConnectTimeout); err != nil {
		return nil, err
	}
	d.opts.HeartbeatInterval, err = fieldPositiveDuration(conf, fieldHeartbeatInterval)
	return d, err
}

func tlsFromParsed(conf *service.ParsedConfig, scheme string) (*tls.Config, error) {
	settings, enabled, err := conf.FieldTLSToggled(fieldTLS)
	switch {
	case err != nil:
		return nil, err
	case !enabled:
		return nil, nil
	case scheme != "wss":
		return nil, fmt.Errorf("field %s is enabled, but the url is %s://: use wss://", fieldTLS, scheme)
	default:
		return settings, nil
	}
}

func proxyFromParsed(conf *service.ParsedConfig) (func(*http.Request) (*url.URL, error), error) {
	raw, err := conf.FieldString(fieldProxyURL)
	if err != nil {
		return nil, err
	}
	if raw == "" {
		return http.ProxyFromEnvironment, nil
	}
	proxy, err := url.Parse(raw) // its error would repeat a password
	if err != nil || proxy.Host == "" || !slices.Contains([]string{"http", "https", "socks5", "socks5h"}, proxy.Scheme) {
		return nil, fmt.Errorf("field %s has to be http://, https:// or socks5:// and a host", fieldProxyURL)
	}
	return http.ProxyURL(proxy), nil
}

// live is the session, if it lives.
func (d *dialer) live() *cryo.Session {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.session == nil || d.session.Err() != nil {
		return nil
	}
	return d.session
}

// follow reports a session's end as soon as it comes: an output may have nothing
// to write for long.
func (d *dialer) follow(s *cryo.Session, gone chan<- struct{}) {
	defer close(gone)
	began := time.Now()
	<-s.Context().Done()
	d.mu.Lock()
	if d.worked || time.Since(began) >= lasting {
		d.failures = 0
	} else {
		d.due = time.Now().Add(d.backOffLocked())
	}
	d.mu.Unlock()
	d.reportEnd(s.Err())
	<-s.Done()
	d.metrics.gone()
}

// noteWork notes that something was acknowledged on a session: however short it was, the
// next attempt need not wait. The end of the session may have been noted before.
func (d *dialer) noteWork(s *cryo.Session) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.session == s && !d.worked {
		d.worked, d.failures, d.due = true, 0, time.Time{}
	}
}

func (d *dialer) reportEnd(err error) {
	var closed *cryo.PeerClosedError
	switch {
	case errors.Is(err, cryo.ErrClosed):
		d.log.Infof("Closed the session with %s", d.name)
	case errors.As(err, &closed): // a server that restarts is no fault
		d.log.Infof("Disconnected from %s: %v", d.name, err)
	default:
		d.log.Warnf("Disconnected from %s: %v", d.name, err)
	}
}

// connect returns the live session, or that of one attempt; fresh is one that it has
// not returned before. The error of a failed attempt has the time until the next.
func (d *dialer) connect(ctx context.Context) (session *cryo.Session, fresh bool, err error) {
	session, err = d.next(ctx, false)
	if err != nil {
		return nil, false, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	fresh = session != d.returned
	d.returned = session
	return session, fresh, nil
}

// await returns the live session, or that of the first attempt that succeeds before
// the context is done.
func (d *dialer) await(ctx context.Context) (*cryo.Session, error) {
	var last error
	for {
		s, err := d.next(ctx, true)
		switch {
		case err == nil || errors.Is(err, errDialerClosed):
			return s, err
		case ctx.Err() == nil:
			last = err
		case last == nil:
			return nil, context.Cause(ctx)
		default:
			return nil, fmt.Errorf("%w: %v", context.Cause(ctx), last) //nolint:errorlint // its back-off is not the caller's
		}
	}
}

// next returns the live session, or the result of the attempt in flight, and begins
// one if there is none; logged is set by callers whose failures nobody else logs.
func (d *dialer) next(ctx context.Context, logged bool) (*cryo.Session, error) {
	s, a, err := d.join(logged)
	if a == nil {
		return s, err
	}
	select {
	case <-a.done:
		return a.session, a.err
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

func (d *dialer) join(logged bool) (*cryo.Session, *attempt, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	switch {
	case d.closed:
		return nil, nil, errDialerClosed
	case d.session != nil && d.session.Err() == nil:
		return d.session, nil, nil
	case d.attempt == nil:
		ctx, cancel := context.WithCancel(context.Background())
		d.attempt = &attempt{cancel: cancel, done: make(chan struct{})}
		go d.try(ctx, d.attempt)
	}
	d.attempt.logged = d.attempt.logged || logged
	return nil, d.attempt, nil
}

// try makes an attempt, when it is due.
func (d *dialer) try(ctx context.Context, a *attempt) {
	defer close(a.done)
	defer a.cancel()
	s, err := d.dial(ctx)
	d.mu.Lock()
	defer d.mu.Unlock()
	d.attempt = nil
	switch {
	case err == nil:
		a.session = s
		d.startLocked(s)
	case ctx.Err() != nil:
		a.err = errDialerClosed
	default:
		a.err = d.failedLocked(err)
		if a.logged {
			d.lines.do(d.log, func(log *service.Logger) {
				log.Warnf("Connecting to %s again failed, messages wait for it: %v (at most one such line a second)", d.name, a.err)
			})
		}
	}
}

// dial waits until nothing is left of the last session, which would be a ghost for
// the server, and until the next attempt is due.
func (d *dialer) dial(ctx context.Context) (*cryo.Session, error) {
	d.mu.Lock()
	gone := d.gone
	d.mu.Unlock()
	if gone != nil {
		select {
		case <-gone:
		case <-ctx.Done():
		}
	}
	d.mu.Lock()
	due := d.due
	d.mu.Unlock()
	pause(ctx, time.Until(due))
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	return cryo.Dial(ctx, d.url, &d.opts)
}

// pause returns early when the context is done.
func pause(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}

func (d *dialer) startLocked(s *cryo.Session) {
	again := d.session != nil
	verb := "Connected"
	if again {
		verb = "Reconnected"
	}
	d.log.Infof("%s to %s as session %d", verb, d.name, s.ID())
	d.metrics.connected(again)
	d.session, d.gone, d.worked = s, make(chan struct{}), false
	go d.follow(s, d.gone)
}

// failedLocked counts a failed attempt, and adds to its error the time until the
// next.
func (d *dialer) failedLocked(err error) error {
	var wait time.Duration
	switch {
	case errors.Is(err, cryo.ErrSessionExists):
		wait = ghostWait
		err = fmt.Errorf("%w (if that is our own lost connection, it passes within seconds)", err)
	case errors.Is(err, cryo.ErrUnauthorized):
		wait = tokenWait
		err = fmt.Errorf("%w (check the field %s; trying again in %v)", err, fieldToken, tokenWait)
	default:
		wait = d.backOffLocked()
	}
	d.due = time.Now().Add(wait)
	return service.NewErrBackOff(err, wait)
}

// backOffLocked counts a failure and returns the time until the next attempt. Not
// all who lost the same server come back at the same moment.
func (d *dialer) backOffLocked() time.Duration {
	wait := min(firstWait<<min(d.failures, 10), mostWait)
	d.failures++
	return wait - rand.N(wait/4) //nolint:gosec // no secret
}

// close ends the attempt in flight, with all calls that wait for it, and then the
// session by a close handshake, with a bound of its own beside the engine's. A
// session that is ending already is waited for: acknowledgements may still be
// written.
func (d *dialer) close(ctx context.Context) error {
	d.mu.Lock()
	d.closed = true
	a := d.attempt
	d.mu.Unlock()
	if a != nil {
		a.cancel()
		<-a.done
	}
	d.mu.Lock()
	s, gone := d.session, d.gone
	d.mu.Unlock()
	if s == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, closeTime)
	defer cancel()
	err := s.Close(ctx, "")
	<-gone
	return err
}

// test dials as another session and hangs up. What the server sends to it
// meanwhile is neither taken nor refused: after the goodbye it goes to others.
func (d *dialer) test(ctx context.Context) service.ConnectionTestResults {
	opts := d.opts
	opts.SessionID = cryo.NewSessionID()
	opts.SendOnly = false // an output's would refuse
	s, err := cryo.Dial(ctx, d.url, &opts)
	if err != nil {
		return service.ConnectionTestFailed(err).AsList()
	}
	if err := s.Close(ctx, "connection test"); err != nil {
		return service.ConnectionTestFailed(err).AsList()
	}
	return service.ConnectionTestSucceeded().AsList()
}
