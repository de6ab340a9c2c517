package tests

import (
	"os"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/cryo-connect/cryo-connect/internal/testkit"
)

// The engine ends the previous pipeline first, and does not repeat a reload if it cannot read the
// configuration at the second attempt either.
func TestReloadWithoutDescriptorsWaitsForThem(t *testing.T) {
	tokens := testkit.WriteFile(t, "tokens", token+"\n")
	config := `
input: { cryo_server: { address: "127.0.0.1:0", tokens_file: "` + tokens + `" } }
pipeline: { processors: [ { sleep: { duration: 2s } } ] }
output: { drop: {} }
`
	path := testkit.WriteFile(t, "config.yaml", config)
	p := launch(t, nil, "run", "-w", "--set", "http.enabled=false", path)
	client := testkit.Dial(t, p.Listening())
	testkit.WantDelivered(t, client, "by the old pipeline")

	sending := testkit.Send(client, "the old pipeline ends when it has delivered this")
	require.NoError(t, os.WriteFile(path, []byte(strings.Replace(config, "2s", "1ms", 1)), 0o600))
	p.WantLog("Main config updated")
	var old unix.Rlimit
	require.NoError(t, unix.Prlimit(p.Cmd.Process.Pid, unix.RLIMIT_NOFILE, nil, &old))
	require.NoError(t, unix.Prlimit(p.Cmd.Process.Pid, unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 3, Max: old.Max}, nil))
	p.WantLog("Cannot read tokens_file; retrying", "too many open files", "LimitNOFILE")
	require.NoError(t, unix.Prlimit(p.Cmd.Process.Pid, unix.RLIMIT_NOFILE, &old, nil))
	p.WantLog("Updated main config")
	require.NoError(t, testkit.Next(t, sending))
	testkit.WantDelivered(t, client, "by the new pipeline")
	p.Interrupt()
}
