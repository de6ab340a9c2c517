package tests

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/internal/testkit"
)

// check runs "cryo-connect check" on files, and returns its lines, without the files'
// directory, and its exit code.
func check(t *testing.T, env []string, files map[string]string, args ...string) (lines []string, exitCode int) {
	t.Helper()
	dir := t.TempDir()
	for name, content := range files {
		require.NoError(t, os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600))
	}
	for i, arg := range args {
		if strings.HasSuffix(arg, ".yaml") {
			args[i] = filepath.Join(dir, arg)
		}
	}
	p := launch(t, append(env, "CRYO_TOKEN="+token), append([]string{"check"}, args...)...)
	exitCode = p.ExitCode()
	for _, line := range p.All() {
		require.NotContains(t, line, token)
		lines = append(lines, strings.ReplaceAll(line, dir+"/", ""))
	}
	return lines, exitCode
}

const dialBoth = `
input: { label: feed, cryo: { url: "${SERVER}", token: "${CRYO_TOKEN}" } }
output: { cryo: { url: "${SERVER}", token: "${CRYO_TOKEN}" } }
`

func TestCheckConnectsEverythingWithoutReceiving(t *testing.T) {
	server := testkit.Serve(t)
	lines, code := check(t, []string{"SERVER=" + server.URL()}, map[string]string{"a.yaml": dialBoth}, "a.yaml")
	require.Equal(t, []string{"a.yaml: input feed: ok", "a.yaml: output: ok"}, lines)
	require.Zero(t, code)
	for range 2 {
		session := server.Session(t)
		require.Error(t, testkit.Next(t, testkit.Send(session, "for nobody")), "check acknowledges no message, and closes the session")
		<-session.Done()
	}
}

func TestCheckReportsEachFailureOnOneLine(t *testing.T) {
	server, nobody, taken := testkit.Serve(t), testkit.ReserveAddress(t), testkit.Listen(t)
	defer taken.Close()
	env := []string{"SERVER=" + server.URL(), "NOBODY=" + nobody, "TAKEN=" + taken.Addr().String()}
	for _, c := range []struct {
		name, config string
		want         []string // a beginning of each line; behind " … " words that follow
	}{
		{
			"nobody listens", `
input: { cryo: { url: "ws://${NOBODY}", token: "${CRYO_TOKEN}" } }
output: { drop: {} }`,
			[]string{"a.yaml: input: failed: … " + nobody + ": connect: connection refused", "a.yaml: output: ok"},
		},
		{
			"the token is wrong", `
input: { cryo: { url: "${SERVER}", token: "${CRYO_TOKEN}x" } }
output: { stdout: {} }`,
			[]string{"a.yaml: input: failed: ", "a.yaml: output: not tested"},
		},
		{
			"the address is taken", `
input: { cryo_server: { address: "${TAKEN}", tokens: [ a ] } }
output: { cryo_server: { address: "127.0.0.1:0", tokens: [ a ] } }`,
			[]string{"a.yaml: input: failed: … " + taken.Addr().String() + ": bind: address already in use", "a.yaml: output: ok"},
		},
		{
			"two components of a listener disagree", `
input: { cryo_server: { address: "127.0.0.1:0", tokens: [ a ] } }
output: { label: answers, cryo_server: { address: "127.0.0.1:0", tokens: [ b ], path: /else } }`,
			[]string{
				"a.yaml: input: ok",
				"a.yaml: output answers: failed: … differ in path, tokens",
			},
		},
		{
			"there is no certificate", `
input: { cryo_server: { address: "127.0.0.1:0", tokens: [ a ], tls: { cert_file: ./none.pem, key_file: ./none.pem } } }
output: { drop: {} }`,
			[]string{"a.yaml: input: failed: field tls: ", "a.yaml: output: ok"},
		},
		{
			"behind a broker and a resource", `
input: { broker: { inputs: [ { label: a, cryo: { url: "${SERVER}", token: "${CRYO_TOKEN}" } }, { label: b, cryo: { url: "ws://${NOBODY}" } } ] } }
output: { resource: out }
output_resources: [ { label: out, cryo: { url: "ws://${NOBODY}" } } ]`,
			[]string{
				"a.yaml: input.broker.inputs.0 a: ok",
				"a.yaml: input.broker.inputs.1 b: failed: ",
				"a.yaml: output_resources out: failed: ",
			},
		},
		{
			"several lint errors", `
input: { cryo: { url: "http://example.com", tokem: x } }
output: { drop: {} }`,
			[]string{"a.yaml: failed: line 2: field url", "a.yaml: failed: line 2: field tokem"},
		},
		{
			"a missing variable", `
input: { cryo: { url: "ws://localhost/${NOT_SET}" } }
output: { drop: {} }`,
			[]string{"a.yaml: failed: line 1: … [NOT_SET]"},
		},
		{
			"no YAML", "input: {",
			[]string{"a.yaml: failed: yaml: "},
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			lines, code := check(t, env, map[string]string{"a.yaml": c.config}, "a.yaml")
			require.Len(t, lines, len(c.want), strings.Join(lines, "\n"))
			for i, want := range c.want {
				begin, words, _ := strings.Cut(want, "… ")
				require.True(t, strings.HasPrefix(lines[i], begin), "%q begins with %q", lines[i], begin)
				require.Contains(t, lines[i], words)
			}
			require.Equal(t, 1, code)
		})
	}
}

func TestCheckAcceptsSeveralConfigurationsAndResources(t *testing.T) {
	server := testkit.Serve(t)
	lines, code := check(t, []string{"SERVER=" + server.URL()}, map[string]string{
		"a.yaml":         dialBoth,
		"b.yaml":         "input: { resource: feed }\noutput: { drop: {} }",
		"resources.yaml": "input_resources: [ { label: feed, cryo: { url: \"${SERVER}\", token: \"${CRYO_TOKEN}\" } } ]",
	}, "-r", "res*.yaml", "a.yaml", "b.yaml", "none.yaml")
	require.Len(t, lines, 5, strings.Join(lines, "\n"))
	require.Equal(t, []string{"a.yaml: input feed: ok", "a.yaml: output: ok"}, lines[:2])
	require.Contains(t, lines[2], "feed: ok")
	require.Equal(t, "b.yaml: output: ok", lines[3])
	require.Contains(t, lines[4], "none.yaml: failed: open ")
	require.Equal(t, 1, code)
}

func TestCheckWithoutAConfigurationFails(t *testing.T) {
	lines, code := check(t, nil, nil)
	require.Len(t, lines, 1)
	require.Contains(t, lines[0], "cryo-connect check pipeline.yaml")
	require.Equal(t, 1, code)
}
