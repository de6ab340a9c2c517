package tests

import (
	"bytes"
	"context"
	"crypto/sha256"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// streamOf sends a whole stream.
func streamOf(s *cryo.Session, name string, source io.Reader) <-chan error {
	return start(func() error {
		return s.SendStream(context.Background(), source, &cryo.StreamOptions{Name: name})
	})
}

// filesIn are the files below a directory, by path, with the hashes of their contents.
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

// random gives bytes that are the same each time.
func random(n int) []byte {
	b := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{byte(n)}).Read(b)
	return b
}

// streamsToFiles runs the example that makes files of streams.
func streamsToFiles(t *testing.T, dir string) (p *process, address string) {
	t.Helper()
	p = example(t, "cryo_streams_to_files.yaml", nil, "CRYO_ADDRESS=127.0.0.1:0", "CRYO_TOKEN="+token, "DIRECTORY="+dir)
	return p, p.wantLogged("Listening for Cryo clients on ")
}

func TestFilesTravelAsStreamsAndAreFilesAgainByteForByte(t *testing.T) {
	outbox, inbox := t.TempDir(), filepath.Join(t.TempDir(), "inbox")
	for name, content := range map[string][]byte{
		"empty":                      nil,
		"text.txt":                   []byte("one\r\ntwo\n\n"),
		"nul-and-BOM.bin":            []byte("\xEF\xBB\xBF\x00\xFF\xFE\x00"),
		"one-chunk":                  random(64 << 10),
		"many_chunks":                random(1<<20 + 1),
		"more-than-a-frame-may-have": random(cryo.MaxPayload + 12345),
	} {
		require.NoError(t, os.WriteFile(filepath.Join(outbox, name), content, 0o600))
	}
	receiving, address := streamsToFiles(t, inbox)
	sending := example(t, "files_to_cryo.yaml", nil, "CRYO_URL=ws://"+address, "CRYO_TOKEN="+token, "FILES="+outbox+"/*")
	sending.wantSuccess() // when all are acknowledged, so:
	require.Equal(t, filesIn(t, outbox), filesIn(t, inbox))
	receiving.interrupt()
}

func TestNamesFromOutsideMakeNoFilesOutsideTheDirectory(t *testing.T) {
	parent := t.TempDir()
	inbox := filepath.Join(parent, "a", "b", "inbox")
	p, address := streamsToFiles(t, inbox)
	s := dial(t, address)
	names := []string{
		"../../etc/x", "..", ".", "/", "/etc/passwd", "a/b", `..\..\x`, "", " ", "ünïcode ☃", "~root", "-rf", ".hidden",
		"line\nbreak", "nul\x00nul", "$HOME", "${CRYO_TOKEN}", `${! env("CRYO_TOKEN") }`, "%2e%2e%2f", "CON",
		strings.Repeat("long", 256), strings.Repeat("é", 512), strings.Repeat(".", 300), strings.Repeat("../", 100) + "x",
	}
	for _, name := range names {
		before := filesIn(t, parent)
		require.NoError(t, next(t, streamOf(s, name, strings.NewReader("content of "+name))), "%q", name)
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
	p.interrupt()
}

func TestCSVStreamToJSON(t *testing.T) {
	path := filepath.Join(t.TempDir(), "rows.jsonl")
	p := example(t, "csv_stream_to_json.yaml", nil, "CRYO_ADDRESS=127.0.0.1:0", "CRYO_TOKEN="+token, "FILE="+path)
	s := dial(t, p.wantLogged("Listening for Cryo clients on "))
	require.NoError(t, next(t, streamOf(s, "fruit.csv", strings.NewReader("name,taste\napple,sweet\n\"lemon, green\",\"very\nsour\"\n"))))
	content, err := os.ReadFile(path)
	require.NoError(t, err)
	rows := strings.Split(strings.TrimSuffix(string(content), "\n"), "\n")
	require.ElementsMatch(t, []string{`{"name":"apple","taste":"sweet"}`, `{"name":"lemon, green","taste":"very\nsour"}`}, rows,
		"what is acknowledged is in the file")
	p.interrupt()
}

func TestLinesOfAStreamArePrintedAsTheyCome(t *testing.T) {
	p := example(t, "lines_of_a_stream.yaml", nil, "CRYO_ADDRESS=127.0.0.1:0", "CRYO_TOKEN="+token)
	s := dial(t, p.wantLogged("Listening for Cryo clients on "))
	st, err := s.OpenStream(t.Context(), &cryo.StreamOptions{Name: "log"})
	require.NoError(t, err)
	for i, text := range numbered(5) {
		_, err = st.Write([]byte(text + "\nhalf a "))
		require.NoError(t, err)
		want := text
		if i > 0 {
			want = "half a " + text
		}
		p.stdout.want(t, 1, func(line string) bool { return line == want })
	}
	_, err = st.Write([]byte("line"))
	require.NoError(t, err)
	require.NoError(t, st.Finish())
	// What is acknowledged is printed, if not yet read from the pipe.
	p.stdout.want(t, 1, func(line string) bool { return line == "half a line" })
	p.interrupt()
}

func TestABatchGoesOutAsOneStream(t *testing.T) {
	server := serve(t)
	texts := numbered(2000) // a batch that is not full would wait for its time
	p := example(t, "batch_as_stream.yaml", strings.NewReader(strings.Join(texts, "\n")+"\n"), "CRYO_URL="+server.url(), "CRYO_TOKEN="+token)
	s := server.session(t)
	var got []string
	for range 2 {
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		st, err := s.AcceptStream(ctx)
		cancel()
		require.NoError(t, err)
		require.Regexp(t, `^lines-\d+\.txt$`, st.Name())
		content, err := io.ReadAll(st)
		require.NoError(t, err)
		part := strings.Split(string(bytes.TrimSuffix(content, []byte("\n"))), "\n")
		require.Len(t, part, 1000)
		got = append(got, part...)
		require.NoError(t, st.Ack())
	}
	require.ElementsMatch(t, texts, got)
	p.wantSuccess()
}
