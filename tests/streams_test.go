package tests

import (
	"bytes"
	"crypto/sha256"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/testkit"
)

// filesIn returns the hashes of the files below a directory, by path.
func filesIn(t *testing.T, dir string) map[string][sha256.Size]byte {
	t.Helper()
	files := make(map[string][sha256.Size]byte)
	require.NoError(t, filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		content, err := os.ReadFile(path)
		name, _ := filepath.Rel(dir, path)
		files[name] = sha256.Sum256(content)
		return err
	}))
	return files
}

// streamsToFiles runs the example that writes streams into files.
func streamsToFiles(t *testing.T, dir string) (p *testkit.Process, address string) {
	t.Helper()
	p = example(t, "cryo_streams_to_files.yaml", "DIRECTORY="+dir)
	return p, p.Listening()
}

func TestFilesSentAsStreamsArriveUnchanged(t *testing.T) {
	outbox, inbox := t.TempDir(), filepath.Join(t.TempDir(), "inbox")
	for name, content := range map[string][]byte{
		"empty":                      nil,
		"text.txt":                   []byte("one\r\ntwo\n\n"),
		"nul-and-BOM.bin":            []byte("\xEF\xBB\xBF\x00\xFF\xFE\x00"),
		"one-chunk":                  testkit.RandomBytes(64 << 10),
		"many_chunks":                testkit.RandomBytes(1<<20 + 1),
		"more-than-a-frame-may-have": testkit.RandomBytes(cryo.MaxPayload + 12345),
	} {
		require.NoError(t, os.WriteFile(filepath.Join(outbox, name), content, 0o600))
	}
	receiving, address := streamsToFiles(t, inbox)
	sending := example(t, "files_to_cryo.yaml", "CRYO_URL=ws://"+address, "CRYO_TOKEN="+token, "FILES="+outbox+"/*")
	sending.WantExit(0) // when all are acknowledged
	require.Equal(t, filesIn(t, outbox), filesIn(t, inbox))
	receiving.Interrupt()
}

func TestStreamNameCannotEscapeTheDirectory(t *testing.T) {
	parent := t.TempDir()
	inbox := filepath.Join(parent, "a", "b", "inbox")
	p, address := streamsToFiles(t, inbox)
	s := testkit.Dial(t, address)
	names := []string{
		"../../etc/x", "..", ".", "/", "/etc/passwd", "a/b", `..\..\x`, "", " ", "ünïcode ☃", "~root", "-rf", ".hidden",
		"line\nbreak", "nul\x00nul", "$HOME", "${CRYO_TOKEN}", `${! env("CRYO_TOKEN") }`, "%2e%2e%2f", "CON",
		strings.Repeat("long", 256), strings.Repeat("é", 512), strings.Repeat(".", 300), strings.Repeat("../", 100) + "x",
	}
	for _, name := range names {
		before := filesIn(t, parent)
		require.NoError(t, testkit.Next(t, testkit.SendStream(s, name, strings.NewReader("content of "+name))), "%q", name)
		changed := 0
		for path, hash := range filesIn(t, parent) {
			if before[path] == hash {
				continue
			}
			changed++
			require.Equal(t, sha256.Sum256([]byte("content of "+name)), hash, "%q", name)
			require.Regexp(t, `^a/b/inbox/[A-Za-z0-9_-][A-Za-z0-9._-]{0,220}$`, path, "%q", name)
		}
		require.Equal(t, 1, changed, "%q", name)
	}
	p.Interrupt()
}

func TestRowsOfACSVStreamBecomeJSON(t *testing.T) {
	path := filepath.Join(t.TempDir(), "rows.jsonl")
	p := example(t, "csv_stream_to_json.yaml", "FILE="+path)
	s := testkit.Dial(t, p.Listening())
	require.NoError(t, testkit.Next(t, testkit.SendStream(s, "fruit.csv", strings.NewReader("\uFEFF\"name\",taste\r\napple,sweet\n\"lemon, green\",\"very\nsour\"\n"))))
	rows := strings.Split(strings.TrimSuffix(testkit.ReadFile(t, path), "\n"), "\n")
	require.ElementsMatch(t, []string{`{"name":"apple","taste":"sweet"}`, `{"name":"lemon, green","taste":"very\nsour"}`}, rows,
		"acknowledged rows are in the file")
	require.Error(t, testkit.Next(t, testkit.SendStream(s, "old.csv", strings.NewReader("name,taste\rapple,sweet\r"))), "no row is in the file")
	p.WantLog("Stream failed", "convert them to LF")
	p.Interrupt()
}

func TestLinesOfAStreamArePrintedOneByOne(t *testing.T) {
	p := example(t, "lines_of_a_stream.yaml")
	s := testkit.Dial(t, p.Listening())
	st, err := s.OpenStream(t.Context(), &cryo.StreamOptions{Name: "log"})
	require.NoError(t, err)
	for i, text := range numbered(5) {
		_, err = st.Write([]byte(text + "\nhalf a "))
		require.NoError(t, err)
		want := text
		if i > 0 {
			want = "half a " + text
		}
		p.Take(want, func(line string) bool { return line == want })
	}
	_, err = st.Write([]byte("line"))
	require.NoError(t, err)
	require.NoError(t, st.Finish())
	p.Take("the last line", func(line string) bool { return line == "half a line" })
	p.Interrupt()
}

func TestBatchIsSentAsOneStream(t *testing.T) {
	server := testkit.Serve(t)
	texts := numbered(2000) // full batches, which do not wait for their period
	p := exampleReading(t, "batch_as_stream.yaml", strings.Join(texts, "\n")+"\n", "CRYO_URL="+server.URL())
	s := server.Session(t)
	var got []string
	for range 2 {
		st := testkit.AcceptStream(t, s)
		require.Regexp(t, `^lines-\d+\.txt$`, st.Name())
		content, err := io.ReadAll(st)
		require.NoError(t, err)
		part := strings.Split(string(bytes.TrimSuffix(content, []byte("\n"))), "\n")
		require.Len(t, part, 1000)
		got = append(got, part...)
		require.NoError(t, st.Ack())
	}
	require.ElementsMatch(t, texts, got)
	p.WantExit(0)
}
