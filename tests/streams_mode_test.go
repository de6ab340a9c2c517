package tests

import (
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// Several pipelines of one process, which share a listener and its sessions,
// while some of them come and go.
func TestPipelinesOfOneProcessShareAListener(t *testing.T) {
	const listens = "cryo_server: { address: 127.0.0.1:0, tokens: [ " + token + " ]"
	api, toAll, toOne := freeAddress(t), freeAddress(t), freeAddress(t)
	collected := filepath.Join(t.TempDir(), "collected.txt")
	fromHTTP := func(address, fields string) string {
		return "input: { http_server: { address: '" + address + "', path: /post, timeout: 30s } }\noutput:\n  label: sender\n  " + listens + ", " + fields + " }\n"
	}
	collect := func(fields string) string {
		return "input:\n  label: collector\n  " + listens + fields + " }\noutput: { file: { path: '" + collected + "', codec: lines } }\n"
	}
	dir := t.TempDir()
	for name, config := range map[string]string{
		"collect": collect(""), "all": fromHTTP(toAll, "send_to: all"), "one": fromHTTP(toOne, "send_to: any"),
	} {
		require.NoError(t, os.WriteFile(filepath.Join(dir, name+".yaml"), []byte(config), 0o600))
	}
	p := launch(t, nil, nil, "streams", "--set", "http.address="+api, dir)
	address := p.wantLogged("Listening for Cryo clients on ")
	for range 2 {
		p.wantLogged("is now active")
	}

	call := func(method, url, body string) (int, error) {
		req, err := http.NewRequestWithContext(t.Context(), method, url, strings.NewReader(body))
		if err != nil {
			return 0, err
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			return 0, err
		}
		_, _ = io.Copy(io.Discard, resp.Body)
		return resp.StatusCode, resp.Body.Close()
	}
	defer http.DefaultClient.CloseIdleConnections()
	manage := func(method, stream, body string) {
		t.Helper()
		require.EventuallyWithT(t, func(c *assertT) {
			status, err := call(method, "http://"+api+"/streams/"+stream, body)
			require.NoError(c, err)
			require.Equal(c, http.StatusOK, status)
		}, patience, 10*time.Millisecond)
	}
	s := dial(t, address)
	wantSent := func(address, text string) {
		t.Helper()
		var posted <-chan error
		require.EventuallyWithT(t, func(c *assertT) { // until it listens; then it waits for the session
			posted = start(func() error {
				status, err := call(http.MethodPost, "http://"+address+"/post", text)
				if err == nil && status != http.StatusOK {
					err = fmt.Errorf("status %d", status)
				}
				return err
			})
			select {
			case err := <-posted:
				require.NoError(c, err)
			case <-time.After(time.Second):
			}
		}, patience, 10*time.Millisecond)
		m := receive(t, s)
		require.Equal(t, text, string(m.Payload))
		require.NoError(t, m.Ack())
		require.NoError(t, next(t, posted))
	}
	require.NoError(t, next(t, send(s, "to the input")))
	wantSent(toAll, "from one output")
	wantSent(toOne, "from the other")

	// The input goes, and the sessions stay with the outputs.
	manage(http.MethodDelete, "collect", "")
	wantSent(toAll, "after the input")
	waits := send(s, "while there is no input")

	// An output goes too, and another input comes.
	manage(http.MethodDelete, "all", "")
	manage(http.MethodPost, "again", collect(""))
	require.NoError(t, next(t, waits), "it has waited for the next input")
	require.EventuallyWithT(t, func(c *assertT) {
		require.NoError(c, next(t, send(s, "to the next input")))
	}, patience, 10*time.Millisecond)
	wantSent(toOne, "from the output that is left")

	// One that differs is told with whom, and in what.
	manage(http.MethodPost, "differs", collect(", max_sessions: 5"))
	p.wantLogged(" and the input cryo_server collector of the stream differs share the listener on 127.0.0.1:0, but differ in max_sessions")

	content, err := os.ReadFile(collected)
	require.NoError(t, err)
	require.Equal(t, "to the input\nwhile there is no input\nto the next input\n", string(content))
	require.NoError(t, s.Err(), "through all of it")
	require.NoError(t, s.Close(t.Context(), ""))
	p.interrupt()
	opened := 0
	for _, line := range p.said() {
		if strings.Contains(line, "Listening for Cryo clients on ") {
			opened++
		}
	}
	require.Equal(t, 1, opened)
}

func TestWhichPipelinesDisagreeOnAListenerIsSaid(t *testing.T) {
	dir := t.TempDir()
	for name, tokens := range map[string]string{"orders": "[ a ]", "events": "[ b ]"} {
		config := "input: { cryo_server: { address: 127.0.0.1:0, tokens: " + tokens + " } }\noutput: { drop: {} }\n"
		require.NoError(t, os.WriteFile(filepath.Join(dir, name+".yaml"), []byte(config), 0o600))
	}
	p := launch(t, nil, nil, "streams", "--set", "http.enabled=false", dir)
	p.wantLogged("share the listener on 127.0.0.1:0, but differ in tokens")
	for _, stream := range []string{"orders", "events"} {
		p.wantLogged("the input cryo_server at input of the stream " + stream + " ")
	}
}
