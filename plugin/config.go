package plugin

import (
	"errors"
	"fmt"
	"io/fs"
	"math"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/redpanda-data/benthos/v4/public/bloblang"
	"github.com/redpanda-data/benthos/v4/public/service"
	"gopkg.in/yaml.v3"
)

// The descriptions are GitHub Markdown. docsURL begins the links to the pages of documentation,
// because the descriptions are also shown outside of this repository.
const docsURL = "https://github.com/cryo-connect/cryo-connect/blob/main/docs/"

// cryoText begins the description of every component.
const cryoText = "Cryo is a protocol over WebSocket: each text or binary message is acknowledged by its receiver, and large data is sent as named streams. A connection between a client and a server is called a session.\n\n"

// reconnectText is part of the description of each component that dials.
const reconnectText = "After a lost connection it reconnects with the same session id: see [Reconnecting](" + docsURL + "reference/delivery.md#reconnecting)."

// metricsText ends the description of every component.
const metricsText = `
## Metrics

Metrics with the prefix ` + "`cryo_`" + ` count sessions, messages and bytes, acknowledgements and their latency, rejections and streams. [Metrics](` + docsURL + `operations/metrics.md) lists them and names the ones to watch.
`

// Each field has a rule: a function that converts its value to the setting, or returns an
// error. Building a component uses the setting, and lint reports the same error. The engine
// expects a lint rule as a Bloblang mapping of the value of one field; those of this plugin
// call the method cryo_lint, which runs the rule. Rules about several fields are checked when a
// component is built, so the lint rule of a component builds one. Therefore, a configuration
// that lint accepts can be started.

// setting is a field of the configuration with its rule. The last element of its path is the
// name of the field.
type setting[T any] struct {
	path  string
	lint  string // key in lintRules
	field func(name string) *service.ConfigField
	rule  func(value any) (T, error)
}

// newField returns a field. Fields with the same path must have the same rule.
func newField[T any](path string, field func(name string) *service.ConfigField, rule func(value any) (T, error)) setting[T] {
	return newVariant(path, path, field, rule)
}

// newVariant returns a field whose rule differs from that of another field with the same path.
// lint is the key of the rule in lintRules.
func newVariant[T any](lint, path string, field func(name string) *service.ConfigField, rule func(value any) (T, error)) setting[T] {
	lintRules[lint] = func(value any) error {
		_, err := rule(value)
		return err
	}
	return setting[T]{path, lint, field, rule}
}

// config returns the field as part of the specification of a component.
func (s setting[T]) config() *service.ConfigField {
	return s.field(s.path[strings.LastIndexByte(s.path, '.')+1:]).LintRule(lintMapping(s.lint))
}

// settingsReader reads the fields of a component.
type settingsReader struct {
	conf *service.ParsedConfig
	err  error // the first error, after which reads have no effect
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

// fail sets an error that lint also reports at the field, because either the field's rule
// returns it, or the engine does, for a mapping or an interpolation.
func (r *settingsReader) fail(err error) {
	if err != nil {
		r.err = &fieldError{err}
	}
}

// fieldError is an error that lint reports at a field, so that the rule of the component does
// not have to.
type fieldError struct{ error }

func (e *fieldError) Unwrap() error { return e.error }

// wholeNumber is a field for a whole number. Null means the default.
//
// Its type in the specification is any, because for a field of type int the engine's lint
// accepts other values without calling the rule, and converts null to 0.
func wholeNumber(path string, minimum, maximum, defaultValue int) setting[int] {
	return newField(path, anyField(defaultValue), func(value any) (int, error) {
		n, whole := toInt(value)
		switch {
		case value == nil:
			return defaultValue, nil
		case !whole:
			return 0, fmt.Errorf("field %s must be a whole number, got %s", path, printed(value))
		case n < float64(minimum):
			return 0, fmt.Errorf("field %s must be at least %d, got %v", path, minimum, value)
		case n > float64(maximum):
			return 0, fmt.Errorf("field %s must be at most %d, got %v", path, maximum, value)
		default:
			return int(n), nil
		}
	})
}

// printed returns a value as text for an error. A string is quoted, so that "5" does not look
// like 5.
func printed(value any) string {
	if text, ok := value.(string); ok {
		return strconv.Quote(text)
	}
	return fmt.Sprint(value)
}

func anyField(defaultValue any) func(name string) *service.ConfigField {
	return func(name string) *service.ConfigField { return service.NewAnyField(name).Default(defaultValue) }
}

// toInt returns a number of YAML or Bloblang, and reports whether it is a whole number.
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

// maxNumber is the maximum of fields that have no smaller one. Up to it, a float64 represents
// all whole numbers exactly.
const maxNumber = 1 << 53

// positiveInt is a field for a whole number of at least 1.
func positiveInt(path string, defaultValue int) setting[int] {
	return wholeNumber(path, 1, maxNumber, defaultValue)
}

// boolean is a field for true or false. Null means the default. Its type is any for the same
// reason as that of wholeNumber.
func boolean(path string, defaultValue bool) setting[bool] {
	return newField(path, anyField(defaultValue), func(value any) (bool, error) {
		switch value {
		case nil:
			return defaultValue, nil
		case true, "y", "Y", "yes", "on": // the booleans of YAML 1.1, which the engine accepts
			return true, nil
		case false, "n", "N", "no", "off":
			return false, nil
		default:
			return false, fmt.Errorf("field %s must be true or false, got %s", path, printed(value))
		}
	})
}

// stringOf is a field for a string. Null means the empty string.
func stringOf[T any](path string, rule func(string) (T, error)) setting[T] {
	return newField(path, service.NewStringField, textRule(rule))
}

func textRule[T any](rule func(string) (T, error)) func(value any) (T, error) {
	return func(value any) (T, error) {
		s, _ := value.(string) // the engine guarantees the type
		return rule(s)
	}
}

// anyText is the rule of a string that may have any value.
func anyText(s string) (string, error) { return s, nil }

// positiveDuration is a field for a duration greater than zero.
func positiveDuration(path string) setting[time.Duration] {
	return durationField(path, "greater than zero", func(d time.Duration) bool { return d > 0 })
}

// durationOrZero is a field for a duration of zero or more.
func durationOrZero(path string) setting[time.Duration] {
	return durationField(path, "zero or more", func(d time.Duration) bool { return d >= 0 })
}

// durationField is a field for a duration that valid accepts. must describes such durations.
func durationField(path, must string, valid func(time.Duration) bool) setting[time.Duration] {
	return newField(path, service.NewDurationField, textRule(func(s string) (time.Duration, error) {
		d, err := time.ParseDuration(s)
		switch {
		case err != nil:
			return 0, fmt.Errorf("field %s must be a duration such as 5s, got %q", path, s)
		case !valid(d):
			return 0, fmt.Errorf("field %s must be %s, got %s", path, must, s)
		default:
			return d, nil
		}
	}))
}

// oneOf is a field whose value is one of several words.
func oneOf(path string, words ...string) setting[string] {
	return newField(path, func(name string) *service.ConfigField {
		return service.NewStringEnumField(name, words...)
	}, wordRule(path, words))
}

// oneOfDescribed is a field whose value is one of several words, each of which has a
// description.
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
			return setting, nil // lint also calls the rule with each element
		}
		elements := make([]string, len(values))
		for i, v := range values {
			elements[i], _ = v.(string)
		}
		return rule(elements)
	}
}

// anyList is the rule of a list that may have any elements.
func anyList(elements []string) ([]string, error) { return elements, nil }

// lintRules holds the rules of fields and components, by the argument of cryo_lint. It is
// read-only after the package has been initialized.
var lintRules = make(map[string]func(value any) error)

// lintMapping returns a lint rule for the engine: a mapping that calls cryo_lint with the name
// of a rule in lintRules.
func lintMapping(rule string) string {
	registerLintMethod()
	return fmt.Sprintf("root = this.%s(%q)", lintMethod, rule)
}

const lintMethod = "cryo_lint"

var registerLintMethod = sync.OnceFunc(func() {
	spec := bloblang.NewPluginSpec().
		Description("Checks a field of a Cryo component. It is for the lint rules of these components only.").
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

// lintByBuilding adds the lint rule of a component. The rule builds the component from the
// configuration, discards it, and reports the error, unless a field has reported it already.
func lintByBuilding(name string, spec func() *service.ConfigSpec, build func(*service.ParsedConfig, *service.Resources) error) {
	lintRules[name] = func(value any) error {
		if stopping.Load() {
			return errors.New("the process is stopping: no further configuration is accepted")
		}
		text, err := yaml.Marshal(value)
		if err != nil {
			return err
		}
		conf, err := spec().ParseYAML(string(text), nil)
		if err != nil {
			return nil //nolint:nilerr // the engine's lint reports a missing field or a wrong type
		}
		err = build(conf, conf.Resources())
		if _, reported := errors.AsType[*fieldError](err); reported {
			return nil
		}
		_, isFile := errors.AsType[*fs.PathError](err)
		isPath := !errors.Is(err, syscall.EINVAL) // no machine has a path with a zero byte
		if isFile && isPath && !filesRequired.Load() {
			return nil // the file may exist on another machine, where the configuration runs
		}
		return err
	}
}

var filesRequired atomic.Bool

// RequireFiles makes lint report files that cannot be read, such as those of the field tls, for the
// rest of the process. Otherwise lint accepts them, because the configuration may run on another
// machine. Call it when the pipelines of a process have started: the engine lints a changed
// configuration before it ends the running pipeline, and builds the new one afterwards.
func RequireFiles() { filesRequired.Store(true) }

var stopping atomic.Bool

// RefuseConfigurations makes lint refuse the Cryo components of all configurations, for the rest of the
// process. Call it when the process stops and its pipelines still run, as in the engine's
// shutdown_delay: one that replaces another then would not drain, and would make /ready respond with 200.
func RefuseConfigurations() { stopping.Store(true) }

// readMapping reads an optional field that is a Bloblang mapping. It returns nil if the field
// is not set. The engine's lint reports syntax errors.
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

// readInterpolated reads a field with interpolations. The engine's lint reports syntax errors.
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
