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

// listenFields returns the common fields of a component that listens.
func listenFields() []*service.ConfigField {
	return append([]*service.ConfigField{
		addressField.config().
			Description("The host and port to listen on; `:port` means all network interfaces. Inputs and outputs with the same address, in streams mode also those of different pipelines, share one listener and its clients; their listener settings must be equal. Several inputs receive clients in turn.").
			Example("0.0.0.0:8080").
			Example("127.0.0.1:8080"),
		pathField.config().
			Description("The path of the URL that clients connect to; other paths return 404. Behind a reverse proxy that strips a prefix, use the path without it.").
			Default("/"),
		listenTLSField(),
	}, append(admissionFields(), lifetimeFields()...)...)
}

// listenOptionFields returns the remaining fields of a component that listens, most of which are
// advanced.
func listenOptionFields() []*service.ConfigField {
	fields := []*service.ConfigField{
		maxSessionsField.config().
			Description("The maximum number of sessions; further clients are denied with status 503. The same number of connections, at least 1,024, may be open without a session: see [Connections](" + docsURL + "reference/limits.md#connections)."),
	}
	fields = append(fields, admissionOptionFields()...)
	fields = append(fields, lifetimeOptionFields()...)
	fields = append(fields, proxyFields()...)
	return append(fields,
		maxSessionsPerAddressField.config().
			Description("The maximum number of sessions from one IPv4 address or IPv6 /64 network; further clients are denied with status 429. 0 means no limit. Behind a reverse proxy, set `trusted_proxies`, because otherwise all clients have the address of the proxy.").
			Advanced(),
		maxConnectsPerSecondField.config().
			Description("The maximum number of clients that are accepted per second, and in one burst; further clients are denied with status 503. Only authorized clients count. 0 means no limit.").
			Advanced(),
		maxMessagesPerSecondField.config().
			Description("The maximum number of messages and streams that a session receives per second. A faster client is slowed down by backpressure; nothing is rejected. 0 means no limit; [Rates]("+docsURL+"reference/limits.md#rates) has the details.").
			Advanced(),
		maxBytesPerSecondField.config().
			Description("The maximum number of bytes that a session receives per second; each message and chunk counts as at least 64 bytes. It works like `max_messages_per_second`. 0 means no limit.").
			Advanced(),
		maxBufferField(true),
		handshakeTimeoutField.config().
			Description("The timeout for TLS and a client's HTTP request, and then again for the Cryo handshake on the open WebSocket. A client that exceeds the latter is disconnected with close code 4001. Keep the timeout well above one second.").
			Default("10s").
			Advanced(),
		maxHeaderBytesField.config().
			Description("The maximum number of bytes of the request line and headers of a client, including the token. A client that exceeds it is denied with status 431. Each connection without a session may use this much memory plus 4 KiB.").
			Advanced(),
		heartbeatField(),
		drainPeriodField.config().
			Description("The time over which sessions are closed when the process stops, so that clients do not reconnect in the same second. It is the last part of `shutdown_delay`, which must be at least as long. With 0s, all sessions are closed together: see [Draining]("+docsURL+"reference/delivery.md#draining).").
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
