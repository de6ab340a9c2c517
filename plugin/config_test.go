package plugin

import (
	"context"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	_ "github.com/redpanda-data/benthos/v4/public/components/io"
	_ "github.com/redpanda-data/benthos/v4/public/components/pure"
	"github.com/redpanda-data/benthos/v4/public/service"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

var linter = sync.OnceValue(func() *service.ComponentConfigLinter {
	return service.NewEnvironment().NewComponentConfigLinter().
		SetEnvVarLookupFunc(func(_ context.Context, name string) (string, bool) {
			return "secret-of-" + name, name == "CRYO_TOKEN" || name == "OTHER_TOKEN"
		})
})

// lint returns the sentences of the engine's linter about one component.
func lint(t *testing.T, kind, yaml string) []string {
	t.Helper()
	lints, err := linter().LintYAML(kind, []byte(yaml))
	require.NoError(t, err)
	var sentences []string
	for _, l := range lints {
		sentences = append(sentences, l.What)
	}
	return sentences
}

// component is a configuration by itself.
func component(name, fields string) string { return name + ": " + fields }

const (
	dials   = `url: ws://localhost:8080`
	listens = `address: 127.0.0.1:8080, tokens: [ a ]`
)

// encodeProxy is the error of proxy URLs whose password has special characters.
const encodeProxy = "field proxy_url is not a URL: percent-encode special characters in its user name and password, such as # as %23, % as %25, / as %2F and ? as %3F"

func TestInvalidConfigurationFailsLintAndStartWithTheSameError(t *testing.T) {
	for _, tt := range []struct {
		kind, name, fields string
		sentence           string
	}{
		// Where to dial.
		{"input", "cryo", `{ url: "localhost:8080" }`, `field url: the scheme is "localhost": it must be ws or wss`},
		{"input", "cryo", `{ url: "" }`, `field url: the scheme is "": it must be ws or wss`},
		{"output", "cryo", `{ url: "http://localhost:8080" }`, `field url: the scheme is "http": it must be ws or wss`},
		{"input", "cryo", `{ url: "ws:///path" }`, "field url: the URL has no host"},
		{"input", "cryo", `{ url: "ws://:8080" }`, "field url: the URL has no host"},
		{"output", "cryo", `{ url: "wss://me:pass@localhost" }`, "field url: the URL must not contain a user or password: set the token instead"},
		{"input", "cryo", `{ url: "ws://localhost?authorization=Bearer%20x" }`, "field url: the query parameter authorization is set from the token: remove it from the query"},
		{"input", "cryo", `{ url: "ws://localhost?a=b&x-cryo-sid=1" }`, "field url: the query parameter x-cryo-sid is set from the session id: remove it from the query"},
		{"input", "cryo", `{ ` + dials + `, query_parameters: { authorization: x } }`, "field query_parameters: the query parameter authorization is set from the token: remove it from the query"},
		{"output", "cryo", `{ ` + dials + `, tls: { enabled: true } }`, "field tls is enabled, but the field url begins with ws://: use wss://"},
		{"output", "cryo", `{ ` + dials + `, proxy_url: "ftp://localhost" }`, "field proxy_url must be a URL with http://, https:// or socks5://, a host, and optionally a port from 1 to 65535"},
		{"output", "cryo", `{ ` + dials + `, proxy_url: "http://" }`, "field proxy_url must be a URL with http://, https:// or socks5://, a host, and optionally a port from 1 to 65535"},

		{"input", "cryo", `{ url: "ws://[::1" }`, "field url: not a URL: missing ']' in host"},
		{"input", "cryo", `{ url: "ws://h/%zz" }`, `field url: not a URL: invalid URL escape "%zz"`},
		{"input", "cryo", `{ url: "ws://h:port/" }`, `field url: not a URL: invalid port ":port" after host`},
		{"input", "cryo", `{ url: "ws://h\\x" }`, `field url: not a URL: invalid character "\\" in host name`},
		{"input", "cryo", `{ url: "ws://h?%61uthorization=1" }`, "field url: the query parameter authorization is set from the token: remove it from the query"},
		{"input", "cryo", `{ url: "ws://h:99999" }`, "field url: the URL's port must be from 1 to 65535"},
		{"input", "cryo", `{ url: "ws://h:" }`, "field url: the URL's port must be from 1 to 65535"},
		{"input", "cryo", `{ url: "ws://me:p%zz@h" }`, "field url: not a URL"},
		{"input", "cryo", `{ url: null }`, `field url: the scheme is "": it must be ws or wss`},
		{"output", "cryo", `{ ` + dials + `, proxy_url: "http://me:secret@%zz" }`, encodeProxy},
		{"output", "cryo", `{ ` + dials + `, proxy_url: "http://me:sec#ret@h" }`, encodeProxy},
		{"output", "cryo", `{ ` + dials + `, proxy_url: "http://me:100%@h" }`, encodeProxy},
		{"input", "cryo", `{ ` + dials + `, proxy_url: "socks5://me:12#3@h" }`, encodeProxy}, // 12 could be a port
		{"input", "cryo", `{ ` + dials + `, proxy_url: "https://me:12/3@h" }`, encodeProxy},
		{"input", "cryo", `{ ` + dials + `, proxy_url: "https://me:12?3@h" }`, encodeProxy},
		{"output", "cryo", `{ ` + dials + `, proxy_url: "http://localhost:99999" }`, "field proxy_url must be a URL with http://, https:// or socks5://, a host, and optionally a port from 1 to 65535"},
		{"input", "cryo", `{ ` + dials + `, headers: { connection: close } }`, "field headers: connection is set by the WebSocket handshake: remove it"},
		{"input", "cryo", `{ ` + dials + `, headers: { Sec-WebSocket-Key: a } }`, "field headers: Sec-WebSocket-Key is set by the WebSocket handshake: remove it"},
		{"input", "cryo", `{ ` + dials + `, headers: { "a b": a } }`, `field headers: "a b" is not a valid HTTP header name`},
		{"input", "cryo", `{ ` + dials + `, headers: { X-Key: "secret\n" } }`, "field headers: the value of \"X-Key\" begins or ends with whitespace, such as a line break: remove it from the file or the environment variable"},

		// Numbers and durations.
		{"input", "cryo", `{ ` + dials + `, max_in_flight: 100000000000000000000 }`, "field max_in_flight must be at most 9007199254740992, got 1e+20"},
		{"input", "cryo", `{ ` + dials + `, max_in_flight: 1.5 }`, "field max_in_flight must be a whole number, got 1.5"},
		{"input", "cryo", `{ ` + dials + `, max_in_flight: many }`, `field max_in_flight must be a whole number, got "many"`},
		{"input", "cryo", `{ ` + dials + `, max_in_flight: "64" }`, `field max_in_flight must be a whole number, got "64"`},
		{"input", "cryo", `{ ` + dials + `, auto_replay_nacks: perhaps }`, `field auto_replay_nacks must be true or false, got "perhaps"`},
		{"input", "cryo", `{ ` + dials + `, include_metadata: "true" }`, `field include_metadata must be true or false, got "true"`},
		{"output", "cryo", `{ ` + dials + `, batching: { count: 10, period: abc } }`, `field batching.period must be a duration such as 10ms, got "abc"`},
		{"output", "cryo", `{ ` + dials + `, batching: { processors: [ { noop: {} } ] } }`, "field batching needs a count, a byte_size, a period or a check: without one, its processors never run"},
		{"input", "cryo", `{ ` + dials + `, max_in_flight: 0 }`, "field max_in_flight must be at least 1, got 0"},
		{"input", "cryo", `{ ` + dials + `, max_batch_count: -1 }`, "field max_batch_count must be at least 1, got -1"},
		{"input", "cryo", `{ ` + dials + `, max_buffer_bytes: 0 }`, "field max_buffer_bytes must be at least 1, got 0"},
		{"output", "cryo", `{ ` + dials + `, max_in_flight: 0 }`, "field max_in_flight must be at least 1, got 0"},
		{"output", "cryo", `{ ` + dials + `, ack_timeout: 0s }`, "field ack_timeout must be greater than zero, got 0s"},
		{"output", "cryo", `{ ` + dials + `, ack_timeout: soon }`, `field ack_timeout must be a duration such as 5s, got "soon"`},
		{"input", "cryo", `{ ` + dials + `, connect_timeout: -1s }`, "field connect_timeout must be greater than zero, got -1s"},
		{"input", "cryo", `{ ` + dials + `, heartbeat_interval: 0s }`, "field heartbeat_interval must be greater than zero, got 0s"},
		{"input", "cryo_server", `{ ` + listens + `, max_sessions: 0 }`, "field max_sessions must be at least 1, got 0"},
		{"input", "cryo_server", `{ ` + listens + `, max_buffer_bytes: -5 }`, "field max_buffer_bytes must be at least 1, got -5"},
		{"output", "cryo_server", `{ ` + listens + `, handshake_timeout: 0ms }`, "field handshake_timeout must be greater than zero, got 0ms"},

		// What to receive and to send.
		{"input", "cryo", `{ ` + dials + `, streams: { scanner: { lines: { omit_empty: maybe } } } }`, "field streams.scanner: field 'omit_empty': cannot unmarshal !!str `maybe` into bool"},
		{"input", "cryo", `{ ` + dials + `, message_types: [ utf8, text ] }`, `field message_types: unknown message type "text": it must be utf8, binary, stream or error`},
		{"input", "cryo_server", `{ ` + listens + `, message_types: [] }`, "field message_types is empty: every message would be dropped"},
		{"input", "cryo", `{ ` + dials + `, acknowledge: never }`, `field acknowledge must be delivered or received, got "never"`},
		{"output", "cryo", `{ ` + dials + `, message_type: text }`, `field message_type: unknown message type "text": it must be auto, utf8, binary or stream`},
		{"output", "cryo_server", `{ ` + listens + `, message_type: "" }`, `field message_type: unknown message type "": it must be auto, utf8, binary or stream`},
		{"output", "cryo_server", `{ ` + listens + `, send_to: some }`, `field send_to must be all, any, session or match, got "some"`},
		{"output", "cryo_server", `{ ` + listens + `, no_session: panic }`, `field no_session must be wait, drop or reject, got "panic"`},
		{"output", "cryo_server", `{ ` + listens + `, send_to: session }`, "send_to: session needs the field session_id"},
		{"output", "cryo_server", `{ ` + listens + `, send_to: match }`, "send_to: match needs the field match"},
		{"output", "cryo_server", `{ ` + listens + `, match: "true" }`, "the field match has no effect without send_to: match"},
		{"output", "cryo_server", `{ ` + listens + `, send_to: any, max_in_flight_per_session: 0 }`, "field max_in_flight_per_session must be at least 1, got 0"},
		{"output", "cryo_server", `{ ` + listens + `, session_id: "7" }`, "the field session_id has no effect without send_to: session"},
		{"output", "cryo_server", `{ ` + listens + `, session_id: "${! @cryo_session_id }" }`, "the field session_id has no effect without send_to: session"},

		// Where to listen, and whom to let in.
		{"input", "cryo_server", `{ address: localhost, tokens: [ a ] }`, `field address must be host:port, got "localhost"`},
		{"input", "cryo_server", `{ address: "localhost:http", tokens: [ a ] }`, `field address must be host:port, got "localhost:http"`},
		{"input", "cryo_server", `{ address: "localhost:70000", tokens: [ a ] }`, `field address must be host:port, got "localhost:70000"`},
		{"input", "cryo_server", `{ address: "::1:80", tokens: [ a ] }`, `field address must be host:port, got "::1:80"`},
		{"input", "cryo_server", `{ address: "300.1.1.1:80", tokens: [ a ] }`, `field address must be host:port, got "300.1.1.1:80"`},
		{"input", "cryo_server", `{ address: "[localhost]:80", tokens: [ a ] }`, `field address must be host:port, got "[localhost]:80"`},
		{"input", "cryo_server", `{ address: "0.0.0.0/8:80", tokens: [ a ] }`, `field address must be host:port, got "0.0.0.0/8:80"`},
		{"input", "cryo_server", `{ ` + listens + `, trusted_proxies: [ 999.1.1.1 ] }`, `field trusted_proxies: "999.1.1.1" is neither an IP address nor a network such as 10.0.0.0/8`},
		{"input", "cryo_server", `{ ` + listens + `, trusted_proxies: [ 10.0.0.0/99 ] }`, `field trusted_proxies: "10.0.0.0/99" is neither an IP address nor a network such as 10.0.0.0/8`},
		{"input", "cryo_server", `{ ` + listens + `, trusted_proxies: [ ":::" ] }`, `field trusted_proxies: ":::" is neither an IP address nor a network such as 10.0.0.0/8`},
		{"output", "cryo_server", `{ ` + listens + `, send_to: match, match: null }`, "send_to: match needs the field match"},
		{"output", "cryo_server", `{ ` + listens + `, send_to: match, match: "" }`, "send_to: match needs the field match"},
		{"input", "cryo_server", `{ ` + listens + `, path: feed }`, `field path must start with a slash, got "feed"`},
		{"input", "cryo_server", `{ address: ":8080" }`, "one of the fields tokens, tokens_file and authorize is required: without it, all clients would be denied"},
		{"output", "cryo_server", `{ address: ":8080" }`, "one of the fields tokens, tokens_file and authorize is required: without it, all clients would be denied"},
		{"output", "cryo_server", `{ address: ":8080", tokens: [], authorize: "" }`, "one of the fields tokens, tokens_file and authorize is required: without it, all clients would be denied"},
		{"input", "cryo_server", `{ ` + listens + `, authorize: "root = true" }`, "the fields tokens and authorize cannot be used together"},
		{"output", "cryo_server", `{ ` + listens + `, authorize: "root = true" }`, "the fields tokens and authorize cannot be used together"},
		{"input", "cryo_server", `{ address: ":8080", tokens: [ a, "" ] }`, "field tokens contains an empty token, which would accept every client"},
		{"input", "cryo_server", `{ ` + listens + `, session_metadata: { query_parameters: [ room, authorization ] } }`, "field session_metadata.query_parameters: authorization contains the token, which must not become metadata"},
		{"input", "cryo_server", `{ ` + listens + `, max_session_age: -1s }`, "field max_session_age must be zero or more, got -1s"},
		{"output", "cryo_server", `{ ` + listens + `, max_session_age: 1 day }`, `field max_session_age must be a duration such as 5s, got "1 day"`},
		{"input", "cryo_server", `{ ` + listens + `, session_expires: "root = 5", session_expiry_grace: -1s }`, "field session_expiry_grace must be zero or more, got -1s"},
		{"input", "cryo_server", `{ ` + listens + `, session_expiry_grace: 25s }`, "the field session_expiry_grace has no effect without session_expires"},
		{"input", "cryo_server", `{ ` + listens + `, tls: { cert_file: a.pem } }`, "field tls needs both cert_file and key_file"},
		{"output", "cryo_server", `{ ` + listens + `, tls: { key_file: a.pem } }`, "field tls needs both cert_file and key_file"},
		{"input", "cryo_server", `{ ` + listens + `, tls: { client_ca_file: a.pem } }`, "field tls: client_ca_file has no effect without cert_file and key_file"},
		{"input", "cryo_server", `{ ` + listens + `, tls: { min_version: tls11 } }`, `field tls.min_version must be tls12 or tls13, got "tls11"`},
		{"input", "cryo_server", `{ ` + listens + `, tls: { client_auth: no } }`, `field tls.client_auth must be require_valid or verify_if_given, got "no"`},
		{"input", "cryo_server", `{ ` + listens + `, max_sessions_per_address: -1 }`, "field max_sessions_per_address must be at least 0, got -1"},
		{"input", "cryo_server", `{ ` + listens + `, max_connects_per_second: -1 }`, "field max_connects_per_second must be at least 0, got -1"},
		{"output", "cryo_server", `{ ` + listens + `, max_messages_per_second: 1.5 }`, "field max_messages_per_second must be a whole number, got 1.5"},
		{"input", "cryo_server", `{ ` + listens + `, max_bytes_per_second: 1MB }`, `field max_bytes_per_second must be a whole number, got "1MB"`},
		{"input", "cryo_server", `{ ` + listens + `, max_header_bytes: 0 }`, "field max_header_bytes must be at least 1, got 0"},
		{"input", "cryo_server", `{ ` + listens + `, trusted_proxies: [ 10.0.0.0/8, proxy.local ] }`, `field trusted_proxies: "proxy.local" is neither an IP address nor a network such as 10.0.0.0/8`},
		{"input", "cryo_server", `{ ` + listens + `, proxy_protocol: true }`, "field proxy_protocol needs trusted_proxies: only the proxies in that list are trusted to send the header"},
		{"output", "cryo_server", `{ ` + listens + `, proxy_protocol: v2, trusted_proxies: [ 10.0.0.0/8 ] }`, `field proxy_protocol must be true or false, got "v2"`},
		{"input", "cryo_server", `{ ` + listens + `, forwarded_header: via }`, `field forwarded_header must be x-forwarded-for or forwarded, got "via"`},
		{"input", "cryo_server", `{ ` + listens + `, allowed_origins: [ app.example.com ] }`, `field allowed_origins: "app.example.com" must be *, null or a scheme and a host such as https://app.example.com, in lower case and without a path`},
		{"input", "cryo_server", `{ ` + listens + `, allowed_origins: [ "https://app.example.com/" ] }`, `field allowed_origins: "https://app.example.com/" must be *, null or a scheme and a host such as https://app.example.com, in lower case and without a path`},
		{"input", "cryo_server", `{ ` + listens + `, allowed_origins: [ "https://*.example.com" ] }`, `field allowed_origins: "https://*.example.com" must be *, null or a scheme and a host such as https://app.example.com, in lower case and without a path`},
	} {
		t.Run(tt.kind+" "+component(tt.name, tt.fields), func(t *testing.T) {
			assert.Equal(t, []string{tt.sentence}, lint(t, tt.kind, component(tt.name, tt.fields)))
			assert.EqualError(t, construct(t, tt.kind, tt.name, tt.fields), tt.sentence)
		})
	}
}

func TestUnparsableAuthorizeMappingFailsLintAndStart(t *testing.T) {
	fields := `{ address: ":8080", authorize: "root = this.token ==" }`
	sentences := lint(t, "input", component("cryo_server", fields))
	require.Len(t, sentences, 1)
	assert.Contains(t, sentences[0], "expected")
	assert.ErrorContains(t, construct(t, "input", "cryo_server", fields), "field authorize: failed to parse bloblang mapping 'authorize': "+sentences[0])
}

func TestMissingURLFailsLintAndStart(t *testing.T) {
	assert.Equal(t, []string{"field url is required"}, lint(t, "input", component("cryo", `{}`)))
	assert.ErrorContains(t, construct(t, "input", "cryo", `{}`), "'url'")
}

func TestNullMeansTheDefault(t *testing.T) {
	conf, err := specs()["input cryo"].ParseYAML(`{ `+dials+`, max_in_flight: null, max_batch_count: , auto_replay_nacks: null, include_metadata: ~ }`, nil)
	require.NoError(t, err)

	c, err := receiveConfigFromParsed(conf, false)

	require.NoError(t, err)
	assert.Equal(t, []any{1024, 64, true, true}, []any{c.maxInFlight, c.maxBatchCount, c.replay, c.includeMetadata})
}

func TestEachInvalidFieldIsReportedWithItsLine(t *testing.T) {
	lints, err := linter().LintYAML("input", []byte("cryo:\n  url: ws://localhost\n  max_in_flight: 0\n  headers:\n    upgrade: a\n"))
	require.NoError(t, err)
	lines := make(map[int]string)
	for _, l := range lints {
		lines[l.Line] = l.What
	}
	assert.Equal(t, map[int]string{
		3: "field max_in_flight must be at least 1, got 0",
		5: "field headers: upgrade is set by the WebSocket handshake: remove it",
	}, lines)
}

func TestValidConfigurationPassesLintAndStarts(t *testing.T) {
	for _, tt := range []struct{ kind, name, fields string }{
		{"input", "cryo", `{ ` + dials + ` }`},
		{"input", "cryo", `{ url: "WSS://[::1]:8443/a/path?room=5", token: "${CRYO_TOKEN}", tls: { enabled: true } }`},
		{"input", "cryo", `{ ` + dials + `, query_parameters: { room: "5" }, headers: { X-Room: "5" }, proxy_url: "socks5://u:p@localhost:1080" }`},
		{"input", "cryo", `{ ` + dials + `, proxy_url: "http://u:%23@p%25@localhost:1080" }`},
		{"input", "cryo", `{ ` + dials + `, message_types: [ error ], acknowledge: received, auto_replay_nacks: false, max_in_flight: 1, max_batch_count: 1, max_buffer_bytes: 1 }`},
		{"output", "cryo", `{ ` + dials + `, message_type: binary, ack_timeout: 1ms, max_in_flight: 1, batching: { count: 10, period: 1s } }`},
		{"output", "cryo", `{ ` + dials + `, message_type: '${! if meta("content_type") == "text/plain" { "utf8" } else { "binary" } }' }`},
		{"input", "cryo_server", `{ ` + listens + ` }`},
		{"input", "cryo_server", `{ ` + listens + `, max_connects_per_second: 100, max_messages_per_second: 1, max_bytes_per_second: 1048576 }`},
		{"input", "cryo_server", `{ address: ":8080", tokens: [ "${CRYO_TOKEN}", "${OTHER_TOKEN}" ], max_sessions: 1 }`},
		{"input", "cryo_server", `{ address: "[::1]:8080", path: /feed, authorize: 'root = this.token == env("CRYO_TOKEN") && this.remote_address.has_prefix("127.")' }`},
		{"output", "cryo_server", `{ ` + listens + `, send_to: all, no_session: drop }`},
		{"output", "cryo_server", `{ ` + listens + `, send_to: any, max_in_flight_per_session: 1 }`},
		{"output", "cryo_server", `{ ` + listens + `, send_to: match, match: "@cryo_session.cryo_auth_room == @room" }`},
		{"output", "cryo_server", `{ ` + listens + `, send_to: session, session_id: "${! @cryo_session_id }", no_session: reject }`},
		{"output", "cryo_server", `{ ` + listens + `, tls: { cert_file: a.pem, key_file: b.pem, client_ca_file: c.pem, client_auth: verify_if_given, min_version: tls13 } }`},
		{"input", "cryo_server", `{ ` + listens + `, trusted_proxies: [ 127.0.0.1, 10.0.0.0/8, "::1", "2001:db8::/32", "::ffff:10.0.0.1" ], forwarded_header: forwarded, max_sessions_per_address: 0 }`},
		{"input", "cryo_server", `{ ` + listens + `, trusted_proxies: [ 10.0.0.0/8 ], proxy_protocol: true }`},
		{"input", "cryo_server", `{ ` + listens + `, allowed_origins: [ "*", "null", "https://app.example.com", "http://localhost:3000", "capacitor://localhost", "http://[::1]:80" ] }`},
	} {
		t.Run(tt.kind+" "+component(tt.name, tt.fields), func(t *testing.T) {
			assert.Empty(t, lint(t, tt.kind, component(tt.name, tt.fields)))
			assert.NoError(t, construct(t, tt.kind, tt.name, tt.fields))
		})
	}
}

func TestTruncatedCertificateFailsTheFirstConnect(t *testing.T) {
	cert := filepath.Join(t.TempDir(), "cert.pem")
	require.NoError(t, os.WriteFile(cert, []byte("no certificate"), 0o600))
	conf, err := specs()["input cryo_server"].ParseYAML(`{ address: 127.0.0.1:0, tokens: [ a ], tls: { cert_file: `+cert+`, key_file: `+cert+` } }`, nil)
	require.NoError(t, err)
	in, err := newServerInput(conf, service.MockResources())
	require.NoError(t, err)

	err = in.Connect(t.Context())

	require.ErrorContains(t, err, "field tls: ")
	require.NoError(t, in.Close(t.Context()))
}

func TestLintDoesNotRequireFilesReadAtStart(t *testing.T) {
	fields := `{ url: "wss://h", tls: { enabled: true, root_cas_file: /nowhere.pem } }`
	assert.Empty(t, lint(t, "input", component("cryo", fields)), "they may exist where the configuration runs")
	assert.ErrorIs(t, construct(t, "input", "cryo", fields), fs.ErrNotExist)
}

func TestLintAndStartErrorsContainNoSecrets(t *testing.T) {
	for _, tt := range []struct{ kind, name, fields string }{
		{"input", "cryo", `{ url: "ws://me:s3cret@h" }`},
		{"input", "cryo", `{ url: "ws://me:s3cret/x@h" }`},
		{"input", "cryo", `{ url: "ws://me:%s3cret@h" }`},
		{"input", "cryo", `{ url: "ws://h:99999?key=s3cret" }`},
		{"input", "cryo", `{ url: "ws://h/\x01?key=s3cret" }`},
		{"input", "cryo", `{ url: "ws://h?key=s3cret;" }`},
		{"input", "cryo", `{ url: "ws://h", token: s3cret, query_parameters: { authorization: s3cret } }`},
		{"input", "cryo", `{ url: "ws://h", headers: { X-Key: "s3cret\n" } }`},
		{"input", "cryo", `{ url: "ws://h", headers: { Upgrade: s3cret } }`},
		{"output", "cryo", `{ url: "ws://h", proxy_url: "http://me:s3cret@h:99999" }`},
		{"output", "cryo", `{ url: "ws://h", proxy_url: "http://me:s3cret/x@h" }`},
		{"output", "cryo", `{ url: "wss://h", tls: { enabled: true, client_certs: [ { cert: a, key: s3cret, password: s3cret } ] } }`},
		{"input", "cryo_server", `{ address: ":8080", tokens: [ s3cret, "" ] }`},
		{"input", "cryo_server", `{ address: ":8080", tokens: [ s3cret ], authorize: "root = true" }`},
		{"output", "cryo_server", `{ address: h, tokens: [ s3cret ], send_to: match }`},
	} {
		t.Run(tt.kind+" "+component(tt.name, tt.fields), func(t *testing.T) {
			sentences := lint(t, tt.kind, component(tt.name, tt.fields))
			assert.NotEmpty(t, sentences)
			assert.NotContains(t, strings.Join(sentences, "\n"), "s3cret")
			err := construct(t, tt.kind, tt.name, tt.fields)
			require.Error(t, err)
			assert.NotContains(t, err.Error(), "s3cret")
		})
	}
}

func TestInvalidStreamsConfigurationFailsLintAndStart(t *testing.T) {
	for _, tt := range []struct{ kind, fields, sentence string }{
		{"input", `streams: { flow_control: both }`, `field streams.flow_control must be push or pull, got "both"`},
		{"input", `streams: { flow_control: Push }`, `field streams.flow_control must be push or pull, got "Push"`},
		{"input", `streams: { max_bytes: -1 }`, "field streams.max_bytes must be at least 0, got -1"},
		{"input", `streams: { max_open: 0 }`, "field streams.max_open must be at least 1, got 0"},
		{"input", `streams: { idle_timeout: 0s }`, "field streams.idle_timeout must be greater than zero, got 0s"},
		{"input", `streams: { idle_timeout: soon }`, `field streams.idle_timeout must be a duration such as 5s, got "soon"`},
		{"input", `streams: { scanner: { decompress: { algorithm: zip } } }`, "field streams.scanner: compression type not recognised: zip"},
		{"input", `streams: { scanner: null }`, "field streams.scanner: invalid type !!null, expected object"},
		{"input", `streams: { scanner: {} }`, "field streams.scanner: an explicit scanner type must be specified"},
		{"input", `streams: { scanner: { chunker: { size: 0 } } }`, "field size of the chunker scanner must be at least 1 and at most 1 GiB (1073741824), got 0"},
		{"input", `streams: { scanner: { chunker: { size: 1099511627776 } } }`, "field size of the chunker scanner must be at least 1 and at most 1 GiB (1073741824), got 1099511627776"},
		{"input", `streams: { scanner: { switch: [ { scanner: { decompress: { algorithm: gzip, into: { chunker: { size: -1 } } } } } ] } }`, "field size of the chunker scanner must be at least 1 and at most 1 GiB (1073741824), got -1"},
		{"output", `stream: { chunk_bytes: 0 }`, "field stream.chunk_bytes must be at least 1, got 0"},
		{"output", `stream: { chunk_bytes: 16777217 }`, "field stream.chunk_bytes must be at most 16777216, got 16777217"},
		{"output", `message_type: streams`, `field message_type: unknown message type "streams": it must be auto, utf8, binary or stream`},
	} {
		for _, name := range []string{"cryo", "cryo_server"} {
			fields := `{ ` + map[string]string{"cryo": dials, "cryo_server": listens}[name] + `, ` + tt.fields + ` }`
			t.Run(tt.kind+" "+component(name, fields), func(t *testing.T) {
				assert.Equal(t, []string{tt.sentence}, lint(t, tt.kind, component(name, fields)))
				assert.ErrorContains(t, construct(t, tt.kind, name, fields), tt.sentence)
			})
		}
	}
}

func TestUnknownScannerFailsLintAndStart(t *testing.T) {
	fields := `{ ` + dials + `, streams: { scanner: { words: {} } } }`
	assert.Equal(t, []string{"unable to infer component type: words"}, lint(t, "input", component("cryo", fields)))
	assert.EqualError(t, construct(t, "input", "cryo", fields), "field streams.scanner: unable to infer scanner type from candidates: [words]")
}

func TestMisspeltStreamsFieldFailsLint(t *testing.T) {
	assert.Equal(t, []string{"field name not recognised"}, lint(t, "input", component("cryo", `{ `+dials+`, streams: { name: orders } }`)))
}

func TestValidStreamsConfigurationPassesLintAndStarts(t *testing.T) {
	for _, tt := range []struct{ kind, fields string }{
		{"input", `streams: {}`},
		{"input", `message_types: [ stream ], streams: { names: [ "a", "b c" ], flow_control: pull, max_bytes: 0, max_open: 1, idle_timeout: 1ms }`},
		{"input", `streams: { scanner: { decompress: { algorithm: gzip, into: { csv: { continue_on_error: true } } } } }`},
		{"input", `streams: { scanner: { switch: [ { re_match_name: "csv$", scanner: { csv: {} } }, { scanner: { chunker: { size: 65536 } } } ] } }`},
		{"input", `streams: { scanner: { type: chunker, chunker: { size: 1073741824 } } }`},
		{"output", `message_type: stream, stream: { name: "${! @path }", chunk_bytes: 16777216 }`},
		{"output", `message_type: stream, batching: { count: 100, processors: [ { archive: { format: tar } } ] }`},
	} {
		for _, name := range []string{"cryo", "cryo_server"} {
			fields := `{ ` + map[string]string{"cryo": dials, "cryo_server": listens}[name] + `, ` + tt.fields + ` }`
			t.Run(tt.kind+" "+component(name, fields), func(t *testing.T) {
				assert.Empty(t, lint(t, tt.kind, component(name, fields)))
				assert.NoError(t, construct(t, tt.kind, name, fields))
			})
		}
	}
}
