package tests

import (
	"go/ast"
	"go/parser"
	gotoken "go/token"
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

// documents returns the repository's pages, by path.
func documents(t *testing.T) map[string]string {
	t.Helper()
	pages := make(map[string]string)
	for _, pattern := range []string{"../*.md", "*.md", "../config/*.md", "../docs/*.md", "../docs/*/*.md", "../docs/reference/components/*/*.md"} {
		files, err := filepath.Glob(pattern)
		require.NoError(t, err)
		for _, file := range files {
			pages[filepath.Clean(file)] = testkit.ReadFile(t, file)
		}
	}
	require.NotEmpty(t, pages)
	return pages
}

// anchors returns the anchors of a page: its headings, and those that it names itself.
func anchors(page string) map[string]bool {
	found := make(map[string]bool)
	dropped := regexp.MustCompile(`[^\p{L}\p{N} _-]`)
	for _, heading := range regexp.MustCompile(`(?m)^#+ (.*)$`).FindAllStringSubmatch(page, -1) {
		text := dropped.ReplaceAllString(strings.ToLower(heading[1]), "")
		found[strings.ReplaceAll(text, " ", "-")] = true
	}
	for _, named := range regexp.MustCompile(`<a (?:id|name)="([^"]+)"`).FindAllStringSubmatch(page, -1) {
		found[named[1]] = true
	}
	return found
}

func TestLinksInTheDocumentationResolve(t *testing.T) {
	pages := documents(t)
	code := regexp.MustCompile("(?s)```.*?```|`[^`\n]*`")
	for path, page := range pages {
		for _, link := range regexp.MustCompile(`\]\(([^)\s]+)\)`).FindAllStringSubmatch(code.ReplaceAllString(page, ""), -1) {
			target, anchor, _ := strings.Cut(link[1], "#")
			file := path
			if own, ok := strings.CutPrefix(target, "https://github.com/cryo-connect/cryo-connect/blob/main/"); ok {
				file = filepath.Join("..", own)
			} else if strings.Contains(target, "://") || strings.HasPrefix(target, "mailto:") {
				continue
			} else if target != "" {
				file = filepath.Join(filepath.Dir(path), target)
			}
			if file != path {
				_, err := os.Stat(file)
				require.NoError(t, err, "%s links to %s", path, link[1])
			}
			if other, ok := pages[file]; ok && anchor != "" {
				require.True(t, anchors(other)[anchor], "%s links to %s, which has no such heading", path, link[1])
			}
		}
	}
}

// A Go of that minor version downloads the patch release of go.mod.
func TestPagesNameTheGoVersionOfTheModule(t *testing.T) {
	version := regexp.MustCompile(`(?m)^go (\d+\.\d+)`).FindStringSubmatch(testkit.ReadFile(t, "../go.mod"))
	require.NotNil(t, version)
	named := 0
	for path, page := range documents(t) {
		for _, newer := range regexp.MustCompile(`Go ([\d.]+) or newer`).FindAllStringSubmatch(page, -1) {
			require.Equal(t, version[1], newer[1], path)
			named++
		}
	}
	require.Positive(t, named)
}

func TestREADMEHasAtMost120Lines(t *testing.T) {
	require.LessOrEqual(t, strings.Count(testkit.ReadFile(t, "../README.md"), "\n"), 120)
}

// blocks returns the fenced blocks of a page in a language.
func blocks(page, language string) []string {
	var found []string
	for _, block := range regexp.MustCompile("(?ms)^```"+language+"\n(.*?)^```$").FindAllStringSubmatch(page, -1) {
		found = append(found, block[1])
	}
	return found
}

// The fragments of Go compile as the body of a function with these parameters.
func TestGoInREADMEAndLibraryPageCompiles(t *testing.T) {
	const head = `package main

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/cryo-connect/cryo-connect/cryo"
)

var _ = []any{errors.Is, io.Copy, net.Dial, http.Serve, os.Open, signal.Notify, syscall.SIGTERM, time.Now} // fragments may use these packages

func main() {}

func fragment(ctx context.Context, token string, currentToken func(context.Context) (string, error), deliver func([]byte),
	receiveStreams func(*cryo.Session), client *cryo.Client, source *os.File) error {
`
	for _, path := range []string{"../README.md", "../docs/development/library.md"} {
		fragments := blocks(testkit.ReadFile(t, path), "go")
		require.NotEmpty(t, fragments, path)
		for _, fragment := range fragments {
			file := testkit.WriteFile(t, "main.go", head+fragment+"\treturn nil\n}\n")
			build := exec.Command("go", "build", "-o", os.DevNull, file)
			build.Dir = testkit.Root(t)
			out, err := build.CombinedOutput()
			require.NoError(t, err, "%s:\n%s\n%s", path, fragment, out)
		}
	}
}

// declared returns the names of a package: of types, functions, constants and variables,
// and of methods, as Type.Method.
func declared(t *testing.T, dir string) map[string]bool {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "*.go"))
	require.NoError(t, err)
	names := make(map[string]bool)
	for _, file := range files {
		parsed, err := parser.ParseFile(gotoken.NewFileSet(), file, nil, parser.SkipObjectResolution)
		require.NoError(t, err)
		for _, declaration := range parsed.Decls {
			switch d := declaration.(type) {
			case *ast.FuncDecl:
				name := d.Name.Name
				if d.Recv != nil {
					receiver := d.Recv.List[0].Type
					if pointer, ok := receiver.(*ast.StarExpr); ok {
						receiver = pointer.X
					}
					if of, ok := receiver.(*ast.Ident); ok {
						name = of.Name + "." + name
					}
				}
				names[name] = true
			case *ast.GenDecl:
				for _, spec := range d.Specs {
					switch s := spec.(type) {
					case *ast.TypeSpec:
						names[s.Name.Name] = true
						if structure, ok := s.Type.(*ast.StructType); ok {
							for _, field := range structure.Fields.List {
								for _, name := range field.Names {
									names[s.Name.Name+"."+name.Name] = true
								}
							}
						}
					case *ast.ValueSpec:
						for _, name := range s.Names {
							names[name.Name] = true
						}
					}
				}
			}
		}
	}
	return names
}

// Every name of code in docs/development/architecture.md must be declared in cryo or plugin.
func TestArchitecturePageNamesExistingCode(t *testing.T) {
	page := testkit.ReadFile(t, "../docs/development/architecture.md")
	names := declared(t, "../cryo")
	for name := range declared(t, "../plugin") {
		names[name] = true
	}
	found := 0
	// The names of the diagram are not in backquotes.
	pattern := regexp.MustCompile("`(?:cryo\\.)?([A-Za-z]+(?:\\.[A-Za-z]+)?)`|\\b((?:Session|receiver|outbox)\\.[A-Za-z]+)")
	for _, match := range pattern.FindAllStringSubmatch(page, -1) {
		name := match[1] + match[2]
		if name == strings.ToLower(name) && !names[name] || strings.HasPrefix(name, "service.") {
			continue // a package, a component, a field or a file; a name of the engine
		}
		require.True(t, names[name], "docs/development/architecture.md names %s, which does not exist", name)
		found++
	}
	require.Greater(t, found, 30)
}

// The tables of docs/development/architecture.md must name each file of cryo and plugin once: whoever
// reads the page finds every file. A pattern such as *_config.go names several.
func TestArchitecturePageNamesEachFileOnce(t *testing.T) {
	page := testkit.ReadFile(t, "../docs/development/architecture.md")
	for _, dir := range []string{"cryo", "plugin"} {
		_, table, found := strings.Cut(page, "\n### "+dir+"/\n")
		require.True(t, found, dir)
		table, _, _ = strings.Cut(table, "\n#")
		var patterns []string
		for _, match := range regexp.MustCompile("`([a-z_*]+\\.go)`").FindAllStringSubmatch(table, -1) {
			patterns = append(patterns, match[1])
		}
		files, err := filepath.Glob(filepath.Join("..", dir, "*.go"))
		require.NoError(t, err)
		for _, file := range files {
			if strings.HasSuffix(file, "_test.go") {
				continue
			}
			var by []string
			for _, pattern := range patterns {
				if ok, _ := filepath.Match(pattern, filepath.Base(file)); ok {
					by = append(by, pattern)
				}
			}
			require.Len(t, by, 1, "docs/development/architecture.md must name %s once", file)
		}
	}
}

// The long tests that CI runs by name must exist: go test runs none for a name that does not.
func TestCIRunsExistingTests(t *testing.T) {
	declared := regexp.MustCompile(`(?m)^func (Test\w+)\(`)
	known := make(map[string]bool)
	for _, pattern := range []string{"*_test.go", "../plugin/*_test.go"} {
		files, err := filepath.Glob(pattern)
		require.NoError(t, err)
		for _, file := range files {
			for _, match := range declared.FindAllStringSubmatch(testkit.ReadFile(t, file), -1) {
				known[match[1]] = true
			}
		}
	}
	named := regexp.MustCompile(`\bTest\w+`).FindAllString(testkit.ReadFile(t, "../.ci/run"), -1)
	require.NotEmpty(t, named)
	for _, name := range named {
		require.True(t, known[name], ".ci/run names %s, which does not exist", name)
	}
}

// The tests that pages cite must exist. Each row of docs/development/fault-matrix.md, or the head of
// its table, must cite one. A citation can have the test's file, as a link, and the names of subtests.
func TestFaultMatrixCitesExistingTests(t *testing.T) {
	page := testkit.ReadFile(t, "../docs/development/fault-matrix.md")
	in := make(map[string][]string)   // the files of a test
	code := make(map[string][]string) // the files' contents by directory
	for _, pattern := range []string{"*_test.go", "*/*_test.go", "../cryo/*_test.go", "../plugin/*_test.go", "../cmd/*/*_test.go", "../internal/*/*_test.go"} {
		files, err := filepath.Glob(pattern)
		require.NoError(t, err)
		for _, file := range files {
			content := testkit.ReadFile(t, file)
			code[filepath.Dir(file)] = append(code[filepath.Dir(file)], content)
			for _, f := range regexp.MustCompile(`(?m)^func ((?:Test|Fuzz)\w+)\(`).FindAllStringSubmatch(content, -1) {
				in[f[1]] = append(in[f[1]], file)
			}
		}
	}
	for path, page := range documents(t) {
		for _, name := range regexp.MustCompile("`((?:Test|Fuzz)[A-Z]\\w+)`").FindAllStringSubmatch(page, -1) {
			require.NotEmpty(t, in[name[1]], "%s: no test is called %s", path, name[1])
		}
	}
	named := regexp.MustCompile("`((?:Test|Fuzz)\\w+)((?:/[^`]+)?)`(?:\\]\\(\\.\\./\\.\\./([^)]+)\\))?")
	for _, n := range named.FindAllStringSubmatch(page, -1) {
		name, subtests, file := n[1], n[2], n[3]
		require.NotEmpty(t, in[name], "no test is called %s", name)
		if file != "" {
			file, err := filepath.Rel("tests", file)
			require.NoError(t, err)
			require.Contains(t, in[name], file, "%s is in another file", name)
		}
		for part := range strings.SplitSeq(strings.Trim(subtests, "/"), "/") {
			literal := `"` + strings.ReplaceAll(part, "_", " ") + `"`
			known := part == "" || part == ".*" || slices.ContainsFunc(code[filepath.Dir(in[name][0])], func(content string) bool {
				return strings.Contains(content, literal) || strings.Contains(content, `"`+part+`"`)
			})
			require.True(t, known, "%s has no subtest %s", name, part)
		}
	}

	rows := 0
	for table := range strings.SplitSeq(page, "\n\n") {
		header, body, ok := strings.Cut(table, "\n|---|")
		if !ok || named.MatchString(header) {
			continue
		}
		for _, row := range strings.Split(body, "\n")[1:] {
			if strings.HasPrefix(row, "|") {
				require.Regexp(t, named, row, "a row without a test")
				rows++
			}
		}
	}
	require.Greater(t, rows, 30)
}
