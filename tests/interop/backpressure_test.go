package interop_test

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strconv"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/internal/testkit"
)

// The back-pressure profiles of cryo-server, and its Stream() at the end of a
// session.

// profiles are those of cryo-server 3, and one that waits instead of dropping.
var profiles = map[string]any{
	"default":          "default",
	"optimize_latency": "optimize_latency",
	"optimize_memory":  "optimize_memory",
	"drop-newest": map[string]any{
		"DROP_POLICY": "drop-newest", "HIGH_WATERMARK": 256 << 10, "LOW_WATERMARK": 64 << 10,
		"MAX_QUEUED_BYTES": 2 << 20, "MAX_QUEUE_SIZE": 256,
	},
}

// serverWith is a Cryo server with a profile.
func serverWith(t *testing.T, profile any) *node {
	t.Helper()
	option, err := json.Marshal(profile)
	require.NoError(t, err)
	n := startNode(t, "server.mjs", "0", token, strconv.FormatInt(quiet.Milliseconds(), 10), string(option))
	n.port = n.want("listening").Port
	return n
}

// The end of a session during Stream() would leave the package in a loop for ever,
// if the stream waits for room in its queue. That it answers afterwards is what
// wantHealthy looks at.
func TestServerSurvivesAGracefulStopDuringStreams(t *testing.T) {
	t.Parallel()
	const count, size = 2000, 64 << 10 // 131 MB
	for name, profile := range profiles {
		for _, role := range []string{"listens", "dials"} {
			t.Run(name+", the server "+role, func(t *testing.T) {
				n := serverWith(t, profile)
				g := testkit.NewWebService(t)
				receiving := "    max_buffer_bytes: 1000000\n    streams:\n      max_bytes: 1000000000\n      max_open: 3\n      scanner:\n        chunker:\n          size: 100000\n"
				var p *pipeline
				if role == "listens" {
					p = input(t, n, receiving, toService(g))
				} else {
					p = run(t, "input:\n  cryo_server:"+listen+receiving+toService(g))
					n.run(command{"do": "dial", "url": "ws://" + p.Listening(), "token": token})
					n.want("connected")
				}
				for i := range 3 {
					n.tell(command{"do": "large", "name": fmt.Sprintf("stream %d", i), "count": count, "size": size})
				}
				d := g.Next() // and nothing more is delivered
				n.run(command{"do": "throttled", "size": size})
				p.Signal(syscall.SIGTERM)
				n.want("closed")
				d.Respond(http.StatusOK)
				p.WantExit(0)
			})
		}
	}
}

// What each profile does to messages of a session that reads slowly.
func TestEachServerProfileHandlesBackpressure(t *testing.T) {
	t.Parallel()
	const count, size = 3000, 8 << 10 // 24 MB
	for name, profile := range profiles {
		t.Run(name, func(t *testing.T) {
			n := serverWith(t, profile)
			g := testkit.NewWebService(t)
			input(t, n, "    max_buffer_bytes: 100000\n", toService(g))
			id := n.tell(command{"do": "binaries", "count": count, "size": size})
			d := g.Next()
			n.run(command{"do": "alive"})
			d.Respond(http.StatusOK)
			if name == "default" || name == "drop-newest" {
				for range count - 1 {
					g.Next().Respond(http.StatusOK)
				}
				n.wantDone(id)
				return
			}
			last := n.tell(command{"do": "text", "text": "the last"})
			received := 1
			for d.Body != "the last" {
				d = g.Next()
				d.Respond(http.StatusOK)
				received++
			}
			n.wantDone(last)
			require.Less(t, received, count, "the oldest that wait are thrown away")
			n.wantOpen(id)
		})
	}
}
