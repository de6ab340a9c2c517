package plugin

import (
	"cmp"
	"context"
	"crypto/tls"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"github.com/redpanda-data/benthos/v4/public/service"
	"golang.org/x/net/http/httpguts"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// The fields of components that connect to a server.

const (
	fieldURL               = "url"
	fieldToken             = "token"
	fieldTokenFile         = "token_file"
	fieldQueryParameters   = "query_parameters"
	fieldHeaders           = "headers"
	fieldTLS               = "tls"
	fieldProxyURL          = "proxy_url"
	fieldConnectTimeout    = "connect_timeout"
	fieldHeartbeatInterval = "heartbeat_interval"
)

var (
	urlField = stringOf(fieldURL, func(text string) (*url.URL, error) {
		if err := cryo.CheckURL(text); err != nil {
			return nil, fmt.Errorf("field %s: %w", fieldURL, err)
		}
		return url.Parse(text)
	})
	tokenField           = secretField(fieldToken, parseInterpolated)
	tokenFileField       = stringOf(fieldTokenFile, anyText)
	queryParametersField = secretMapField(fieldQueryParameters, func(parameters map[string]*interpolated) (map[string]*interpolated, error) {
		query := make(url.Values)
		for name := range parameters {
			query.Set(name, "")
		}
		// CheckURL rejects the parameters that the client sets itself.
		if err := cryo.CheckURL("ws://server?" + query.Encode()); err != nil {
			return nil, fmt.Errorf("field %s: %w", fieldQueryParameters, err)
		}
		return parameters, nil
	})
	headersField  = secretMapField(fieldHeaders, checkHeaders)
	proxyURLField = newField(fieldProxyURL, service.NewURLField, textRule(parseProxy)) // the engine redacts passwords in such fields

	connectTimeoutField    = positiveDuration(fieldConnectTimeout)
	heartbeatIntervalField = positiveDuration(fieldHeartbeatInterval)
)

// dialFields returns the common fields of a component that dials.
func dialFields() []*service.ConfigField {
	return []*service.ConfigField{
		urlField.config().
			Description("The URL of the Cryo server: `ws://`, or `wss://` for TLS. The default port is 80, or 443 for `wss://`.").
			Example("ws://localhost:8080").
			Example("wss://cryo.example.com/feed"),
		tokenField.config().
			Description("The token that authenticates this client, without the word `Bearer`. An [interpolation](https://docs.redpanda.com/redpanda-connect/configuration/interpolation/) is evaluated for each connection attempt, and a connected session keeps its token. Cryo sends the token in the query of the URL, so use `wss://` on untrusted networks."),
		tokenFileField.config().
			Description("The path of a file with the token, instead of `token`. A changed file is read at the next connection attempt. If it cannot be read or is invalid, an error is logged, and the previous token stays in use; at startup, the component fails.").
			Default(""),
		service.NewTLSToggledField(fieldTLS).
			Description("Settings of `wss://`, such as certificate authorities and client certificates, with `enabled: true`. Without them, the certificate authorities of the system apply. Changed files are read at the next connection attempt; if they are invalid, an error is logged, and the previous ones stay in use."),
	}
}

// dialOptionFields returns the advanced fields of a component that dials.
func dialOptionFields() []*service.ConfigField {
	return []*service.ConfigField{
		queryParametersField.config().
			Description("Query parameters that are added to the URL, such as a tenant. Values may be interpolated, as in `token`.").
			Advanced(),
		headersField.config().
			Description("Headers that are added to the HTTP request that opens the WebSocket, for proxies and gateways. Values may be interpolated, as in `token`.").
			Advanced(),
		proxyURLField.config().
			Description("The URL of a proxy: `http://`, `https://` or `socks5://`. Percent-encode special characters in its user name and password, such as `#` as `%23`. If empty, the environment variables HTTPS_PROXY, HTTP_PROXY and NO_PROXY apply.").
			Default("").
			Advanced(),
		connectTimeoutField.config().
			Description("The timeout of a connection attempt, from the name lookup to the end of the handshake. It covers all addresses that the name resolves to. The delays between attempts are fixed: see [Reconnecting](" + docsURL + "reference/delivery.md#reconnecting).").
			Default("5s").
			Advanced(),
		heartbeatField(),
	}
}

func heartbeatField() *service.ConfigField {
	return heartbeatIntervalField.config().
		Description("The interval between WebSocket pings. A connection is closed when nothing is received for two intervals and no data is transferred, so a lost peer is detected within three. On a slow connection, 4 KiB of a large message per interval keep it open.").
		Default("15s").
		Advanced()
}

// attemptOptions are the options that are evaluated for each attempt to connect.
type attemptOptions struct {
	token     *interpolated
	tokenFile *watchedFiles[string] // nil without token_file
	query     map[string]*interpolated
	headers   map[string]*interpolated
	tls       *watchedFiles[*tls.Config] // nil without tls
}

// evaluate is the client's BeforeDial.
func (a *attemptOptions) evaluate(_ context.Context, opts *cryo.DialOptions) (err error) {
	if opts.Token, err = a.token.evaluate(); err != nil {
		return err
	}
	if a.tokenFile != nil {
		opts.Token = a.tokenFile.current()
	}
	opts.Query, opts.Header = make(url.Values, len(a.query)), make(http.Header, len(a.headers))
	for name, value := range a.query {
		text, err := value.evaluate()
		if err != nil {
			return err
		}
		opts.Query.Set(name, text)
	}
	for name, value := range a.headers {
		text, err := value.evaluate()
		if err != nil {
			return err
		}
		opts.Header.Set(name, text)
	}
	if a.tls != nil {
		opts.TLS = a.tls.current()
	}
	return nil
}

// readDialOptions reads the fields into opts, except for the URL and those that are evaluated for
// each attempt, which it returns.
func readDialOptions(conf *service.ParsedConfig, opts *cryo.DialOptions, log *service.Logger) (*url.URL, *attemptOptions, error) {
	r := &settingsReader{conf: conf}
	u := urlField.read(r)
	a := &attemptOptions{token: tokenField.read(r), query: queryParametersField.read(r), headers: headersField.read(r)}
	tokenFile := tokenFileField.read(r)
	proxy := proxyURLField.read(r)
	opts.ConnectTimeout = connectTimeoutField.read(r)
	opts.HeartbeatInterval = heartbeatIntervalField.read(r)
	if r.err != nil {
		return nil, nil, r.err
	}
	if opts.Proxy = http.ProxyFromEnvironment; proxy != nil {
		opts.Proxy = http.ProxyURL(proxy)
	}
	var err error
	switch {
	case tokenFile != "" && !a.token.isEmpty():
		return nil, nil, fmt.Errorf("the fields %s and %s cannot be used together", fieldToken, fieldTokenFile)
	case tokenFile != "":
		if a.tokenFile, err = watchFiles(fieldTokenFile, []string{tokenFile}, 0, shortageTime, log, tokenOfFile); err != nil {
			return nil, nil, fmt.Errorf("field %s: %w", fieldTokenFile, withoutToken(err, fieldToken))
		}
		a.tokenFile.log = log.With("file", tokenFile)
	}
	a.tls, err = readDialTLS(conf, log)
	switch {
	case err != nil:
		return nil, nil, fmt.Errorf("field %s: %w", fieldTLS, err)
	case a.tls != nil && u.Scheme != "wss":
		return nil, nil, fmt.Errorf("field %s is enabled, but the field %s begins with %s://: use wss://", fieldTLS, fieldURL, u.Scheme)
	}
	return u, a, nil
}

// readDialTLS returns the configuration of wss and watches its files. It returns nil if the field
// is not enabled.
func readDialTLS(conf *service.ParsedConfig, log *service.Logger) (*watchedFiles[*tls.Config], error) {
	_, enabled, err := conf.FieldTLSToggled(fieldTLS)
	if err != nil || !enabled {
		return nil, err
	}
	var paths []string
	caFile, err := conf.FieldString(fieldTLS, "root_cas_file")
	if err != nil {
		return nil, err
	}
	if caFile != "" {
		paths = append(paths, caFile)
	}
	certs, err := conf.FieldObjectList(fieldTLS, "client_certs")
	if err != nil {
		return nil, err
	}
	for _, cert := range certs {
		for _, field := range []string{"cert_file", "key_file"} {
			if path, err := cert.FieldString(field); err != nil {
				return nil, err
			} else if path != "" {
				paths = append(paths, path)
			}
		}
	}
	return watchFiles("TLS files", paths, 0, shortageTime, log, func(contents [][]byte) (*tls.Config, error) {
		if caFile != "" {
			if _, err := certPool(caFile, contents[0]); err != nil {
				return nil, err // the engine would trust no authority at all
			}
		}
		// The engine reads the files itself. If they change in between, they differ from contents
		// at the next attempt, and are loaded again.
		config, _, err := conf.FieldTLSToggled(fieldTLS)
		return config, err
	})
}

// handshakeHeaders are the headers that the WebSocket handshake sets.
var handshakeHeaders = []string{"Connection", "Sec-Websocket-Extensions", "Sec-Websocket-Key", "Sec-Websocket-Version", "Upgrade"}

// checkHeaders rejects headers that net/http and the WebSocket library would reject or ignore.
func checkHeaders(headers map[string]*interpolated) (map[string]*interpolated, error) {
	for _, name := range slices.Sorted(maps.Keys(headers)) {
		switch {
		case !httpguts.ValidHeaderFieldName(name):
			return nil, fmt.Errorf("field %s: %q is not a valid HTTP header name", fieldHeaders, name)
		case slices.Contains(handshakeHeaders, http.CanonicalHeaderKey(name)):
			return nil, fmt.Errorf("field %s: %s is set by the WebSocket handshake: remove it", fieldHeaders, name)
		}
	}
	return headers, nil
}

// parseProxy returns nil if the text is empty. Its error does not contain the text, which may
// include a password.
func parseProxy(text string) (*url.URL, error) {
	if text == "" {
		return nil, nil
	}
	proxy, err := url.Parse(text)
	// An @ behind the host is that of a user and password, one of whose characters ends the host.
	if strings.Contains(text, "@") && (err != nil || strings.Contains(proxy.Path+proxy.RawQuery+proxy.Fragment, "@")) {
		return nil, fmt.Errorf("field %s is not a URL: percent-encode special characters in its user name and password, such as # as %%23, %% as %%25, / as %%2F and ? as %%3F", fieldProxyURL)
	}
	if err == nil && slices.Contains([]string{"http", "https", "socks5", "socks5h"}, proxy.Scheme) && proxy.Hostname() != "" {
		if port, err := strconv.ParseUint(cmp.Or(proxy.Port(), "1"), 10, 16); err == nil && port > 0 {
			return proxy, nil
		}
	}
	return nil, fmt.Errorf("field %s must be a URL with http://, https:// or socks5://, a host, and optionally a port from 1 to 65535", fieldProxyURL)
}
