package tests

import (
	"go/ast"
	"go/parser"
	gotoken "go/token"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// documents are the repository's pages, by path.
func documents(t *testing.T) map[string]string {
	t.Helper()
	pages := make(map[string]string)
	for _, pattern := range []string{"../*.md", "../docs/*.md", "../docs/components/*/*.md"} {
		files, err := filepath.Glob(pattern)
		require.NoError(t, err)
		for _, file := range files {
			content, err := os.ReadFile(file)
			require.NoError(t, err)
			pages[filepath.Clean(file)] = string(content)
		}
	}
	require.NotEmpty(t, pages)
	return pages
}

// anchors are the headings of a page, as links name them.
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
			if strings.Contains(link[1], "://") || strings.HasPrefix(link[1], "mailto:") {
				continue
			}
			target, anchor, _ := strings.Cut(link[1], "#")
			file := path
			if target != "" {
				file = filepath.Join(filepath.Dir(path), target)
				_, err := os.Stat(file)
				require.NoError(t, err, "%s links to %s", path, link[1])
			}
			if other, ok := pages[file]; ok && anchor != "" {
				require.True(t, anchors(other)[anchor], "%s links to %s, which has no such heading", path, link[1])
			}
		}
	}
}

// declared are the names in a package: of types, functions, constants and
// variables as they are, of methods and fields behind their type's.
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

// TestTheArchitecturePageNamesExistingCode keeps the names in docs/architecture.md from
// outliving what they name.
func TestTheArchitecturePageNamesExistingCode(t *testing.T) {
	page, err := os.ReadFile("../docs/architecture.md")
	require.NoError(t, err)
	names := declared(t, "../cryo")
	for name := range declared(t, "../plugin") {
		names[name] = true
	}
	found := 0
	// Those of the diagram are not in backquotes.
	pattern := regexp.MustCompile("`(?:cryo\\.)?([A-Za-z]+(?:\\.[A-Za-z]+)?)`|\\b((?:Session|receiver|outbox)\\.[A-Za-z]+)")
	for _, match := range pattern.FindAllStringSubmatch(string(page), -1) {
		name := match[1] + match[2]
		if name == strings.ToLower(name) && !names[name] {
			continue // a package, a component, a field or a file
		}
		require.True(t, names[name], "docs/architecture.md names %s, which is not there", name)
		found++
	}
	require.Greater(t, found, 30)
}

// TestTheGuaranteesCiteExistingTests: each row of docs/guarantees.md names the
// test that shows it, or its table does. A test may be named with its file, as a
// link, and with what its subtests are called.
func TestTheGuaranteesCiteExistingTests(t *testing.T) {
	page, err := os.ReadFile("../docs/guarantees.md")
	require.NoError(t, err)
	in := make(map[string][]string)   // files of a test
	code := make(map[string][]string) // of a directory
	for _, pattern := range []string{"*_test.go", "*/*_test.go", "../cryo/*_test.go", "../plugin/*_test.go", "../cmd/*/*_test.go", "../internal/*/*_test.go"} {
		files, err := filepath.Glob(pattern)
		require.NoError(t, err)
		for _, file := range files {
			content, err := os.ReadFile(file)
			require.NoError(t, err)
			code[filepath.Dir(file)] = append(code[filepath.Dir(file)], string(content))
			for _, f := range regexp.MustCompile(`(?m)^func ((?:Test|Fuzz)\w+)\(`).FindAllStringSubmatch(string(content), -1) {
				in[f[1]] = append(in[f[1]], file)
			}
		}
	}
	named := regexp.MustCompile("`((?:Test|Fuzz)\\w+)((?:/[^`]+)?)`(?:\\]\\(\\.\\./([^)]+)\\))?")
	for _, n := range named.FindAllStringSubmatch(string(page), -1) {
		name, subtests, file := n[1], n[2], n[3]
		require.NotEmpty(t, in[name], "there is no test %s", name)
		if file != "" {
			file, err := filepath.Rel("tests", file)
			require.NoError(t, err)
			require.Contains(t, in[name], file, "%s is elsewhere", name)
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
	for table := range strings.SplitSeq(string(page), "\n\n") {
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
