// Package tests runs pipelines end to end: the binary with the examples of config/, with
// files of deploy/, and with what it is connected to. README.md shows how to write such
// a test.
package tests

import (
	"fmt"
	"io"
	"os"
	"strings"
	"testing"

	"github.com/cryo-connect/cryo-connect/internal/testkit"
)

const token = testkit.Token

func TestMain(m *testing.M) { os.Exit(testkit.Main(m)) }

// launch starts cryo-connect with arguments, in the repository's directory, as the
// documentation has it.
func launch(tb testing.TB, env []string, args ...string) *testkit.Process {
	tb.Helper()
	return launchReading(tb, nil, env, args...)
}

// launchReading is launch with a standard input.
func launchReading(tb testing.TB, stdin io.Reader, env []string, args ...string) *testkit.Process {
	tb.Helper()
	cmd := testkit.Command(tb, args...)
	cmd.Stdin, cmd.Env = stdin, append(cmd.Env, env...)
	return testkit.Start(tb, cmd)
}

// example runs a configuration of config/. It listens for Cryo clients on its own
// port, unless env sets CRYO_ADDRESS.
func example(tb testing.TB, file string, env ...string) *testkit.Process {
	tb.Helper()
	return exampleReading(tb, file, "", env...)
}

// exampleReading is example with a standard input.
func exampleReading(tb testing.TB, file, stdin string, env ...string) *testkit.Process {
	tb.Helper()
	env = append([]string{"CRYO_ADDRESS=127.0.0.1:0", "CRYO_TOKEN=" + token}, env...)
	return launchReading(tb, strings.NewReader(stdin), env, "run", "--set", "http.enabled=false", "config/"+file)
}

// runConfig runs a configuration of the test's own, without the engine's HTTP server.
func runConfig(tb testing.TB, config string, env ...string) *testkit.Process {
	tb.Helper()
	path := testkit.WriteFile(tb, "config.yaml", config)
	return launch(tb, append(env, "CRYO_TOKEN="+token), "run", "--set", "http.enabled=false", path)
}

// runServing is runConfig with the engine's HTTP server, which has the metrics and
// /ready, and returns the server's URL.
func runServing(tb testing.TB, config string, env ...string) (p *testkit.Process, url string) {
	tb.Helper()
	address := testkit.ReserveAddress(tb)
	path := testkit.WriteFile(tb, "config.yaml", config)
	return launch(tb, append(env, "CRYO_TOKEN="+token), "run", "--set", "http.address="+address, path), "http://" + address
}

// numbered returns n different texts.
func numbered(n int) []string {
	texts := make([]string, n)
	for i := range texts {
		texts[i] = fmt.Sprintf("m-%06d", i)
	}
	return texts
}
