package tests

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"gopkg.in/yaml.v3"
)

// goreleaser is the version that CONTRIBUTING.md names too.
const goreleaser = "github.com/goreleaser/goreleaser/v2@v2.15.4"

// wantLinkerVariables wants a release's command line to set the variables that
// there are, for the linker says nothing about others.
func wantLinkerVariables(t *testing.T, flags string) {
	t.Helper()
	source, err := os.ReadFile("../cmd/cryo-connect/version.go")
	require.NoError(t, err)
	var set []string
	for _, name := range regexp.MustCompile(`-X main\.(\w+)=`).FindAllStringSubmatch(flags, -1) {
		require.Regexp(t, `(?m)^\t`+name[1]+`\s+string$`, string(source))
		set = append(set, name[1])
	}
	require.ElementsMatch(t, []string{"releaseVersion", "releaseCommit", "releaseDate"}, set)
}

// TestTheReleaseNamesWhatThereIs also runs goreleaser's own check if
// CRYO_LONG_TESTS=1; building that takes minutes.
func TestTheReleaseNamesWhatThereIs(t *testing.T) {
	content, err := os.ReadFile("../.goreleaser.yaml")
	require.NoError(t, err)
	var release struct {
		Version int
		Builds  []struct {
			Main, Binary        string
			Env, Flags, Ldflags []string
		}
		Archives []struct{ Files []string }
		SBOMs    []struct{ Artifacts string }
		Checksum struct{ Algorithm string }
	}
	require.NoError(t, yaml.Unmarshal(content, &release))
	require.Equal(t, 2, release.Version)
	require.Len(t, release.Builds, 1)
	build := release.Builds[0]
	require.DirExists(t, filepath.Join("..", build.Main))
	require.Equal(t, "cryo-connect", build.Binary)
	require.Equal(t, []string{"CGO_ENABLED=0"}, build.Env)
	require.Contains(t, build.Flags, "-trimpath")
	wantLinkerVariables(t, strings.Join(build.Ldflags, " "))
	require.Len(t, release.Archives, 1)
	for _, pattern := range release.Archives[0].Files {
		found, err := filepath.Glob(filepath.Join("..", strings.ReplaceAll(pattern, "**/", "")))
		require.NoError(t, err)
		require.NotEmpty(t, found, pattern)
	}
	require.NotEmpty(t, release.SBOMs)
	require.Equal(t, "sha256", release.Checksum.Algorithm)

	contributing, err := os.ReadFile("../CONTRIBUTING.md")
	require.NoError(t, err)
	require.Contains(t, string(contributing), goreleaser)
	if os.Getenv("CRYO_LONG_TESTS") != "1" {
		return
	}
	check := exec.Command("go", "run", goreleaser, "check", "--quiet")
	check.Dir = ".."
	out, err := check.CombinedOutput()
	require.NoError(t, err, string(out))
}
