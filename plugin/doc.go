// Package plugin adds Cryo to Redpanda Connect: the inputs and outputs cryo,
// which dial a Cryo server, and cryo_server, which listen for Cryo clients.
// Importing it registers them:
//
//	import _ "github.com/cryo-connect/cryo-connect/plugin"
//
// What a Cryo sender sees acknowledged has been delivered by the pipeline; what
// an output counts as delivered has been acknowledged by the Cryo peer.
//
// The four components are put together of two halves, receive.go and send.go,
// and two ways to have sessions, dial.go and listen.go.
//
//go:generate go run ../internal/docsgen ../docs/components
package plugin
