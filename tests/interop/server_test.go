package interop_test

import (
	"fmt"
	"net/http"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/internal/testkit"
)

// cryo-connect dials, and cryo-server listens.

// dial has the common fields of this file's components.
func dial(n *node) string {
	return fmt.Sprintf(`
    url: %s
    token: ${CRYO_TOKEN}
`, n.url())
}

// input runs a pipeline that receives from the server, until it is connected.
func input(t *testing.T, n *node, more, output string) *pipeline {
	t.Helper()
	p := run(t, "input:\n  cryo:"+dial(n)+more+output)
	n.want("connected")
	return p
}

// output runs a pipeline that sends to the server, until it is connected.
func output(t *testing.T, n *node, more string) (*source, *pipeline) {
	t.Helper()
	s, in := newSource(t)
	p := run(t, in+"output:\n  cryo:"+dial(n)+more)
	n.want("connected")
	s.ready(p)
	return s, p
}

func TestServerReceivesMessages(t *testing.T) {
	t.Parallel()
	n := server(t, 0, quiet)
	s, _ := output(t, n, "    message_type: ${! @type }\n")
	for _, m := range append(payloads, payload{kind: "text"}) {
		s.deliver(m.bytes(), "type="+m.messageType())
		n.want(m.kind, is(m.bytes()))
	}
}

func TestServerSendsMessages(t *testing.T) {
	t.Parallel()
	n := server(t, 0, quiet)
	p := input(t, n, "", toLines)

	// A frame has 13 bytes in front of the payload, and the package sends none
	// of 4 MiB or more.
	const most = 4<<20 - 13 - 1
	for _, m := range payloads {
		m.size = min(m.size, most)
		n.run(m.command())
		require.Equal(t, m.messageType(), p.wantMessage(m.String(), m.bytes()).Type, "%s", m)
	}
	n.run(command{"do": "text", "text": ""})
	p.wantMessage("an empty text", []byte("null"))
	p.wantNoMessage()
}

func TestServerSendsNoFrameOf4MiB(t *testing.T) {
	t.Parallel()
	n := server(t, 0, quiet)
	input(t, n, "", toLines)
	// The reason for the limit in docs/reference/interop.md: this frame, and every later one, waits
	// for ever.
	large := n.tell(command{"do": "binary", "size": 4<<20 - 13})
	after := n.tell(command{"do": "text", "text": "after it"})
	n.wantOpen(large)
	n.wantOpen(after)
}

func TestServerExchangesManyMessages(t *testing.T) {
	t.Parallel()
	const sent = 1000
	n := server(t, 0, quiet)
	g, s := testkit.NewWebService(t), (*source)(nil)
	g.RespondToAll(http.StatusOK)
	receiver := input(t, n, "", toLines)
	down := n.tell(command{"do": "texts", "count": sent, "prefix": "down-"})
	s, _ = output(t, n, "    max_in_flight: 400\n")
	var up []*posted
	for i := range 300 {
		up = append(up, s.post(fmt.Appendf(nil, "up-%d", i)))
	}
	n.wantDone(down)
	for i, m := range up {
		m.wantDelivered(fmt.Sprintf("message %d to the server", i))
		n.want("text", func(e event) bool { return e.Text == fmt.Sprintf("up-%d", i) })
	}
	for i := range sent {
		receiver.wantMessage(fmt.Sprintf("message %d of the server", i), fmt.Appendf(nil, "down-%d", i))
	}
	receiver.wantNoMessage()
	require.Zero(t, n.Count(isEvent("text")), "duplicate messages")
}

func TestServerMessageIsAcknowledgedAfterDelivery(t *testing.T) {
	t.Parallel()
	n := server(t, 0, quiet)
	g := testkit.NewWebService(t)
	input(t, n, "", toService(g))

	wantAcknowledgedAfterDelivery(t, g, n)
}

func TestServerIgnoresLateAcknowledgements(t *testing.T) {
	t.Parallel()
	n := server(t, 0, 500*time.Millisecond)
	g := testkit.NewWebService(t)
	input(t, n, "", toService(g))
	late := n.tell(command{"do": "text", "text": "late"})
	d := g.Next()
	for range 8 { // the package forgets a message after 2.5 s
		n.want("heartbeat")
	}
	d.Respond(http.StatusOK)
	next := n.tell(command{"do": "text", "text": "next"})
	g.Next().Respond(http.StatusOK)
	n.wantDone(next)
	n.wantOpen(late)
}

func TestServerMessageIsAcknowledgedOnReceiptIfConfigured(t *testing.T) {
	t.Parallel()
	n := server(t, 0, quiet)
	g := testkit.NewWebService(t)
	input(t, n, "    acknowledge: received\n", toService(g))
	n.run(command{"do": "text", "text": "first"})
	g.Next().Respond(http.StatusOK)
}

func TestServerReceivesARejection(t *testing.T) {
	t.Parallel()
	n := server(t, 0, quiet)
	g := testkit.NewWebService(t)
	input(t, n, "    auto_replay_nacks: false\n", toService(g))
	rejected := n.tell(command{"do": "text", "text": "bad"})
	g.Next().Respond(http.StatusInternalServerError)
	n.want("error")
	n.wantOpen(rejected) // the package rejects no promise

	good := n.tell(command{"do": "text", "text": "good"})
	g.Next().Respond(http.StatusOK)
	n.wantDone(good)
}

func TestServerMessagesToAnOutputAreRejected(t *testing.T) {
	t.Parallel()
	n := server(t, 0, quiet)
	s, _ := output(t, n, "")
	rejected := n.tell(command{"do": "text", "text": "for nobody"})
	n.want("error")
	n.wantOpen(rejected)
	stream := n.tell(command{"do": "stream", "name": "for nobody", "chunks": []int{10, 10}})
	n.wantOpen(stream)
	s.deliver([]byte("goes on"))
	n.want("text", is([]byte("goes on")))
}

func TestServerSendsApplicationErrors(t *testing.T) {
	t.Parallel()
	n := server(t, 0, quiet)
	p := input(t, n, "    message_types: [ utf8, error ]\n", toLines)
	n.run(command{"do": "error", "text": "the pump is dry"})
	require.Equal(t, "error", p.wantMessage("an error of the application", []byte("the pump is dry")).Type)
	n.run(command{"do": "binary", "size": 10}) // not a configured type, and acknowledged
	n.run(command{"do": "text", "text": "last"})
	p.wantMessage("the message after it", []byte("last"))
	p.wantNoMessage()
}

func TestServerReceivesHeartbeats(t *testing.T) {
	t.Parallel()
	n := server(t, 0, 300*time.Millisecond)
	p := input(t, n, "", toLines)
	for range 8 {
		require.Equal(t, "pong", n.want("heartbeat").Kind)
	}
	n.run(command{"do": "text", "text": "still here"})
	p.wantMessage("a message after that", []byte("still here"))
	require.Zero(t, n.Count(isEvent("closed")))
	require.Less(t, n.Count(isEvent("heartbeat")), 50)
}

func TestServerReceivesHeartbeatsWhileThePipelineStalls(t *testing.T) {
	t.Parallel()
	n := server(t, 0, time.Second)
	g := testkit.NewWebService(t)
	input(t, n, `
    max_buffer_bytes: 50000
    max_in_flight: 2
`, toService(g))
	for range 2 { // so that the interval is known
		n.want("heartbeat")
	}
	for range 20 {
		n.tell(command{"do": "binary", "size": 20_000})
	}
	held := g.Next()
	for range 8 { // several seconds, in which cryo-connect reads nothing
		require.Equal(t, "pong", n.want("heartbeat").Kind)
	}
	require.Zero(t, n.Count(isEvent("closed")))
	held.Respond(http.StatusOK)
	g.RespondToAll(http.StatusOK)
	last := n.tell(command{"do": "text", "text": "last"})
	n.wantDone(last)
	require.Zero(t, n.Count(isEvent("closed")))
}

func TestServerDeniesAWrongToken(t *testing.T) {
	t.Parallel()
	n := server(t, 0, quiet)
	p := run(t, fmt.Sprintf(`
input:
  cryo:
    url: %s
    token: a wrong one
`, n.url())+toLines)
	line := p.WantLog("401 Unauthorized", "check the field token; retrying in 30s")
	require.NotContains(t, line, "a wrong one")
	require.Zero(t, n.Count(isEvent("session")))
}

func TestServerKeepsTheSessionOfAHalfOpenConnection(t *testing.T) {
	t.Parallel()
	n := server(t, 0, quiet)
	between := testkit.NewProxy(t, fmt.Sprintf("127.0.0.1:%d", n.port))
	s, in := newSource(t)
	p := run(t, in+fmt.Sprintf(`
output:
  cryo:
    url: ws://%s
    token: ${CRYO_TOKEN}
`, between.Address()))
	id := n.want("connected").Session
	s.ready(p)
	s.deliver([]byte("before"))

	between.CutClients()
	m := s.post([]byte("after"))
	p.WantLog("The session already exists", "removes it within seconds")
	require.Zero(t, n.Count(isEvent("closed")))
	between.CutBackends()
	n.want("closed")
	require.Equal(t, id, n.want("connected").Session, "another session's id")
	m.wantDelivered("a message that waited for the session")
	n.want("text", is([]byte("after")))
}

func TestOutputReconnectsAfterAServerRestart(t *testing.T) {
	t.Parallel()
	n := server(t, reservePort(t), quiet)
	s, p := output(t, n, "")
	s.deliver([]byte("before"))
	n.stop()
	m := s.post([]byte("meanwhile"))
	p.WantLog("Disconnected")
	n2 := server(t, n.port, quiet)
	n2.want("connected")
	p.WantLog("Reconnected")
	m.wantDelivered("a message that waited for the server")
	n2.want("text", is([]byte("meanwhile")))
	s.deliver([]byte("after"))
}

func TestStreamIsResentAfterAServerRestart(t *testing.T) {
	t.Parallel()
	n := server(t, reservePort(t), quiet)
	s, p := output(t, n, `
    message_type: stream
    stream:
      chunk_bytes: 1000
`)
	n.run(command{"do": "flow", "behaviour": 1}) // so that it is not over before
	m := s.post(numbers(4500, 0))
	n.run(command{"do": "fetch", "tx": n.want("stream").Tx, "start": 0, "end": 2})
	n.want("chunk")
	n.stop()
	p.WantLog("Disconnected")
	n2 := server(t, n.port, quiet)
	n2.want("streamed", is(numbers(4500, 0))) // from the start
	m.wantDelivered("a stream that was cut off")
}

func TestRestartedServerReceivesNoOldAcknowledgement(t *testing.T) {
	t.Parallel()
	n := server(t, reservePort(t), quiet)
	g := testkit.NewWebService(t)
	p := input(t, n, "", toService(g))
	n.tell(command{"do": "text", "text": "of the old server"})
	old := g.Next()
	n.stop()
	p.WantLog("Disconnected")
	n2 := server(t, n.port, quiet)
	n2.want("connected")
	// Both servers number from 0: the old message's acknowledgement must not
	// reach the new one's.
	id := n2.tell(command{"do": "text", "text": "of the new server"})
	d := g.Next()
	old.Respond(http.StatusOK)
	n2.wantOpen(id)
	d.Respond(http.StatusOK)
	n2.wantDone(id)
}

func TestServerCloseReasonIsLogged(t *testing.T) {
	t.Parallel()
	for name, reason := range map[string]string{
		"none": "", "short": "that was it", "too long": strings.Repeat("a long goodbye ", 20), "not ASCII": "äöü",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n := server(t, 0, quiet)
			g := testkit.NewWebService(t)
			p := input(t, n, "", toService(g))
			c := command{"do": "close"}
			if reason != "" {
				c["reason"] = reason
			}
			n.tell(c)
			line := p.WantLog("Disconnected", "closed by the peer")
			if name == "short" {
				require.Contains(t, line, reason)
			}
			n.want("closed")
			n.want("connected")
			id := n.tell(command{"do": "text", "text": "after it"})
			g.Next().Respond(http.StatusOK)
			n.wantDone(id)
		})
	}
}

func TestServerShutdownIsLogged(t *testing.T) {
	t.Parallel()
	n := server(t, 0, quiet)
	p := input(t, n, "", toService(testkit.NewWebService(t)))
	n.run(command{"do": "destroy"})
	p.WantLog("Disconnected", "Server shutdown.")
}

func TestServerIsClosedAfterTheLastAcknowledgement(t *testing.T) {
	t.Parallel()
	n := server(t, 0, quiet)
	g := testkit.NewWebService(t)
	p := input(t, n, "", toService(g))
	id := n.tell(command{"do": "text", "text": "in the pipeline at the end"})
	d := g.Next()
	p.Signal(syscall.SIGTERM)
	d.Respond(http.StatusOK)
	n.wantDone(id)
	n.want("closed")
	p.WantExit(0)
}

func TestServerPackageCanDial(t *testing.T) {
	t.Parallel()
	p := run(t, "input:\n  cryo_server:"+listen+"    heartbeat_interval: 300ms\n"+toLines)
	address := p.Listening()
	n := server(t, 0, 300*time.Millisecond)
	id := n.run(command{"do": "dial", "url": "ws://" + address, "token": token}).Session
	n.want("connected")
	for range 5 { // each asks the other
		n.want("heartbeat", func(e event) bool { return e.Kind == "ping" })
		n.want("heartbeat", func(e event) bool { return e.Kind == "pong" })
	}
	n.run(command{"do": "text", "text": "of a server"})
	require.Equal(t, id, p.wantMessage("a message", []byte("of a server")).Session)
	n.run(command{"do": "stream", "chunks": []int{10, 20}})
	p.wantMessage("a stream", join(10, 20))
	require.Less(t, n.Count(isEvent("heartbeat")), 50)
	require.Zero(t, n.Count(isEvent("closed")))
}
