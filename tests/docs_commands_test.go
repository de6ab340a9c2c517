package tests

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/internal/testkit"
)

// Paths of the repository, subcommands and flags must exist in the commands that the pages show,
// in blocks of shell and in the text.
func TestCommandsInTheDocumentationExist(t *testing.T) {
	ownPath := regexp.MustCompile(`^(?:\./|config/|deploy/|docs/|tests/)`)
	checked := 0
	for path, page := range documents(t) {
		for _, c := range commandsOn(page) {
			checked++
			for _, argument := range c.arguments {
				if file, _, _ := strings.Cut(argument, "..."); ownPath.MatchString(argument) {
					_, err := os.Stat(filepath.Join("..", file))
					require.NoError(t, err, "%s: %s", path, c)
				}
			}
			switch {
			case c.program == "cryo-connect":
				flags := help(t)
				if subcommand := c.subcommand(); subcommand != "" {
					require.Regexp(t, `(?m)^   `+regexp.QuoteMeta(subcommand)+`\s`, flags, "%s: %s", path, c)
					flags += help(t, subcommand)
				}
				c.wantFlags(t, flags)
			case c.program == "go run" && ownPath.MatchString(c.subcommand()):
				c.wantFlags(t, flagsDefinedIn(t, filepath.Join("..", c.subcommand())))
			}
		}
	}
	require.Greater(t, checked, 15)
}

// command is an invocation of cryo-connect or of Go.
type command struct {
	program   string // cryo-connect, or the go command with its subcommand
	arguments []string
}

func (c command) String() string { return c.program + " " + strings.Join(c.arguments, " ") }

func isFlag(argument string) bool { return strings.HasPrefix(argument, "-") }

// subcommand returns the first argument that is no flag, or "".
func (c command) subcommand() string {
	if i := slices.IndexFunc(c.arguments, func(a string) bool { return !isFlag(a) }); i >= 0 {
		return c.arguments[i]
	}
	return ""
}

// wantFlags wants the command's flags to be in a text that defines flags.
func (c command) wantFlags(t *testing.T, definitions string) {
	t.Helper()
	for _, argument := range c.arguments {
		if name, _, _ := strings.Cut(argument, "="); isFlag(argument) {
			require.Regexp(t, `[\s,]`+regexp.QuoteMeta(name)+`[\s,]`, definitions, c)
		}
	}
}

// commandsOn returns the commands that a page shows.
func commandsOn(page string) []command {
	shown := blocks(page, "sh")
	for _, span := range regexp.MustCompile("`([^`\n]+)`").FindAllStringSubmatch(page, -1) {
		shown = append(shown, span[1])
	}
	invocation := regexp.MustCompile(`(?m)(?:^|[;&|(] *|exec )(?:[A-Z_]+=\S+ )*(?:\./)?(cryo-connect|go (?:run|build|test|vet|generate)) ([^;&|\n>#]*)`)
	var found []command
	for _, text := range shown {
		for _, match := range invocation.FindAllStringSubmatch(strings.ReplaceAll(text, "\\\n", " "), -1) {
			found = append(found, command{match[1], strings.Fields(match[2])})
		}
	}
	return found
}

// helps are the texts of help, by subcommand.
var helps = make(map[string]string)

// help returns what cryo-connect, or one of its subcommands, prints about its flags.
func help(t *testing.T, subcommand ...string) string {
	t.Helper()
	name := strings.Join(subcommand, " ")
	if helps[name] == "" {
		helps[name] = testkit.Output(t, testkit.Command(t, append(subcommand, "--help")...))
	}
	return helps[name]
}

// flagsDefinedIn returns the flags that the program of a directory defines.
func flagsDefinedIn(t *testing.T, dir string) string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "*.go"))
	require.NoError(t, err)
	flags := " "
	for _, file := range files {
		for _, name := range regexp.MustCompile(`flag\.\w+\("([^"]+)"`).FindAllStringSubmatch(testkit.ReadFile(t, file), -1) {
			flags += "-" + name[1] + " "
		}
	}
	return flags
}
