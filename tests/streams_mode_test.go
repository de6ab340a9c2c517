package tests

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/internal/testkit"
)

// Pipelines are added and removed while they share a listener and its sessions.
func TestPipelinesInOneProcessShareAListener(t *testing.T) {
	const listens = "cryo_server: { address: 127.0.0.1:0, tokens: [ " + token + " ]"
	api, toAll, toOne := testkit.ReserveAddress(t), testkit.ReserveAddress(t), testkit.ReserveAddress(t)
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
	p := launch(t, nil, append(withAPI(api), dir)...)
	address := p.Listening()
	for range 2 {
		p.WantLog("is now active")
	}

	manage := func(method, stream, body string) {
		t.Helper()
		testkit.Eventually(t, func(c *assert.CollectT) {
			resp := asOperator(c, method, "http://"+api+"/streams/"+stream, body, password)
			require.Equal(c, http.StatusOK, resp.Status)
		})
	}
	s := testkit.Dial(t, address)
	wantSent := func(address, text string) {
		t.Helper()
		var posted <-chan error
		testkit.Eventually(t, func(c *assert.CollectT) { // until it listens; then it waits for the session
			posted = testkit.Go(func() error {
				resp, err := testkit.HTTP(http.MethodPost, "http://"+address+"/post", text)
				if err == nil && resp.Status != http.StatusOK {
					err = fmt.Errorf("status %d", resp.Status)
				}
				return err
			})
			select {
			case err := <-posted:
				require.NoError(c, err)
			case <-time.After(time.Second):
			}
		})
		m := testkit.Receive(t, s)
		require.Equal(t, text, string(m.Payload))
		require.NoError(t, m.Ack())
		require.NoError(t, testkit.Next(t, posted))
	}
	testkit.WantDelivered(t, s, "to the input")
	wantSent(toAll, "from one output")
	wantSent(toOne, "from the other")

	// The input is removed; the sessions stay with the outputs.
	manage(http.MethodDelete, "collect", "")
	wantSent(toAll, "after the input")
	waits := testkit.Send(s, "while there is no input")

	// An output is removed too, and another input is added.
	manage(http.MethodDelete, "all", "")
	manage(http.MethodPost, "again", collect(""))
	require.NoError(t, testkit.Next(t, waits), "the message waited for the next input")
	testkit.Eventually(t, func(c *assert.CollectT) {
		require.NoError(c, testkit.Next(t, testkit.Send(s, "to the next input")))
	})
	wantSent(toOne, "from the output that is left")

	// One that differs is rejected, with the name of the other one and the fields.
	manage(http.MethodPost, "differs", collect(", max_sessions: 5"))
	p.WantLog("the input cryo_server collector of the stream differs", "differ in max_sessions")

	require.Equal(t, "to the input\nwhile there is no input\nto the next input\n", testkit.ReadFile(t, collected))
	require.NoError(t, s.Err(), "the session outlived all of it")
	require.NoError(t, s.Close(t.Context(), ""))
	p.Interrupt()
	opened := 0
	for _, line := range p.All() {
		if strings.Contains(line, "Listening for Cryo clients") {
			opened++
		}
	}
	require.Equal(t, 1, opened)
}

// unreachable is a pipeline whose output cannot connect.
const unreachable = "{ input: { cryo_server: { address: 127.0.0.1:0, tokens: [ " + token + " ] } }, output: { cryo: { url: 'ws://127.0.0.1:1', token: " + token + " } } }"

func TestStreamThatCannotConnectIsRemovedAndReplacedWithinATimeout(t *testing.T) {
	api := testkit.ReserveAddress(t)
	p := launch(t, nil, append(withAPI(api), testkit.WriteFile(t, "orders.yaml", unreachable))...)
	wantUnsettled := func(sent <-chan error) {
		t.Helper()
		err := testkit.Next(t, sent)
		require.ErrorIs(t, err, net.ErrClosed, "the message is neither acknowledged nor rejected: its sender sends it again")
	}
	sent := testkit.Send(testkit.Dial(t, p.Listening()), "which stays with its session after PUT")
	for _, method := range []string{http.MethodPut, http.MethodDelete} {
		p.WantLog("Failed to connect to cryo")
		resp := asOperator(t, method, "http://"+api+"/streams/orders?timeout=2s", unreachable, password)
		require.Equal(t, http.StatusOK, resp.Status, resp.Body)
	}
	wantUnsettled(sent)
	require.Equal(t, http.StatusNotFound, asOperator(t, http.MethodGet, "http://"+api+"/streams/orders", "", password).Status)

	// Without a timeout, the engine waits until the caller gives up.
	require.Equal(t, http.StatusOK, asOperator(t, http.MethodPost, "http://"+api+"/streams/orders", unreachable, password).Status)
	sent = testkit.Send(testkit.Dial(t, p.Listening()), "m")
	p.WantLog("Failed to connect to cryo")
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodDelete, "http://"+api+"/streams/orders", nil)
	require.NoError(t, err)
	req.SetBasicAuth(operator, password)
	_, err = testkit.Do(http.DefaultTransport, req)
	require.ErrorIs(t, err, context.DeadlineExceeded, "the engine is mended: docs/operations/running.md and docs/development/engine-faults.md need no ?timeout")
	wantUnsettled(sent)
	testkit.Eventually(t, func(c *assert.CollectT) {
		require.Equal(c, http.StatusNotFound, asOperator(c, http.MethodGet, "http://"+api+"/streams/orders", "", password).Status)
	})
	p.Interrupt()
}

func TestPipelinesThatDisagreeOnAListenerAreNamed(t *testing.T) {
	dir := t.TempDir()
	for name, tokens := range map[string]string{"orders": "[ a ]", "events": "[ b ]"} {
		config := "input: { cryo_server: { address: 127.0.0.1:0, tokens: " + tokens + " } }\noutput: { drop: {} }\n"
		require.NoError(t, os.WriteFile(filepath.Join(dir, name+".yaml"), []byte(config), 0o600))
	}
	p := launch(t, nil, "streams", "--set", "http.enabled=false", dir)
	p.WantLog("share the listener on 127.0.0.1:0", "differ in tokens", "of the stream orders ", "of the stream events ")
}
