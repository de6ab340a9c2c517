package tests

import (
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/testkit"
)

// reloaded is a pipeline that appends to a file, after it has changed the messages.
func reloaded(file, mapping, maxSessions string) string {
	return `
input: { cryo_server: { address: "127.0.0.1:0", tokens: [ ` + token + ` ], max_sessions: ` + maxSessions + ` } }
pipeline: { processors: [ { mapping: "` + mapping + `" } ] }
output: { file: { path: "` + file + `", codec: lines } }
`
}

func TestSessionsOutliveAChangeOfThePipelineBehindThem(t *testing.T) {
	for _, mode := range []string{"run", "streams", "API"} {
		t.Run(mode, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "messages.txt")
			path := testkit.WriteFile(t, "pipeline.yaml", reloaded(file, "root = content()", "100"))
			api := testkit.ReserveAddress(t)
			args := []string{mode, "-w", "--set", "http.enabled=false", path}
			if mode == "API" {
				args = append(withAPI(api), path)
			}
			p := launch(t, nil, args...)
			change := func(config string) {
				t.Helper()
				p.WantLog("Input type cryo_server is now active") // the previous pipeline
				if mode != "API" {
					require.NoError(t, os.WriteFile(path, []byte(config), 0o600))
					return
				}
				resp := asOperator(t, http.MethodPut, "http://"+api+"/streams/pipeline?timeout=30s", config, password)
				require.Equal(t, http.StatusOK, resp.Status, resp.Body)
			}
			s := testkit.Dial(t, p.Listening())
			var sent []string
			send := func(text string) {
				testkit.WantDelivered(t, s, text)
				sent = append(sent, text)
			}
			send("before")

			change(reloaded(file, "root = content().uppercase()", "100"))
			for content := ""; !strings.Contains(content, "M\n"); content = testkit.ReadFile(t, file) {
				send("m")
			}
			require.NoError(t, s.Err(), "it is the same session")
			require.Equal(t, strings.Join(sent, "\n")+"\n", strings.ToLower(testkit.ReadFile(t, file)), "each acknowledged message once")

			change(reloaded(file, "root = content()", "50"))
			<-s.Done()
			var closed *cryo.PeerClosedError
			require.ErrorAs(t, s.Err(), &closed, "the settings of the listener have changed")
			require.Equal(t, 1012, closed.Code)
			testkit.WantDelivered(t, testkit.Dial(t, p.Listening()), "of a new session")
			p.Interrupt()
		})
	}
}

// The listener of a stream that was deleted waits for another one.
func TestStopClosesSessionsOfAListenerThatWaits(t *testing.T) {
	api := testkit.ReserveAddress(t)
	path := testkit.WriteFile(t, "pipeline.yaml", reloaded(filepath.Join(t.TempDir(), "messages.txt"), "root = content()", "100"))
	p := launch(t, nil, append(withAPI(api), path)...)
	s := testkit.Dial(t, p.Listening())
	testkit.WantDelivered(t, s, "before")
	resp := asOperator(t, http.MethodDelete, "http://"+api+"/streams/pipeline?timeout=30s", "", password)
	require.Equal(t, http.StatusOK, resp.Status, resp.Body)
	require.NoError(t, s.Err())
	p.Interrupt()
	<-s.Done()
	var closed *cryo.PeerClosedError
	require.ErrorAs(t, s.Err(), &closed)
	require.Equal(t, 1012, closed.Code)
}
