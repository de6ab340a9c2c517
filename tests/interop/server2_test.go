package interop_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/internal/testkit"
)

// cryo-connect dials, and cryo-server 2.12 listens.

// oldServer is a Cryo server of version 2.12.
func oldServer(t *testing.T) *node {
	t.Helper()
	modules := os.Getenv("CRYO_NODE_MODULES_2")
	if modules == "" {
		t.Skip("needs Node and cryo-server 2.12: set CRYO_NODE_MODULES_2 to the path of a node_modules folder that has it")
	}
	modules, err := filepath.Abs(modules)
	require.NoError(t, err)
	cmd := exec.Command("node", filepath.Join("peers", "server2.mjs"), "0", token, strconv.FormatInt(quiet.Milliseconds(), 10))
	cmd.Env = append(os.Environ(), "CRYO_NODE_MODULES="+modules)
	stdin, err := cmd.StdinPipe()
	require.NoError(t, err)
	n := &node{Process: testkit.Start(t, cmd), t: t, name: "server2.mjs", stdin: stdin}
	t.Cleanup(n.wantHealthy)
	e := n.want("package")
	n.version = e.Name + " " + e.Version
	n.want("ready")
	n.port = n.want("listening").Port
	return n
}

func TestOldServerSendsMessagesAndStreams(t *testing.T) {
	t.Parallel()
	n := oldServer(t)
	p := input(t, n, "", toLines)
	for _, m := range []payload{{kind: "text", text: multiByte}, {kind: "binary", size: 0}, {kind: "binary", size: 1 << 20}} {
		n.run(m.command())
		require.Equal(t, m.messageType(), p.wantMessage(m.String(), m.bytes()).Type, "%s", m)
	}
	n.run(command{"do": "stream", "name": "pushed", "chunks": []int{10, 100_000, 1}})
	r := p.wantMessage("a stream", join(10, 100_000, 1))
	require.Equal(t, "pushed", r.Name)
	require.Equal(t, -1, r.Size)
	p.wantNoMessage()
}

func TestOldServerReceivesMessagesAndStreams(t *testing.T) {
	t.Parallel()
	n := oldServer(t)
	s, _ := output(t, n, "    message_type: ${! @type }\n    stream:\n      name: sent\n      chunk_bytes: 1000\n")
	for _, m := range []payload{{kind: "text", text: multiByte}, {kind: "text"}, {kind: "binary", size: 1 << 20}} {
		s.deliver(m.bytes(), "type="+m.messageType())
		n.want(m.kind, is(m.bytes()))
	}
	s.deliver(numbers(4500, 0), "type=stream")
	n.want("streamed", is(numbers(4500, 0)))
	n.Drop(isEvent("stream"))

	n.run(command{"do": "flow", "behaviour": 1})
	m := s.post(numbers(2500, 0), "type=stream")
	tx := n.want("stream").Tx
	n.run(command{"do": "fetch", "tx": tx, "start": 0, "end": 3})
	n.want("streamed", is(numbers(2500, 0)))
	m.wantDelivered("a stream that was pulled")
}

// It sends its chunk frames within chunk frames, under wrong indices.
func TestOldServerStreamsCannotBePulled(t *testing.T) {
	t.Parallel()
	n := oldServer(t)
	p := input(t, n, "    streams:\n      flow_control: pull\n", toLines)
	n.run(command{"do": "text", "text": "the flow control is set"})
	p.wantMessage("a message", []byte("the flow control is set"))
	n.tell(command{"do": "stream", "name": "pulled", "chunks": []int{10, 100_000, 1}})
	p.WantLog("Stream failed", "pulled", "the stream is broken: chunk 3 received, expected 0")
	n.run(command{"do": "text", "text": "the session goes on"})
	p.wantMessage("a message", []byte("the session goes on"))
	p.wantNoMessage()
}

func TestOldServerIsRedialled(t *testing.T) {
	t.Parallel()
	n := oldServer(t)
	p := input(t, n, "", toLines)
	n.run(command{"do": "text", "text": "one"})
	p.wantMessage("a message", []byte("one"))
	n.run(command{"do": "terminate"})
	n.want("connected") // again, with the same id
	n.run(command{"do": "text", "text": "two"})
	p.wantMessage("a message", []byte("two"))
	p.stop()
	n.want("closed")
}
