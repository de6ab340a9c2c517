package tests

import (
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"gopkg.in/yaml.v3"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/testkit"
)

func TestEveryExamplePassesLintAndIsListed(t *testing.T) {
	index := testkit.ReadFile(t, "../config/README.md")
	var files []string
	require.NoError(t, filepath.WalkDir("../config", func(path string, _ os.DirEntry, err error) error {
		if strings.HasSuffix(path, ".yaml") {
			files = append(files, path)
		}
		return err
	}))
	require.NotEmpty(t, files)
	t.Setenv("CRYO_TOKEN", token)
	t.Setenv("CRYO_NEXT_TOKEN", token)
	wantLinted(t, nil, files...)
	for _, file := range files {
		content := testkit.ReadFile(t, file)
		require.True(t, strings.HasPrefix(content, "# "), "%s: the first line describes the example", file)
		require.Contains(t, index, "("+strings.TrimPrefix(file, "../config/")+")", "config/README.md lists it")
		var config any
		require.NoError(t, yaml.Unmarshal([]byte(content), &config))
		wantPeriods(t, file, config)
	}
}

// Single quotes are the form that preserves the most tokens (TestTokensFromTheEnvironmentAreUnchanged).
// Variables of Compose itself are no configuration.
func TestTokensFromTheEnvironmentAreInSingleQuotes(t *testing.T) {
	otherwise := regexp.MustCompile(`(?m)^.*[^'\n]\$\{[A-Z_]*TOKEN\b.*$`)
	files := []string{"../README.md"}
	for _, dir := range []string{"../config", "../deploy", "../docs"} {
		require.NoError(t, filepath.WalkDir(dir, func(path string, _ os.DirEntry, err error) error {
			if slices.Contains([]string{".yaml", ".md"}, filepath.Ext(path)) && path != "../deploy/compose.yaml" {
				files = append(files, path)
			}
			return err
		}))
	}
	for _, file := range files {
		require.Empty(t, otherwise.FindAllString(testkit.ReadFile(t, file), -1), file)
	}
}

// wantPeriods wants every batching policy to have a period. With a count or a size alone,
// the last messages would wait for others, and so would their senders.
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

func TestDocumentationSnippetsPassLint(t *testing.T) {
	files := []string{"../README.md"}
	for page := range documents(t) {
		if strings.HasPrefix(page, "../docs/") && !strings.HasPrefix(page, "../docs/reference/components/") {
			files = append(files, page)
		}
	}
	wantLinted(t, []string{"--skip-env-var-check"}, files...)
}

// wantLinted wants no lint error, in an environment with env in addition.
func wantLinted(t *testing.T, flags []string, files ...string) {
	t.Helper()
	cmd := testkit.Command(t, slices.Concat([]string{"lint", "--deprecated"}, flags, files)...)
	cmd.Dir = ""
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, string(out))
	require.Empty(t, string(out))
}

func TestProcessEndsWhenEveryLineIsAcknowledged(t *testing.T) {
	server := testkit.Serve(t)
	texts := numbered(6)
	p := exampleReading(t, "stdin_to_cryo.yaml", strings.Join(texts, "\n"), "CRYO_URL="+server.URL())
	s := server.Session(t)
	want := func(text string) *cryo.Message {
		m := testkit.Receive(t, s)
		require.Equal(t, text, string(m.Payload), "in order")
		require.True(t, p.Running(), "the process ended before the last line was acknowledged")
		return m
	}
	require.NoError(t, want(texts[0]).Ack())
	require.NoError(t, want(texts[1]).Reject("not now"))
	require.NoError(t, want(texts[1]).Reject("nor now"))
	require.NoError(t, want(texts[1]).Ack())
	want(texts[2])
	require.NoError(t, s.Close(testkit.Context(t), "")) // without an acknowledgement
	s = server.Session(t)
	for _, text := range texts[2:5] {
		require.NoError(t, want(text).Ack())
	}
	require.NoError(t, want(texts[5]).Reject("not the last one either"))
	require.NoError(t, want(texts[5]).Ack())
	p.WantExit(0)
}

func TestAcknowledgedMessageIsInTheFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "messages.txt")
	p := example(t, "cryo_server_to_file.yaml", "FILE="+path)
	s := testkit.Dial(t, p.Listening())
	want := ""
	for _, text := range []string{"one", "two", "three"} {
		testkit.WantDelivered(t, s, text)
		want += text + "\n"
		require.Equal(t, want, testkit.ReadFile(t, path), "acknowledged messages are in the file")
	}
	p.Interrupt()
}

// A limit of the file size makes a write fail in the middle of a line; then the process is
// started again without the limit.
func TestFullDiskCorruptsNoLineOfJSON(t *testing.T) {
	path := filepath.Join(t.TempDir(), "messages.jsonl")
	limited := exec.Command("sh", "-c", `ulimit -f 1; exec "$0" "$@"`,
		testkit.Binary(t), "run", "--set", "http.enabled=false", "../config/cryo_server_to_json_lines.yaml")
	limited.Env = append(os.Environ(), "CRYO_ADDRESS=127.0.0.1:0", "CRYO_TOKEN="+token, "FILE="+path)
	p := testkit.Start(t, limited)
	texts := numbered(40)
	s := testkit.DialAs(t, p.Listening(), 1)
	acknowledged := 0
	ended := testkit.Go(func() error {
		for _, text := range texts {
			if err := s.SendText(context.Background(), text); err != nil {
				return err
			}
			acknowledged++
		}
		return nil
	})
	p.WantLog("Failed to send message to file")
	p.Kill()
	require.Error(t, testkit.Next(t, ended))

	p = example(t, "cryo_server_to_json_lines.yaml", "FILE="+path)
	s = testkit.DialAs(t, p.Listening(), 1)
	for _, text := range texts[acknowledged:] {
		testkit.WantDelivered(t, s, text)
	}
	p.Interrupt()

	content := testkit.ReadFile(t, path)
	written, torn := make(map[string]bool), 0
	for line := range strings.Lines(content) {
		var m struct{ Session, Text string }
		switch err := json.Unmarshal([]byte(line), &m); {
		case err == nil:
			written[m.Text] = true
		case line != "\n":
			torn++
		}
	}
	require.Equal(t, 1, torn, "one truncated line: %s", content)
	for _, text := range texts {
		require.True(t, written[text], "%s was acknowledged and has no line", text)
	}
}
