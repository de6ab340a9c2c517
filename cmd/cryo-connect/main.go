// Command cryo-connect runs the engine of Redpanda Connect with the Cryo components, the
// components for Kafka, S3, HTTP, Prometheus and Jaeger, and the Bloblang methods for JWTs.
//
// See "cryo-connect help" and "cryo-connect list inputs".
package main

import (
	"cmp"
	"context"
	"runtime/debug"

	_ "github.com/redpanda-data/benthos/v4/public/components/io"
	_ "github.com/redpanda-data/benthos/v4/public/components/pure"
	"github.com/redpanda-data/benthos/v4/public/service"
	_ "github.com/redpanda-data/connect/v4/public/components/aws"
	_ "github.com/redpanda-data/connect/v4/public/components/crypto"
	_ "github.com/redpanda-data/connect/v4/public/components/jaeger"
	_ "github.com/redpanda-data/connect/v4/public/components/kafka"
	_ "github.com/redpanda-data/connect/v4/public/components/prometheus"
	"github.com/urfave/cli/v2"

	"github.com/cryo-connect/cryo-connect/internal/ballast"
	"github.com/cryo-connect/cryo-connect/plugin"
)

const (
	binaryName       = "cryo-connect"
	documentationURL = "https://github.com/cryo-connect/cryo-connect"
)

func main() {
	ballast.Load()
	info, _ := debug.ReadBuildInfo()
	version, date := buildStamp(info)

	schema := func() *service.ConfigSchema {
		schema := service.GlobalEnvironment().FullConfigSchema(version, date)
		schema.SetFieldDefault(map[string]any{"@service": binaryName}, "logger", "static_fields")
		schema.SetFieldDefault(defaultHTTPAddress(), "http", "address")
		return schema
	}
	var api streamsAPI
	var watcher fileWatcher
	var stop stopper

	service.RunCLI(
		context.Background(),
		service.CLIOptSetVersion(version, date),
		service.CLIOptSetBinaryName(binaryName),
		service.CLIOptSetProductName(binaryName),
		service.CLIOptSetDocumentationURL(documentationURL),
		service.CLIOptAddCommand(checkCommand(schema)),
		service.CLIOptAddCommand(probeCommand),
		service.CLIOptCustomRunFlags(api.flags(), func(c *cli.Context) error {
			watcher.readFlags(c)
			return api.readFlags(c)
		}),
		service.CLIOptSetEnvVarLookup(lookupEnv),
		service.CLIOptSetDefaultConfigPaths(
			"cryo-connect.yaml",
			"/cryo-connect.yaml",
			"/etc/cryo-connect/config.yaml",
			"/etc/cryo-connect.yaml",
		),
		service.CLIOptSetMainSchemaFrom(schema),
		service.CLIOptOnConfigParse(func(conf *service.ParsedConfig) error {
			if err := cmp.Or(api.checkConfig(conf), stop.configure(conf), plugin.CheckListeners(conf)); err != nil {
				return err
			}
			if watcher.requested || api.requested {
				plugin.KeepListeners(stop.resources) // a request may replace a pipeline before all have started
			}
			return nil
		}),
		service.CLIOptOnStreamStart(func(*service.RunningStreamSummary) error {
			plugin.RequireFiles() // of configurations that replace running ones
			watcher.start()
			stop.watch()
			return nil
		}),
	)
	stop.complete()
}
