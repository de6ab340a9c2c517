package interop_test

import (
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// cryo-connect dials, and cryo-server listens.

// dial is what the components of this file have in common.
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
	// Why docs/interop.md tells its users to stay below: this one, and what is
	// sent after it, waits for ever.
	large := n.tell(command{"do": "binary", "size": 4<<20 - 13})
	after := n.tell(command{"do": "text", "text": "after it"})
	n.wantOpen(large)
	n.wantOpen(after)
}

func TestServerManyMessagesBothWays(t *testing.T) {
	t.Parallel()
	const sent = 1000
	n := server(t, 0, quiet)
	g, s := newGate(t), (*source)(nil)
	g.open()
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
	require.Zero(t, n.count(isEvent("text")), "messages came twice")
}

func TestServerIsAcknowledgedAfterDelivery(t *testing.T) {
	t.Parallel()
	n := server(t, 0, quiet)
	g := newGate(t)
	input(t, n, "", g.output())

	first := n.tell(command{"do": "text", "text": "first"})
	d1 := g.next()
	second := n.tell(command{"do": "binary", "size": 1000})
	d2 := g.next()
	n.wantOpen(first)
	n.wantOpen(second)
	d2.pass()
	n.wantDone(second)
	n.wantOpen(first)
	d1.turnAway()
	again := g.next()
	n.wantOpen(first)
	again.pass()
	n.wantDone(first)
}

func TestServerForgetsAcknowledgementsThatAreLate(t *testing.T) {
	t.Parallel()
	n := server(t, 0, 500*time.Millisecond)
	g := newGate(t)
	input(t, n, "", g.output())
	late := n.tell(command{"do": "text", "text": "late"})
	d := g.next()
	for range 8 { // the package gives up after 2.5 seconds
		n.want("heartbeat")
	}
	d.pass()
	next := n.tell(command{"do": "text", "text": "next"})
	g.next().pass()
	n.wantDone(next)
	n.wantOpen(late)
}

func TestServerIsAcknowledgedOnReceiptIfAsked(t *testing.T) {
	t.Parallel()
	n := server(t, 0, quiet)
	g := newGate(t)
	input(t, n, "    acknowledge: received\n", g.output())
	n.run(command{"do": "text", "text": "first"})
	g.next().pass()
}

func TestServerIsToldOfARejection(t *testing.T) {
	t.Parallel()
	n := server(t, 0, quiet)
	g := newGate(t)
	input(t, n, "    auto_replay_nacks: false\n", g.output())
	refused := n.tell(command{"do": "text", "text": "bad"})
	g.next().turnAway()
	require.Equal(t, "the message could not be delivered", n.want("error").Text)
	n.wantOpen(refused) // the package rejects no promise

	good := n.tell(command{"do": "text", "text": "good"})
	g.next().pass()
	n.wantDone(good)
}

func TestServerSendsToAnOutput(t *testing.T) {
	t.Parallel()
	n := server(t, 0, quiet)
	s, _ := output(t, n, "")
	refused := n.tell(command{"do": "text", "text": "for nobody"})
	require.Equal(t, "this session receives no messages", n.want("error").Text)
	n.wantOpen(refused)
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
	n.run(command{"do": "binary", "size": 10}) // not taken, and acknowledged
	n.run(command{"do": "text", "text": "last"})
	p.wantMessage("what came after it", []byte("last"))
	p.wantNoMessage()
}

func TestServerHeartbeat(t *testing.T) {
	t.Parallel()
	n := server(t, 0, 300*time.Millisecond)
	p := input(t, n, "", toLines)
	for range 8 {
		require.Equal(t, "pong", n.want("heartbeat").Kind)
	}
	n.run(command{"do": "text", "text": "still here"})
	p.wantMessage("a message after that", []byte("still here"))
	require.Zero(t, n.count(isEvent("closed")))
	require.Less(t, n.count(isEvent("heartbeat")), 50)
}

func TestServerHeartbeatWhileThePipelineStalls(t *testing.T) {
	t.Parallel()
	n := server(t, 0, time.Second)
	g := newGate(t)
	input(t, n, `
    max_buffer_bytes: 50000
    max_in_flight: 2
`, g.output())
	for range 2 { // so that the interval is known
		n.want("heartbeat")
	}
	for range 20 {
		n.tell(command{"do": "binary", "size": 20_000})
	}
	held := g.next()
	for range 8 { // several seconds, of which cryo-connect reads nothing
		require.Equal(t, "pong", n.want("heartbeat").Kind)
	}
	require.Zero(t, n.count(isEvent("closed")))
	held.pass()
	g.open()
	last := n.tell(command{"do": "text", "text": "last"})
	n.wantDone(last)
	require.Zero(t, n.count(isEvent("closed")))
}

func TestServerRefusesTheToken(t *testing.T) {
	t.Parallel()
	n := server(t, 0, quiet)
	p := run(t, fmt.Sprintf(`
input:
  cryo:
    url: %s
    token: a wrong one
`, n.url())+toLines)
	line := p.wantLog("401 Unauthorized", "check the field token; trying again in 30s")
	require.NotContains(t, line, "a wrong one")
	require.Zero(t, n.count(isEvent("session")))
}

func TestServerStillHasTheSession(t *testing.T) {
	t.Parallel()
	n := server(t, 0, quiet)
	between := newForwarder(t, fmt.Sprintf("127.0.0.1:%d", n.port))
	s, in := newSource(t)
	p := run(t, in+fmt.Sprintf(`
output:
  cryo:
    url: ws://%s
    token: ${CRYO_TOKEN}
`, between.address))
	id := n.want("connected").Session
	s.ready(p)
	s.deliver([]byte("before"))

	between.cutOneSide()
	m := s.post([]byte("after"))
	p.wantLog("The session already exists", "passes within seconds")
	require.Zero(t, n.count(isEvent("closed")))
	between.cutOtherSide()
	n.want("closed")
	require.Equal(t, id, n.want("connected").Session, "another session's id")
	m.wantDelivered("a message that waited for the session")
	n.want("text", is([]byte("after")))
}

func TestServerRestarts(t *testing.T) {
	t.Parallel()
	n := server(t, 0, quiet)
	s, p := output(t, n, "")
	s.deliver([]byte("before"))
	n.stop()
	m := s.post([]byte("meanwhile"))
	p.wantLog("Disconnected from")
	n2 := server(t, n.port, quiet)
	n2.want("connected")
	p.wantLog("Reconnected to")
	m.wantDelivered("a message that waited for the server")
	n2.want("text", is([]byte("meanwhile")))
	s.deliver([]byte("after"))
}

func TestServerRestartsDuringAStream(t *testing.T) {
	t.Parallel()
	n := server(t, 0, quiet)
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
	p.wantLog("Disconnected from")
	n2 := server(t, n.port, quiet)
	n2.want("streamed", is(numbers(4500, 0))) // from the start
	m.wantDelivered("a stream that was cut off")
}

func TestServerRestartsDuringDelivery(t *testing.T) {
	t.Parallel()
	n := server(t, 0, quiet)
	g := newGate(t)
	p := input(t, n, "", g.output())
	n.tell(command{"do": "text", "text": "of the old server"})
	old := g.next()
	n.stop()
	p.wantLog("Disconnected from")
	n2 := server(t, n.port, quiet)
	n2.want("connected")
	// Both servers number from 0: the old message's acknowledgement must not
	// reach the new one's.
	id := n2.tell(command{"do": "text", "text": "of the new server"})
	d := g.next()
	old.pass()
	n2.wantOpen(id)
	d.pass()
	n2.wantDone(id)
}

func TestServerCloses(t *testing.T) {
	t.Parallel()
	n := server(t, 0, quiet)
	g := newGate(t)
	p := input(t, n, "", g.output())
	for i, reason := range []string{"", "that was it", strings.Repeat("a long goodbye ", 20), "äöü"} {
		c := command{"do": "close"}
		if reason != "" {
			c["reason"] = reason
		}
		n.tell(c)
		line := p.wantLog("Disconnected from", "closed by the peer")
		if i == 1 {
			require.Contains(t, line, reason)
		}
		n.want("closed")
		n.want("connected")
	}
	id := n.tell(command{"do": "text", "text": "after it"})
	g.next().pass()
	n.wantDone(id)

	n.run(command{"do": "destroy"})
	p.wantLog("Disconnected from", "Server shutdown.")
}

func TestServerIsToldOfTheEnd(t *testing.T) {
	t.Parallel()
	n := server(t, 0, quiet)
	g := newGate(t)
	p := input(t, n, "", g.output())
	id := n.tell(command{"do": "text", "text": "in the pipeline at the end"})
	d := g.next()
	p.interrupt()
	d.pass()
	n.wantDone(id)
	n.want("closed")
	p.wantExit(0)
}

func TestServerPackageDials(t *testing.T) {
	t.Parallel()
	p := run(t, "input:\n  cryo_server:"+listen+"    heartbeat_interval: 300ms\n"+toLines)
	address := p.wantListening()
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
	require.Less(t, n.count(isEvent("heartbeat")), 50)
	require.Zero(t, n.count(isEvent("closed")))
}

// forwarder passes bytes on between a pipeline and a server, and can lose one
// side of the connection without the other's knowing.
type forwarder struct {
	address string

	mu      sync.Mutex
	clients []net.Conn
	servers []net.Conn
}

func newForwarder(t *testing.T, target string) *forwarder {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	f := &forwarder{address: l.Addr().String()}
	t.Cleanup(func() {
		_ = l.Close()
		f.cutOneSide()
		f.cutOtherSide()
	})
	go func() {
		for {
			client, err := l.Accept()
			if err != nil {
				return
			}
			server, err := net.Dial("tcp", target)
			if err != nil {
				_ = client.Close()
				continue
			}
			f.mu.Lock()
			f.clients, f.servers = append(f.clients, client), append(f.servers, server)
			f.mu.Unlock()
			go func() { _, _ = io.Copy(server, client) }() // leaves the server's side open
			go func() {
				_, _ = io.Copy(client, server)
				_ = client.Close()
			}()
		}
	}()
	return f
}

func (f *forwarder) cutOneSide() { f.cut(&f.clients) }

func (f *forwarder) cutOtherSide() { f.cut(&f.servers) }

func (f *forwarder) cut(conns *[]net.Conn) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, c := range *conns {
		_ = c.Close()
	}
	*conns = nil
}
