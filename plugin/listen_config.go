package plugin

import (
	"fmt"
	"net"
	"strconv"
	"strings"
	"time"

	"github.com/redpanda-data/benthos/v4/public/service"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// What can be set of a listener.

const (
	fieldAddress          = "address"
	fieldPath             = "path"
	fieldCertFile         = "cert_file"
	fieldKeyFile          = "key_file"
	fieldHandshakeTimeout = "handshake_timeout"
	fieldMaxSessions      = "max_sessions"
)

func listenFields() []*service.ConfigField {
	fields := []*service.ConfigField{
		service.NewStringField(fieldAddress).
			Description("Where to listen: host and port, or `:port` for all network interfaces. An input and an output with the same address share one listener and its clients, and have to agree on all of its settings.").
			Example("0.0.0.0:8080").
			Example("127.0.0.1:8080").
			LintRule(`
let port = this.re_replace_all("^.*:", "").number().catch(-1)
root = if this.type() == "string" && (!this.re_match("^(\\[[^\\[\\]]*\\]|[^:\\[\\]]*):[0-9]+$") || $port > 65535) { "field address has to be host:port, got %v".format(this) }`),
		service.NewStringField(fieldPath).
			Description("The path of the URL that clients connect to. On others they get 404.").
			Default("/").
			LintRule(`root = if this.type() == "string" && !this.has_prefix("/") { "field path has to start with a slash, got %v".format(this) }`),
		service.NewObjectField(fieldTLS,
			service.NewStringField(fieldCertFile).
				Description("The path of a file with the server's certificate and those between it and the authority, PEM. Empty: no TLS.").
				Default(""),
			service.NewStringField(fieldKeyFile).
				Description("The path of a file with its private key, PEM.").
				Default(""),
		).
			Description("With a certificate and its key, clients connect by `wss://`; without, by `ws://`."),
	}
	fields = append(fields, admissionFields()...)
	return append(fields,
		positiveInt(fieldMaxSessions).
			Description("How many clients may be connected at a time. Further ones are refused with status 503.").
			Default(cryo.DefaultMaxSessions),
		maxBufferField(),
		positiveDuration(fieldHandshakeTimeout).
			Description("How long a client may take for its HTTP request, and again for Cryo's handshake on the open WebSocket.").
			Default("10s").
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
} else if (this.tls.cert_file.or("") == "") != (this.tls.key_file.or("") == "") {
  "field tls needs both cert_file and key_file"
}`

// listenSettings are what the components of one listener have to agree on.
type listenSettings struct {
	Address, Path     string
	CertFile, KeyFile string
	admissionSettings
	MaxSessions       int
	MaxBufferBytes    int
	HandshakeTimeout  time.Duration
	HeartbeatInterval time.Duration
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
	if s.CertFile, err = conf.FieldString(fieldTLS, fieldCertFile); err != nil {
		return
	}
	if s.KeyFile, err = conf.FieldString(fieldTLS, fieldKeyFile); err != nil {
		return
	}
	if (s.CertFile == "") != (s.KeyFile == "") {
		return s, nil, fmt.Errorf("field %s needs both %s and %s", fieldTLS, fieldCertFile, fieldKeyFile)
	}
	if s.MaxSessions, err = fieldPositive(conf, fieldMaxSessions); err != nil {
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
