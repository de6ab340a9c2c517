package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestBuildFromACloneReportsItsCommit(t *testing.T) {
	if dir, err := os.Stat("../../.git"); err != nil || !dir.IsDir() {
		t.Skip("not a clone, or a linked worktree, for which the Go command records no commit")
	}
	commit, err := exec.Command("git", "rev-parse", "HEAD").Output()
	if err != nil {
		t.Skip("git has no commit: ", err)
	}
	file := filepath.Join(t.TempDir(), "cryo-connect")
	out, err := exec.Command("go", "build", "-buildvcs=true", "-o", file, ".").CombinedOutput()
	require.NoError(t, err, string(out))
	version, err := exec.Command(file, "--version").Output()
	require.NoError(t, err)
	require.Contains(t, string(version), "(commit "+strings.TrimSpace(string(commit)))
}
