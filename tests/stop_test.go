package tests

import (
	"net"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/internal/testkit"
)

// The engine alone would wait for three quarters of shutdown_timeout. The log tells which of
// the two has ended the send.
func TestStopDoesNotWaitForAServerThatAcknowledgesNothing(t *testing.T) {
	for mode, args := range map[string][]string{
		"run":     {"run", "--set", "http.enabled=false"},
		"streams": {"streams", "--set", "http.enabled=false"},
	} {
		t.Run(mode, func(t *testing.T) {
			server := testkit.Serve(t)
			folder := t.TempDir()
			require.NoError(t, os.WriteFile(filepath.Join(folder, "pipeline.yaml"), []byte(`
input: { cryo_server: { address: 127.0.0.1:0, tokens: [ `+token+` ] } }
output: { cryo: { url: "`+server.URL()+`", token: `+token+` } }
`), 0o600))
			if args[0] == "run" {
				folder = filepath.Join(folder, "pipeline.yaml")
			}
			p := launch(t, nil, append(args, "--set", "shutdown_timeout=8s", "--set", "shutdown_delay=1s", folder)...)
			client := testkit.Dial(t, p.Listening())
			sent := testkit.Send(client, "m")
			testkit.Receive(t, server.Session(t)) // and acknowledges nothing
			p.AwaitStopHandling()                 // a stop that follows the start at once has the engine's limits
			p.Terminate()
			p.WantLog("send cancelled: the process is stopping")
			require.ErrorIs(t, testkit.Next(t, sent), net.ErrClosed, "not delivered, so not acknowledged")
		})
	}
}
