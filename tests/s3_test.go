package tests

import (
	"bufio"
	"encoding/json"
	"io"
	"io/fs"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/testkit"
)

const bucket = "bridge"

// s3 is an S3 server, Versity's gateway, in its own process. Its buckets are
// directories, and its objects are files in them.
type s3 struct {
	t       *testing.T
	path    string // of the binary
	address string
	dir     string
	process *testkit.Process // while it is up
}

// runS3 runs a server with an empty bucket, until the test's end.
func runS3(t *testing.T) *s3 {
	t.Helper()
	tool := exec.Command("go", "tool", "-C", "../tools/versitygw", "-n", "versitygw") // builds it, unless it is cached
	s := &s3{t: t, path: strings.TrimSpace(testkit.Output(t, tool)), address: testkit.ReserveAddress(t), dir: t.TempDir()}
	require.NoError(t, os.MkdirAll(filepath.Join(s.dir, "buckets", bucket), 0o700))
	require.NoError(t, os.Mkdir(filepath.Join(s.dir, "metadata"), 0o700))
	s.up()
	return s
}

// env has the variables of the examples.
func (s *s3) env() []string {
	return []string{
		"S3_ENDPOINT=http://" + s.address, "S3_BUCKET=" + bucket,
		"AWS_ACCESS_KEY_ID=cryo", "AWS_SECRET_ACCESS_KEY=" + token, "AWS_REGION=us-east-1",
		"AWS_MAX_ATTEMPTS=1", // the pipeline retries, and logs the failure sooner
	}
}

// up starts the server, and waits until it is healthy.
func (s *s3) up() {
	s.t.Helper()
	s.process = testkit.Start(s.t, exec.Command(s.path, "--port", s.address, "--access", "cryo", "--secret", token, "--health", "/health", "--quiet",
		"posix", "--sidecar", filepath.Join(s.dir, "metadata"), filepath.Join(s.dir, "buckets")))
	testkit.Eventually(s.t, func(c *assert.CollectT) {
		_, err := testkit.HTTP(http.MethodGet, "http://"+s.address+"/health", "")
		require.NoError(c, err)
	})
}

// down kills the server.
func (s *s3) down() { s.process.Kill() }

// objects returns the objects by their keys.
func (s *s3) objects() map[string]string {
	s.t.Helper()
	objects := make(map[string]string)
	root := filepath.Join(s.dir, "buckets", bucket)
	require.NoError(s.t, filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		content, err := os.ReadFile(path)
		key, _ := filepath.Rel(root, path)
		objects[key] = string(content)
		return err
	}))
	return objects
}

// put stores an object.
func (s *s3) put(key, content string) {
	s.t.Helper()
	path := filepath.Join(s.dir, "buckets", bucket, filepath.FromSlash(key))
	require.NoError(s.t, os.MkdirAll(filepath.Dir(path), 0o700))
	require.NoError(s.t, os.WriteFile(path, []byte(content), 0o600))
}

type line struct{ Session, Text, Base64 string }

// lines returns the lines of all objects.
func (s *s3) lines() []line {
	s.t.Helper()
	var all []line
	for key, content := range s.objects() {
		require.Regexp(s.t, `^messages/\d{4}/\d\d/\d\d/\d\d/[0-9a-f-]{36}\.jsonl$`, key)
		scanner := bufio.NewScanner(strings.NewReader(content))
		for scanner.Scan() {
			var l line
			require.NoError(s.t, json.Unmarshal(scanner.Bytes(), &l))
			all = append(all, l)
		}
	}
	return all
}

func TestMessageIsAcknowledgedWhenS3HasIt(t *testing.T) {
	store := runS3(t)
	p := example(t, "cryo_to_s3.yaml", store.env()...)
	s := testkit.Dial(t, p.Listening())
	session := strconv.FormatUint(s.ID(), 10)
	testkit.WantDelivered(t, s, "two\nlines")
	require.NoError(t, s.SendBinary(t.Context(), []byte{0, 1, 2}))
	require.ElementsMatch(t, []line{{Session: session, Text: "two\nlines"}, {Session: session, Base64: "AAEC"}}, store.lines(),
		"an acknowledged message is stored")

	texts := numbered(1200)
	var sent []<-chan error
	for _, text := range texts[:1000] {
		sent = append(sent, testkit.Send(s, text))
	}
	for _, done := range sent {
		require.NoError(t, testkit.Next(t, done))
	}
	most := 0
	for _, content := range store.objects() {
		most = max(most, strings.Count(content, "\n"))
	}
	require.Greater(t, most, 1, "an object has several messages")

	store.down()
	sent = nil
	for _, text := range texts[1000:] {
		sent = append(sent, testkit.Send(s, text))
	}
	p.WantLog("Failed to send message to aws_s3: ")
	for _, done := range sent {
		testkit.WantPending(t, done, "the store is down")
	}
	store.up()
	for _, done := range sent {
		require.NoError(t, testkit.Next(t, done))
	}
	found := make(map[string]bool)
	for _, l := range store.lines() {
		found[l.Text] = true
	}
	for _, text := range texts {
		require.True(t, found[text], "%s was acknowledged, and is not stored", text)
	}
	p.Interrupt()
}

func TestStreamIsAcknowledgedWhenS3HasIt(t *testing.T) {
	store := runS3(t)
	p := example(t, "cryo_streams_to_s3.yaml", store.env()...)
	s := testkit.Dial(t, p.Listening())
	large := string(testkit.RandomBytes(6<<20 + 1))
	require.NoError(t, testkit.Next(t, testkit.SendStream(s, "report-1.bin", strings.NewReader(large))))
	require.Equal(t, map[string]string{"streams/report-1.bin": large}, store.objects(), "an acknowledged message is stored")

	names := []string{"", "..", "../../etc/passwd", "a/b", "line\nbreak", "nul\x00nul", "ünïcode ☃", strings.Repeat("long", 256)}
	for _, name := range names {
		before := len(store.objects())
		require.NoError(t, testkit.Next(t, testkit.SendStream(s, name, strings.NewReader(name))), "%q", name)
		require.Len(t, store.objects(), before+1, "%q", name)
	}
	for key := range store.objects() {
		require.Regexp(t, `^streams/[A-Za-z0-9_-][A-Za-z0-9._-]{0,220}$`, key)
	}

	store.down()
	sent := testkit.SendStream(s, "late.txt", strings.NewReader("content"))
	p.WantLog("Failed to send message to aws_s3: ")
	testkit.WantPending(t, sent, "the store is down")
	store.up()
	require.NoError(t, testkit.Next(t, sent))
	require.Equal(t, "content", store.objects()["streams/late.txt"])
	p.Interrupt()
}

func TestObjectIsDeletedWhenItsStreamIsAcknowledged(t *testing.T) {
	store, server := runS3(t), testkit.Serve(t)
	want := map[string]string{"outbox/empty": "", "outbox/large.bin": string(testkit.RandomBytes(3<<20 + 1))}
	for _, text := range numbered(20) {
		want["outbox/"+text+".txt"] = "content of " + text
	}
	for key, content := range want {
		store.put(key, content)
	}
	store.put("elsewhere/x", "another's")
	run := func() *testkit.Process {
		return example(t, "s3_to_cryo_streams.yaml", append(store.env(), "CRYO_URL="+server.URL())...)
	}
	got := make(map[string]string)
	read := func(st *cryo.IncomingStream) *cryo.IncomingStream {
		content, err := io.ReadAll(st)
		require.NoError(t, err)
		got[st.Name()] = string(content)
		return st
	}
	accept := func(s *cryo.Session) *cryo.IncomingStream {
		return read(testkit.AcceptStream(t, s))
	}
	acknowledgeTheRest := func(p *testkit.Process, s *cryo.Session) {
		for {
			st, err := s.AcceptStream(testkit.Context(t))
			if err != nil { // the process has closed the session
				break
			}
			require.NoError(t, read(st).Ack())
		}
		p.WantExit(0)
	}

	// Killed with unacknowledged streams: their objects stay.
	p := run()
	s := server.Session(t)
	for range 5 {
		require.NoError(t, accept(s).Ack())
	}
	accept(s)
	p.Kill()
	require.GreaterOrEqual(t, len(store.objects()), len(want)+1-5, "an object was deleted before its stream was acknowledged")

	// The store is down for a while. Objects that could not be read or deleted stay for
	// the next run. (Whether the input logs the failed read depends on how the
	// connection ends: see docs/guides/bridges.md.)
	p = run()
	s = server.Session(t)
	st := accept(s)
	store.down()
	require.NoError(t, st.Ack())
	p.WantLog("Failed to acknowledge message: ")
	store.up()
	acknowledgeTheRest(p, s)
	require.Contains(t, store.objects(), st.Name())

	// The Cryo server closes the session.
	p = run()
	s = server.Session(t)
	accept(s)
	require.NoError(t, s.Close(testkit.Context(t), ""))
	acknowledgeTheRest(p, server.Session(t))
	require.Equal(t, want, got)
	require.Equal(t, map[string]string{"elsewhere/x": "another's"}, store.objects())
}
