// Package plugin adds Cryo to Redpanda Connect: the inputs and outputs cryo, which connect to a
// Cryo server, and cryo_server, which listen for Cryo clients. Importing it registers them:
//
//	import _ "github.com/cryo-connect/cryo-connect/plugin"
//
// A message is acknowledged to its Cryo sender when the pipeline has delivered it. An output has
// delivered a message when its Cryo peer has acknowledged it.
//
// A component consists of a half (receive*.go or send*.go) and a way to open sessions (dial*.go
// or listen*.go); input_*.go and output_*.go contain the four components. The fields of each
// part and their rules are in the part's *_config.go.
//
//go:generate go run ../internal/docsgen ../docs/reference/components
package plugin
