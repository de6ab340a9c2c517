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
)

const (
	flagResources = "resources"
	flagTimeout   = "timeout"
)

// checkCommand returns the command check, which lints configurations and tests their
// connections.
func checkCommand(schema func() *service.ConfigSchema) *cli.Command {
	return &cli.Command{
		Name:      "check",
		Usage:     "Lint configurations and test their connections, without running them",
		ArgsUsage: "config.yaml…",
		Description: `Lints each configuration, connects each of its inputs and outputs that supports a connection test, and
closes the connections. No message is sent, and no received message is acknowledged or rejected.
Each result is one line; the exit code is 1 if any of them is a failure:

  cryo-connect check pipeline.yaml
  cryo-connect check -r resources.yaml pipeline.yaml`,
		Flags: []cli.Flag{
			&cli.StringSliceFlag{Name: flagResources, Aliases: []string{"r"}, Usage: "a file with resources, or a glob pattern of such files, as for run"},
			&cli.DurationFlag{Name: flagTimeout, Value: 30 * time.Second, Usage: "the maximum duration of the tests of one configuration"},
		},
		Action: func(c *cli.Context) error {
			if c.NArg() == 0 {
				return cli.Exit("missing argument: a configuration file, for example: cryo-connect check pipeline.yaml", 1)
			}
			resources, err := service.Globs(service.OSFS(), c.StringSlice(flagResources)...)
			if err != nil {
				return cli.Exit(fmt.Errorf("resources: %w", err), 1)
			}
			k := checker{out: c.App.Writer, schema: schema(), resources: resources}
			for _, file := range c.Args().Slice() {
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

// checker checks configurations one after the other, and prints the results.
type checker struct {
	out       io.Writer
	schema    *service.ConfigSchema
	resources []string // paths of resource files
	failed    bool     // whether any result is a failure
}

// check lints one configuration, tests its connections and prints the results.
func (k *checker) check(ctx context.Context, file string) {
	stream, err := k.build(file)
	if err != nil {
		for _, err := range unjoin(err) {
			k.print(file, "failed: %v", err)
		}
		k.failed = true
		return
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
func (k *checker) build(file string) (*service.Stream, error) {
	config, err := k.read(file)
	if err != nil {
		return nil, err
	}
	builder := k.schema.Environment().NewStreamBuilder()
	builder.SetSchema(k.schema)
	builder.SetEnvVarLookupFunc(func(name string) (string, bool) { return lookupEnv(context.Background(), name) })
	builder.SetLogger(slog.New(slog.DiscardHandler)) // errors are reported as results
	if err := builder.SetYAML(config); err != nil {
		return nil, err
	}
	for _, file := range k.resources {
		more, err := k.read(file)
		if err == nil {
			err = builder.AddResourcesYAML(more)
		}
		if err != nil {
			return nil, fmt.Errorf("resource file %s: %w", file, err)
		}
	}
	return builder.Build()
}

// read reads and lints a file. It returns the lint errors joined.
func (k *checker) read(file string) (string, error) {
	config, err := os.ReadFile(file)
	if err != nil {
		return "", err
	}
	lints, err := k.schema.NewStreamConfigLinter().SetEnvVarLookupFunc(lookupEnv).LintYAML(config)
	if err != nil {
		return "", err
	}
	var errs []error
	for _, l := range lints {
		errs = append(errs, fmt.Errorf("line %d: %s", l.Line, l.What))
	}
	return string(config), errors.Join(errs...)
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

// print writes a result about a file as a single line, even if the text contains line breaks.
func (k *checker) print(file, format string, args ...any) {
	line := strings.Join(strings.Fields(fmt.Sprintf(format, args...)), " ")
	fmt.Fprintf(k.out, "%s: %s\n", file, line)
}

// unjoin returns the errors that were joined into err, or err itself.
func unjoin(err error) []error {
	if joined, ok := err.(interface{ Unwrap() []error }); ok {
		return joined.Unwrap()
	}
	return []error{err}
}
