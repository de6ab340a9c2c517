// Package plugin adds Cryo to Redpanda Connect: the inputs and outputs cryo,
// which dial a Cryo server, and cryo_server, which listen for Cryo clients.
// Importing it registers them:
//
//	import _ "github.com/cryo-connect/cryo-connect/plugin"
//
// What a Cryo sender sees acknowledged has been delivered by the pipeline; what
// an output counts as delivered has been acknowledged by the Cryo peer.
//
// A component is a half and a way to have sessions: files are named receive*.go and
// send*.go for the halves, dial*.go and listen*.go for the ways, input_*.go and
// output_*.go for the four components. A field's rule is in the *_config.go of its part.
//
//go:generate go run ../internal/docsgen ../docs/components
package plugin
