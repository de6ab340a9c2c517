package tests

import (
	"net/http"
	"net/url"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/internal/testkit"
)

const (
	secret      = `s3cr/et+&=%2F <b>$1`
	otherSecret = "an0ther-s3cret"
)

// wantNoSecret wants no token in a text, in any encoding.
func wantNoSecret(t *testing.T, text string) {
	t.Helper()
	for _, spelling := range []string{secret, url.QueryEscape(secret), url.PathEscape(secret), otherSecret, "pr0xy-pass"} {
		require.NotContains(t, text, spelling)
	}
}

func TestEchoShowsNoToken(t *testing.T) {
	config := testkit.WriteFile(t, "config.yaml", `
input:
  cryo:
    url: ws://localhost:8080
    token: '`+secret+`'
    proxy_url: http://user:pr0xy-pass@localhost:3128
output:
  broker:
    outputs:
      - cryo_server:
          address: localhost:8081
          tokens:
            - '`+secret+`'
            - "${OTHER_TOKEN}"
            - ${OTHER_TOKEN}
      - cryo:
          url: ws://localhost:8080
          token: ${OTHER_TOKEN}
`)
	cmd := testkit.Command(t, "echo", config)
	cmd.Env = append(cmd.Env, "OTHER_TOKEN="+otherSecret)
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, string(out))
	require.Equal(t, 6, strings.Count(string(out), "!!!SECRET_SCRUBBED!!!"), string(out))
	wantNoSecret(t, string(out))
}

func TestNoTokenIsLoggedOrServed(t *testing.T) {
	server, api := testkit.Serve(t), testkit.ReserveAddress(t) // with another token
	config := testkit.WriteFile(t, "config.yaml", `
http: { address: `+api+`, debug_endpoints: true }
input:
  broker:
    inputs:
      - cryo: { url: "`+server.URL()+`", token: '`+secret+`' }
      - cryo_server: { address: "127.0.0.1:0", tokens: [ '`+secret+`', `+otherSecret+` ] }
output:
  cryo: { url: "`+server.URL()+`", token: `+otherSecret+` }
`)
	p := launch(t, nil, "run", "--log.level", "trace", config)
	p.Listening()
	p.WantLog("Failed to connect to cryo: ")
	wantServing(t, api, http.StatusOK)
	for _, path := range []string{"/metrics", "/stats", "/debug/config/json", "/debug/config/yaml", "/endpoints"} {
		resp, err := testkit.HTTP(http.MethodGet, "http://"+api+path, "")
		require.NoError(t, err)
		require.Equal(t, http.StatusOK, resp.Status, path)
		require.NotEmpty(t, resp.Body, path)
		wantNoSecret(t, resp.Body)
	}
	p.Kill() // an output that never connected delays the engine's shutdown to its timeout
	wantNoSecret(t, strings.Join(p.All(), "\n"))
}

func TestSecretThatYAMLChangesIsRejectedWithoutLoggingIt(t *testing.T) {
	const digits, lineBreak = "4815162342", "s3cret-with-a-line-break"
	server := testkit.Serve(t)
	for name, tt := range map[string]struct{ fields, token, words string }{
		"digits without quotes": {
			"cryo: { url: '" + server.URL() + "', token: ${SOME_TOKEN} }", digits, "field token must be text, but YAML reads it as a number: put it in single quotes, for example '${TOKEN}'",
		},
		"digits in a header": {
			"cryo: { url: '" + server.URL() + "', headers: { X-Key: ${SOME_TOKEN} } }", digits, "must be text, but YAML reads it as a number",
		},
		"digits at a listener": {
			"cryo_server: { address: '127.0.0.1:0', tokens: [ ${SOME_TOKEN} ] }", digits, "field tokens: element 1 must be text, but YAML reads it as a number",
		},
		"line break in single quotes": {
			"cryo: { url: '" + server.URL() + "', token: '${SOME_TOKEN}' }", lineBreak + "\n", "field token ends with ",
		},
		"line break in double quotes": {
			"cryo: { url: '" + server.URL() + `', token: "${SOME_TOKEN}" }`, lineBreak + "\n", "field token begins or ends with whitespace",
		},
		"line break without quotes": {
			"cryo_server: { address: '127.0.0.1:0', tokens: [ ${SOME_TOKEN} ] }", lineBreak + "\n", "field tokens: element 1 ends with ",
		},
	} {
		stream := "input:\n  " + tt.fields + "\noutput:\n  drop: {}\n"
		config := testkit.WriteFile(t, "config.yaml", stream)
		observability := testkit.WriteFile(t, "observability.yaml", "http: { enabled: false }")
		for _, args := range [][]string{{"lint", config}, {"check", config}, {"run", "--set", "http.enabled=false", config}, {"streams", "-o", observability, config}} {
			t.Run(name+"/"+args[0], func(t *testing.T) {
				cmd := testkit.Command(t, args...)
				cmd.Env = append(cmd.Env, "SOME_TOKEN="+tt.token)
				out, err := cmd.CombinedOutput()
				require.Error(t, err, string(out))
				require.Contains(t, string(out), tt.words)
				require.NotContains(t, string(out), strings.TrimSpace(tt.token))
			})
		}
	}
}
