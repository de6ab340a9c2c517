package tests

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/testkit"
)

// The log is a pipe whose reader hangs, as a log collector may. The engine logs a signal before it obeys.
func TestProcessWhoseLogIsBlockedDeliversAndStops(t *testing.T) {
	address := testkit.ReserveAddress(t)
	config := testkit.WriteFile(t, "config.yaml", `
input: { cryo_server: { address: "`+address+`", tokens: [ `+token+` ] } }
output: { drop: {} }
shutdown_timeout: 1s
`)
	unread, log, err := os.Pipe()
	require.NoError(t, err)
	defer unread.Close()
	filler, err := os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", log.Fd()), os.O_WRONLY, 0) // opened again, because log.Fd makes log ignore deadlines
	require.NoError(t, err)
	defer filler.Close()
	cmd := testkit.Command(t, "run", "--set", "http.enabled=false", config)
	cmd.Stdout, cmd.Stderr = log, log
	require.NoError(t, cmd.Start())
	require.NoError(t, log.Close())
	ended := testkit.Go(cmd.Wait)
	defer cmd.Process.Kill() // it has ended unless the test fails

	lines := bufio.NewScanner(unread)
	for launched := false; !launched; launched = strings.Contains(lines.Text(), "Launching") {
		require.True(t, lines.Scan())
	}
	client := testkit.Next(t, testkit.Redial(t, address, cryo.DialOptions{}))
	time.Sleep(200 * time.Millisecond) // a stop that follows the start at once has the engine's limits
	require.NoError(t, filler.SetWriteDeadline(time.Now().Add(200*time.Millisecond)))
	_, err = filler.Write(make([]byte, 1<<20)) // more than a pipe holds
	require.ErrorIs(t, err, os.ErrDeadlineExceeded)
	testkit.WantDelivered(t, client, "while the log is blocked")
	require.NoError(t, cmd.Process.Signal(syscall.SIGTERM))
	var exit *exec.ExitError
	require.ErrorAs(t, testkit.Next(t, ended), &exit)
	require.Equal(t, 1, exit.ExitCode())
}
