package tests

import (
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"net"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/internal/testkit"
)

// What the engine's HTTP server offers to whoever reaches it.

const idle = "input: { generate: { interval: 1h, mapping: root = 1 } }\noutput: { drop: {} }\n"

// operator is who may use the API of streams mode; see withAPI.
const operator, password = "operator", "pass w0rd"

// withAPI returns the arguments that serve the API of streams mode at an address.
func withAPI(address string) []string {
	hash := sha256.Sum256([]byte(password))
	return []string{
		"streams", "--api", "--set", "http.address=" + address, "--set", "http.basic_auth.enabled=true",
		"--set", "http.basic_auth.username=" + operator, "--set", "http.basic_auth.password_hash=" + base64.StdEncoding.EncodeToString(hash[:]),
	}
}

// asOperator makes a request with the credentials of withAPI, or with another password, as soon as the
// server listens.
func asOperator(t require.TestingT, method, url, body, password string) testkit.Response {
	for deadline := time.Now().Add(testkit.Patience); ; time.Sleep(10 * time.Millisecond) {
		req, err := http.NewRequest(method, url, strings.NewReader(body)) //nolint:noctx // the test's end kills the server
		require.NoError(t, err)
		req.SetBasicAuth(operator, password)
		resp, err := testkit.Do(http.DefaultTransport, req)
		if errors.Is(err, syscall.ECONNREFUSED) && time.Now().Before(deadline) {
			continue
		}
		require.NoError(t, err)
		return resp
	}
}

// wantServing waits until the HTTP server responds with a status to a request for /ping.
func wantServing(t *testing.T, address string, status int) {
	t.Helper()
	testkit.Eventually(t, func(c *assert.CollectT) {
		resp, err := testkit.HTTP(http.MethodGet, "http://"+address+"/ping", "")
		require.NoError(c, err)
		require.Equal(c, status, resp.Status)
	})
}

func TestUnauthenticatedRequestsCannotRunAnything(t *testing.T) {
	stream := testkit.WriteFile(t, "idle.yaml", idle)
	resources := testkit.WriteFile(t, "resources.yaml", "cache_resources: [ { label: known, memory: {} } ]\n")
	root := testkit.WriteFile(t, "root.yaml", "logger: { level: DEBUG }\n")
	const at = "--set=http.address=" // and an address
	for name, args := range map[string][]string{
		"streams":                  {"streams", at, stream},
		"streams, watched":         {"streams", at, "-w", "-r", resources, "-o", root, stream},
		"streams without a prefix": {"streams", at, "--prefix-stream-endpoints=false", "--", stream},
		"--no-api=false":           {"streams", at, "--no-api=false", stream},
		"--no-api beside --api":    {"--api", "streams", at, "--no-api", stream},
		"run":                      {"run", at, "-w", "-r", resources, stream},
		"no command":               {at, "-c", stream},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			address, proof := testkit.ReserveAddress(t), filepath.Join(t.TempDir(), "proof")
			command := slices.Clone(args)
			command[slices.Index(command, at)] += address
			p := launch(t, nil, command...)
			p.WantLog("Launching ") // all paths are registered
			wantServing(t, address, http.StatusOK)

			evil := "{ input: { generate: { count: 1, mapping: root = 1 } }, output: { file: { path: '" + proof + "' } } }"
			for _, path := range []string{
				"/streams", "/streams/", "/streams/idle", "/streams/evil", "/streams/idle/stats", "/streams/evil?chilled=true",
				"/resources/cache/known", "/resources/output/evil", "/inputs", "/inputs/evil", "/outputs/evil",
				"/debug/config/json", "/debug/config/yaml", "/debug/stack", "/debug/pprof/", "/debug/pprof/heap", "/debug/pprof/profile",
				"/debug/pprof/trace", "/debug/pprof/cmdline", "/debug/vars",
			} {
				for _, prefix := range []string{"", "/benthos"} {
					for _, method := range []string{http.MethodGet, http.MethodPost, http.MethodPut, http.MethodPatch, http.MethodDelete} {
						resp, err := testkit.HTTP(method, "http://"+address+prefix+path, evil)
						require.NoError(t, err)
						require.Contains(t, []int{http.StatusNotFound, http.StatusMovedPermanently}, resp.Status, "%s %s", method, path)
					}
				}
			}
			require.NoFileExists(t, proof)
			resp, err := testkit.HTTP(http.MethodGet, "http://"+address+"/ready", "")
			require.NoError(t, err)
			require.Equal(t, http.StatusOK, resp.Status)
			p.Kill()
		})
	}
}

func TestAPIWithoutAuthenticationIsRejectedAtStart(t *testing.T) {
	stream := testkit.WriteFile(t, "idle.yaml", idle)
	address := testkit.ReserveAddress(t)
	for name, c := range map[string]struct {
		args []string
		want string // in the output
	}{
		"by the flag":        {[]string{"streams", "--api", stream}, "http.basic_auth"},
		"before the command": {[]string{"--api", "streams", "--", stream}, "http.basic_auth"},
		"with a value":       {[]string{"streams", "--api=true", stream}, "http.basic_auth"},
		"with a user name":   {[]string{"streams", "--api", "--set", "http.basic_auth.username=me", stream}, "http.basic_auth"},
		"without a password": {[]string{"streams", "--api", "--set", "http.basic_auth.enabled=true", stream}, "password_hash"},
		"without streams":    {[]string{"run", "--api", stream}, "streams"},
	} {
		t.Run(name, func(t *testing.T) {
			args := append([]string{"--set", "http.address=" + address}, c.args...)
			p := launch(t, nil, args...)
			p.WantExit(1)
			output := strings.Join(p.All(), "\n")
			require.Contains(t, output, c.want)
			require.NotContains(t, output, "Launching")
		})
	}
}

func TestAPIWithAuthenticationServesOnlyTheOperator(t *testing.T) {
	address, proof := testkit.ReserveAddress(t), filepath.Join(t.TempDir(), "proof")
	p := launch(t, nil, append(withAPI(address), testkit.WriteFile(t, "idle.yaml", idle))...)
	p.WantLog("Launching ") // all paths are registered
	wantServing(t, address, http.StatusUnauthorized)

	url := "http://" + address + "/streams/copy"
	config := "{ input: { generate: { count: 1, mapping: root = 1 } }, output: { file: { path: '" + proof + "' } } }"
	for _, method := range []string{http.MethodGet, http.MethodPost, http.MethodPut, http.MethodPatch, http.MethodDelete} {
		resp, err := testkit.HTTP(method, url, config)
		require.NoError(t, err)
		require.Equal(t, http.StatusUnauthorized, resp.Status)
		require.Equal(t, http.StatusUnauthorized, asOperator(t, method, url, config, "another").Status)
	}
	require.NoFileExists(t, proof)

	require.Equal(t, http.StatusOK, asOperator(t, http.MethodPost, url, config, password).Status)
	testkit.Eventually(t, func(c *assert.CollectT) { assert.FileExists(c, proof) })
	resp := asOperator(t, http.MethodGet, "http://"+address+"/streams", "", password)
	require.Equal(t, http.StatusOK, resp.Status)
	require.Contains(t, resp.Body, `"copy"`)

	// The probe authenticates, too, and does not repeat the password.
	probe := "@" + address + "/ping"
	testkit.Output(t, testkit.Command(t, "probe", "http://"+operator+":pass%20w0rd"+probe))
	out, err := testkit.Command(t, "probe", "http://"+operator+":an0ther"+probe).CombinedOutput()
	require.Error(t, err)
	require.Contains(t, string(out), "401")
	require.NotContains(t, string(out), "an0ther")
	p.Kill()
}

func TestHTTPServerListensOnLoopbackByDefault(t *testing.T) {
	t.Setenv("CRYO_CONNECT_HTTP_ADDRESS", "")
	file := testkit.WriteFile(t, "idle.yaml", idle)
	for _, command := range []string{"run", "streams"} {
		t.Run(command, func(t *testing.T) {
			p := launch(t, nil, command, "--set", "http.root_path=/own", file)
			p.WantLog("Listening for HTTP requests at", "http://127.0.0.1:4195")
			own := false // otherwise another process has the port
			testkit.Eventually(t, func(c *assert.CollectT) {
				resp, err := testkit.HTTP(http.MethodGet, "http://127.0.0.1:4195/own/ping", "")
				own = err == nil && resp.Status == http.StatusOK
				require.True(c, own || strings.Contains(strings.Join(p.All(), "\n"), "HTTP Server error"))
			})
			for _, address := range otherAddresses(t) {
				_, err := testkit.HTTP(http.MethodGet, "http://"+net.JoinHostPort(address, "4195")+"/own/ping", "")
				require.True(t, !own || errors.Is(err, syscall.ECONNREFUSED), "%s: %v", address, err)
			}
			p.Kill()
		})
	}
}

// otherAddresses returns the addresses of this machine that are not loopback.
func otherAddresses(t *testing.T) (addresses []string) {
	t.Helper()
	all, err := net.InterfaceAddrs()
	require.NoError(t, err)
	for _, a := range all {
		if ip, _, err := net.ParseCIDR(a.String()); err == nil && ip.IsGlobalUnicast() {
			addresses = append(addresses, ip.String())
		}
	}
	return addresses
}

// The image sets the variable.
func TestEnvironmentSetsTheAddressOfTheHTTPServer(t *testing.T) {
	address, other := testkit.ReserveAddress(t), testkit.ReserveAddress(t)
	_, port, err := net.SplitHostPort(address)
	require.NoError(t, err)
	env := []string{"CRYO_CONNECT_HTTP_ADDRESS=0.0.0.0:" + port}
	file := testkit.WriteFile(t, "idle.yaml", idle)

	p := launch(t, env, "run", file)
	wantServing(t, address, http.StatusOK)
	for _, a := range otherAddresses(t) {
		wantServing(t, net.JoinHostPort(a, port), http.StatusOK)
	}
	probe := testkit.Command(t, "probe")
	probe.Env = append(probe.Env, env...)
	testkit.Output(t, probe)
	p.Kill()

	// What a configuration says comes first.
	p = launch(t, env, "run", testkit.WriteFile(t, "address.yaml", idle+"http: { address: '"+other+"' }\n"))
	p.WantLog("Listening for HTTP requests at", "http://"+other)
	p.Kill()
}
