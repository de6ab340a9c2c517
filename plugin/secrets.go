package plugin

import (
	"fmt"
	"strings"
	"time"
	"unicode"

	"github.com/redpanda-data/benthos/v4/public/service"
)

// Fields whose values are secrets, or may be. Their errors do not contain the values.
//
// The type of these fields in the specification is any: for a field of type string, the engine
// converts numbers, booleans and dates to a text that differs from the one in the file (007
// becomes 7), before lint can see them.

// secretField is a field for one secret. Null is not a text: it is what YAML reads from ~, null or
// an empty environment variable without quotes.
func secretField[T any](path string, rule func(string) (T, error)) setting[T] {
	return newField(path, func(name string) *service.ConfigField {
		return service.NewAnyField(name).Default("").Secret()
	}, func(value any) (secret T, err error) {
		text, err := secretText("field "+path, value)
		if err != nil {
			return secret, err
		}
		return rule(text)
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

// secretMapField is a field for an object whose values may be secrets.
func secretMapField[T any](path string, rule func(map[string]string) (T, error)) setting[T] {
	return newField(path, func(name string) *service.ConfigField {
		return service.NewAnyMapField(name).Default(map[string]any{}).Secret()
	}, func(value any) (secrets T, err error) {
		values, ok := value.(map[string]any)
		if !ok {
			return secrets, nil // lint also calls the rule with each value
		}
		texts := make(map[string]string, len(values))
		for name, v := range values {
			if texts[name], err = secretText(fmt.Sprintf("field %s: the value of %q", path, name), v); err != nil {
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

// checkSecret returns an error if a text has characters that are hardly a part of a secret, but the
// usual traces of the file or the environment variable that it comes from. The other end of the
// connection would only report that the secret is wrong.
func checkSecret(what, text string) error {
	invisible := func(r rune) bool { return !unicode.IsGraphic(r) }
	switch {
	case strings.TrimSpace(text) != text:
		return fmt.Errorf("%s begins or ends with white space, such as a line break: remove it from the file or the environment variable", what)
	case strings.HasSuffix(text, `\n`): // the engine's spelling of a line break in an environment variable
		return fmt.Errorf(`%s ends with \n, a line break of the environment variable: remove it there`, what)
	case strings.ContainsFunc(text, invisible):
		return fmt.Errorf("%s contains an invisible character, such as a line break, a tab or a byte order mark: remove it", what)
	}
	return nil
}
