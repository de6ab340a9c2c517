package main

import (
	"context"
	"runtime/debug"
	"testing"

	"github.com/redpanda-data/benthos/v4/public/service"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestBinaryHasAllComponents(t *testing.T) {
	env := service.GlobalEnvironment()

	for _, name := range []string{"cryo", "cryo_server", "redpanda", "aws_s3", "http_server", "generate", "stdin"} {
		_, ok := env.GetInputConfig(name)
		assert.True(t, ok, "input %s", name)
	}
	for _, name := range []string{"cryo", "cryo_server", "redpanda", "aws_s3", "http_client", "sync_response", "stdout"} {
		_, ok := env.GetOutputConfig(name)
		assert.True(t, ok, "output %s", name)
	}
	for _, name := range []string{"mapping", "archive"} {
		_, ok := env.GetProcessorConfig(name)
		assert.True(t, ok, "processor %s", name)
	}
	_, ok := env.GetMetricsConfig("prometheus")
	assert.True(t, ok, "metrics prometheus")
	_, ok = env.GetTracerConfig("jaeger")
	assert.True(t, ok, "tracer jaeger")
}

func TestReferenceExamplesPassLint(t *testing.T) {
	env := service.GlobalEnvironment()
	linter := env.FullConfigSchema("", "").NewStreamConfigLinter().
		SetEnvVarLookupFunc(func(context.Context, string) (string, bool) { return "x", true })
	for _, name := range []string{"cryo", "cryo_server"} {
		in, _ := env.GetInputConfig(name)
		out, _ := env.GetOutputConfig(name)
		for _, view := range []*service.ConfigView{in, out} {
			data, err := view.TemplateData()
			require.NoError(t, err)
			require.NotEmpty(t, data.Examples)
			for _, example := range data.Examples {
				lints, err := linter.LintYAML([]byte(example.Config))
				require.NoError(t, err)
				assert.Empty(t, lints, example.Config)
			}
		}
	}
}

func TestVersionNamesReleaseCommitAndDate(t *testing.T) {
	clone := &debug.BuildInfo{
		Main: debug.Module{Version: "v0.3.1-0.20260102030405-abcdef012345"},
		Settings: []debug.BuildSetting{
			{Key: "vcs.revision", Value: "abcdef0123456789"},
			{Key: "vcs.time", Value: "2026-01-02T03:04:05Z"},
			{Key: "vcs.modified", Value: "true"},
		},
	}

	for _, tt := range []struct {
		name                  string
		version, commit, date string
		info                  *debug.BuildInfo
		wantVersion, wantDate string
	}{
		{
			name:        "no build information",
			wantVersion: "unknown",
			wantDate:    "unknown",
		},
		{
			name:        "built without version control",
			info:        &debug.BuildInfo{Main: debug.Module{Version: "(devel)"}},
			wantVersion: "unknown",
			wantDate:    "unknown",
		},
		{
			name:        "installed as a module",
			info:        &debug.BuildInfo{Main: debug.Module{Version: "v1.2.3"}},
			wantVersion: "v1.2.3",
			wantDate:    "unknown",
		},
		{
			name:        "built in a clone with changes",
			info:        clone,
			wantVersion: "v0.3.1-0.20260102030405-abcdef012345 (commit abcdef0123456789, modified)",
			wantDate:    "2026-01-02T03:04:05Z",
		},
		{
			name:        "a release",
			version:     "v1.2.3",
			commit:      "0123456",
			date:        "2026-02-03",
			info:        clone,
			wantVersion: "v1.2.3 (commit 0123456)",
			wantDate:    "2026-02-03",
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Cleanup(func() { releaseVersion, releaseCommit, releaseDate = "", "", "" })
			releaseVersion, releaseCommit, releaseDate = tt.version, tt.commit, tt.date

			version, date := buildStamp(tt.info)

			assert.Equal(t, tt.wantVersion, version)
			assert.Equal(t, tt.wantDate, date)
		})
	}
}
