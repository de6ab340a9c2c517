package tests

import (
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"gopkg.in/yaml.v3"
)

// example runs one of config/ until the test's end.
func example(t *testing.T, file string, stdin io.Reader, env ...string) *process {
	t.Helper()
	return launch(t, stdin, env, "run", "--set", "http.enabled=false", "config/"+file)
}

func TestEveryExampleIsLintedCleanAndListed(t *testing.T) {
	readme, err := os.ReadFile("../README.md")
	require.NoError(t, err)
	var files []string
	require.NoError(t, filepath.WalkDir("../config", func(path string, _ os.DirEntry, err error) error {
		if strings.HasSuffix(path, ".yaml") {
			files = append(files, path)
		}
		return err
	}))
	require.NotEmpty(t, files)
	out, err := exec.Command(binary, append([]string{"lint", "--deprecated"}, files...)...).CombinedOutput()
	require.NoError(t, err, string(out))
	require.Empty(t, out)
	for _, file := range files {
		content, err := os.ReadFile(file)
		require.NoError(t, err)
		require.True(t, strings.HasPrefix(string(content), "# Shows: "), "%s: the first line says what it shows", file)
		require.Contains(t, string(readme), "("+strings.TrimPrefix(file, "../")+")", "the README lists it")
		var config any
		require.NoError(t, yaml.Unmarshal(content, &config))
		wantPeriods(t, file, config)
	}
}

// wantPeriods wants every batching policy to have a period: by count or bytes
// alone, the last messages would wait for others, and so would their senders.
func wantPeriods(t *testing.T, file string, config any) {
	t.Helper()
	switch c := config.(type) {
	case map[string]any:
		for key, value := range c {
			if policy, ok := value.(map[string]any); ok && key == "batching" {
				require.NotEmpty(t, policy["period"], "%s: batches without a period", file)
			}
			wantPeriods(t, file, value)
		}
	case []any:
		for _, value := range c {
			wantPeriods(t, file, value)
		}
	}
}

func TestTheSnippetsOfTheDocumentationAreLintedClean(t *testing.T) {
	files, err := filepath.Glob("../docs/*.md")
	require.NoError(t, err)
	require.NotEmpty(t, files)
	files = append(files, "../README.md")
	out, err := exec.Command(binary, append([]string{"lint", "--deprecated", "--skip-env-var-check"}, files...)...).CombinedOutput()
	require.NoError(t, err, string(out))
	require.Empty(t, out)
}

func TestStdinToCryo(t *testing.T) {
	server := serve(t)
	p := example(t, "stdin_to_cryo.yaml", strings.NewReader("one\ntwo\nthree\n"), "CRYO_URL="+server.url(), "CRYO_TOKEN="+token)
	s := server.session(t)
	for _, want := range []string{"one", "two", "three"} {
		m := receive(t, s)
		require.Equal(t, want, string(m.Payload))
		select {
		case <-p.ended:
			require.FailNow(t, "ended before the last line was acknowledged")
		default:
		}
		require.NoError(t, m.Ack())
	}
	p.wantSuccess()
}

func TestCryoServerToFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "messages.txt")
	p := example(t, "cryo_server_to_file.yaml", nil, "CRYO_ADDRESS=127.0.0.1:0", "CRYO_TOKEN="+token, "FILE="+path)
	s := dial(t, p.wantLogged("Listening for Cryo clients on "))
	want := ""
	for _, text := range []string{"one", "two", "three"} {
		require.NoError(t, next(t, send(s, text)))
		content, err := os.ReadFile(path)
		require.NoError(t, err)
		want += text + "\n"
		require.Equal(t, want, string(content), "what is acknowledged is in the file")
	}
	p.interrupt()
}
