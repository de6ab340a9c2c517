package plugin

import (
	"cmp"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strconv"

	"github.com/redpanda-data/benthos/v4/public/service"
	"golang.org/x/net/http/httpguts"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// The fields of components that connect to a server.

const (
	fieldURL               = "url"
	fieldToken             = "token"
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
	tokenField = secretField(fieldToken, func(token string) (string, error) {
		return token, checkSecret("field "+fieldToken, token)
	})
	queryParametersField = secretMapField(fieldQueryParameters, func(parameters map[string]string) (url.Values, error) {
		query := make(url.Values)
		for name, value := range parameters {
			if err := checkSecret(fmt.Sprintf("field %s: the value of %q", fieldQueryParameters, name), value); err != nil {
				return nil, err
			}
			query.Set(name, value)
		}
		// CheckURL rejects the parameters that the client sets itself.
		if err := cryo.CheckURL("ws://server?" + query.Encode()); err != nil {
			return nil, fmt.Errorf("field %s: %w", fieldQueryParameters, err)
		}
		return query, nil
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
			Description("The secret that the server authenticates the client by, without the word `Bearer`. Cryo sends it in the query of the URL: use `wss://` on untrusted networks, and check the access logs of proxies. It is redacted from all log lines, errors and metrics of this component; a text that contains a token of fewer than 6 bytes is redacted as a whole."),
		queryParametersField.config().
			Description("Additional query parameters of the URL, such as a tenant or a room.").
			Advanced(),
		headersField.config().
			Description("Additional headers of the HTTP request that opens the WebSocket, for proxies and gateways.").
			Advanced(),
		service.NewTLSToggledField(fieldTLS).
			Description("Settings for `wss://`, such as custom certificate authorities and client certificates, with `enabled: true`. Without them, `wss://` uses the system's certificate authorities."),
		proxyURLField.config().
			Description("The URL of a proxy: `http://`, `https://` or `socks5://`. Empty: the environment variables HTTPS_PROXY, HTTP_PROXY and NO_PROXY apply.").
			Default("").
			Advanced(),
		connectTimeoutField.config().
			Description("The timeout of an attempt to connect, from the TCP connection to the end of the handshake. The wait before the next attempt grows from 250 ms to 10 s. It is 30 s if the token was denied, and at most 5 minutes if the server sends `Retry-After`.").
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

// readDialOptions reads the fields into opts, except for the URL, which it returns.
func readDialOptions(conf *service.ParsedConfig, opts *cryo.DialOptions) (*url.URL, error) {
	r := &settingsReader{conf: conf}
	u := urlField.read(r)
	opts.Token = tokenField.read(r)
	opts.Query = queryParametersField.read(r)
	opts.Header = headersField.read(r)
	proxy := proxyURLField.read(r)
	opts.ConnectTimeout = connectTimeoutField.read(r)
	opts.HeartbeatInterval = heartbeatIntervalField.read(r)
	if r.err != nil {
		return nil, r.err
	}
	if opts.Proxy = http.ProxyFromEnvironment; proxy != nil {
		opts.Proxy = http.ProxyURL(proxy)
	}
	settings, enabled, err := conf.FieldTLSToggled(fieldTLS)
	switch {
	case err != nil:
		return nil, fmt.Errorf("field %s: %w", fieldTLS, err)
	case enabled && u.Scheme != "wss":
		return nil, fmt.Errorf("field %s is enabled, but the field %s begins with %s://: use wss://", fieldTLS, fieldURL, u.Scheme)
	case enabled:
		opts.TLS = settings
	}
	return u, nil
}

// handshakeHeaders are the headers that the WebSocket handshake sets.
var handshakeHeaders = []string{"Connection", "Sec-Websocket-Extensions", "Sec-Websocket-Key", "Sec-Websocket-Version", "Upgrade"}

// checkHeaders rejects headers that net/http and the WebSocket library would reject or ignore.
// Its error contains no value of a header, because that may be a secret.
func checkHeaders(headers map[string]string) (http.Header, error) {
	checked := make(http.Header, len(headers))
	for _, name := range slices.Sorted(maps.Keys(headers)) {
		key, value := http.CanonicalHeaderKey(name), headers[name]
		switch {
		case !httpguts.ValidHeaderFieldName(name):
			return nil, fmt.Errorf("field %s: %q is not a valid HTTP header name", fieldHeaders, name)
		case slices.Contains(handshakeHeaders, key):
			return nil, fmt.Errorf("field %s: %s is set by the WebSocket handshake: remove it", fieldHeaders, name)
		}
		if err := checkSecret(fmt.Sprintf("field %s: the value of %q", fieldHeaders, name), value); err != nil {
			return nil, err
		}
		checked.Set(key, value)
	}
	return checked, nil
}

// parseProxy returns nil if the text is empty. Its error does not contain the text, which may
// include a password.
func parseProxy(text string) (*url.URL, error) {
	if text == "" {
		return nil, nil
	}
	proxy, err := url.Parse(text)
	if err == nil && slices.Contains([]string{"http", "https", "socks5", "socks5h"}, proxy.Scheme) && proxy.Hostname() != "" {
		if port, err := strconv.ParseUint(cmp.Or(proxy.Port(), "1"), 10, 16); err == nil && port > 0 {
			return proxy, nil
		}
	}
	return nil, fmt.Errorf("field %s must be a URL with http://, https:// or socks5://, a host, and optionally a port from 1 to 65535", fieldProxyURL)
}
