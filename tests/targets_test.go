package tests

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestWorkQueue(t *testing.T) {
	p := example(t, "work_queue.yaml", strings.NewReader("one\ntwo\nthree\n"), "CRYO_ADDRESS=127.0.0.1:0", "CRYO_TOKEN="+token)
	address := p.wantLogged("Listening for Cryo clients on ")
	jobs := map[string]bool{"one": true, "two": true, "three": true}
	leaves := dial(t, address)
	undone := string(receive(t, leaves).Payload)
	require.True(t, jobs[undone])

	stays := dial(t, address)
	m := receive(t, stays)
	require.NotEqual(t, undone, string(m.Payload), "each job goes to one client")
	require.NoError(t, leaves.Close(t.Context(), ""))
	for len(jobs) > 0 {
		require.True(t, jobs[string(m.Payload)], "%q is done already", m.Payload)
		delete(jobs, string(m.Payload))
		require.NoError(t, m.Ack())
		if len(jobs) > 0 {
			m = receive(t, stays) // in the end also what the other left undone
		}
	}
	p.wantSuccess()
}
