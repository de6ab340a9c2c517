package plugin

import (
	"fmt"
	"net"
	"reflect"
	"strconv"
	"strings"
	"time"

	"github.com/redpanda-data/benthos/v4/public/service"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// What can be set of a listener.

const (
	fieldAddress               = "address"
	fieldPath                  = "path"
	fieldMaxSessions           = "max_sessions"
	fieldMaxSessionsPerAddress = "max_sessions_per_address"
	fieldHandshakeTimeout      = "handshake_timeout"
	fieldMaxHeaderBytes        = "max_header_bytes"
)

func listenFields() []*service.ConfigField {
	fields := []*service.ConfigField{
		service.NewStringField(fieldAddress).
			Description("Where to listen: host and port, or `:port` for all network interfaces. Inputs and outputs with the same address, of one pipeline or of several in streams mode, share one listener and its clients, and have to agree on all of its settings. Of several inputs each gets its share of the clients, in turn.").
			Example("0.0.0.0:8080").
			Example("127.0.0.1:8080").
			LintRule(`
let port = this.re_replace_all("^.*:", "").number().catch(-1)
root = if this.type() == "string" && (!this.re_match("^(\\[[^\\[\\]]*\\]|[^:\\[\\]]*):[0-9]+$") || $port > 65535) { "field address has to be host:port, got %v".format(this) }`),
		service.NewStringField(fieldPath).
			Description("The path of the URL that clients connect to. On others they get 404. Behind a reverse proxy it is the path that the proxy asks for: with the prefix that it serves us under, or without where it takes that off.").
			Default("/").
			LintRule(`root = if this.type() == "string" && !this.has_prefix("/") { "field path has to start with a slash, got %v".format(this) }`),
		listenTLSField(),
	}
	fields = append(fields, admissionFields()...)
	fields = append(fields, proxyFields()...)
	return append(fields,
		positiveInt(fieldMaxSessions).
			Description("How many clients may be connected at a time. Further ones are refused with status 503. As many connections, or 1,024 if that is more, may be open that are no sessions, or not yet: another one closes the oldest of them, so that nobody without a token keeps clients out.").
			Default(cryo.DefaultMaxSessions),
		service.NewIntField(fieldMaxSessionsPerAddress).
			Description("How many clients may be connected at a time from one IP address, or from one IPv6 network of 64 bits. Further ones are refused with status 429. 0 is no limit. Behind a reverse proxy, see `trusted_proxies`: without it all clients have the proxy's address.").
			Default(0).
			Advanced().
			LintRule(`root = if this.type() == "number" && this < 0 { "field max_sessions_per_address can't be negative, got %v".format(this) }`),
		maxBufferField(true),
		positiveDuration(fieldHandshakeTimeout).
			Description("How long a client may take for TLS and its HTTP request, and again for Cryo's handshake on the open WebSocket.").
			Default("10s").
			Advanced(),
		positiveInt(fieldMaxHeaderBytes).
			Description("How long the first line and the headers of a client's HTTP request may be together, the token included. A client with longer ones is refused with status 431.").
			Default(64<<10).
			Advanced(),
		heartbeatField(),
	)
}

// listenLint finds a listener that would let nobody in, and half a certificate.
// A component has one rule only, so others are made of it.
const listenLint = `if this.tokens.or([]).length() == 0 && this.authorize.or("") == "" {
  "either the field tokens or authorize is required: without them nobody could come in"
} else if this.tokens.or([]).length() > 0 && this.authorize.or("") != "" {
  "the fields tokens and authorize can't be used together"
} else ` + listenTLSLint

// listenSettings are what the components of one listener have to agree on.
type listenSettings struct {
	Address string `field:"address"`
	Path    string `field:"path"`
	tlsSettings
	admissionSettings
	proxySettings
	MaxSessions           int           `field:"max_sessions"`
	MaxSessionsPerAddress int           `field:"max_sessions_per_address"`
	MaxBufferBytes        int           `field:"max_buffer_bytes"`
	HandshakeTimeout      time.Duration `field:"handshake_timeout"`
	MaxHeaderBytes        int           `field:"max_header_bytes"`
	HeartbeatInterval     time.Duration `field:"heartbeat_interval"`
}

// differences names the fields in which two settings differ. Their values are
// not told: some are secret.
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

func listenSettingsFromParsed(conf *service.ParsedConfig) (s listenSettings, authorize func(*cryo.Upgrade) error, err error) {
	if s.Address, err = conf.FieldString(fieldAddress); err != nil {
		return
	}
	if err = checkAddress(s.Address); err != nil {
		return
	}
	if s.Path, err = conf.FieldString(fieldPath); err != nil {
		return
	}
	if !strings.HasPrefix(s.Path, "/") {
		return s, nil, fmt.Errorf("field %s has to start with a slash, got %s", fieldPath, s.Path)
	}
	if s.tlsSettings, err = tlsSettingsFromParsed(conf); err != nil {
		return
	}
	if s.proxySettings, err = proxySettingsFromParsed(conf); err != nil {
		return
	}
	if s.MaxSessions, err = fieldPositive(conf, fieldMaxSessions); err != nil {
		return
	}
	if s.MaxSessionsPerAddress, err = conf.FieldInt(fieldMaxSessionsPerAddress); err != nil {
		return
	}
	if s.MaxSessionsPerAddress < 0 {
		return s, nil, fmt.Errorf("field %s can't be negative, got %d", fieldMaxSessionsPerAddress, s.MaxSessionsPerAddress)
	}
	if s.MaxHeaderBytes, err = fieldPositive(conf, fieldMaxHeaderBytes); err != nil {
		return
	}
	if s.MaxBufferBytes, err = fieldPositive(conf, fieldMaxBufferBytes); err != nil {
		return
	}
	if s.HandshakeTimeout, err = fieldPositiveDuration(conf, fieldHandshakeTimeout); err != nil {
		return
	}
	if s.HeartbeatInterval, err = fieldPositiveDuration(conf, fieldHeartbeatInterval); err != nil {
		return
	}
	s.admissionSettings, authorize, err = admissionFromParsed(conf)
	return
}

func checkAddress(address string) error {
	_, port, err := net.SplitHostPort(address)
	if err == nil {
		_, err = strconv.ParseUint(port, 10, 16)
	}
	if err != nil {
		return fmt.Errorf("field %s has to be host:port, got %s", fieldAddress, address)
	}
	return nil
}
