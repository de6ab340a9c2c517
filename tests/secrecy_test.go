package tests

import (
	"io"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

const (
	secret      = `s3cr/et+&=%2F <b>$1`
	otherSecret = "an0ther-s3cret"
)

// wantNoSecret wants no token in a text, however it is spelled.
func wantNoSecret(t *testing.T, text string) {
	t.Helper()
	for _, spelling := range []string{secret, url.QueryEscape(secret), url.PathEscape(secret), otherSecret, "pr0xy-pass"} {
		require.NotContains(t, text, spelling)
	}
}

// writeConfig writes a configuration into a file.
func writeConfig(t *testing.T, yaml string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "config.yaml")
	require.NoError(t, os.WriteFile(path, []byte(yaml), 0o600))
	return path
}

func TestEchoShowsNoToken(t *testing.T) {
	config := writeConfig(t, `
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
	cmd := exec.Command(binary, "echo", config)
	cmd.Env = append(os.Environ(), "OTHER_TOKEN="+otherSecret)
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, string(out))
	require.Equal(t, 6, strings.Count(string(out), "!!!SECRET_SCRUBBED!!!"), string(out))
	wantNoSecret(t, string(out))
}

func TestTheProcessTellsNobodyItsTokens(t *testing.T) {
	server, api := serve(t), freeAddress(t) // whose token is another
	config := writeConfig(t, `
http: { address: `+api+`, debug_endpoints: true }
input:
  broker:
    inputs:
      - cryo: { url: "`+server.url()+`", token: '`+secret+`' }
      - cryo_server: { address: "127.0.0.1:0", tokens: [ '`+secret+`', `+otherSecret+` ] }
output:
  cryo: { url: "`+server.url()+`", token: `+otherSecret+` }
`)
	p := launch(t, nil, nil, "run", "--log.level", "trace", config)
	p.wantLogged("Listening for Cryo clients on ")
	p.stdout.either(t, p.stderr, "Failed to connect to cryo: ")
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	for _, path := range []string{"/metrics", "/stats", "/debug/config/json", "/debug/config/yaml", "/endpoints"} {
		resp, err := client.Get("http://" + api + path)
		require.NoError(t, err)
		body, err := io.ReadAll(resp.Body)
		require.NoError(t, err)
		require.NoError(t, resp.Body.Close())
		require.Equal(t, http.StatusOK, resp.StatusCode, path)
		require.NotEmpty(t, body, path)
		wantNoSecret(t, string(body))
	}
	p.kill() // an output that never connected keeps the engine until its time-out
	wantNoSecret(t, strings.Join(p.said(), "\n"))
}
