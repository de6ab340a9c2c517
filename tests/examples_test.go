package tests

import (
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// example runs one of config/ until the test's end.
func example(t *testing.T, file string, stdin io.Reader, env ...string) *process {
	t.Helper()
	return launch(t, stdin, env, "run", "--set", "http.enabled=false", "config/"+file)
}

func TestEveryExampleIsLintedClean(t *testing.T) {
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
	}
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
