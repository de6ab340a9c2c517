package main

import (
	"context"
	"fmt"
	"maps"
	"net"
	"slices"
	"time"

	"github.com/redpanda-data/benthos/v4/public/service"
	"gopkg.in/yaml.v3"
)

// configuration is a configuration with its resource files, of which check reads fields that no
// component sees.
type configuration struct {
	main  *service.ConfigQueryFile
	files []*service.ConfigQueryFile // main and the resource files
}

// add parses a file. The first one is the main file.
func (c *configuration) add(schema *service.ConfigSchema, config string, lookup lookup) error {
	querier := schema.NewConfigQuerier()
	querier.SetEnvVarLookupFunc(lookup)
	file, err := querier.ParseYAML(config)
	if err != nil {
		return err
	}
	if c.files = append(c.files, file); c.main == nil {
		c.main = file
	}
	return nil
}

// text returns the value of a field of the main file.
func (c *configuration) text(path ...string) (string, error) {
	field, err := c.main.FieldAtPath(path...)
	if err != nil {
		return "", err
	}
	return field.FieldString()
}

// shutdownDelay returns the engine's shutdown_delay. The error is that of run.
func (c *configuration) shutdownDelay() (time.Duration, error) {
	delay, err := durationOf(c.text, shutdownDelay)
	if err == nil {
		_, err = durationOf(c.text, shutdownTimeout)
	}
	return delay, err
}

// testHTTP opens and closes the socket of the field http.address. The error is only a warning: run logs
// it, and runs the pipelines.
func (c *configuration) testHTTP(ctx context.Context) error {
	enabled, err := c.main.FieldAtPath("http", "enabled")
	if err != nil {
		return err
	}
	if on, err := enabled.FieldBool(); err != nil || !on {
		return err
	}
	address, err := c.text("http", "address")
	if err != nil || address == "" {
		return err
	}
	socket, err := (&net.ListenConfig{}).Listen(ctx, "tcp", address)
	if err != nil {
		return fmt.Errorf("field http.address: %w: the pipeline would run, but without metrics and health checks", err)
	}
	return socket.Close()
}

// endlessBatches returns a warning about each output whose batches may wait for messages that do not
// come, and so keep the messages of a Cryo input unacknowledged. Components of templates are not seen.
func (c *configuration) endlessBatches() (warnings []string) {
	receives := false
	c.each([]string{"input", "input_resources"}, func(_, name string, _ any) {
		receives = receives || name == "cryo" || name == "cryo_server"
	})
	if !receives {
		return nil
	}
	c.each([]string{"output", "output_resources"}, func(path, name string, value any) {
		if policy, ok := value.(map[string]any); ok && name == "batching" && isEndless(policy) {
			warnings = append(warnings, "field "+path+" has no period: the messages of a batch that does not fill stay unacknowledged forever: set a period, such as 1s")
		}
	})
	return warnings
}

// isEndless reports whether a batch can wait for any time. A policy with a check may end it.
func isEndless(policy map[string]any) bool {
	set := func(field string) bool {
		switch value := policy[field]; value {
		case nil, "", 0, "0":
			return false
		default:
			return true
		}
	}
	one := policy["count"] == 1 || policy["count"] == "1" // each message is a batch
	return (set("count") || set("byte_size")) && !one && !set("period") && !set("check")
}

// each calls f for every field within root fields of the files, in the order of their names.
func (c *configuration) each(roots []string, f func(path, name string, value any)) {
	for _, file := range c.files {
		for _, root := range roots {
			field, err := file.FieldAtPath(root)
			if err != nil {
				continue // lint reports it
			}
			if value, err := field.FieldAny(); err == nil {
				eachField(root, value, f)
			}
		}
	}
}

func eachField(path string, value any, f func(path, name string, value any)) {
	switch v := value.(type) {
	case *yaml.Node:
		var decoded any
		if v.Decode(&decoded) == nil {
			eachField(path, decoded, f)
		}
	case map[string]any:
		for _, name := range slices.Sorted(maps.Keys(v)) {
			below := path + "." + name
			f(below, name, v[name])
			eachField(below, v[name], f)
		}
	case []any:
		for i, child := range v {
			eachField(fmt.Sprintf("%s.%d", path, i), child, f)
		}
	}
}
