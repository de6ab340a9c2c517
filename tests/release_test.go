package tests

import (
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"gopkg.in/yaml.v3"

	"github.com/cryo-connect/cryo-connect/internal/testkit"
)

// goreleaser is the version that CONTRIBUTING.md names too.
const goreleaser = "github.com/goreleaser/goreleaser/v2@v2.15.4"

// wantLinkerVariables wants a command line to set the variables of version.go: the linker
// ignores others silently.
func wantLinkerVariables(t *testing.T, flags string) {
	t.Helper()
	source := testkit.ReadFile(t, "../cmd/cryo-connect/version.go")
	var set []string
	for _, name := range regexp.MustCompile(`-X main\.(\w+)=`).FindAllStringSubmatch(flags, -1) {
		require.Regexp(t, `(?m)^\t`+name[1]+`\s+string$`, source)
		set = append(set, name[1])
	}
	require.ElementsMatch(t, []string{"releaseVersion", "releaseCommit", "releaseDate"}, set)
}

// With CRYO_LONG_TESTS=1, goreleaser itself checks its configuration; building it takes
// minutes.
func TestReleaseConfigurationNamesExistingFiles(t *testing.T) {
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
	require.NoError(t, yaml.Unmarshal([]byte(testkit.ReadFile(t, "../.goreleaser.yaml")), &release))
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

	require.Contains(t, testkit.ReadFile(t, "../CONTRIBUTING.md"), goreleaser)
	if !testkit.LongTests() {
		return
	}
	check := exec.Command("go", "run", goreleaser, "check", "--quiet")
	check.Dir = ".."
	testkit.Output(t, check)
}
