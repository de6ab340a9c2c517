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

// The fields of a component that dials.

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
	queryParametersField = mapOf(fieldQueryParameters, func(parameters map[string]string) (url.Values, error) {
		query := make(url.Values)
		for name, value := range parameters {
			query.Set(name, value)
		}
		// CheckURL knows the parameters that the client sets.
		if err := cryo.CheckURL("ws://server?" + query.Encode()); err != nil {
			return nil, fmt.Errorf("field %s: %w", fieldQueryParameters, err)
		}
		return query, nil
	})
	headersField  = mapOf(fieldHeaders, checkHeaders)
	proxyURLField = newField(fieldProxyURL, service.NewURLField, textRule(parseProxy)) // the engine echoes no password of such a field

	connectTimeoutField    = positiveDuration(fieldConnectTimeout)
	heartbeatIntervalField = positiveDuration(fieldHeartbeatInterval)
)

func dialFields() []*service.ConfigField {
	return []*service.ConfigField{
		urlField.config().
			Description("The address of the Cryo server: `ws://` (or `wss://` for TLS), host, port if it is not 80 (443), and path if it is not `/`.").
			Example("ws://localhost:8080").
			Example("wss://cryo.example.com/feed"),
		service.NewStringField(fieldToken).
			Description("The secret by which the server knows who may connect, without the word `Bearer`. Cryo carries it in the query of the URL: use `wss://` where others could listen, and mind the access logs of proxies. It appears in none of our log lines, errors or metrics; a text with one of fewer than 6 bytes in it is left out as a whole.").
			Default("").
			Secret(),
		queryParametersField.config().
			Description("Further parameters for the query of the URL, for servers that look at them, such as a tenant or a room.").
			Default(map[string]any{}).
			Advanced(),
		headersField.config().
			Description("Further headers for the HTTP request that opens the WebSocket, for proxies and gateways that look at them.").
			Default(map[string]any{}).
			Advanced(),
		service.NewTLSToggledField(fieldTLS).
			Description("Settings for `wss://`: own certificate authorities, client certificates. They need `enabled: true`. Without it `wss://` works too, and the authorities that the system trusts decide."),
		proxyURLField.config().
			Description("A proxy to connect through: `http://`, `https://` or `socks5://`. Without it, HTTPS_PROXY, HTTP_PROXY and NO_PROXY of the environment decide.").
			Default("").
			Advanced(),
		connectTimeoutField.config().
			Description("How long one attempt to connect may take, from the TCP connection to the end of the handshake. While attempts fail, the next one follows after 250 ms, then ever later, up to 10 s; after 30 s when the token was refused; and when the server asks for it by `Retry-After`, after that time, 5 minutes at most.").
			Default("5s").
			Advanced(),
		heartbeatField(),
	}
}

func heartbeatField() *service.ConfigField {
	return heartbeatIntervalField.config().
		Description("How often the other end is pinged, by a WebSocket ping. It is given up within three intervals when nothing at all was received from it, and nothing of what waits to be sent gets through: on a slow line, 4 KiB of a large message an interval are enough.").
		Default("15s").
		Advanced()
}

// readDialOptions reads the fields into opts.
func readDialOptions(conf *service.ParsedConfig, opts *cryo.DialOptions) (*url.URL, error) {
	r := &settingsReader{conf: conf}
	u := urlField.read(r)
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
	var err error
	if opts.Token, err = conf.FieldString(fieldToken); err != nil {
		return nil, err
	}
	settings, enabled, err := conf.FieldTLSToggled(fieldTLS)
	switch {
	case err != nil:
		return nil, fmt.Errorf("field %s: %w", fieldTLS, err)
	case enabled && u.Scheme != "wss":
		return nil, fmt.Errorf("field %s is enabled, but the url is %s://: use wss://", fieldTLS, u.Scheme)
	case enabled:
		opts.TLS = settings
	}
	return u, nil
}

// handshakeHeaders are set by the handshake.
var handshakeHeaders = []string{"Connection", "Sec-Websocket-Extensions", "Sec-Websocket-Key", "Sec-Websocket-Version", "Upgrade"}

// checkHeaders checks what net/http and the WebSocket library check when they send the
// headers, or leave out. Its error does not repeat a value, which may be a secret.
func checkHeaders(headers map[string]string) (http.Header, error) {
	checked := make(http.Header, len(headers))
	for _, name := range slices.Sorted(maps.Keys(headers)) {
		key, value := http.CanonicalHeaderKey(name), headers[name]
		switch {
		case !httpguts.ValidHeaderFieldName(name):
			return nil, fmt.Errorf("field %s: %q is no name of an HTTP header", fieldHeaders, name)
		case !httpguts.ValidHeaderFieldValue(value):
			return nil, fmt.Errorf("field %s: the value of %s has characters that HTTP does not allow, such as line breaks", fieldHeaders, name)
		case slices.Contains(handshakeHeaders, key):
			return nil, fmt.Errorf("field %s: %s is set by the WebSocket handshake: remove it", fieldHeaders, name)
		}
		checked.Set(key, value)
	}
	return checked, nil
}

// parseProxy returns nil for an empty text. Its error does not repeat the text, which may have
// a password.
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
	return nil, fmt.Errorf("field %s must be http://, https:// or socks5:// with a host, and with a port from 1 to 65535 if it has one", fieldProxyURL)
}
