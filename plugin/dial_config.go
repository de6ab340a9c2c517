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

func dialFields() []*service.ConfigField {
	return []*service.ConfigField{
		urlField.config().
			Description("The URL of the Cryo server: `ws://`, or `wss://` for TLS. The default port is 80, or 443 for `wss://`.").
			Example("ws://localhost:8080").
			Example("wss://cryo.example.com/feed"),
		tokenField.config().
			Description("The secret that the server authenticates the client by, without the word `Bearer`. It may be an xref:configuration:interpolation.adoc#bloblang-queries[interpolation] without a message, which is evaluated for each attempt to connect, such as `${! env(\"TOKEN\") }` or `${! file(path: \"/run/token\", no_cache: true).string().trim() }`; if that fails, so does the attempt. A session that is connected keeps the token that it began with. Cryo sends it in the query of the URL: use `wss://` on untrusted networks, and check the access logs of proxies. No log line, error or metric of this component contains it, or a part of `headers` and `query_parameters`: a text of the server is repeated only if it consists of words and a few numbers and contains none of them, otherwise its length is."),
		tokenFileField.config().
			Description("The path of a file with the token, such as a mounted secret; a line break at its end is ignored. It cannot be used with `token`. When the content has changed, the next attempt to connect uses the new token. If the file cannot be read, is empty or contains an invalid token, an error is logged, and the previous token stays in use; at the start, it is an error.").
			Default(""),
		queryParametersField.config().
			Description("Additional query parameters of the URL, such as a tenant or a room. The values may be interpolated, as that of `token`.").
			Advanced(),
		headersField.config().
			Description("Additional headers of the HTTP request that opens the WebSocket, for proxies and gateways. The values may be interpolated, as that of `token`.").
			Advanced(),
		service.NewTLSToggledField(fieldTLS).
			Description("Settings for `wss://`, such as custom certificate authorities and client certificates, with `enabled: true`. Without them, `wss://` uses the system's certificate authorities. When files have changed, the next attempt to connect uses the new ones; if these are invalid, an error is logged, and the previous ones stay in use."),
		proxyURLField.config().
			Description("The URL of a proxy: `http://`, `https://` or `socks5://`. Special characters of its user and password must be percent-encoded, such as `#` as `%23`. Empty: the environment variables HTTPS_PROXY, HTTP_PROXY and NO_PROXY apply.").
			Default("").
			Advanced(),
		connectTimeoutField.config().
			Description("The timeout of an attempt to connect, from the name lookup to the end of the handshake. If the name has several addresses, up to 64 are tried, IPv6 and IPv4 in turn: the next one begins after 250 ms at most while the others go on, so that dead ones do not use up the time. After the end of a session, the next attempt begins within 1 s, at random, so that the clients of a server that restarts do not return at the same moment. After a failed attempt, the wait grows from 250 ms to 10 s. It is 30 s if the token was denied, and at most 5 minutes if the server sends `Retry-After`.").
			Default("5s").
			Advanced(),
		heartbeatField(),
	}
}

func heartbeatField() *service.ConfigField {
	return heartbeatIntervalField.config().
		Description("The interval between WebSocket pings. If nothing is received within three intervals, and no data is transferred to the peer, the connection is closed. On a slow line, 4 KiB of a large message per interval are enough to keep it open.").
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
		if a.tokenFile, err = watchFiles(fieldTokenFile, []string{tokenFile}, 0, log.With("file", tokenFile), tokenOfFile); err != nil {
			return nil, nil, fmt.Errorf("field %s: %w", fieldTokenFile, withoutToken(err, fieldToken))
		}
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
	return watchFiles("TLS files", paths, 0, log, func(contents [][]byte) (*tls.Config, error) {
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
		return nil, fmt.Errorf("field %s is not a URL: percent-encode special characters of its user and password, such as # as %%23, %% as %%25, / as %%2F and ? as %%3F", fieldProxyURL)
	}
	if err == nil && slices.Contains([]string{"http", "https", "socks5", "socks5h"}, proxy.Scheme) && proxy.Hostname() != "" {
		if port, err := strconv.ParseUint(cmp.Or(proxy.Port(), "1"), 10, 16); err == nil && port > 0 {
			return proxy, nil
		}
	}
	return nil, fmt.Errorf("field %s must be a URL with http://, https:// or socks5://, a host, and optionally a port from 1 to 65535", fieldProxyURL)
}
