package tests

import (
	"go/ast"
	"go/parser"
	gotoken "go/token"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/internal/testkit"
)

const troubleshootingPage = "../docs/operations/troubleshooting.md"

// texts are string literals of the program. A verb of a format becomes "…", and so does every
// other operand of a concatenation.
type texts struct {
	all  []string
	logs map[string]bool // the messages of WARN and ERROR lines
}

var formatVerb = regexp.MustCompile(`%(?:\[\d\])?[-+#.\d]*[a-zA-Z]`)

// programTexts returns the texts of the packages that log or return errors.
func programTexts(t *testing.T) texts {
	t.Helper()
	found := texts{logs: make(map[string]bool)}
	for _, pattern := range []string{"../cmd/*/*.go", "../cryo/*.go", "../plugin/*.go", "../internal/*/*.go"} {
		files, err := filepath.Glob(pattern)
		require.NoError(t, err)
		for _, file := range files {
			if strings.HasSuffix(file, "_test.go") {
				continue
			}
			parsed, err := parser.ParseFile(gotoken.NewFileSet(), file, nil, parser.SkipObjectResolution)
			require.NoError(t, err)
			ast.Inspect(parsed, func(n ast.Node) bool {
				switch n := n.(type) {
				case *ast.BasicLit:
					found.all = append(found.all, formatVerb.ReplaceAllString(textOf(n), "…"))
				case *ast.CallExpr:
					method, ok := n.Fun.(*ast.SelectorExpr)
					if ok && len(n.Args) > 0 && slices.Contains([]string{"Warn", "Error", "report"}, method.Sel.Name) {
						if text := textOf(n.Args[0]); strings.Trim(text, "…") != "" {
							found.logs[text] = true
						}
					}
				}
				return true
			})
		}
	}
	require.Greater(t, len(found.logs), 30)
	return found
}

// textOf returns the value of a literal or of a concatenation with literals.
func textOf(e ast.Expr) string {
	switch e := e.(type) {
	case *ast.BasicLit:
		if text, err := strconv.Unquote(e.Value); err == nil && e.Kind == gotoken.STRING {
			return text
		}
	case *ast.BinaryExpr:
		return textOf(e.X) + textOf(e.Y)
	}
	return "…"
}

// has reports whether each part of a quotation, which "…" separates, is in a literal.
func (x texts) has(quotation string) bool {
	literals := strings.Join(x.all, "\n")
	for part := range strings.SplitSeq(quotation, "…") {
		if !strings.Contains(literals, strings.TrimSpace(part)) {
			return false
		}
	}
	return true
}

// quotations returns the quotations of the first column of a section's table.
func quotations(t *testing.T, section string) []string {
	t.Helper()
	_, section, ok := strings.Cut(testkit.ReadFile(t, troubleshootingPage), "\n## "+section+"\n")
	require.True(t, ok)
	section, _, _ = strings.Cut(section, "\n## ")
	var found []string
	for _, row := range regexp.MustCompile("(?m)^\\| (`.*?`) \\|").FindAllStringSubmatch(section, -1) {
		found = append(found, find(row[1], "`([^`]+)`")...)
	}
	require.NotEmpty(t, found)
	return found
}

func TestTroubleshootingListsEveryWarningAndErrorOfTheLog(t *testing.T) {
	program := programTexts(t)
	listed := make(map[string]bool)
	for _, line := range quotations(t, "Log lines") {
		listed[line] = true
		require.True(t, program.logs[line], "the program does not log %q", line)
	}
	for line := range program.logs {
		require.True(t, listed[line], "the page does not list %q", line)
	}
}

func TestTroubleshootingQuotesErrorsOfTheProgram(t *testing.T) {
	program := programTexts(t)
	for _, section := range []string{"An output does not deliver", "Errors in a configuration"} {
		for _, text := range quotations(t, section) {
			require.True(t, program.has(text), "the program has no error %q", text)
		}
	}
}
