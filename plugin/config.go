package plugin

import (
	"errors"
	"fmt"
	"io/fs"
	"math"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/redpanda-data/benthos/v4/public/bloblang"
	"github.com/redpanda-data/benthos/v4/public/service"
	"gopkg.in/yaml.v3"
)

// aboutCryo begins the description of every component.
const aboutCryo = "Cryo is a small protocol over WebSocket. Its two ends send each other messages, of text or bytes, and the receiver acknowledges each of them by its number; files and large data travel as named streams. A connection between a client and a server is called a session. "

// aboutMetrics ends it.
const aboutMetrics = `
== Metrics

Beside the engine's metrics for every component there are those whose names begin with ` + "`cryo_`" + `: sessions, messages and bytes by their type, what waits for its acknowledgement and for how long, what was rejected or came too late, streams. https://github.com/cryo-connect/cryo-connect/blob/main/docs/metrics.md[The list^] says what each of them means and which to watch.
`

// Each field has one rule: a function from the field's value to the setting, or to an
// error. The start uses the setting, and lint reports the error, in the same words. A lint
// rule of the engine is a Bloblang mapping that knows the value of one field; ours call the
// method cryo_lint, which runs the rule. What needs several fields is left to the rule of
// the component: it builds the component, and reports the error. So what lint accepts can
// be built.

// setting is a field of the configuration with its rule. Its name is the last part of its path.
type setting[T any] struct {
	path  string
	lint  string // in lintRules
	field func(name string) *service.ConfigField
	rule  func(value any) (T, error)
}

// newField makes a field. Fields of the same path must have the same rule.
func newField[T any](path string, of func(name string) *service.ConfigField, rule func(value any) (T, error)) setting[T] {
	return newVariant(path, path, of, rule)
}

// newVariant makes a field whose rule differs from that of another field of the same path.
func newVariant[T any](lint, path string, of func(name string) *service.ConfigField, rule func(value any) (T, error)) setting[T] {
	lintRules[lint] = func(value any) error {
		_, err := rule(value)
		return err
	}
	return setting[T]{path, lint, of, rule}
}

// config returns the field for the specification of a component.
func (s setting[T]) config() *service.ConfigField {
	return s.field(s.path[strings.LastIndexByte(s.path, '.')+1:]).LintRule(lintMapping(s.lint))
}

// settingsReader reads the fields of one component.
type settingsReader struct {
	conf *service.ParsedConfig
	err  error // first error; nothing is read after it
}

func (s setting[T]) read(r *settingsReader) (value T) {
	if r.err != nil {
		return value
	}
	raw, err := r.conf.FieldAny(strings.Split(s.path, ".")...)
	if err == nil {
		value, err = s.rule(raw)
	}
	r.fail(err)
	return value
}

// fail notes an error that lint reports at a field: by its rule, or, if it is a mapping
// or an interpolation that does not parse, by the engine's.
func (r *settingsReader) fail(err error) {
	if err != nil {
		r.err = &fieldError{err}
	}
}

// fieldError is an error that lint reports at a field.
type fieldError struct{ error }

func (e *fieldError) Unwrap() error { return e.error }

// wholeNumber is a field for a whole number. Null is the default.
//
// Its type in the specification is not that of numbers: the engine's lint accepts
// whatever is no number there, without asking the rule, and takes null for 0.
func wholeNumber(path string, least, most, byDefault int) setting[int] {
	return newField(path, anyField(byDefault), func(value any) (int, error) {
		n, whole := toInt(value)
		switch {
		case value == nil:
			return byDefault, nil
		case !whole:
			return 0, fmt.Errorf("field %s must be a whole number, got %v", path, value)
		case n < float64(least):
			return 0, fmt.Errorf("field %s must be at least %d, got %v", path, least, value)
		case n > float64(most):
			return 0, fmt.Errorf("field %s must be at most %d, got %v", path, most, value)
		default:
			return int(n), nil
		}
	})
}

func anyField(byDefault any) func(name string) *service.ConfigField {
	return func(name string) *service.ConfigField { return service.NewAnyField(name).Default(byDefault) }
}

// toInt reports whether a value of YAML or Bloblang is a whole number.
func toInt(value any) (n float64, whole bool) {
	switch v := value.(type) {
	case int:
		n = float64(v)
	case int64:
		n = float64(v)
	case uint64:
		n = float64(v)
	case float64:
		n = v
	default:
		return 0, false
	}
	return n, n == math.Trunc(n)
}

// maxNumber is the bound of numbers without another: all up to it are exact in a float64.
const maxNumber = 1 << 53

// positiveInt is a field for a whole number of at least 1.
func positiveInt(path string, byDefault int) setting[int] {
	return wholeNumber(path, 1, maxNumber, byDefault)
}

// boolean is a field for true or false. Null is the default. Its type is not that of
// booleans for the same reason as with wholeNumber.
func boolean(path string, byDefault bool) setting[bool] {
	return newField(path, anyField(byDefault), func(value any) (bool, error) {
		switch value {
		case nil:
			return byDefault, nil
		case true, "y", "Y", "yes", "on": // the words are those of YAML 1.1 that the engine takes
			return true, nil
		case false, "n", "N", "no", "off":
			return false, nil
		default:
			return false, fmt.Errorf("field %s must be true or false, got %v", path, value)
		}
	})
}

// stringOf is a field for a string. Null is the empty one.
func stringOf[T any](path string, rule func(string) (T, error)) setting[T] {
	return newField(path, service.NewStringField, textRule(rule))
}

func textRule[T any](rule func(string) (T, error)) func(value any) (T, error) {
	return func(value any) (T, error) {
		s, _ := value.(string) // it is one: the engine sees to that
		return rule(s)
	}
}

// anyText is the rule of a string that can have any value.
func anyText(s string) (string, error) { return s, nil }

// positiveDuration is a field for a duration above zero.
func positiveDuration(path string) setting[time.Duration] {
	return newField(path, service.NewDurationField, textRule(func(s string) (time.Duration, error) {
		d, err := time.ParseDuration(s)
		switch {
		case err != nil:
			return 0, fmt.Errorf("field %s must be a duration such as 5s, got %q", path, s)
		case d <= 0:
			return 0, fmt.Errorf("field %s must be above zero, got %s", path, s)
		default:
			return d, nil
		}
	}))
}

// oneOf is a field for one of several words, which are described where they need it.
func oneOf(path string, words ...string) setting[string] {
	return newField(path, func(name string) *service.ConfigField {
		return service.NewStringEnumField(name, words...)
	}, wordRule(path, words))
}

func oneOfDescribed(path string, described map[string]string, words ...string) setting[string] {
	return newField(path, func(name string) *service.ConfigField {
		return service.NewStringAnnotatedEnumField(name, described)
	}, wordRule(path, words))
}

func wordRule(path string, words []string) func(value any) (string, error) {
	last := len(words) - 1
	list := strings.Join(words[:last], ", ") + " or " + words[last]
	return textRule(func(s string) (string, error) {
		if !slices.Contains(words, s) {
			return "", fmt.Errorf("field %s must be %s, got %q", path, list, s)
		}
		return s, nil
	})
}

// listOf is a field for a list of strings.
func listOf[T any](path string, rule func([]string) (T, error)) setting[T] {
	return newField(path, service.NewStringListField, listRule(rule))
}

func listRule[T any](rule func([]string) (T, error)) func(value any) (T, error) {
	return func(value any) (setting T, err error) {
		values, ok := value.([]any)
		if !ok {
			return setting, nil // lint runs the rule on each element, too
		}
		elements := make([]string, len(values))
		for i, v := range values {
			elements[i], _ = v.(string)
		}
		return rule(elements)
	}
}

// anyList is the rule of a list that can have any value.
func anyList(elements []string) ([]string, error) { return elements, nil }

// mapOf is a field for an object with strings.
func mapOf[T any](path string, rule func(map[string]string) (T, error)) setting[T] {
	return newField(path, service.NewStringMapField, func(value any) (setting T, err error) {
		values, ok := value.(map[string]any)
		if !ok {
			return setting, nil // lint runs the rule on each value, too
		}
		texts := make(map[string]string, len(values))
		for name, v := range values {
			texts[name], _ = v.(string)
		}
		return rule(texts)
	})
}

// lintRules are the rules of fields and components by the names that the lint mappings
// have for them. It is not changed after the initialization of the package.
var lintRules = make(map[string]func(value any) error)

// lintMapping returns the lint rule for the engine.
func lintMapping(rule string) string {
	registerLintMethod()
	return fmt.Sprintf("root = this.%s(%q)", lintMethod, rule)
}

const lintMethod = "cryo_lint"

var registerLintMethod = sync.OnceFunc(func() {
	spec := bloblang.NewPluginSpec().
		Description("Checks a field of a Cryo component. The components' own lint rules use it; it is of no use elsewhere.").
		Param(bloblang.NewStringParam("rule").Description("The name of the field or component."))
	bloblang.MustRegisterMethodV2(lintMethod, spec, func(args *bloblang.ParsedParams) (bloblang.Method, error) {
		name, err := args.GetString("rule")
		return func(value any) (any, error) {
			rule, known := lintRules[name]
			if !known {
				return nil, fmt.Errorf("%s has no rule %q", lintMethod, name)
			}
			if err := rule(value); err != nil {
				return []any{err.Error()}, nil
			}
			return []any{}, nil
		}, err
	})
})

// lintByBuilding adds the rule of a component, which builds it and drops it.
func lintByBuilding(name string, spec func() *service.ConfigSpec, build func(*service.ParsedConfig, *service.Resources) error) {
	lintRules[name] = func(value any) error {
		text, err := yaml.Marshal(value)
		if err != nil {
			return err
		}
		conf, err := spec().ParseYAML(string(text), nil)
		if err != nil {
			return nil //nolint:nilerr // lint has reported it: a field is missing or has the wrong type
		}
		err = build(conf, conf.Resources())
		if _, reported := errors.AsType[*fieldError](err); reported {
			return nil
		}
		if _, isFile := errors.AsType[*fs.PathError](err); isFile {
			return nil // it may exist where the configuration runs
		}
		return err
	}
}

// readMapping reads an optional field for a Bloblang mapping: nil if it is not set. The
// engine's lint reports a mapping that does not parse.
func readMapping(r *settingsReader, path ...string) (mapping *bloblang.Executor, text string) {
	if r.err != nil || !r.conf.Contains(path...) {
		return nil, ""
	}
	text, err := r.conf.FieldString(path...)
	if err == nil && text != "" {
		mapping, err = r.conf.FieldBloblang(path...)
	}
	if err != nil {
		err = fmt.Errorf("field %s: %w", strings.Join(path, "."), err)
	}
	r.fail(err)
	return mapping, text
}

// readInterpolated reads a field with interpolations. The engine's lint reports one that
// does not parse.
func readInterpolated(r *settingsReader, path ...string) *service.InterpolatedString {
	if r.err != nil {
		return nil
	}
	s, err := r.conf.FieldInterpolatedString(path...)
	if err != nil {
		err = fmt.Errorf("field %s: %w", strings.Join(path, "."), err)
	}
	r.fail(err)
	return s
}
