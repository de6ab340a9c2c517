package plugin

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"reflect"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/redpanda-data/benthos/v4/public/service"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// The fields of components that listen for clients.

const (
	fieldAddress               = "address"
	fieldPath                  = "path"
	fieldMaxSessions           = "max_sessions"
	fieldMaxSessionsPerAddress = "max_sessions_per_address"
	fieldMaxConnectsPerSecond  = "max_connects_per_second"
	fieldMaxMessagesPerSecond  = "max_messages_per_second"
	fieldMaxBytesPerSecond     = "max_bytes_per_second"
	fieldHandshakeTimeout      = "handshake_timeout"
	fieldMaxHeaderBytes        = "max_header_bytes"
)

var (
	addressField = stringOf(fieldAddress, checkAddress)
	pathField    = stringOf(fieldPath, func(path string) (string, error) {
		if !strings.HasPrefix(path, "/") {
			return "", fmt.Errorf("field %s must start with a slash, got %q", fieldPath, path)
		}
		return path, nil
	})
	maxSessionsField           = positiveInt(fieldMaxSessions, cryo.DefaultMaxSessions)
	maxSessionsPerAddressField = wholeNumber(fieldMaxSessionsPerAddress, 0, maxNumber, 0)
	maxConnectsPerSecondField  = wholeNumber(fieldMaxConnectsPerSecond, 0, maxNumber, 0)
	maxMessagesPerSecondField  = wholeNumber(fieldMaxMessagesPerSecond, 0, maxNumber, 0)
	maxBytesPerSecondField     = wholeNumber(fieldMaxBytesPerSecond, 0, maxNumber, 0)
	handshakeTimeoutField      = positiveDuration(fieldHandshakeTimeout)
	maxHeaderBytesField        = positiveInt(fieldMaxHeaderBytes, 16<<10)
)

func listenFields() []*service.ConfigField {
	fields := []*service.ConfigField{
		addressField.config().
			Description("The address to listen on: host and port, or `:port` for all network interfaces. Inputs and outputs with the same address, of one pipeline or of several in streams mode, share one listener and its clients, and must have the same settings for it. Clients are assigned to several inputs in turn.").
			Example("0.0.0.0:8080").
			Example("127.0.0.1:8080"),
		pathField.config().
			Description("The path of the URL that clients connect to. Other paths return 404. Behind a reverse proxy, the path of the request that the proxy sends: without a prefix that it strips.").
			Default("/"),
		listenTLSField(),
	}
	fields = append(fields, admissionFields()...)
	fields = append(fields, lifetimeFields()...)
	fields = append(fields, proxyFields()...)
	return append(fields,
		maxSessionsField.config().
			Description("The maximum number of sessions. Further clients are denied with status 503. The same number of connections, but at least 1,024, may be open without a session; a further connection closes the oldest of them from the address (or IPv6 /64 network) with the most, so that peers without a token cannot block clients."),
		maxSessionsPerAddressField.config().
			Description("The maximum number of sessions from one IPv4 address or IPv6 /64 network. Further clients are denied with status 429. 0: no limit. Behind a reverse proxy, set `trusted_proxies`, because otherwise all clients have the proxy's address.").
			Advanced(),
		maxConnectsPerSecondField.config().
			Description("The maximum number of clients that are accepted in a second, and at once. Further clients are denied with status 503. Only authorized clients count, so peers without a token cannot block clients; while the maximum is reached, clients are denied before they are authorized. 0: no limit.").
			Advanced(),
		maxMessagesPerSecondField.config().
			Description("The maximum number of messages and streams that a session receives in a second. Beyond it, reads are paused (backpressure), which slows the client down: nothing is rejected, and no session ends. The number applies from the start of a session, so its first message is received up to a second divided by the number later, and after an idle second the number is received at once. Other frames, such as pings, messages that are rejected because no input receives them, and chunks of streams and fragments of less than 1 KiB, are limited by themselves, to four times the number, and 100 at least; acknowledgements of what this process sends are not limited. 0: no limit. If this process also sends on the session, the client's acknowledgements are behind the messages that it has sent before, so they may be late: its session is closed only when they are missing for ten times `ack_timeout`.").
			Advanced(),
		maxBytesPerSecondField.config().
			Description("The maximum number of bytes that a session receives in a second, in the contents of messages and streams, each message and chunk counted with 64 bytes at least. It works like `max_messages_per_second`; if that is 0, other frames are limited to one for each 256 bytes, and 100 at least. A message is received after the time that it takes at this rate, so it may be larger. 0: no limit.").
			Advanced(),
		maxBufferField(true),
		handshakeTimeoutField.config().
			Description("The timeout for TLS and the HTTP request of a client, and before that for the header of `proxy_protocol`, and again for Cryo's handshake on the open WebSocket. That is complete when the client has sent ENDPOINT_INFO, has acknowledged the one that is sent to it after a second, or has sent its first message or stream: the published client for browsers sends no ENDPOINT_INFO when it reconnects. A client that does none of these is disconnected with close code 4001, logged at WARN with its address, and counted in `cryo_sessions_denied` with the status 408. Keep the timeout well above one second.").
			Default("10s").
			Advanced(),
		maxHeaderBytesField.config().
			Description("The maximum size of the request line and headers of a client's HTTP request, including the token. A client that exceeds it is denied with status 431. Each connection without a session may use this much memory, and 4 KiB more, for up to `handshake_timeout`: see `max_sessions`.").
			Advanced(),
		heartbeatField(),
		drainPeriodField.config().
			Description("The time over which sessions are closed when the process stops, so that their clients do not all connect again in the same second. It is the last part of the engine's `shutdown_delay`, which must be at least as long. When it begins, the listener closes its socket, so that no further client can connect, and handshakes in progress get status 503. Then one session after the other is closed: its messages in flight are acknowledged first, and so is what was sent to it, while those that wait for their turn go on as before. 0s: all sessions are closed together, when their pipelines have stopped. An output without another listener for its clients has fewer and fewer of them meanwhile, so its messages may find none. A pipeline that is replaced or removed closes all sessions together.").
			Default("0s").
			Advanced(),
	)
}

// listenSettings are the settings of a listener. They must be equal for all components that
// share it.
type listenSettings struct {
	Address string `field:"address"`
	Path    string `field:"path"`
	tlsSettings
	admissionSettings
	lifetimeSettings
	proxySettings
	MaxSessions           int           `field:"max_sessions"`
	MaxSessionsPerAddress int           `field:"max_sessions_per_address"`
	MaxConnectsPerSecond  int           `field:"max_connects_per_second"`
	MaxMessagesPerSecond  int           `field:"max_messages_per_second"`
	MaxBytesPerSecond     int           `field:"max_bytes_per_second"`
	MaxBufferBytes        int           `field:"max_buffer_bytes"`
	HandshakeTimeout      time.Duration `field:"handshake_timeout"`
	MaxHeaderBytes        int           `field:"max_header_bytes"`
	HeartbeatInterval     time.Duration `field:"heartbeat_interval"`
	DrainPeriod           time.Duration `field:"drain_period"`
}

// differences returns the names of the fields in which two settings differ. It does not return
// their values, because some are secret.
func (s listenSettings) differences(other listenSettings) []string {
	return differences(reflect.ValueOf(s), reflect.ValueOf(other))
}

func differences(a, b reflect.Value) []string {
	var names []string
	for i := range a.NumField() {
		switch name, isField := a.Type().Field(i).Tag.Lookup("field"); {
		case !isField:
			names = append(names, differences(a.Field(i), b.Field(i))...)
		case !reflect.DeepEqual(a.Field(i).Interface(), b.Field(i).Interface()):
			names = append(names, name)
		}
	}
	return names
}

func listenSettingsFromParsed(conf *service.ParsedConfig, processors *authorizeProcessors, log *service.Logger) (s listenSettings, authorize func(*cryo.Upgrade) error, err error) {
	r := &settingsReader{conf: conf}
	s.Address = addressField.read(r)
	s.Path = pathField.read(r)
	s.MaxSessions = maxSessionsField.read(r)
	s.MaxSessionsPerAddress = maxSessionsPerAddressField.read(r)
	s.MaxConnectsPerSecond = maxConnectsPerSecondField.read(r)
	s.MaxMessagesPerSecond = maxMessagesPerSecondField.read(r)
	s.MaxBytesPerSecond = maxBytesPerSecondField.read(r)
	s.MaxBufferBytes = maxBufferBytesField.read(r)
	s.HandshakeTimeout = handshakeTimeoutField.read(r)
	s.MaxHeaderBytes = maxHeaderBytesField.read(r)
	s.HeartbeatInterval = heartbeatIntervalField.read(r)
	s.DrainPeriod = drainPeriodField.read(r)
	if r.err == nil {
		r.err = checkDrainPeriod(s.DrainPeriod)
	}
	s.tlsSettings = readTLSSettings(r)
	s.proxySettings = readProxySettings(r)
	lifetimeSettings, lasting := readLifetime(r)
	s.lifetimeSettings = lifetimeSettings
	s.admissionSettings, authorize = readAdmission(r, processors, lasting, log)
	return s, authorize, r.err
}

var hostName = regexp.MustCompile(`^[A-Za-z0-9._-]*$`)

// checkAddress checks the syntax of an address, which is a host name or an IP address, and a
// port.
func checkAddress(address string) (string, error) {
	host, port, err := net.SplitHostPort(address)
	if err == nil {
		_, err = strconv.ParseUint(port, 10, 16)
	}
	if err == nil && (strings.Contains(address, "[") || host != "" && strings.Trim(host, "0123456789.") == "") {
		_, err = netip.ParseAddr(host)
	} else if err == nil && !hostName.MatchString(host) {
		err = errors.New("invalid host name")
	}
	if err != nil {
		return "", fmt.Errorf("field %s must be host:port, got %q", fieldAddress, address)
	}
	return address, nil
}
