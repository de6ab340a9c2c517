package tests

import (
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

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

func TestCryoToHTTP(t *testing.T) {
	type request struct {
		body, session string
		answer        chan int
	}
	requests := make(chan *request)
	service := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		req := &request{r.Method + " " + string(body), r.Header.Get("X-Cryo-Session"), make(chan int)}
		requests <- req
		w.WriteHeader(<-req.answer)
	}))
	defer service.Close()
	server := serve(t)
	p := example(t, "cryo_to_http.yaml", nil, "CRYO_URL="+server.url(), "CRYO_TOKEN="+token, "HTTP_URL="+service.URL)
	s := server.session(t)
	sent := send(s, "hello")
	req := next(t, requests)
	require.Equal(t, "POST hello", req.body)
	require.Equal(t, strconv.FormatUint(s.ID(), 10), req.session)
	wantPending(t, sent, "the service has not answered")
	req.answer <- http.StatusInternalServerError
	req = next(t, requests)
	require.Equal(t, "POST hello", req.body, "again")
	wantPending(t, sent, "the service has not taken it")
	req.answer <- http.StatusOK
	require.NoError(t, next(t, sent))
	p.interrupt()
}

func TestHTTPToCryoServer(t *testing.T) {
	address := freeAddress(t)
	p := example(t, "http_to_cryo_server.yaml", nil, "CRYO_ADDRESS=127.0.0.1:0", "CRYO_TOKEN="+token, "HTTP_ADDRESS="+address)
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	post := func() (int, error) {
		resp, err := client.Post("http://"+address+"/post", "text/plain", strings.NewReader("hello"))
		if err != nil {
			return 0, err
		}
		return resp.StatusCode, resp.Body.Close()
	}
	cryoAddress := p.wantLogged("Listening for Cryo clients on ")
	p.wantLogged("Output type cryo_server is now active")
	var status int
	require.EventuallyWithT(t, func(c *assertT) {
		var err error
		status, err = post()
		require.NoError(c, err)
	}, patience, 10*time.Millisecond)
	require.GreaterOrEqual(t, status, 400, "nobody is connected")

	s := dial(t, cryoAddress)
	answered := start(func() error {
		var err error
		status, err = post()
		return err
	})
	m := receive(t, s)
	require.Equal(t, "hello", string(m.Payload))
	wantPending(t, answered, "not acknowledged yet")
	require.NoError(t, m.Ack())
	require.NoError(t, next(t, answered))
	require.Equal(t, http.StatusOK, status)
	p.interrupt()
}
