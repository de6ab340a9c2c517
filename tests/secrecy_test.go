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
