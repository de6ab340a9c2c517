package tests

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// buildElsewhere builds a program in a module of its own that requires this one.
func buildElsewhere(t *testing.T, source string) (path string) {
	t.Helper()
	dir := t.TempDir()
	module, err := os.ReadFile("../go.mod")
	require.NoError(t, err)
	here, err := filepath.Abs("..")
	require.NoError(t, err)
	const ours = "github.com/cryo-connect/cryo-connect"
	// Our requirements are what "go mod tidy" would find, for that asks the
	// network. The module itself is the one that is here.
	elsewhere := strings.Replace(string(module), "module "+ours+"\n", "module example.com/my-connect\n", 1) +
		"\nrequire " + ours + " v0.0.0\n\nreplace " + ours + " => " + here + "\n"
	require.NotEqual(t, string(module), elsewhere)
	sums, err := os.ReadFile("../go.sum")
	require.NoError(t, err)
	for name, content := range map[string]string{"go.mod": elsewhere, "go.sum": string(sums), "main.go": source} {
		require.NoError(t, os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600))
	}
	path = filepath.Join(dir, "my-connect")
	build := exec.Command("go", "build", "-o", path)
	build.Dir = dir
	out, err := build.CombinedOutput()
	require.NoError(t, err, string(out))
	return path
}

func TestTheProgramsInTheDocumentationBuildElsewhere(t *testing.T) {
	doc, err := os.ReadFile("../docs/own-build.md")
	require.NoError(t, err)
	programs := regexp.MustCompile("(?s)```go\n(package main\n.*?)```").FindAllStringSubmatch(string(doc), -1)
	require.Len(t, programs, 2)

	// The first is a whole cryo-connect.
	path := buildElsewhere(t, programs[0][1])
	for _, kind := range []string{"inputs", "outputs"} {
		list, err := exec.Command(path, "list", kind).CombinedOutput()
		require.NoError(t, err, string(list))
		require.Contains(t, string(list), "- cryo\n")
		require.Contains(t, string(list), "- cryo_server\n")
	}

	buildElsewhere(t, programs[1][1])
}

// TestTheLicencesAreAsTheDocumentationSays holds the table of docs/own-build.md
// and the README against the headers of what is linked.
func TestTheLicencesAreAsTheDocumentationSays(t *testing.T) {
	const bundles = "github.com/redpanda-data/connect/v4/public/components/"
	community := func(pkg string) (packages []string) { // one for each file
		list := exec.Command("go", "list", "-deps", "-f", "{{$p := .}}{{range .GoFiles}}{{$p.ImportPath}} {{$p.Dir}}/{{.}}\n{{end}}", pkg)
		out, err := list.Output()
		require.NoError(t, err)
		for line := range strings.Lines(string(out)) {
			path, file, _ := strings.Cut(strings.TrimSpace(line), " ")
			if !strings.HasPrefix(path, "github.com/redpanda-data/") {
				continue
			}
			content, err := os.ReadFile(file)
			require.NoError(t, err)
			if header, _, _ := strings.Cut(string(content), "\npackage "); strings.Contains(header, "Redpanda Community\n// License") {
				packages = append(packages, path)
			}
		}
		return packages
	}
	for _, free := range []string{
		"github.com/redpanda-data/benthos/v4/public/components/pure", "github.com/redpanda-data/benthos/v4/public/components/io",
		"../plugin", bundles + "prometheus", bundles + "crypto", bundles + "jaeger",
	} {
		require.Empty(t, community(free), free)
	}
	source, err := os.ReadFile("../cmd/cryo-connect/main.go")
	require.NoError(t, err)
	doc, err := os.ReadFile("../docs/own-build.md")
	require.NoError(t, err)
	_, table, _ := strings.Cut(string(doc), "| linked | licence")
	for _, bundle := range regexp.MustCompile(bundles+`(\w+)"`).FindAllStringSubmatch(string(source), -1) {
		require.Contains(t, table, "`"+bundle[1]+"`", "what the binary links is in the table")
	}
	const connect = "github.com/redpanda-data/connect/v4/internal/"
	require.Equal(t, []string{connect + "serviceaccount"}, community(bundles+"kafka"), "one file")
	require.ElementsMatch(t, []string{
		connect + "serviceaccount",
		connect + "impl/aws/dynamodb", connect + "impl/mysql", connect + "impl/postgresql",
		connect + "license", "github.com/redpanda-data/common-go/license", // the check
		connect + "impl/postgresql/pglogicalstream", connect + "replication", connect + "sqlutil", // what they are built on
	}, slices.Compact(community(bundles+"aws")))
}
