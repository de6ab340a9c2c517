package plugin

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/redpanda-data/benthos/v4/public/service"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// Fields whose values are secrets, or may be. Their errors do not contain the values.
//
// The type of these fields in the specification is any: for a field of type string, the engine
// converts numbers, booleans and dates to a text that differs from the one in the file (007
// becomes 7), before lint can see them.

// secretField is a field for one secret. Null is not a text: it is what YAML reads from ~, null or
// an empty environment variable without quotes.
func secretField[T any](path string, rule func(what, text string) (T, error)) setting[T] {
	return newField(path, func(name string) *service.ConfigField {
		return service.NewAnyField(name).Default("").Secret()
	}, func(value any) (secret T, err error) {
		text, err := secretText("field "+path, value)
		if err != nil {
			return secret, err
		}
		return rule("field "+path, text)
	})
}

// secretListField is a field for a list of secrets.
func secretListField[T any](path string, rule func([]string) (T, error)) setting[T] {
	return newField(path, func(name string) *service.ConfigField {
		return service.NewAnyListField(name).Default([]any{}).Secret()
	}, func(value any) (secrets T, err error) {
		values, ok := value.([]any)
		if !ok {
			return secrets, nil // lint also calls the rule with each element
		}
		texts := make([]string, len(values))
		for i, v := range values {
			if texts[i], err = secretText(fmt.Sprintf("field %s: element %d", path, i+1), v); err != nil {
				return secrets, err
			}
		}
		return rule(texts)
	})
}

// secretMapField is a field for an object whose values may be secrets, and may be interpolated.
func secretMapField[T any](path string, rule func(map[string]*interpolated) (T, error)) setting[T] {
	return newField(path, func(name string) *service.ConfigField {
		return service.NewAnyMapField(name).Default(map[string]any{}).Secret()
	}, func(value any) (secrets T, err error) {
		values, ok := value.(map[string]any)
		if !ok {
			return secrets, nil // lint also calls the rule with each value
		}
		texts := make(map[string]*interpolated, len(values))
		for _, name := range slices.Sorted(maps.Keys(values)) {
			what := fmt.Sprintf("field %s: the value of %q", path, name)
			text, err := secretText(what, values[name])
			if err != nil {
				return secrets, err
			}
			if texts[name], err = parseInterpolated(what, text); err != nil {
				return secrets, err
			}
		}
		return rule(texts)
	})
}

// secretText returns a value that YAML has read as text. what names it in errors.
func secretText(what string, value any) (string, error) {
	kind := "an object or a list"
	switch value := value.(type) {
	case string:
		return value, nil
	case nil:
		kind = "null"
	case bool:
		kind = "a boolean"
	case time.Time:
		kind = "a date"
	case int, int64, uint64, float64:
		kind = "a number"
	}
	return "", fmt.Errorf("%s must be text, but YAML reads it as %s: put it in single quotes, for example '${TOKEN}'", what, kind)
}

// checkSecret returns an error if a text has characters that are unlikely in a secret, and are
// usual traces of the file or the environment variable that it comes from. The other end of the
// connection would only report that the secret is wrong.
func checkSecret(what, text string) error {
	invisible := func(r rune) bool { return !unicode.IsGraphic(r) }
	switch {
	case strings.TrimSpace(text) != text:
		return fmt.Errorf("%s begins or ends with whitespace, such as a line break: remove it from the file or the environment variable", what)
	case strings.HasSuffix(text, `\n`): // the engine's spelling of a line break in an environment variable
		return fmt.Errorf(`%s ends with \n, a line break in the environment variable: remove it from the variable`, what)
	case !utf8.ValidString(text):
		return fmt.Errorf("%s is not valid UTF-8", what)
	case strings.ContainsFunc(text, invisible):
		return fmt.Errorf("%s contains an invisible character, such as a line break, a tab or a byte order mark: remove it", what)
	}
	return nil
}

// interpolated is a secret that may contain interpolations, which are evaluated without a message.
type interpolated struct {
	what string // for errors
	text *service.InterpolatedString
}

// parseInterpolated checks a text without interpolations, too.
func parseInterpolated(what, text string) (*interpolated, error) {
	parsed, err := service.NewInterpolatedString(text)
	if err != nil { // the error may repeat the text
		return nil, fmt.Errorf("%s contains an interpolation that is invalid or fails: check what is between ${! and }", what)
	}
	if static, ok := parsed.Static(); ok {
		err = checkSecret(what, static)
	}
	return &interpolated{what, parsed}, err
}

// isEmpty reports whether the text is empty and has no interpolations.
func (s *interpolated) isEmpty() bool {
	text, static := s.text.Static()
	return static && text == ""
}

// evaluate returns the text. Its error does not contain a secret.
func (s *interpolated) evaluate() (text string, err error) {
	if text, static := s.text.Static(); static {
		return text, nil
	}
	text, err = s.resolve()
	switch unreadable, isFile := errors.AsType[*fs.PathError](err); {
	case isFile:
		return "", fmt.Errorf("%s: evaluating the interpolation: %w", s.what, unreadable)
	case err != nil:
		return "", fmt.Errorf("%s: evaluating the interpolation failed; the error is redacted, because it may contain a secret", s.what)
	case text == "" || text == "null":
		return "", fmt.Errorf("%s: the interpolation returned nothing, for example because a variable is not set", s.what)
	}
	return text, checkSecret(s.what, text)
}

func (s *interpolated) resolve() (text string, err error) {
	defer catchPanic(&err)
	return s.text.TryString(service.NewMessage(nil))
}

// withoutToken returns the error of a token file. It does not contain a path that may be the token
// itself, as with token_file: '${TOKEN}'. field is the field for tokens.
func withoutToken(err error, field string) error {
	unreadable, ok := errors.AsType[*fs.PathError](err)
	if !ok || isInDirectory(unreadable.Path) {
		return err
	}
	return fmt.Errorf("%w: the path is redacted, because it may be a token: begin a path with its directory, such as ./, and set a token in the field %s", unreadable.Err, field)
}

// isInDirectory reports whether a path begins with a directory that exists, such as ./ or /run.
func isInDirectory(path string) bool {
	root := len(path) - len(strings.TrimLeft(path, "/")) // any text that begins with a slash is in the root
	end := strings.IndexByte(path[root:], '/')
	if end < 0 {
		return false
	}
	info, err := os.Stat(path[:root+end])
	return err == nil && info.IsDir()
}

// tokenOfFile returns the token that is the content of a file, without the line break at its end.
func tokenOfFile(contents [][]byte) (string, error) {
	token := strings.TrimRight(string(contents[0]), "\r\n")
	if token == "" {
		return "", errors.New("the file is empty")
	}
	return token, checkSecret("the content of the file", token)
}

// tokensOfFile returns an Authorize function for the tokens in a file, one per line.
func tokensOfFile(contents [][]byte) (func(*cryo.Upgrade) error, error) {
	var tokens []string
	line := 0
	for token := range strings.Lines(string(contents[0])) {
		line++
		if token = strings.TrimRight(token, "\r\n"); token == "" {
			continue
		}
		if err := checkSecret(fmt.Sprintf("line %d", line), token); err != nil {
			return nil, err
		}
		tokens = append(tokens, token)
	}
	if len(tokens) == 0 {
		return nil, errors.New("the file has no token")
	}
	return cryo.Tokens(tokens...), nil
}
