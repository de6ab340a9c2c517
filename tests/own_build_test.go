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

	"github.com/cryo-connect/cryo-connect/internal/testkit"
)

// buildElsewhere builds a program in its own module that requires this one.
func buildElsewhere(t *testing.T, source string) (path string) {
	t.Helper()
	dir := t.TempDir()
	module := testkit.ReadFile(t, "../go.mod")
	const ours = "github.com/cryo-connect/cryo-connect"
	// The requirements are those of this module: "go mod tidy" would need the network. The
	// module itself is this copy of the repository.
	elsewhere := strings.Replace(module, "module "+ours+"\n", "module example.com/my-connect\n", 1) +
		"\nrequire " + ours + " v0.0.0\n\nreplace " + ours + " => " + testkit.Root(t) + "\n"
	require.NotEqual(t, module, elsewhere)
	for name, content := range map[string]string{"go.mod": elsewhere, "go.sum": testkit.ReadFile(t, "../go.sum"), "main.go": source} {
		require.NoError(t, os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600))
	}
	path = filepath.Join(dir, "my-connect")
	build := exec.Command("go", "build", "-o", path)
	build.Dir = dir
	testkit.Output(t, build)
	return path
}

func TestDocumentedProgramsBuildOutsideTheRepository(t *testing.T) {
	doc := testkit.ReadFile(t, "../docs/development/own-build.md")
	programs := regexp.MustCompile("(?s)```go\n(package main\n.*?)```").FindAllStringSubmatch(doc, -1)
	require.Len(t, programs, 2)

	// The first is a whole cryo-connect.
	path := buildElsewhere(t, programs[0][1])
	for _, kind := range []string{"inputs", "outputs"} {
		list := testkit.Output(t, exec.Command(path, "list", kind))
		require.Contains(t, list, "- cryo\n")
		require.Contains(t, list, "- cryo_server\n")
	}

	buildElsewhere(t, programs[1][1])
}

// The table of docs/development/own-build.md is compared with the headers of the linked packages.
func TestDocumentedLicencesMatchTheLinkedPackages(t *testing.T) {
	const bundles = "github.com/redpanda-data/connect/v4/public/components/"
	community := func(pkg string) (packages []string) { // one for each file
		list := exec.Command("go", "list", "-deps", "-f", "{{$p := .}}{{range .GoFiles}}{{$p.ImportPath}} {{$p.Dir}}/{{.}}\n{{end}}", pkg)
		for line := range strings.Lines(testkit.Output(t, list)) {
			path, file, _ := strings.Cut(strings.TrimSpace(line), " ")
			if !strings.HasPrefix(path, "github.com/redpanda-data/") {
				continue
			}
			if header, _, _ := strings.Cut(testkit.ReadFile(t, file), "\npackage "); strings.Contains(header, "Redpanda Community\n// License") {
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
	source := testkit.ReadFile(t, "../cmd/cryo-connect/main.go")
	_, table, _ := strings.Cut(testkit.ReadFile(t, "../docs/development/own-build.md"), "| linked | licence")
	for _, bundle := range regexp.MustCompile(bundles+`(\w+)"`).FindAllStringSubmatch(source, -1) {
		require.Contains(t, table, "`"+bundle[1]+"`", "the table lists the linked bundle")
	}
	const connect = "github.com/redpanda-data/connect/v4/internal/"
	require.Equal(t, []string{connect + "serviceaccount"}, community(bundles+"kafka"), "one file")
	require.ElementsMatch(t, []string{
		connect + "serviceaccount",
		connect + "impl/aws/dynamodb", connect + "impl/mysql", connect + "impl/postgresql",
		connect + "license", "github.com/redpanda-data/common-go/license", // the licence check
		connect + "impl/postgresql/pglogicalstream", connect + "replication", connect + "sqlutil", // their dependencies
	}, slices.Compact(community(bundles+"aws")))
}
