package tests

import (
	"context"
	"encoding/json"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"gopkg.in/yaml.v3"

	"github.com/cryo-connect/cryo-connect/cryo"
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
	texts := numbered(6)
	p := example(t, "stdin_to_cryo.yaml", strings.NewReader(strings.Join(texts, "\n")), "CRYO_URL="+server.url(), "CRYO_TOKEN="+token)
	s := server.session(t)
	want := func(text string) *cryo.Message {
		m := receive(t, s)
		require.Equal(t, text, string(m.Payload), "in order")
		select {
		case <-p.ended:
			require.FailNow(t, "ended before the last line was acknowledged")
		default:
		}
		return m
	}
	require.NoError(t, want(texts[0]).Ack())
	require.NoError(t, want(texts[1]).Reject("not now"))
	require.NoError(t, want(texts[1]).Reject("nor now"))
	require.NoError(t, want(texts[1]).Ack())
	want(texts[2])
	require.NoError(t, s.Close(contextFor(t), "")) // without an acknowledgement
	s = server.session(t)
	for _, text := range texts[2:5] {
		require.NoError(t, want(text).Ack())
	}
	require.NoError(t, want(texts[5]).Reject("not the last one either"))
	require.NoError(t, want(texts[5]).Ack())
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

// TestAFullDiskDamagesNoLineOfJSON bounds the size of files, has a write fail in
// the middle of a line, and starts the process again without the bound.
func TestAFullDiskDamagesNoLineOfJSON(t *testing.T) {
	path := filepath.Join(t.TempDir(), "messages.jsonl")
	env := []string{"CRYO_ADDRESS=127.0.0.1:0", "CRYO_TOKEN=" + token, "FILE=" + path}
	p := launchAs(t, nil, env, "sh", "-c", `ulimit -f 1; exec "$0" "$@"`,
		binary, "run", "--set", "http.enabled=false", "config/cryo_server_to_json_lines.yaml")
	texts := numbered(40)
	s := dialAs(t, p.wantLogged("Listening for Cryo clients on "), 1)
	acknowledged := 0
	ended := start(func() error {
		for _, text := range texts {
			if err := s.SendText(context.Background(), text); err != nil {
				return err
			}
			acknowledged++
		}
		return nil
	})
	p.wantLogged("Failed to send message to file")
	p.kill()
	require.Error(t, next(t, ended))

	p = example(t, "cryo_server_to_json_lines.yaml", nil, env...)
	s = dialAs(t, p.wantLogged("Listening for Cryo clients on "), 1)
	for _, text := range texts[acknowledged:] {
		require.NoError(t, next(t, send(s, text)))
	}
	p.interrupt()

	content, err := os.ReadFile(path)
	require.NoError(t, err)
	written, torn := make(map[string]bool), 0
	for line := range strings.Lines(string(content)) {
		var m struct{ Session, Text string }
		switch err := json.Unmarshal([]byte(line), &m); {
		case err == nil:
			written[m.Text] = true
		case line != "\n":
			torn++
		}
	}
	require.Equal(t, 1, torn, "one write was cut short: %s", content)
	for _, text := range texts {
		require.True(t, written[text], "%s was acknowledged and has no line", text)
	}
}
