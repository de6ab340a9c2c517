package plugin

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"sync"
	"sync/atomic"
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
			Description("How long one attempt to connect may take, from the TCP connection to the end of the handshake. While attempts fail, the next one follows after 250 ms, then ever later, up to 10 s; after 30 s when the token was refused; and when the server asks for it by `Retry-After`, after that time, 5 minutes at most.").
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

// dialer is the engine's view of a [cryo.Client], which has the sessions and the waits
// between attempts: its log lines, metrics and errors.
type dialer struct {
	client  *cryo.Client
	url     string // of the server
	name    string // the URL without its query, for log lines
	opts    cryo.DialOptions
	log     *service.Logger
	metrics dialMetrics

	again   bool           // a session was connected before; used by connected alone
	reports sync.WaitGroup // the goroutine that logs the end of the session

	logged   atomic.Pointer[cryo.RetryError] // the last failure that await has logged
	awaitLog limitedLog                      // of await
}

// errDialerClosed is the error of those who wait for a session when the component closes.
var errDialerClosed = errors.New("the component is closed")

// dialerFromParsed adds the configuration to opts.
func dialerFromParsed(conf *service.ParsedConfig, res *service.Resources, opts cryo.DialOptions) (*dialer, error) {
	d := &dialer{opts: opts, log: res.Logger(), metrics: newDialMetrics(meterOf(res))}
	d.awaitLog = newLimitedLog(d.log)
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
	if d.opts.HeartbeatInterval, err = fieldPositiveDuration(conf, fieldHeartbeatInterval); err != nil {
		return nil, err
	}
	d.client, err = cryo.NewClient(d.url, &cryo.ClientOptions{DialOptions: d.opts, OnSession: d.connected, OnSessionEnd: d.ended})
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

// connected is the client's OnSession. It reports the session, and the end of it when it
// begins: the engine may not notice it for long, and Done may be a close timeout away.
func (d *dialer) connected(s *cryo.Session) {
	verb := "Connected"
	if d.again {
		verb = "Reconnected"
	}
	d.log.Infof("%s to %s as session %d", verb, d.name, s.ID())
	d.metrics.connected(d.again)
	d.again = true
	d.reports.Go(func() {
		<-s.Context().Done()
		d.reportEnd(s.Err())
	})
}

// ended is the client's OnSessionEnd. The end is logged before the next session can be.
func (d *dialer) ended(*cryo.Session) {
	d.reports.Wait()
	d.metrics.gone()
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

// connect returns the session, or the result of one attempt. The engine logs a failure, and
// connects again when the next attempt is due.
func (d *dialer) connect(ctx context.Context) (*cryo.Session, error) {
	s, err := d.client.Connect(ctx)
	if failed, ok := errors.AsType[*cryo.RetryError](err); ok {
		return nil, service.NewErrBackOff(withHint(failed), failed.After)
	}
	if errors.Is(err, cryo.ErrClosed) {
		err = errDialerClosed
	}
	return s, err
}

// await returns the session, or that of the first attempt that succeeds before the context
// is done. Failures go to the log, each once for all who await the session.
func (d *dialer) await(ctx context.Context) (*cryo.Session, error) {
	var last error
	for {
		s, err := d.client.Connect(ctx)
		failed, ok := errors.AsType[*cryo.RetryError](err)
		switch {
		case ok:
			last = withHint(failed)
			if d.logged.Swap(failed) != failed {
				if log, ok := d.awaitLog.allow(); ok {
					log.Warnf("Connecting to %s again failed, messages wait for it: %v", d.name, last)
				}
			}
		case errors.Is(err, cryo.ErrClosed):
			return nil, errDialerClosed
		case err != nil && last != nil:
			return nil, fmt.Errorf("%w: %v", context.Cause(ctx), last) //nolint:errorlint // its cause is not the caller's
		case err != nil:
			return nil, context.Cause(ctx)
		default:
			return s, nil
		}
	}
}

// withHint adds what the user can do to the error of an attempt.
func withHint(failed *cryo.RetryError) error {
	switch err := failed.Err; {
	case errors.Is(err, cryo.ErrSessionExists):
		return fmt.Errorf("%w (if that is our own lost connection, it passes within seconds)", err)
	case errors.Is(err, cryo.ErrUnauthorized):
		return fmt.Errorf("%w (check the field %s; trying again in %v)", err, fieldToken, failed.After.Round(time.Second))
	default:
		return err
	}
}

// close closes the client, with a bound of its own beside the engine's. A session that is
// ending already is waited for: acknowledgements may still be written.
func (d *dialer) close(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, closeTime)
	defer cancel()
	return d.client.Close(ctx, "")
}

// test dials as another session and hangs up. What the server sends to it
// meanwhile is neither taken nor refused: after the goodbye it goes to others.
func (d *dialer) test(ctx context.Context) service.ConnectionTestResults {
	opts := d.opts
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
