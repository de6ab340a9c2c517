package main

import (
	"context"
	"fmt"
	"os"
	"strings"
	"unicode"
)

// unreadable is a value that YAML does not allow anywhere. The parser's error has no text of
// the configuration.
const unreadable = "\x00"

// lookupEnv looks up the environment variables of configurations.
//
// The engine replaces ${NAME} in the text of a configuration before the text is parsed. Single
// quotes around it keep every value as it is, except for those that quoteProblem describes:
// they become another token or another configuration, or appear in an error. Of a variable
// with TOKEN in its name, lookupEnv reports such a value and returns an unreadable one. So
// lint, check, the start and a reload fail, each in its own way.
func lookupEnv(_ context.Context, name string) (value string, ok bool) {
	value, ok = os.LookupEnv(name)
	if strings.Contains(strings.ToUpper(name), "TOKEN") {
		if problem := quoteProblem(value); problem != "" {
			fmt.Fprintf(os.Stderr, "The value of the environment variable %[1]s contains %[2]s, which '${%[1]s}' in a configuration does not preserve: use a token without it.\n", name, problem)
			return unreadable, true
		}
	}
	return value, ok
}

// quoteProblem returns what of a value single quotes do not preserve, or "". A line break at
// the end is left to the fields' own rules, which name the field.
func quoteProblem(value string) string {
	switch {
	case strings.Contains(value, "'"):
		return "a single quote"
	case strings.Contains(value, "${"):
		return "an interpolation"
	case strings.ContainsFunc(strings.TrimRight(value, "\n"), func(r rune) bool { return unicode.In(r, unicode.Cc, unicode.Zl, unicode.Zp) }):
		return "a line break or another control character"
	}
	return ""
}
