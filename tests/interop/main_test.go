// Package interop_test runs the cryo-connect binary against the published Cryo packages
// for Node, in both roles, and compares the library and docs/development/protocol.md with recorded
// sessions of these packages.
//
// The tests with Node need the packages: CRYO_NODE_MODULES is the path of a node_modules
// folder that has cryo-server 3 and cryo-client-node, and cryo-client-browser for the tests
// with Chromium. CRYO_NODE_MODULES_2 is that of one with cryo-server 2.12.
// CRYO_CONNECT_BINARY names a binary to test; by default, one is built. CRYO_RECORD=1
// records testdata/*.txt again.
package interop_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/internal/testkit"
)

const howToRun = "needs Node and the published Cryo packages: set CRYO_NODE_MODULES to the path of a node_modules folder that has cryo-server and cryo-client-node"

func TestMain(m *testing.M) { os.Exit(testkit.Main(m)) }

// nodeModules returns the folder with the packages. Without the variable the test is skipped;
// if it names a folder without them, it fails.
func nodeModules(t *testing.T) string {
	t.Helper()
	folder := os.Getenv("CRYO_NODE_MODULES")
	if folder == "" {
		t.Skip(howToRun)
	}
	folder, err := filepath.Abs(folder)
	require.NoError(t, err)
	for _, name := range []string{"cryo-server", "cryo-client-node"} {
		_, err := os.Stat(filepath.Join(folder, name, "package.json"))
		require.NoError(t, err, "CRYO_NODE_MODULES names a folder without the package %s", name)
	}
	_, err = exec.LookPath("node")
	require.NoError(t, err, "CRYO_NODE_MODULES is set, but there is no node")
	return folder
}

// binary returns the path of cryo-connect, with the race detector if the tests have it.
func binary(t *testing.T) string {
	t.Helper()
	if testkit.RaceDetector() {
		return testkit.Binary(t, "-race")
	}
	return testkit.Binary(t)
}
