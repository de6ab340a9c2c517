package main

import (
	"context"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/redpanda-data/benthos/v4/public/service"
	"github.com/stretchr/testify/require"
)

// warningsOf returns the fields that endlessBatches warns about.
func warningsOf(t *testing.T, configs ...string) (fields []string) {
	t.Helper()
	c := &configuration{}
	for _, config := range configs {
		require.NoError(t, c.add(service.GlobalEnvironment().FullConfigSchema("", ""), config, func(_ context.Context, name string) (string, bool) {
			return map[string]string{"COUNT": "10"}[name], true
		}))
	}
	for _, warning := range c.endlessBatches() {
		field, _, ok := strings.Cut(warning, " has no period")
		require.True(t, ok, warning)
		fields = append(fields, strings.TrimPrefix(field, "field "))
	}
	return fields
}

func TestCheckWarnsAboutBatchesThatMayNeverFill(t *testing.T) {
	const input = "input: { cryo_server: { address: '127.0.0.1:0', tokens: [ a ] } }\n"
	for _, c := range []struct {
		batching string
		endless  bool
	}{
		{"count: 10", true},
		{"count: ${COUNT}", true},
		{"byte_size: 1000", true},
		{"count: 10, period: ''", true},
		{"count: 10, processors: [ archive: { format: lines } ]", true},
		{"count: 10, period: 1s", false},
		{"byte_size: 1000, period: 1s", false},
		{"count: 10, check: this.last", false},
		{"period: 1s", false},
		{"count: 1, byte_size: 1000", false},
		{"count: 0", false},
		{"", false},
	} {
		var want []string
		if c.endless {
			want = []string{"output.drop_on.output.http_client.batching"}
		}
		require.Equal(t, want, warningsOf(t, input+"output: { drop_on: { error: true, output: { http_client: { url: x, batching: { "+c.batching+" } } } } }"), c.batching)
	}

	const batches = "broker: { outputs: [ { drop: {} }, { redpanda: { batching: { count: 5 } } } ], batching: { byte_size: 5 } }"
	require.Equal(t, []string{"output.broker.batching", "output.broker.outputs.1.redpanda.batching"}, warningsOf(t, input+"output: { "+batches+" }"))
	require.Equal(t, []string{"output_resources.1.cryo.batching"}, warningsOf(t,
		"input: { broker: { inputs: [ { cryo: { url: ws://x } } ] } }\noutput: { resource: b }\noutput_resources: [ { label: a, drop: {} }, { label: b, cryo: { batching: { count: 2 } } } ]"))
	require.Equal(t, []string{"output.http_client.batching"}, warningsOf(t,
		"input: { resource: a }\noutput: { http_client: { batching: { count: 2 } } }", "input_resources: [ { label: a, cryo: { url: ws://x } } ]"), "in a resource file")
	require.Empty(t, warningsOf(t, "input: { redpanda: {} }\noutput: { "+batches+" }"), "no Cryo input")
}

func TestCheckWarnsAboutNoExample(t *testing.T) {
	checked := 0
	require.NoError(t, filepath.WalkDir("../../config", func(path string, _ fs.DirEntry, err error) error {
		if err != nil || filepath.Ext(path) != ".yaml" {
			return err
		}
		content, err := os.ReadFile(path)
		require.NoError(t, err)
		require.Empty(t, warningsOf(t, string(content)), path)
		checked++
		return nil
	}))
	require.Greater(t, checked, 10)
}
