package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/redpanda-data/benthos/v4/public/service"
	"github.com/urfave/cli/v2"
	"gopkg.in/yaml.v3"

	"github.com/cryo-connect/cryo-connect/plugin"
)

// The engine's flags of the command run that check has, too. The engine reads those that precede
// the command, except for flagSet and flagResources.
const (
	flagConfig    = "config" // only before the command
	flagEnvFile   = "env-file"
	flagResources = "resources"
	flagSet       = "set"
	flagTemplates = "templates"

	flagTimeout = "timeout"
)

// checkCommand returns the command check, which lints configurations and tests their
// connections.
func checkCommand(schema func() *service.ConfigSchema) *cli.Command {
	return &cli.Command{
		Name:      "check",
		Usage:     "Lint configurations, and test their files, addresses and connections, without running them",
		ArgsUsage: "config.yaml…",
		Description: `Lints each configuration, reads the files that its Cryo components name, connects each of its inputs and
outputs that supports a connection test, and closes the connections. No message is sent, and no received
message is acknowledged or rejected. Each result is one line; the exit code is 1 if any of them is a failure, and
0 if there are only warnings:

  cryo-connect check pipeline.yaml
  cryo-connect check -e .env --set input.label=feed -r "resources/*.yaml" pipeline.yaml`,
		Flags: []cli.Flag{
			&cli.StringSliceFlag{Name: flagEnvFile, Aliases: []string{"e"}, Usage: "import environment variables from a dotenv file, as for run"},
			&cli.StringSliceFlag{Name: flagResources, Aliases: []string{"r"}, Usage: "a file with resources, or a glob pattern of such files, as for run"},
			&cli.StringSliceFlag{Name: flagSet, Aliases: []string{"s"}, Usage: "set a field of the configurations, such as input.label=feed, as for run"},
			&cli.StringSliceFlag{Name: flagTemplates, Aliases: []string{"t"}, Usage: "a file with a template, or a glob pattern of such files, as for run"},
			&cli.DurationFlag{Name: flagTimeout, Value: 30 * time.Second, Usage: "the maximum duration of the tests of one configuration"},
		},
		Action: func(c *cli.Context) error {
			files := c.Args().Slice()
			if file := c.String(flagConfig); file != "" {
				files = append(files, file)
			}
			if len(files) == 0 {
				return cli.Exit("missing argument: a configuration file, for example: cryo-connect check pipeline.yaml", 1)
			}
			if err := setEnvironment(c.StringSlice(flagEnvFile)); err != nil {
				return flagFailed(flagEnvFile, err)
			}
			if err := registerTemplates(schema().Environment(), c.StringSlice(flagTemplates)); err != nil {
				return flagFailed(flagTemplates, err)
			}
			resources, err := service.Globs(service.OSFS(), stringsOf(c, flagResources)...)
			if err != nil {
				return flagFailed(flagResources, err)
			}
			overrides, err := parseOverrides(stringsOf(c, flagSet))
			if err != nil {
				return flagFailed(flagSet, err)
			}
			plugin.RequireFiles()
			k := checker{out: c.App.Writer, schema: schema(), resources: resources, overrides: overrides}
			for _, file := range files {
				ctx, cancel := context.WithTimeout(c.Context, c.Duration(flagTimeout))
				k.check(ctx, file)
				cancel()
			}
			if k.failed {
				return cli.Exit("", 1)
			}
			return nil
		},
	}
}

// flagFailed returns the error of a flag as a single line, with which the process exits.
func flagFailed(flag string, err error) error {
	return cli.Exit(fmt.Sprintf("--%s: %s", flag, singleLine(err.Error())), 1)
}

// stringsOf returns the values of a flag that may precede the command. As for run, those behind the
// command replace those before it.
func stringsOf(c *cli.Context, flag string) []string {
	for _, c := range c.Lineage() {
		if values := c.StringSlice(flag); len(values) > 0 {
			return values
		}
	}
	return nil
}

// setEnvironment sets the environment variables of dotenv files.
func setEnvironment(patterns []string) error {
	return readEach(patterns, func(content []byte) error {
		variables, err := service.ParseEnvFile(content)
		if err != nil {
			return err
		}
		for name, value := range variables {
			if err := os.Setenv(name, value); err != nil {
				return err
			}
		}
		return nil
	})
}

// registerTemplates lints templates and adds them to an environment.
func registerTemplates(env *service.Environment, patterns []string) error {
	return readEach(patterns, func(content []byte) error {
		lints, err := env.NewStreamTemplateTester().LintYAML(content)
		if err != nil {
			return err
		}
		if len(lints) > 0 {
			return joinLints(lints, inFile)
		}
		return env.RegisterTemplateYAML(string(content))
	})
}

// readEach calls f with the content of each file that a pattern matches.
func readEach(patterns []string, f func(content []byte) error) error {
	paths, err := service.Globs(service.OSFS(), patterns...)
	if err != nil {
		return err
	}
	for _, path := range paths {
		content, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		if err := f(content); err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
	}
	return nil
}

// override is a field that --set sets.
type override struct {
	path  []string
	value *yaml.Node
}

// parseOverrides reads expressions such as input.label=feed.
func parseOverrides(expressions []string) ([]override, error) {
	var overrides []override
	for _, expression := range expressions {
		path, text, _ := strings.Cut(expression, "=")
		if path == "" || text == "" {
			return nil, errors.New("must be of the form path=value") // the text may be a secret
		}
		var value yaml.Node
		if err := yaml.Unmarshal([]byte(text), &value); err != nil || len(value.Content) == 0 {
			return nil, fmt.Errorf("the value of %s is not valid YAML", path)
		}
		overrides = append(overrides, override{strings.Split(path, "."), value.Content[0]})
	}
	return overrides, nil
}

// setPath sets the value at a path below a node. Missing objects and lists are added. An element of a
// list is identified by its index; - adds one.
func setPath(node *yaml.Node, path []string, value *yaml.Node) error {
	if len(path) == 0 {
		*node = *value
		return nil
	}
	name := path[0]
	if name == "-" && node.Kind == 0 {
		*node = yaml.Node{Kind: yaml.SequenceNode}
	}
	switch node.Kind {
	case yaml.SequenceNode:
		if name == "-" {
			node.Content = append(node.Content, &yaml.Node{})
			return setPath(node.Content[len(node.Content)-1], path[1:], value)
		}
		index, err := strconv.Atoi(name)
		if err != nil || index < 0 || index >= len(node.Content) {
			return fmt.Errorf("%s is not an index of a list of %d elements", name, len(node.Content))
		}
		return setPath(node.Content[index], path[1:], value)
	case yaml.MappingNode:
		for i := 0; i+1 < len(node.Content); i += 2 {
			if node.Content[i].Value == name {
				return setPath(node.Content[i+1], path[1:], value)
			}
		}
	default:
		*node = yaml.Node{Kind: yaml.MappingNode}
	}
	added := &yaml.Node{}
	node.Content = append(node.Content, &yaml.Node{Kind: yaml.ScalarNode, Value: name}, added)
	return setPath(added, path[1:], value)
}

// checker checks configurations one after the other, and prints the results.
type checker struct {
	out       io.Writer
	schema    *service.ConfigSchema
	resources []string // paths of resource files
	overrides []override
	failed    bool // whether any result is a failure
}

// check lints one configuration, tests its connections and prints the results.
func (k *checker) check(ctx context.Context, file string) {
	stream, whole, err := k.build(file)
	if err != nil {
		for _, err := range unjoin(err) {
			k.print(file, "failed: %v", err)
		}
		k.failed = true
		return
	}
	for _, warning := range whole.endlessBatches() {
		k.print(file, "warning: %s", warning)
	}
	if err := whole.testHTTP(ctx); err != nil {
		k.print(file, "warning: %v", err)
	}
	results, err := stream.ConnectionTest(ctx)
	if err != nil {
		k.print(file, "failed: %v", err)
		k.failed = true
	}
	slices.SortStableFunc(results, byPath) // the engine returns the inputs of a broker in random order
	for _, r := range results {
		k.report(file, r)
	}
}

// byPath compares the results of two components by their paths. Indexes within a path are
// compared as numbers.
func byPath(a, b *service.ConnectionTestResult) int {
	return slices.CompareFunc(a.Path, b.Path, func(a, b string) int {
		m, errA := strconv.Atoi(a)
		n, errB := strconv.Atoi(b)
		if errA == nil && errB == nil {
			return cmp.Or(cmp.Compare(m, n), cmp.Compare(a, b))
		}
		return cmp.Compare(a, b)
	})
}

// build builds the pipeline of a configuration without starting it.
func (k *checker) build(file string) (*service.Stream, *configuration, error) {
	config, err := k.read(file)
	lookup, describe := lookupEnv, inFile
	if err == nil && len(k.overrides) > 0 {
		config, err = k.override(config)
		lookup, describe = keepVariable, withSet
	}
	whole := &configuration{}
	if err == nil && whole.add(k.schema, config, lookup) == nil { // lint reports the error
		var delay time.Duration
		delay, err = whole.shutdownDelay()
		plugin.SetShutdownDelay(delay) // for lint
	}
	if err == nil {
		err = k.lint(config, lookup, describe)
	}
	if err != nil {
		return nil, nil, err
	}
	builder := k.schema.Environment().NewStreamBuilder()
	builder.SetSchema(k.schema)
	builder.SetLogger(slog.New(slog.DiscardHandler)) // errors are reported as results
	setLookup(builder, lookup)
	if err := builder.SetYAML(config); err != nil {
		return nil, nil, err
	}
	setLookup(builder, lookupEnv)
	for _, file := range k.resources {
		more, err := k.read(file)
		if err == nil {
			err = k.lint(more, lookupEnv, inFile)
		}
		if err == nil {
			err = builder.AddResourcesYAML(more)
		}
		if err == nil {
			err = whole.add(k.schema, more, lookupEnv)
		}
		if err != nil {
			return nil, nil, fmt.Errorf("resource file %s: %w", file, err)
		}
	}
	stream, err := builder.Build()
	return stream, whole, err
}

func (*checker) read(file string) (string, error) {
	content, err := os.ReadFile(file)
	return string(content), err
}

// lookup returns the value of an environment variable.
type lookup = func(ctx context.Context, name string) (value string, ok bool)

func setLookup(builder *service.StreamBuilder, lookup lookup) {
	builder.SetEnvVarLookupFunc(func(name string) (string, bool) { return lookup(context.Background(), name) })
}

// keepVariable keeps what looks like a variable where variables have been replaced already.
func keepVariable(_ context.Context, name string) (string, bool) { return "${" + name + "}", true }

// lint returns the lint errors of a configuration, joined.
func (k *checker) lint(config string, lookup lookup, describe func(service.Lint) error) error {
	lints, err := k.schema.NewStreamConfigLinter().SetEnvVarLookupFunc(lookup).LintYAML([]byte(config))
	if err != nil {
		return err
	}
	return joinLints(lints, describe)
}

// joinLints returns lint errors as joined errors.
func joinLints(lints []service.Lint, describe func(service.Lint) error) error {
	var errs []error
	for _, l := range lints {
		errs = append(errs, describe(l))
	}
	return errors.Join(errs...)
}

func inFile(l service.Lint) error { return fmt.Errorf("line %d: %s", l.Line, l.What) }

// withSet describes a lint error of a configuration with overrides. Its line is not one of the file.
func withSet(l service.Lint) error { return fmt.Errorf("with --%s: %s", flagSet, l.What) }

// override returns a configuration with the overrides, and without variables. As for run, the result
// must pass lint, but the file need not.
func (k *checker) override(config string) (string, error) {
	lints, err := k.schema.NewStreamConfigLinter().SetEnvVarLookupFunc(lookupEnv).LintYAML([]byte(config))
	if err != nil {
		return "", err
	}
	for _, l := range lints {
		if l.Type == service.LintMissingEnvVar {
			return "", errors.New(l.What)
		}
	}
	config, err = replaceVariables(config)
	if err != nil {
		return "", err
	}
	var root yaml.Node
	if err := yaml.Unmarshal([]byte(config), &root); err != nil {
		return "", err
	}
	if len(root.Content) == 0 { // an empty file
		root = yaml.Node{Kind: yaml.DocumentNode, Content: []*yaml.Node{{}}}
	}
	for _, o := range k.overrides {
		if err := setPath(root.Content[0], o.path, o.value); err != nil {
			return "", fmt.Errorf("--%s %s: %w", flagSet, strings.Join(o.path, "."), err)
		}
	}
	result, err := yaml.Marshal(&root)
	return string(result), err
}

// replaceVariables replaces the environment variables in a text. The engine does so only in YAML that
// it parses, so the text becomes the value of a field.
func replaceVariables(text string) (string, error) {
	const field, indent = "text", "\n  "
	querier := service.NewEmptyEnvironment().CoreConfigSchema("", "").Field(service.NewStringField(field)).NewConfigQuerier()
	querier.SetEnvVarLookupFunc(lookupEnv)
	parsed, err := querier.ParseYAML(field + ": |2+" + indent + strings.ReplaceAll(text, "\n", indent))
	if err != nil {
		return "", err
	}
	value, err := parsed.FieldAtPath(field)
	if err != nil {
		return "", err
	}
	return value.FieldString()
}

// report prints the result of a component's connection test.
func (k *checker) report(file string, r *service.ConnectionTestResult) {
	name := strings.Join(r.Path, ".")
	if r.Label != "" {
		name += " " + r.Label
	}
	switch {
	case r.Err == nil:
		k.print(file, "%s: ok", name)
	case errors.Is(r.Err, service.ErrConnectionTestNotSupported):
		k.print(file, "%s: not tested: the component has no connection test", name)
	default:
		k.print(file, "%s: failed: %v", name, r.Err)
		k.failed = true
	}
}

// print writes a result about a file as a single line.
func (k *checker) print(file, format string, args ...any) {
	fmt.Fprintf(k.out, "%s: %s\n", file, singleLine(fmt.Sprintf(format, args...)))
}

// singleLine replaces each line break by a space.
func singleLine(text string) string { return strings.Join(strings.Fields(text), " ") }

// unjoin returns the errors that were joined into err, or err itself.
func unjoin(err error) []error {
	if joined, ok := err.(interface{ Unwrap() []error }); ok {
		return joined.Unwrap()
	}
	return []error{err}
}
