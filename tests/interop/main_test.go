// Package interop_test runs the cryo-connect binary against the published Cryo
// packages for Node, in both roles, and holds the library and docs/protocol.md
// against what was recorded of them.
//
// The part with Node wants the packages: npm install --prefix
// tests/interop/peers, or CRYO_NODE_MODULES with the path of a node_modules
// folder that has them. CRYO_CONNECT_BINARY names a binary to test; without it,
// one is built. CRYO_RECORD=1 writes testdata/*.txt anew.
package interop_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// patience bounds every wait for something that is to come.
const patience = 60 * time.Second

const howToRun = "needs Node and the published Cryo packages: run npm install --prefix tests/interop/peers, or set CRYO_NODE_MODULES to the path of a node_modules folder that has cryo-server and cryo-client-node"

func TestMain(m *testing.M) {
	code := m.Run()
	if built.dir != "" {
		_ = os.RemoveAll(built.dir)
	}
	os.Exit(code)
}

// nodeModules is the folder with the packages. Without them the test is skipped;
// where the variable names a folder without them, that is an error.
func nodeModules(t *testing.T) string {
	t.Helper()
	folder := os.Getenv("CRYO_NODE_MODULES")
	named := folder != ""
	if !named {
		folder = filepath.Join("peers", "node_modules")
	}
	folder, err := filepath.Abs(folder)
	require.NoError(t, err)
	for _, name := range []string{"cryo-server", "cryo-client-node"} {
		if _, err := os.Stat(filepath.Join(folder, name, "package.json")); err != nil {
			require.False(t, named, "CRYO_NODE_MODULES names a folder without the package %s: %v", name, err)
			t.Skip(howToRun)
		}
	}
	if _, err := exec.LookPath("node"); err != nil {
		require.False(t, named, "CRYO_NODE_MODULES is set, but there is no node: %v", err)
		t.Skip(howToRun)
	}
	return folder
}

var built struct {
	once sync.Once
	dir  string
	path string
	err  error
}

// binary is cryo-connect itself, built once; with the race detector if the
// tests have it.
func binary(t *testing.T) string {
	t.Helper()
	built.once.Do(build)
	require.NoError(t, built.err)
	return built.path
}

func build() {
	if named := os.Getenv("CRYO_CONNECT_BINARY"); named != "" {
		built.path, built.err = filepath.Abs(named)
		return
	}
	if built.dir, built.err = os.MkdirTemp("", "cryo-interop-"); built.err != nil {
		return
	}
	built.path = filepath.Join(built.dir, "cryo-connect")
	args := []string{"build", "-o", built.path}
	if raceDetector {
		args = append(args, "-race")
	}
	args = append(args, "../../cmd/cryo-connect")
	if out, err := exec.Command("go", args...).CombinedOutput(); err != nil {
		built.err = fmt.Errorf("building cryo-connect: %w\n%s", err, out)
	}
}
