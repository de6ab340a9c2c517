package tests

import (
	"bufio"
	"bytes"
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
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
)

const bucket = "bridge"

// s3 is a real S3 server, Versity's gateway, in a process of its own. Its
// buckets are directories, and its objects files in them.
type s3 struct {
	t       *testing.T
	path    string // of the binary
	address string
	dir     string
	cmd     *exec.Cmd // while it runs
}

func runS3(t *testing.T) *s3 {
	t.Helper()
	tool := exec.Command("go", "tool", "-C", "../tools/versitygw", "-n", "versitygw") // builds it, unless it is cached
	tool.Stderr = os.Stderr
	path, err := tool.Output()
	require.NoError(t, err)
	s := &s3{t: t, path: strings.TrimSpace(string(path)), address: freeAddress(t), dir: t.TempDir()}
	require.NoError(t, os.MkdirAll(filepath.Join(s.dir, "buckets", bucket), 0o700))
	require.NoError(t, os.Mkdir(filepath.Join(s.dir, "metadata"), 0o700))
	s.comeBack()
	t.Cleanup(s.goAway)
	return s
}

// env is what an example needs to find it.
func (s *s3) env() []string {
	return []string{
		"S3_ENDPOINT=http://" + s.address, "S3_BUCKET=" + bucket,
		"AWS_ACCESS_KEY_ID=cryo", "AWS_SECRET_ACCESS_KEY=" + token, "AWS_REGION=us-east-1",
		"AWS_MAX_ATTEMPTS=1", // the pipeline tries again by itself; so it tells sooner
	}
}

func (s *s3) comeBack() {
	s.t.Helper()
	s.cmd = exec.Command(s.path, "--port", s.address, "--access", "cryo", "--secret", token, "--health", "/health", "--quiet",
		"posix", "--sidecar", filepath.Join(s.dir, "metadata"), filepath.Join(s.dir, "buckets"))
	var said bytes.Buffer
	s.cmd.Stdout, s.cmd.Stderr = &said, &said
	require.NoError(s.t, s.cmd.Start())
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	require.EventuallyWithT(s.t, func(c *assertT) {
		resp, err := client.Get("http://" + s.address + "/health")
		require.NoError(c, err)
		require.NoError(c, resp.Body.Close())
	}, patience, 10*time.Millisecond)
}

// goAway kills it.
func (s *s3) goAway() {
	_ = s.cmd.Process.Kill()
	_ = s.cmd.Wait()
}

// objects are the objects by their keys.
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

func (s *s3) put(key, content string) {
	s.t.Helper()
	path := filepath.Join(s.dir, "buckets", bucket, filepath.FromSlash(key))
	require.NoError(s.t, os.MkdirAll(filepath.Dir(path), 0o700))
	require.NoError(s.t, os.WriteFile(path, []byte(content), 0o600))
}

type line struct{ Session, Text, Base64 string }

// lines are the lines of all objects.
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

func TestCryoToS3(t *testing.T) {
	store := runS3(t)
	p := example(t, "cryo_to_s3.yaml", nil, append(store.env(), "CRYO_ADDRESS=127.0.0.1:0", "CRYO_TOKEN="+token)...)
	s := dial(t, p.wantLogged("Listening for Cryo clients on "))
	session := strconv.FormatUint(s.ID(), 10)
	require.NoError(t, next(t, send(s, "two\nlines")))
	require.NoError(t, s.SendBinary(t.Context(), []byte{0, 1, 2}))
	require.ElementsMatch(t, []line{{Session: session, Text: "two\nlines"}, {Session: session, Base64: "AAEC"}}, store.lines(),
		"what is acknowledged is stored")

	texts := numbered(1200)
	var sent []<-chan error
	for _, text := range texts[:1000] {
		sent = append(sent, send(s, text))
	}
	for _, done := range sent {
		require.NoError(t, next(t, done))
	}
	most := 0
	for _, content := range store.objects() {
		most = max(most, strings.Count(content, "\n"))
	}
	require.Greater(t, most, 1, "messages share an object")

	store.goAway()
	sent = nil
	for _, text := range texts[1000:] {
		sent = append(sent, send(s, text))
	}
	p.wantLogged("Failed to send message to aws_s3: ")
	for _, done := range sent {
		wantPending(t, done, "the store is away")
	}
	store.comeBack()
	for _, done := range sent {
		require.NoError(t, next(t, done))
	}
	found := make(map[string]bool)
	for _, l := range store.lines() {
		found[l.Text] = true
	}
	for _, text := range texts {
		require.True(t, found[text], "%s was acknowledged, and is not stored", text)
	}
	p.interrupt()
}

func TestCryoStreamsToS3(t *testing.T) {
	store := runS3(t)
	p := example(t, "cryo_streams_to_s3.yaml", nil, append(store.env(), "CRYO_ADDRESS=127.0.0.1:0", "CRYO_TOKEN="+token)...)
	s := dial(t, p.wantLogged("Listening for Cryo clients on "))
	large := string(random(6<<20 + 1))
	require.NoError(t, next(t, streamOf(s, "report-1.bin", strings.NewReader(large))))
	require.Equal(t, map[string]string{"streams/report-1.bin": large}, store.objects(), "what is acknowledged is stored")

	names := []string{"", "..", "../../etc/passwd", "a/b", "line\nbreak", "nul\x00nul", "ünïcode ☃", strings.Repeat("long", 256)}
	for _, name := range names {
		before := len(store.objects())
		require.NoError(t, next(t, streamOf(s, name, strings.NewReader(name))), "%q", name)
		require.Len(t, store.objects(), before+1, "%q", name)
	}
	for key := range store.objects() {
		require.Regexp(t, `^streams/[A-Za-z0-9_-][A-Za-z0-9._-]{0,220}$`, key)
	}

	store.goAway()
	sent := streamOf(s, "late.txt", strings.NewReader("content"))
	p.wantLogged("Failed to send message to aws_s3: ")
	wantPending(t, sent, "the store is away")
	store.comeBack()
	require.NoError(t, next(t, sent))
	require.Equal(t, "content", store.objects()["streams/late.txt"])
	p.interrupt()
}

func TestS3ToCryoStreams(t *testing.T) {
	store, server := runS3(t), serve(t)
	want := map[string]string{"outbox/empty": "", "outbox/large.bin": string(random(3<<20 + 1))}
	for _, text := range numbered(20) {
		want["outbox/"+text+".txt"] = "content of " + text
	}
	for key, content := range want {
		store.put(key, content)
	}
	store.put("elsewhere/x", "another's")
	run := func() *process {
		return example(t, "s3_to_cryo_streams.yaml", nil, append(store.env(), "CRYO_URL="+server.url(), "CRYO_TOKEN="+token)...)
	}
	got := make(map[string]string)
	take := func(st *cryo.IncomingStream) *cryo.IncomingStream {
		content, err := io.ReadAll(st)
		require.NoError(t, err)
		got[st.Name()] = string(content)
		return st
	}
	accept := func(s *cryo.Session) *cryo.IncomingStream {
		st, err := s.AcceptStream(patient(t))
		require.NoError(t, err)
		return take(st)
	}
	acknowledgeTheRest := func(p *process, s *cryo.Session) {
		for {
			st, err := s.AcceptStream(patient(t))
			if err != nil { // the process has closed the session
				break
			}
			require.NoError(t, take(st).Ack())
		}
		p.wantSuccess()
	}

	// Killed with streams on their way: what is not acknowledged stays.
	p := run()
	s := server.session(t)
	for range 5 {
		require.NoError(t, accept(s).Ack())
	}
	accept(s)
	p.kill()
	require.GreaterOrEqual(t, len(store.objects()), len(want)+1-5, "deleted and not acknowledged")

	// The store goes away in the middle. What could not be read, or not be
	// deleted, stays for the next run. (Whether the input says that it could not
	// read depends on how the connection ends: see docs/bridges.md.)
	p = run()
	s = server.session(t)
	st := accept(s)
	store.goAway()
	require.NoError(t, st.Ack())
	p.wantLogged("Failed to acknowledge message: ")
	store.comeBack()
	acknowledgeTheRest(p, s)
	require.Contains(t, store.objects(), st.Name())

	// The Cryo server goes away.
	p = run()
	s = server.session(t)
	accept(s)
	require.NoError(t, s.Close(contextFor(t), ""))
	acknowledgeTheRest(p, server.session(t))
	require.Equal(t, want, got)
	require.Equal(t, map[string]string{"elsewhere/x": "another's"}, store.objects())
}
