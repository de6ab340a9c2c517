package tests

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/testkit"
)

// Tokens from the environment, in single quotes as in every example.

// Each of these means something else to YAML, to the engine, to a URL or to a header, if only
// without the quotes.
var preservedTokens = []string{
	"4815162342", "007123", "-1", "1e5", "0x1F", "0b11", "0o17", "1_000", "3.14", ".inf", ".nan", "12:30:45",
	"2026-11-30", "2026-11-30T10:00:00Z", "true", "False", "yes", "off", "null", "Null", "~", "<<", "=",
	"#x", "abc #def", "abc#def", "&abc", "&a b", "*x", "!x", "!!binary x", "%x", "%YAML 1.2", "@x", "`x`", "|", ">-", "? x", "-", "- a", "---", "...",
	"a: b", "a:b", "key:", ", x", "a,b", "{}", "[]", "{a: b}", "[a, b]", "}", "]", `a"b`, `"quoted"`, `"`,
	`pa\nss`, `pa\ss`, `\`, `ends with \`, `\x41`, "a  b", "$X", "$$", "$(x)", "$", "{{x}}", "{{ .X }}",
	"%41%20", "a+b/c==", "a&b=c", "<b>&amp;", "ünïcödé 🔑", strings.Repeat("long ", 800) + "token",
}

func TestTokensFromTheEnvironmentAreUnchanged(t *testing.T) {
	type upgrade struct{ token, header, query string }
	arrived := make(chan map[int]upgrade, 1)
	arrived <- make(map[int]upgrade)
	all := make(chan struct{})
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		i, _ := strconv.Atoi(strings.Trim(r.URL.Path, "/"))
		query := r.URL.Query()
		by := <-arrived
		if _, known := by[i]; !known {
			by[i] = upgrade{query.Get("authorization"), r.Header.Get("X-Key"), query.Get("key")}
			if len(by) == len(preservedTokens) {
				close(all)
			}
		}
		arrived <- by
		http.Error(w, "later", http.StatusServiceUnavailable)
	}))
	defer server.Close()

	var env, dials, listens []string
	for i, token := range preservedTokens {
		env = append(env, fmt.Sprintf("TOKEN_%d=%s", i, token))
		quoted := fmt.Sprintf("'${TOKEN_%d}'", i)
		dials = append(dials, fmt.Sprintf("{ cryo: { url: 'ws://%s/%d', token: %s, headers: { X-Key: %s }, query_parameters: { key: %s } } }",
			server.Listener.Addr(), i, quoted, quoted, quoted))
		listens = append(listens, quoted)
	}
	config := testkit.WriteFile(t, "config.yaml", "input: { broker: { inputs: [ "+strings.Join(dials, ", ")+" ] } }\n"+
		"output: { cryo_server: { address: '127.0.0.1:0', tokens: [ "+strings.Join(listens, ", ")+" ], no_session: drop } }\n")
	lint := testkit.Command(t, "lint", config)
	lint.Env = append(lint.Env, env...)
	require.Empty(t, testkit.Output(t, lint))

	p := launch(t, env, "run", "--set", "http.enabled=false", config)
	address := p.Listening()
	testkit.Next(t, all)
	by := <-arrived
	for i, token := range preservedTokens {
		require.Equal(t, upgrade{"Bearer " + token, token, token}, by[i])
		s, err := cryo.Dial(t.Context(), "ws://"+address, &cryo.DialOptions{Token: token})
		require.NoError(t, err, token)
		testkit.HangUp(s)
	}
	arrived <- by
	p.Kill() // inputs that never connected delay the engine's shutdown
}

func TestTokensThatQuotesDoNotPreserveAreRejectedWithoutLogging(t *testing.T) {
	commands := [][]string{{"lint"}, {"check"}, {"run", "--set", "http.enabled=false"}, {"streams", "--set", "http.enabled=false"}}
	fields := []string{
		"cryo: { url: 'ws://127.0.0.1:9', token: '${CRYO_TOKEN:default}' }",
		"cryo_server: { address: '127.0.0.1:0', tokens: [ '${CRYO_TOKEN}' ] }",
		"cryo: { url: 'ws://127.0.0.1:9', headers: { X-Key: '${CRYO_TOKEN}' } }",
		"cryo: { url: 'ws://127.0.0.1:9', query_parameters: { key: '${CRYO_TOKEN}' } }",
	}
	for i, secret := range []string{
		"it's-s3cret", "s3cret' #def", "s3''cret", "'s3cret'", "s3cret', path: '/else", "'s3cret\n",
		`s3cret${! env("HOME") }`, "s3cret${HOME}", "s3cret${{HOME}}", "${!s3cret}", "${s3cret",
		"s3cret\nsecond line", "s3cret\r\nsecond line", "s3cret\ttab", "s3cret\x07bell", "s3cret\u0085next", "s3cret\u2028line", "s3cret\u2029paragraph",
	} {
		for j, field := range fields {
			command := commands[(i+j)%len(commands)] // each with each field, and with each secret
			t.Run(fmt.Sprintf("%s %d, field %d", command[0], i, j), func(t *testing.T) {
				t.Parallel()
				path := testkit.WriteFile(t, "config.yaml", "input:\n  "+field+"\noutput: { drop: {} }\n")
				p := launch(t, []string{"CRYO_TOKEN=" + secret}, append(slices.Clone(command), path)...)
				p.WantExit(1)
				output := strings.Join(p.All(), "\n")
				require.Contains(t, output, "environment variable CRYO_TOKEN", "%q in %s", secret, field)
				require.NotContains(t, output, "s3cret")
				require.NotContains(t, output, "second line")
			})
		}
	}
}
