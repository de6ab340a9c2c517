package tests

import (
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/internal/testkit"
)

// receiving is a pipeline that receives; badFiles are configurations that must not replace it.
const receiving = "{ input: { label: in, cryo_server: { address: '127.0.0.1:0', tokens: [ " + token + " ] } }, output: { drop: {} } }"

var badFiles = []struct {
	name, config string
	refused      string // a part of the log line
}{
	{"invalid YAML", "{ input: [", "did not find expected node content"},
	{"a half-written file", receiving[:60], "did not find expected"},
	{"an empty file", "", "expected object value"},
	{"an unknown field", strings.Replace(receiving, "tokens", "tokenz", 1), "field tokenz not recognised"},
	{"a value that violates a field's rule", strings.Replace(receiving, "127.0.0.1:0", "127.0.0.1:99999", 1), "field address must be host:port"},
	{"fields that contradict each other", strings.Replace(receiving, "tokens:", "tls: { cert_file: a.pem }, tokens:", 1), "field tls needs both"},
	{"a missing TLS file", strings.Replace(receiving, "tokens:", "tls: { cert_file: no-cert.pem, key_file: no-key.pem }, tokens:", 1), "field tls: open no-cert.pem"},
	{"a missing token file", strings.Replace(receiving, "tokens: [ "+token+" ]", "tokens_file: ./no-tokens", 1), "field tokens_file: open ./no-tokens"},
	{"a missing certificate authority", strings.Replace(receiving, "drop: {}", "cryo: { url: 'wss://127.0.0.1:1', tls: { enabled: true, root_cas_file: no-ca.pem } }", 1), "field tls: open no-ca.pem"},
}

func TestBadFileEndsNoWatchedPipeline(t *testing.T) {
	for _, mode := range []string{"run", "streams"} {
		t.Run(mode, func(t *testing.T) {
			path := testkit.WriteFile(t, "pipeline.yaml", receiving)
			p := launch(t, []string{"CRYO_CONNECT_HTTP_ADDRESS=127.0.0.1:0"}, mode, "-w", path) // --set would fill an empty file
			s := testkit.Dial(t, p.Listening())
			wantActive := func() { p.WantLog("Input type cryo_server is now active") }
			wantActive()
			write := func(config string) { require.NoError(t, os.WriteFile(path, []byte(config), 0o600)) }
			replace := func(config string) {
				other := filepath.Join(t.TempDir(), "other")
				require.NoError(t, os.WriteFile(other, []byte(config), 0o600))
				require.NoError(t, os.Rename(other, path))
			}
			for _, bad := range badFiles {
				write(bad.config)
				p.WantLog(bad.refused)
				testkit.WantDelivered(t, s, bad.name)
			}
			replace(badFiles[3].config)
			p.WantLog(badFiles[3].refused)
			testkit.WantDelivered(t, s, "replaced by renaming")
			require.NoError(t, s.Err(), "the session outlived all of it")

			// Good files are noticed afterwards, however they are written, and keep the session.
			write(receiving)
			wantActive()
			testkit.WantDelivered(t, s, "written")
			replace(receiving)
			wantActive()
			testkit.WantDelivered(t, s, "replaced")
			require.NoError(t, s.Err(), "the session outlived that, too")
			require.NoError(t, os.Remove(path))
			if mode == "streams" {
				p.WantLog("Removed stream")
				p.WantLog("Listener closed")
			}
			write(receiving)
			wantActive()
			if mode == "streams" {
				s = testkit.Dial(t, p.Listening())
			}
			testkit.WantDelivered(t, s, "written again")
			p.Interrupt()
		})
	}
}

func TestBadRequestEndsNoPipeline(t *testing.T) {
	api := testkit.ReserveAddress(t)
	path := testkit.WriteFile(t, "pipeline.yaml", receiving)
	p := launch(t, nil, append(withAPI(api), path)...)
	s := testkit.Dial(t, p.Listening())
	for _, bad := range badFiles {
		for _, method := range []string{http.MethodPut, http.MethodPost} {
			resp := asOperator(t, method, "http://"+api+"/streams/pipeline?timeout=5s", bad.config, password)
			require.Equal(t, http.StatusBadRequest, resp.Status, "%s: %s", bad.name, resp.Body)
			if method == http.MethodPut {
				require.Contains(t, resp.Body, bad.refused, bad.name)
			}
		}
		testkit.WantDelivered(t, s, bad.name)
	}
	resp := asOperator(t, http.MethodPost, "http://"+api+"/streams/pipeline", receiving, password)
	require.Equal(t, http.StatusBadRequest, resp.Status, "it exists")
	require.NoError(t, s.Err(), "the session outlived all of it")
	p.Interrupt()
}

// The first start accepts a file of an input only if it exists, whatever lint says.
func TestMissingFileFailsStartupButNotLint(t *testing.T) {
	path := testkit.WriteFile(t, "pipeline.yaml", strings.Replace(receiving, "tokens: [ "+token+" ]", "tokens_file: ./no-tokens", 1))
	launch(t, nil, "lint", path).WantExit(0)
	p := launch(t, nil, "run", "--set", "http.enabled=false", path)
	p.WantExit(1)
	require.Contains(t, strings.Join(p.All(), "\n"), "field tokens_file: open ./no-tokens")
}

// unbuildable passes lint, but the engine can't build its output.
var unbuildable = strings.Replace(receiving, "drop: {}", "http_client: { url: 'http://127.0.0.1:1', tls: { enabled: true, root_cas_file: no-ca.pem } }", 1)

func TestEngineEndsAPipelineBeforeItBuildsTheNext(t *testing.T) {
	const mended = "the engine is mended: docs/operations/running.md and docs/development/engine-faults.md need not warn of files that can't be built"
	path := testkit.WriteFile(t, "pipeline.yaml", receiving)
	p := launch(t, nil, "run", "-w", "--set", "http.enabled=false", path)
	s := testkit.Dial(t, p.Listening())
	require.NoError(t, os.WriteFile(path, []byte(unbuildable), 0o600))
	p.WantLog("Failed to apply updated config", "no-ca.pem")
	<-s.Done()
	testkit.Eventually(t, func(c *assert.CollectT) {
		assert.Positive(c, p.Count(func(line string) bool { return strings.Contains(line, "Listener closed") }), mended)
	})
	require.NoError(t, os.WriteFile(path, []byte(receiving), 0o600))
	testkit.WantDelivered(t, testkit.Dial(t, p.Listening()), "the next good file is applied")
	p.Interrupt()
}

func TestWatchedPipelineWhoseAddressIsTakenIsRetriedAndReplaced(t *testing.T) {
	taken := testkit.Listen(t)
	defer taken.Close()
	address := testkit.ReserveAddress(t)
	receiving := strings.Replace(receiving, "127.0.0.1:0", address, 1)
	elsewhere := strings.Replace(receiving, address, taken.Addr().String(), 1)
	path := testkit.WriteFile(t, "pipeline.yaml", receiving)
	p := launch(t, nil, "run", "-w", "--set", "http.enabled=false", path)
	for _, end := range []func() error{
		func() error { return os.WriteFile(path, []byte(receiving), 0o600) }, // the next good file
		taken.Close, // or the end of the other process
	} {
		p.WantLog("Input type cryo_server is now active")
		testkit.WantDelivered(t, testkit.Dial(t, address), "before")
		require.NoError(t, os.WriteFile(path, []byte(elsewhere), 0o600))
		for range 2 {
			p.WantLog("Failed to connect to cryo_server", "field address: ", "address already in use: another process listens there: stop it, or use another port")
		}
		require.NoError(t, end())
	}
	p.WantLog("Input type cryo_server is now active")
	testkit.WantDelivered(t, testkit.Dial(t, taken.Addr().String()), "after")
	p.Interrupt()
}

func TestEngineEndsAStreamBeforeItBuildsTheNext(t *testing.T) {
	api := testkit.ReserveAddress(t)
	path := testkit.WriteFile(t, "pipeline.yaml", receiving)
	p := launch(t, nil, append(withAPI(api), path)...)
	s := testkit.Dial(t, p.Listening())
	resp := asOperator(t, http.MethodPut, "http://"+api+"/streams/pipeline?timeout=5s", unbuildable, password)
	require.Equal(t, http.StatusBadGateway, resp.Status, resp.Body)
	<-s.Done()
	resp = asOperator(t, http.MethodGet, "http://"+api+"/streams/pipeline", "", password)
	require.Equal(t, http.StatusNotFound, resp.Status, "the engine is mended: the stream that could not be replaced still runs")
	resp = asOperator(t, http.MethodPost, "http://"+api+"/streams/pipeline", receiving, password)
	require.Equal(t, http.StatusOK, resp.Status, "it must be created again")
	testkit.WantDelivered(t, testkit.Dial(t, p.Listening()), "it runs again")
	p.Interrupt()
}

func TestEngineKeepsConfigurationFilesOpen(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("it looks into /proc")
	}
	isOpen := func(p *testkit.Process, path string) bool {
		links, err := filepath.Glob("/proc/" + strconv.Itoa(p.Cmd.Process.Pid) + "/fd/*")
		require.NoError(t, err)
		for _, link := range links {
			if target, _ := os.Readlink(link); target == path {
				return true
			}
		}
		return false
	}
	path := testkit.WriteFile(t, "pipeline.yaml", receiving)
	p := launch(t, []string{"GOGC=off"}, "run", "--set", "http.enabled=false", path)
	p.Listening()
	require.True(t, isOpen(p, path), "the engine is mended: fileWatcher of cmd/cryo-connect/watch.go can go")
	p.Interrupt()

	p = launch(t, []string{"GOGC=off"}, "run", "-w", "--set", "http.enabled=false", path)
	p.Listening()
	testkit.Eventually(t, func(c *assert.CollectT) { require.False(c, isOpen(p, path), "with -w it is closed") })
	p.Interrupt()
}
