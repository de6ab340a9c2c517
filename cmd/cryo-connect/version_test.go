package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestABuildInACloneCarriesItsCommit(t *testing.T) {
	if os.Getenv("CRYO_LONG_TESTS") == "" {
		t.Skip("links the whole binary: set CRYO_LONG_TESTS=1")
	}
	commit, err := exec.Command("git", "rev-parse", "HEAD").Output()
	if err != nil {
		t.Skip("this is no clone: ", err)
	}
	file := filepath.Join(t.TempDir(), "cryo-connect")
	out, err := exec.Command("go", "build", "-buildvcs=true", "-o", file, ".").CombinedOutput()
	require.NoError(t, err, string(out))
	version, err := exec.Command(file, "--version").Output()
	require.NoError(t, err)
	require.Contains(t, string(version), "(commit "+strings.TrimSpace(string(commit)))
}
