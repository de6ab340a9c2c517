package plugin

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"regexp"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/redpanda-data/benthos/v4/public/service"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// fieldValues are values of our fields, in YAML, by their paths. Each begins valid; the test
// adds null, values of other types, and mutations.
var fieldValues = map[string][]string{
	"url":                  {`ws://localhost:8080`, `WSS://[::1]:443/a/path?room=5#x`, `ws://[fe80::1%25lo]:80`, `ws://h`, `ws://[::1`, `ws://h/%zz`, `ws://h:port/`, `ws://h:99999`, `ws://h:0`, `ws://h:`, `ws://h\x`, `ws://h?%61uthorization=1`, `ws://h?x-cryo-sid=1`, `ws://h?a;b`, `ws://u:p@h`, `ws://u:p%zz@h`, `http://h`, `ws:h`, `ws:///p`, `//h`},
	"token":                {`a`, `a b`, "a\x01", `${! env("NO_SUCH_VARIABLE") }`, `${! file("nowhere") }`, `${! file( }`, `a${!`, `a `, `a\n`},
	"token_file":           {`nowhere/token`},
	"tokens_file":          {`nowhere/tokens`},
	"query_parameters":     {`{ room: "5" }`, `{ authorization: a }`, `{ x-cryo-sid: a }`, `{ Authorization: a }`, `{ "": "" }`, `{ "a\r\n": "\0" }`, `{ a: 5 }`, `{ a: [ b ] }`},
	"headers":              {`{ X-Room: "5" }`, `{ host: example.com }`, `{ Connection: close }`, `{ upgrade: a }`, `{ Sec-WebSocket-Key: a }`, `{ sec-websocket-version: "8" }`, `{ Sec-WebSocket-Extensions: a }`, `{ Sec-WebSocket-Protocol: a }`, `{ "a b": a }`, `{ "": a }`, `{ "ä": a }`, `{ a: "b\r\nc" }`, `{ a: "\0" }`, `{ a: "ä" }`, `{ a: [ b ] }`, `{ a: null }`},
	"tls":                  {`{ enabled: false }`, `{ enabled: true }`, `{ root_cas: a }`, `{ enabled: true, root_cas: a, root_cas_file: b }`, `{ enabled: true, client_certs: [ { cert: a, key: b } ] }`, `{ enabled: true, client_certs: [ { cert: a } ] }`, `{ enabled: true, client_certs: [ {} ] }`, `{ cert_file: a, key_file: b }`, `{ cert_file: a }`, `{ key_file: a }`, `{ client_ca_file: a }`, `{ client_auth: verify_if_given }`, `{ client_auth: none }`, `{ min_version: tls13 }`, `{ min_version: TLS13 }`, `{ min_version: null }`, `{ unknown: 1 }`},
	"proxy_url":            {`http://localhost:3128`, `socks5://u:p@h`, `HTTPS://h`, `socks5h://[::1]:1`, `http://%zz`, `http://[::1`, `http://h:99999`, `http://h:0`, `http://:80`, `ftp://h`, `h:80`},
	"address":              {`127.0.0.1:8080`, `:0`, `[::]:80`, `[::1]:65535`, `localhost:80`, `exa_mple.com:80`, `[fe80::1%lo]:80`, `300.1.1.1:80`, `1.2.3:80`, `[localhost]:80`, `::1:80`, `h:65536`, `h:-1`, `h:+80`, `h:http`, `h`, `h:`, `a b:80`, `a/b:80`, `ws://h:80`},
	"path":                 {`/`, `/feed`, `feed`, `/a?b`, `/%zz`},
	"tokens":               {`[ a ]`, `[ a, b, a ]`, `[]`, `[ "" ]`, `[ null ]`, `[ 5 ]`, `[ [ a ] ]`, `[ { a: b } ]`},
	"authorize":            {`root = true`, `root = this.token ==`, `deleted()`, `import "nowhere.blobl"`, `root = no_such_function()`},
	"authorize_processors": {`[ { noop: {} } ]`, `[ { mapping: "root = this.token" }, { catch: [ { noop: {} } ] } ]`, `[ { mapping: "root = this ==" } ]`, `[ { nothing: {} } ]`, `[ noop ]`, `{ noop: {} }`, `[]`, `[ null ]`, `[ {} ]`, `[ { noop: {}, mapping: "root = 1" } ]`},
	"session_metadata":     {`{ query_parameters: [ room ], headers: [ Host ] }`, `{ query_parameters: [ authorization ] }`, `{ headers: [ "a b", "" ] }`, `{ headers: null }`, `{ query_parameters: room }`, `{ other: 1 }`, `{}`},
	"allowed_origins":      {`[ "*" ]`, `[ "null", "https://a.example:8443", "capacitor://localhost" ]`, `[]`, `[ "https://a/" ]`, `[ "https://*.a" ]`, `[ "https://A" ]`, `[ a ]`, `[ null ]`, `[ "" ]`},
	"trusted_proxies":      {`[ 10.0.0.0/8, "::1", "2001:db8::/32", "::ffff:10.0.0.0/104", "fe80::1%lo" ]`, `[]`, `[ 999.1.1.1 ]`, `[ 10.0.0.0/99 ]`, `[ ":::" ]`, `[ "fe80::%lo/64" ]`, `[ proxy ]`, `[ null ]`, `[ "" ]`, `[ 010.0.0.1 ]`},
	"forwarded_header":     {`forwarded`, `X-Forwarded-For`, `via`},
	"message_types":        {`[ utf8 ]`, `[ utf8, binary, stream, error, utf8 ]`, `[ session ]`, `[ text ]`, `[]`, `[ null ]`, `[ UTF8 ]`},
	"acknowledge":          {`received`, `Received`, `never`},
	"streams":              {`{ names: [ a ], flow_control: pull, max_bytes: 0, max_open: 1, idle_timeout: 1s }`, `{ flow_control: Pull }`, `{ max_bytes: -1 }`, `{ max_bytes: null, max_open: null }`, `{ max_open: 0 }`, `{ max_open: many }`, `{ max_open: 99999999999999999999 }`, `{ idle_timeout: -1s }`, `{ idle_timeout: null }`, `{ names: null }`, `{ names: [ null ] }`, `{ scanner: { lines: {} } }`, `{ scanner: { chunker: { size: 0 } } }`, `{ scanner: { chunker: { size: 1e12 } } }`, `{ scanner: { words: {} } }`, `{ scanner: { decompress: { algorithm: zip } } }`, `{ scanner: { lines: { max_buffer_size: 0 } } }`, `{ scanner: { re_match: { pattern: "(" } } }`, `{ scanner: { csv: { custom_delimiter: "" } } }`, `{ scanner: { avro: {} } }`, `{ scanner: { decompress: { algorithm: gzip, into: { decompress: { algorithm: zip } } } } }`, `{ scanner: { switch: [ { re_match_name: "(", scanner: { lines: {} } } ] } }`, `{ scanner: null }`, `{ scanner: lines }`, `{ scanner: {} }`, `{ other: 1 }`, `{}`},
	"max_in_flight":        {`1`, `64`, `1e3`, `9007199254740992`, `9007199254740993`, `9223372036854775807`, `100000000000000000000`},
	"include_metadata":     {`false`, `off`},
	"ack_timeout":          {`30s`, `1h2m`, `1ns`, `0s`, `-1s`, `1`, `1d`, `9999999999h`},
	"message_type":         {`auto`, `stream`, `text`, `Binary`, `${! @kind }`, `${! @`, `a${! "b" }`, `${! throw( }`, `$$`},
	"stream":               {`{ name: a, chunk_bytes: 1 }`, `{ name: "${! @path }" }`, `{ name: "${! @" }`, `{ name: null, chunk_bytes: null }`, `{ chunk_bytes: 0 }`, `{ chunk_bytes: 16777216 }`, `{ chunk_bytes: 16777217 }`, `{ chunk_bytes: 1.5 }`, `{ chunk_bytes: a }`, `{ other: 1 }`, `{}`},
	"batching":             {`{ count: 10, period: 1s }`, `{ period: abc }`, `{ period: -1s }`, `{ period: null }`, `{ count: 0, period: 5 }`, `{ check: "this.a ==" }`, `{ check: "true" }`, `{ processors: [ { noop: {} } ] }`, `{ count: -1, processors: [ { noop: {} } ] }`, `{ count: 1, processors: [ { noop: {} } ] }`, `{ count: 2, processors: [ { nothing: {} } ] }`, `{ byte_size: -1 }`, `{ other: 1 }`, `{}`},
	"send_to":              {`all`, `any`, `session`, `match`, `Any`, `some`},
	"session_id":           {`7`, `${! @cryo_session_id }`, `${! @`},
	"match":                {`root = true`, `root = @cryo_session.a ==`},
	"no_session":           {`drop`, `Reject`, `panic`},
	"session_expires":      {`root = this.authorized.exp`, `root = this.`, `root = nothing_of_this_name()`},
	"session_owner":        {`root = this.authorized.sub`, `root = this.`},

	"extract_tracing_map": {`root = this.trace`, `root = this.`},
	"inject_tracing_map":  {`root.trace = this`, `root = this.`},
}

// sameValues are fields with the values of another.
var sameValues = map[string]string{
	"max_batch_count": "max_in_flight", "max_buffer_bytes": "max_in_flight", "max_sessions": "max_in_flight",
	"max_sessions_per_address": "max_in_flight", "max_header_bytes": "max_in_flight", "max_in_flight_per_session": "max_in_flight",
	"max_connects_per_second": "max_in_flight", "max_messages_per_second": "max_in_flight", "max_bytes_per_second": "max_in_flight",
	"auto_replay_nacks": "include_metadata", "proxy_protocol": "include_metadata",
	"connect_timeout": "ack_timeout", "heartbeat_interval": "ack_timeout", "handshake_timeout": "ack_timeout",
	"max_session_age": "ack_timeout", "session_expiry_grace": "ack_timeout", "drain_period": "ack_timeout",
}

// anyValues are values of every type.
var anyValues = []string{
	``, `null`, `~`, `""`, `" "`, `a`, `"5"`, `0`, `-1`, `1`, `1.5`, `-0.0`, `1e400`, `.nan`, `.inf`, `0x10`, `1_000`, `100000000000000000000`, `-100000000000000000000`,
	`true`, `false`, `yes`, `no`, `"true"`, `True`, `2026-11-29`, `!!binary YQ==`, `!!str 5`, `[]`, `[ 1 ]`, `[ null ]`, `[ a ]`, `[ [ a ] ]`, `{}`, `{ a: b }`, `{ a: null }`, `{ a: { b: c } }`,
	`"\0"`, `"\r\n"`, `"ä"`, `"%"`, `"${!"`, `"${! 5 }"`, `"$"`,
}

func valuesOf(path string) []string {
	if other, ok := sameValues[path]; ok {
		path = other
	}
	return fieldValues[path]
}

// mutate changes a few characters of a value.
func mutate(rng *rand.Rand, value string) string {
	const odd = "0:/%[]{}.,-+@#?&=\"'\\ \n\x00azAZä$!*~|"
	runes := []rune(value)
	for range 1 + rng.IntN(3) {
		at := rng.IntN(len(runes) + 1)
		r := []rune(odd)[rng.IntN(utf8.RuneCountInString(odd))]
		switch rng.IntN(3) {
		case 0:
			runes = slices.Insert(runes, at, r)
		case 1:
			runes = slices.Delete(runes, at, min(at+1, len(runes)))
		default:
			if at < len(runes) {
				runes[at] = r
			}
		}
	}
	return string(runes)
}

// engineTypes are the errors of values for which the engine's lint has its own sentence.
// Its start has another.
var engineTypes = []string{"unable to infer", "expected array value", "expected object value", "expected map value", "cannot unmarshal", "yaml: "}

// undecodable is the error of a number or boolean of a field of the engine that is none. The engine's
// lint accepts it, and then runs no rule for the field that has it, or for the component.
var undecodable = regexp.MustCompile(`field '(batching': field '\w+|tls': field '\w+)': yaml: unmarshal errors`)

// TestLintAndBuildAcceptTheSameValues builds each component with each value of each of its
// fields. What passes lint must build; what does not build must fail lint with the same error.
func TestLintAndBuildAcceptTheSameValues(t *testing.T) {
	const mutations = 40
	for _, c := range []struct{ kind, name string }{{"input", "cryo"}, {"output", "cryo"}, {"input", "cryo_server"}, {"output", "cryo_server"}} {
		t.Run(c.kind+" "+c.name, func(t *testing.T) {
			t.Parallel()
			rng := rand.New(rand.NewPCG(19, 1))
			for _, path := range fieldsOf(t, c.kind, c.name) {
				values := slices.Concat(anyValues, valuesOf(path))
				if !assert.NotEmpty(t, valuesOf(path), path) {
					continue
				}
				for range mutations {
					valid := valuesOf(path)[rng.IntN(len(valuesOf(path)))]
					values = append(values, strings.ReplaceAll(mutate(rng, valid), "\n", " "), fmt.Sprintf("%q", mutate(rng, valid)))
				}
				for _, value := range valuesOf(path) {
					values = append(values, fmt.Sprintf("%q", value)) // as text where it is none
				}
				for _, value := range values {
					checkLint(t, c.kind, c.name, path, value)
				}
			}
		})
	}
}

// checkLint lints and builds a component with one field set, and whatever that needs.
func checkLint(t *testing.T, kind, name, path, value string) {
	t.Helper()
	fields := map[string]string{path: value}
	add := func(field, value string) {
		if fields[field] == "" && field != path {
			fields[field] = value
		}
	}
	if name == "cryo" {
		add("url", "ws://localhost")
	} else {
		add("address", "127.0.0.1:0")
		switch path {
		case "authorize", "tokens_file":
		case "authorize_processors":
			add("authorize", "root = true")
		default:
			add("tokens", "[ a ]")
		}
		switch path {
		case "session_id":
			add("send_to", "session")
		case "match":
			add("send_to", "match")
		}
	}
	var b strings.Builder
	for field, value := range fields {
		fmt.Fprintf(&b, "%s: %s\n", field, value)
	}
	text := b.String()
	lints, err := linter().LintYAML(kind, []byte(name+":\n  "+strings.ReplaceAll(strings.TrimSpace(text), "\n", "\n  ")))
	if err != nil {
		return // no YAML
	}
	err = construct(t, kind, name, text)
	switch {
	case err == nil: // lint may be stricter
	case errors.Is(err, fs.ErrNotExist): // the file may exist where the configuration runs
	case undecodable.MatchString(err.Error()): // lint has no rule for what is no number of an engine's field
	case len(lints) == 0:
		t.Errorf("%s %s accepts by lint, but does not build: %v\n%s", kind, name, err, text)
	case slices.ContainsFunc(engineTypes, func(e string) bool { return strings.Contains(err.Error(), e) }):
	case !slices.ContainsFunc(lints, func(l service.Lint) bool { return strings.Contains(err.Error(), l.What) }):
		t.Errorf("%s %s: lint has %q, the start has %q\n%s", kind, name, lints, err, text)
	}
}

// fieldsOf returns the names of the fields of a component.
func fieldsOf(t *testing.T, kind, name string) []string {
	t.Helper()
	config, ok := service.GlobalEnvironment().GetInputConfig(name)
	if kind == "output" {
		config, ok = service.GlobalEnvironment().GetOutputConfig(name)
	}
	require.True(t, ok)
	text, err := config.FormatJSON()
	require.NoError(t, err)
	var spec struct {
		Config struct{ Children []struct{ Name string } }
	}
	require.NoError(t, json.Unmarshal(text, &spec))
	var names []string
	for _, field := range spec.Config.Children {
		names = append(names, field.Name)
	}
	return names
}
