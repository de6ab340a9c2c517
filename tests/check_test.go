package tests

import (
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/internal/testkit"
)

// check runs "cryo-connect check" on files, and returns its lines, without the files'
// directory, and its exit code.
func check(t *testing.T, env []string, files map[string]string, args ...string) (lines []string, exitCode int) {
	t.Helper()
	return checkArgs(t, append(env, "CRYO_TOKEN="+token), files, append([]string{"check"}, args...)...)
}

// checkArgs is check with all arguments, without CRYO_TOKEN.
func checkArgs(t *testing.T, env []string, files map[string]string, args ...string) (lines []string, exitCode int) {
	t.Helper()
	dir := t.TempDir()
	for name, content := range files {
		require.NoError(t, os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600))
	}
	args = slices.Clone(args)
	for i, arg := range args {
		if strings.HasSuffix(arg, ".yaml") || strings.HasSuffix(arg, ".env") {
			args[i] = filepath.Join(dir, arg)
		}
	}
	p := launch(t, append([]string{"CRYO_CONNECT_HTTP_ADDRESS=127.0.0.1:0"}, env...), args...)
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
	other := httptest.NewServer(http.NotFoundHandler())
	defer other.Close()
	_, free, err := net.SplitHostPort(testkit.ReserveAddress(t))
	require.NoError(t, err)
	env := []string{"NOT_CRYO=" + other.Listener.Addr().String(), "SERVER=" + server.URL(), "NOBODY=" + nobody, "TAKEN=" + taken.Addr().String(), "FREE=" + free}
	for _, c := range []struct {
		name, config string
		want         []string // a beginning of each line; behind " … " words that follow
	}{
		{
			"nobody listens", `
input: { cryo: { url: "ws://${NOBODY}", token: "${CRYO_TOKEN}" } }
output: { drop: {} }`,
			[]string{"a.yaml: input: failed: … " + nobody + ": connect: connection refused (unreachable: no process listens on that address)", "a.yaml: output: ok"},
		},
		{
			"the token is wrong", `
input: { cryo: { url: "${SERVER}", token: "${CRYO_TOKEN}x" } }
output: { stdout: {} }`,
			[]string{"a.yaml: input: failed: … The token was rejected. (check the field token)", "a.yaml: output: not tested"},
		},
		{
			"the path is wrong", `
input: { cryo: { url: "ws://${NOT_CRYO}/else" } }
output: { drop: {} }`,
			[]string{"a.yaml: input: failed: … (check the path of the field url)", "a.yaml: output: ok"},
		},
		{
			"the server never answers", `
input: { cryo: { url: "ws://${TAKEN}", connect_timeout: 100ms } }
output: { drop: {} }`,
			[]string{"a.yaml: input: failed: … (unreachable: check the address", "a.yaml: output: ok"},
		},
		{
			"names do not resolve", `
input: { cryo: { url: "ws://no-such-host.invalid" } }
output: { cryo_server: { address: "no-such-host.invalid:80", tokens: [ a ] } }`,
			[]string{"a.yaml: input: failed: … (check the host of the field url)", "a.yaml: output: failed: field address: … use a name that this machine can resolve"},
		},
		{
			"the address is another machine's", `
input: { cryo_server: { address: "192.0.2.1:0", tokens: [ a ] } }
output: { drop: {} }`,
			[]string{"a.yaml: input: failed: field address: … this machine has no such address", "a.yaml: output: ok"},
		},
		{
			"the address is taken", `
input: { cryo_server: { address: "${TAKEN}", tokens: [ a ] } }
output: { cryo_server: { address: "127.0.0.1:0", tokens: [ a ] } }`,
			[]string{"a.yaml: input: failed: … " + taken.Addr().String() + ": bind: address already in use: another process listens there", "a.yaml: output: ok"},
		},
		{
			"an address has two spellings", `
input: { cryo_server: { address: "localhost:${FREE}", tokens: [ a ] } }
output: { cryo_server: { address: "127.0.0.1:${FREE}", tokens: [ a ] } }`,
			[]string{
				"a.yaml: input: ok",
				"a.yaml: output: failed: field address: address already in use: the input cryo_server at … listens there, as localhost:",
			},
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
			"files are missing", `
input: { cryo_server: { address: "127.0.0.1:0", tokens: [ a ], tls: { cert_file: ./none.pem, key_file: ./none.pem } } }
output: { cryo: { url: "wss://${NOBODY}", token: "${CRYO_TOKEN}", tls: { enabled: true, root_cas_file: ./no-ca.pem } } }`,
			[]string{"a.yaml: failed: line 2: field tls: open ./none.pem: ", "a.yaml: failed: line 3: field tls: open ./no-ca.pem: "},
		},
		{
			"token files are missing", `
input: { cryo_server: { address: "127.0.0.1:0", tokens_file: ./no-tokens } }
output: { cryo: { url: "ws://${NOBODY}", token_file: ./no-token } }`,
			[]string{"a.yaml: failed: line 2: field tokens_file: open ./no-tokens: ", "a.yaml: failed: line 3: field token_file: open ./no-token: "},
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
			"the times of a stop do not fit", `
input: { cryo_server: { address: "127.0.0.1:0", tokens: [ a ], drain_period: 3s } }
output: { drop: {} }
shutdown_delay: 2s`,
			[]string{"a.yaml: failed: line 2: field drain_period is 3s, but shutdown_delay of the configuration is 2s"},
		},
		{
			"shutdown_delay is missing", `
input: { cryo_server: { address: "127.0.0.1:0", tokens: [ a ] } }
output: { cryo_server: { address: "127.0.0.1:0", tokens: [ a ], drain_period: 3s } }`,
			[]string{"a.yaml: failed: line 3: field drain_period is 3s, but shutdown_delay of the configuration is 0s"},
		},
		{
			"shutdown_delay is negative", `
input: { cryo_server: { address: "127.0.0.1:0", tokens: [ a ] } }
output: { drop: {} }
shutdown_delay: -2s`,
			[]string{"a.yaml: failed: field shutdown_delay must not be negative, got -2s"},
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

// The pipelines run: a warning does not change the exit code.
func TestCheckWarnsAboutProblemsThatDoNotPreventARun(t *testing.T) {
	taken := testkit.Listen(t)
	defer taken.Close()
	const listens = "input: { cryo_server: { address: '127.0.0.1:0', tokens: [ a ] } }\n"
	tested := []string{"a.yaml: input: ok", "a.yaml: output: ok"}
	for _, c := range []struct {
		name, config string
		want         string // the beginning of the warning; empty: none
	}{
		{
			"the address of the HTTP server is taken", listens + "output: { drop: {} }\nhttp: { address: '${TAKEN}' }",
			"a.yaml: warning: field http.address: listen tcp " + taken.Addr().String() + ": bind: address already in use: ",
		},
		{
			"it is another machine's", listens + "output: { drop: {} }\nhttp: { address: '192.0.2.1:0' }",
			"a.yaml: warning: field http.address: listen tcp 192.0.2.1:0: bind: cannot assign requested address: ",
		},
		{"there is no HTTP server", listens + "output: { drop: {} }\nhttp: { enabled: false, address: '${TAKEN}' }", ""},
		{
			"a batch that never fills", listens + "output: { cryo_server: { address: '127.0.0.1:0', tokens: [ a ], batching: { count: 10 } } }",
			"a.yaml: warning: field output.cryo_server.batching has no period: ",
		},
		{"a batch with a period", listens + "output: { cryo_server: { address: '127.0.0.1:0', tokens: [ a ], batching: { count: 10, period: 1s } } }", ""},
		{"a drain_period that fits", "input: { cryo_server: { address: '127.0.0.1:0', tokens: [ a ], drain_period: 3s } }\noutput: { drop: {} }\nshutdown_delay: 3s", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			lines, code := check(t, []string{"TAKEN=" + taken.Addr().String()}, map[string]string{"a.yaml": c.config}, "a.yaml")
			require.Zero(t, code, strings.Join(lines, "\n"))
			if c.want != "" {
				require.True(t, strings.HasPrefix(lines[0], c.want), lines[0])
				lines = lines[1:]
			}
			require.Equal(t, tested, lines)
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

// The flags of run, before and behind the command.
func TestCheckAcceptsTheFlagsOfRun(t *testing.T) {
	server := testkit.Serve(t)
	files := map[string]string{
		"a.yaml":         "input: { feed: { url: \"${FROM_FILE}\" } }\noutput: { label: out, cryo: { url: nowhere, token: \"${CRYO_TOKEN}\" } }",
		"test.env":       "FROM_FILE=" + server.URL() + "\nCRYO_TOKEN=\"" + token + "\"",
		"resources.yaml": "cache_resources: [ { label: c, memory: {} } ]",
		"feed.tmpl.yaml": "name: feed\ntype: input\nfields: [ { name: url, type: string } ]\nmapping: |\n  root.cryo.url = this.url\n  root.cryo.token = env(\"CRYO_TOKEN\")",
	}
	set := []string{"--set", "output.cryo.url=" + server.URL()}
	flags := append([]string{"-e", "test.env", "-t", "feed*.yaml", "-r", "res*.yaml"}, set...)
	for name, args := range map[string][]string{
		"behind the command": append(append([]string{"check"}, flags...), "a.yaml"),
		"before the command": append(append([]string{}, flags...), "check", "a.yaml"),
		"with -c":            append(append([]string{"-c", "a.yaml"}, flags...), "check"),
	} {
		t.Run(name, func(t *testing.T) {
			lines, code := checkArgs(t, nil, files, args...)
			require.Len(t, lines, 2, strings.Join(lines, "\n"))
			require.Contains(t, lines[0], "input", lines[0])
			require.True(t, strings.HasSuffix(lines[0], ": ok"), lines[0])
			require.Equal(t, "a.yaml: output out: ok", lines[1])
			require.Zero(t, code)
		})
	}

	t.Run("lists and missing fields", func(t *testing.T) {
		files := map[string]string{"a.yaml": "pipeline: { processors: [ {} ] }"}
		lines, code := checkArgs(t, nil, files, "check", "-s", "pipeline.processors.0.mapping=root = \"${! 1 }\"", "-s", "input.cryo_server.address=127.0.0.1:0",
			"-s", "input.cryo_server.tokens.-=a", "-s", "output.broker.outputs.-.drop={}", "a.yaml")
		require.Equal(t, []string{"a.yaml: input: ok", "a.yaml: output.broker.outputs.0: ok"}, lines)
		require.Zero(t, code)
	})

	withTypo := map[string]string{"a.yaml": "input: { generate: { mapping: root = 1, tokem: 1 } }\noutput: { cryo: { url: nowhere } }"}
	withLists := map[string]string{"a.yaml": "input: { cryo_server: { address: 127.0.0.1:0, tokens: [ \"${CRYO_TOKEN}\" ] } }\npipeline: { processors: [ {} ] }\noutput: { drop: {} }", "test.env": files["test.env"]}
	withDrain := map[string]string{"a.yaml": "input: { cryo_server: { address: 127.0.0.1:0, tokens: [ a ], drain_period: 3s } }\noutput: { drop: {} }\nshutdown_delay: 3s"}
	for _, c := range []struct {
		name  string
		files map[string]string
		args  []string
		want  []string // a part of each line
	}{
		{"an override that is not valid", files, append(slices.Clone(flags), "--set", "output.cryo.url=nowhere"), []string{"with --set: field url"}},
		{"an override of an unknown field", files, append(slices.Clone(flags), "--set", "output.cryo.tokem=x"), []string{"with --set: field tokem"}},
		{"an override without a value", files, append(slices.Clone(flags), "--set", token), []string{"--set: "}},
		{"an unknown field beside an override", withTypo, set, []string{"with --set: field tokem"}},
		{"a delay that is too short", withDrain, []string{"-s", "shutdown_delay=2s"}, []string{"with --set: field drain_period is 3s, but shutdown_delay of the configuration is 2s"}},
		{"an unknown index", withLists, []string{"-e", "test.env", "-s", "input.cryo_server.tokens.1=x"}, []string{"--set input.cryo_server.tokens.1: 1 is not an index"}},
		{"a missing variable", withLists, []string{"-s", "pipeline.processors.0.mapping=root = 1"}, []string{"[CRYO_TOKEN]"}},
		{"a missing dotenv file", files, []string{"-e", "none.env"}, []string{"--env-file: open "}},
		{"a faulty template", map[string]string{"a.yaml": "", "bad.tmpl.yaml": "name: feed\ntype: inputt"}, []string{"-t", "bad*.yaml"}, []string{"--templates: "}},
	} {
		t.Run(c.name, func(t *testing.T) {
			lines, code := checkArgs(t, []string{"SERVER=" + server.URL()}, c.files, append(append([]string{"check"}, c.args...), "a.yaml")...)
			require.Len(t, lines, len(c.want), strings.Join(lines, "\n"))
			for i, want := range c.want {
				require.Contains(t, lines[i], want)
			}
			require.Equal(t, 1, code)
		})
	}
}
