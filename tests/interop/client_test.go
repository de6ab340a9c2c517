package interop_test

import (
	"fmt"
	"net/http"
	"strings"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/internal/testkit"
)

// cryo-connect listens, and cryo-client-node connects.

// listen has the common fields of this file's components, which share a listener.
const listen = `
    address: 127.0.0.1:0
    tokens: [ "${CRYO_TOKEN}" ]
`

const maxPayload = 16 << 20

// multiByte has characters of two, three and four bytes.
const multiByte = "grüße – 氷 🧊"

var payloads = []payload{
	{kind: "text", size: 1},
	{kind: "text", size: 64 << 10},
	{kind: "text", size: maxPayload},
	{kind: "text", text: multiByte},
	{kind: "text", text: strings.Repeat(multiByte, 5000)},
	{kind: "text", text: "zero \x00 inside"},
	{kind: "binary", size: 0},
	{kind: "binary", size: 1},
	{kind: "binary", size: 64 << 10},
	{kind: "binary", size: maxPayload},
}

func TestClientSendsMessages(t *testing.T) {
	t.Parallel()
	p := run(t, "input:\n  cryo_server:"+listen+toLines)
	c := client(t)
	id := c.connect(p.Listening())

	for _, m := range payloads {
		c.run(m.command())
		r := p.wantMessage(m.String(), m.bytes())
		require.Equal(t, m.messageType(), r.Type, "%s", m)
		require.Equal(t, id, r.Session, "%s", m)
	}
	// The package sends the text "null" in place of an empty one.
	c.run(command{"do": "text", "text": ""})
	p.wantMessage("an empty text", []byte("null"))
	p.wantNoMessage()
}

func TestClientReceivesMessages(t *testing.T) {
	t.Parallel()
	s, input := newSource(t)
	p := run(t, input+"output:\n  cryo_server:"+listen+`
    message_type: ${! @type }
`)
	c := connected(t, p.Listening())
	s.ready(p)

	for _, m := range append(payloads, payload{kind: "text"}) {
		s.deliver(m.bytes(), "type="+m.messageType())
		c.want(m.kind, is(m.bytes()))
	}
}

func TestClientExchangesManyMessages(t *testing.T) {
	t.Parallel()
	const sent, posts = 2000, 300
	s, input := newSource(t)
	p := run(t, bothWays(input, "", "    stdout: {}\n", "    max_in_flight: 400\n"))
	address := p.Listening()
	s.ready(p)
	clients := []*node{client(t), client(t)}
	for _, c := range clients {
		// The package is connected with the WebSocket, but a broadcast reaches only clients
		// that have sent ENDPOINT_INFO.
		p.WantLog("Session connected", "session="+c.connect(address))
	}

	var running []int
	for i, c := range clients {
		running = append(running, c.tell(command{"do": "texts", "count": sent, "prefix": fmt.Sprintf("up-%d-", i)}))
	}
	var down []*posted
	for i := range posts {
		down = append(down, s.post(fmt.Appendf(nil, "down-%d", i)))
	}
	for i, m := range down {
		m.wantDelivered(fmt.Sprintf("message %d to the clients", i))
	}
	for i, c := range clients {
		c.wantDone(running[i])
		for k := range posts {
			c.want("text", func(e event) bool { return e.Text == fmt.Sprintf("down-%d", k) })
		}
		require.Zero(t, c.Count(isEvent("text")), "duplicate messages")
		prefix := fmt.Sprintf("up-%d-", i)
		seen := make(map[string]bool)
		for range sent {
			line := p.Take("a client's message", func(line string) bool { return strings.HasPrefix(line, prefix) })
			require.False(t, seen[line], "%s was delivered twice", line)
			seen[line] = true
		}
	}
}

// bothWays is a pipeline from clients to an output, and from an input to
// clients. The two have the same address, and share the listener.
func bothWays(input, receiving, output, sending string) string {
	return `
input:
  broker:
    inputs:
      - cryo_server:` + indent(indent(listen+receiving)) + `
        processors:
          - mapping: meta from = "cryo"
      -` + indent(indent(strings.TrimPrefix(input, "\ninput:"))) + `
output:
  switch:
    cases:
      - check: '@from == "cryo"'
        output:` + indent(indent("\n"+output)) + `
      - output:
          cryo_server:` + indent(indent(listen+sending))
}

// indent moves YAML four columns to the right.
func indent(yaml string) string { return strings.ReplaceAll(yaml, "\n", "\n    ") }

func TestClientMessageIsAcknowledgedAfterDelivery(t *testing.T) {
	t.Parallel()
	g := testkit.NewWebService(t)
	p := run(t, "input:\n  cryo_server:"+listen+toService(g))
	c := connected(t, p.Listening())

	wantAcknowledgedAfterDelivery(t, g, c)
}

// wantAcknowledgedAfterDelivery makes the node send messages, and wants each to be
// acknowledged when the service has accepted it.
func wantAcknowledgedAfterDelivery(t *testing.T, g *testkit.WebService, n *node) {
	t.Helper()
	first := n.tell(command{"do": "text", "text": "first"})
	d1 := g.Next()
	second := n.tell(command{"do": "binary", "size": 1000})
	d2 := g.Next()
	n.wantOpen(first)
	n.wantOpen(second)

	d2.Respond(http.StatusOK)
	n.wantDone(second)
	n.wantOpen(first)

	// Redelivered, which is the default.
	d1.Respond(http.StatusInternalServerError)
	again := g.Next()
	require.Equal(t, "first", again.Body)
	n.wantOpen(first)
	again.Respond(http.StatusOK)
	n.wantDone(first)
}

func TestClientReceivesARejection(t *testing.T) {
	t.Parallel()
	g := testkit.NewWebService(t)
	p := run(t, "input:\n  cryo_server:"+listen+"    auto_replay_nacks: false\n"+toService(g))
	c := connected(t, p.Listening())

	for _, m := range []command{{"do": "text", "text": "bad"}, {"do": "binary", "size": 100}} {
		rejected := c.tell(m)
		g.Next().Respond(http.StatusInternalServerError)
		c.wantFailed(rejected)
	}
	good := c.tell(command{"do": "text", "text": "good"})
	g.Next().Respond(http.StatusOK)
	c.wantDone(good)
}

// The sender of a rejection cannot prevent this; docs/reference/interop.md warns of it.
func TestClientThatDoesNotCatchARejectionExits(t *testing.T) {
	t.Parallel()
	g := testkit.NewWebService(t)
	p := run(t, "input:\n  cryo_server:"+listen+"    auto_replay_nacks: false\n"+toService(g))
	c := connected(t, p.Listening())
	c.run(command{"do": "uncaught", "text": "bad"})
	c.ended = true // by its own application
	g.Next().Respond(http.StatusInternalServerError)
	c.WantExit(1)
}

func TestClientMessagesWithoutAnInputAreRejected(t *testing.T) {
	t.Parallel()
	s, input := newSource(t)
	p := run(t, input+"output:\n  cryo_server:"+listen)
	c := connected(t, p.Listening())
	s.ready(p)

	text := c.tell(command{"do": "text", "text": "for nobody"})
	stream := c.tell(command{"do": "stream", "name": "for nobody", "chunks": []int{10, 10}})
	c.wantFailed(text)
	s.deliver([]byte("goes on"))
	c.wantOpen(stream) // cancelled, which the package ignores
	c.want("text", is([]byte("goes on")))
}

func TestClientSendsStreams(t *testing.T) {
	t.Parallel()
	p := run(t, "input:\n  cryo_server:"+listen+toLines)
	c := connected(t, p.Listening())

	c.run(command{"do": "stream", "name": "three parts", "chunks": []int{10, 100_000, 1}})
	r := p.wantMessage("a stream", join(10, 100_000, 1))
	require.Equal(t, "stream", r.Type)
	require.Equal(t, "three parts", r.Name)
	require.Equal(t, -1, r.Size)

	c.run(command{"do": "stream", "chunks": []int{maxPayload, 3}})
	require.Equal(t, "anonymous", p.wantMessage("a stream with the largest chunk", join(maxPayload, 3)).Name)

	c.run(command{"do": "stream", "name": multiByte, "chunks": []int{}})
	require.Equal(t, multiByte, p.wantMessage("an empty stream", nil).Name)

	// Several at a time, their chunks in turn, with a message in between.
	var open []int
	for _, name := range []string{"a", "b", "c"} {
		open = append(open, c.tell(command{"do": "stream", "name": name, "source": name}))
	}
	for range 3 {
		for _, name := range []string{"a", "b", "c"} {
			c.run(command{"do": "chunk", "source": name, "text": name + "\n"})
		}
	}
	c.run(command{"do": "text", "text": "in between"})
	for i, name := range []string{"a", "b", "c"} {
		c.run(command{"do": "end", "source": name})
		c.wantDone(open[i])
		require.Equal(t, name, p.wantMessage("stream "+name, []byte(strings.Repeat(name+"\n", 3))).Name)
	}
}

// join is the data of a stream with chunks of these sizes.
func join(sizes ...int) []byte {
	var b []byte
	for i, size := range sizes {
		b = append(b, numbers(size, i)...)
	}
	return b
}

func TestClientReceivesStreams(t *testing.T) {
	t.Parallel()
	s, input := newSource(t)
	p := run(t, input+"output:\n  cryo_server:"+listen+`
    message_type: stream
    stream:
      name: ${! @name }
      chunk_bytes: 5000
`)
	c := connected(t, p.Listening())
	s.ready(p)

	wantStreamsOfAllSizes(t, s, c)
}

// wantStreamsOfAllSizes posts streams, and wants the node to receive them in chunks of 5000
// bytes.
func wantStreamsOfAllSizes(t *testing.T, s *source, n *node) {
	t.Helper()
	var running []*posted
	sizes := []int{0, 1, 4999, 5000, 5001, 3_000_000}
	for _, size := range sizes {
		running = append(running, s.post(numbers(size, 0), fmt.Sprintf("name=of %d", size)))
	}
	for i, size := range sizes {
		running[i].wantDelivered(fmt.Sprintf("stream of %d bytes", size))
		e := n.want("streamed", named(fmt.Sprintf("of %d", size)), is(numbers(size, 0)))
		require.Equal(t, (size+4999)/5000, e.Chunks, "chunks of %d bytes", size)
	}
}

func TestClientStreamIsCancelled(t *testing.T) {
	t.Parallel()
	p := run(t, "input:\n  cryo_server:"+listen+`
    streams:
      max_bytes: 1000
      idle_timeout: 1200ms # so that each is logged: streams are at most once a second
`+toLines)
	c := connected(t, p.Listening())

	// The package ignores TX_CANCEL, and must survive it.
	c.run(command{"do": "stream", "name": "long", "chunks": []int{600, 600, 600}})
	p.WantLog("Stream failed", "long", "max_bytes")

	c.tell(command{"do": "stream", "name": "silent", "source": "silent"})
	c.run(command{"do": "chunk", "source": "silent", "size": 10})
	p.WantLog("Stream failed", "silent", "stream idle")

	id := c.tell(command{"do": "stream", "name": "broken", "source": "broken"})
	c.run(command{"do": "chunk", "source": "broken", "size": 10})
	c.run(command{"do": "fail", "source": "broken"})
	require.Equal(t, "the source has failed", c.wantFailed(id))
	p.WantLog("Stream failed", "broken", "stream idle")

	c.run(command{"do": "end", "source": "silent"})
	c.run(command{"do": "stream", "name": "short", "chunks": []int{1000}})
	require.Equal(t, "short", p.wantMessage("the stream that is short enough", numbers(1000, 0)).Name)
	p.wantNoMessage()
}

func TestTruncatedClientStreamFails(t *testing.T) {
	t.Parallel()
	for _, cut := range []string{"terminate", "close", "kill"} {
		t.Run(cut, func(t *testing.T) {
			t.Parallel()
			p := run(t, "input:\n  cryo_server:"+listen+`
    streams:
      scanner:
        lines: {}
`+toLines)
			c := connected(t, p.Listening())
			c.tell(command{"do": "stream", "name": "cut", "source": "s"})
			c.run(command{"do": "chunk", "source": "s", "text": "whole line\npart of a "})
			p.wantMessage("the line that was whole", []byte("whole line"))
			if cut == "kill" {
				c.stop()
			} else {
				c.run(command{"do": cut})
				c.want("closed")
			}
			p.WantLog("Stream failed", "cut", "unexpected EOF")
			p.wantNoMessage()
		})
	}
}

func TestClientReceivesHeartbeats(t *testing.T) {
	t.Parallel()
	p := run(t, "input:\n  cryo_server:"+listen+"    heartbeat_interval: 200ms\n"+toLines)
	c := connected(t, p.Listening())
	for range 8 {
		require.Equal(t, "ping", c.want("heartbeat").Kind)
	}
	c.run(command{"do": "text", "text": "still here"})
	// If a pong were answered with a ping, there would be thousands in a second.
	require.Less(t, c.Count(isEvent("heartbeat")), 50)
	require.Zero(t, c.Count(isEvent("closed")))
}

func TestClientReceivesHeartbeatsWhileThePipelineStalls(t *testing.T) {
	t.Parallel()
	g := testkit.NewWebService(t)
	p := run(t, "input:\n  cryo_server:"+listen+`
    heartbeat_interval: 200ms
    max_buffer_bytes: 50000
    max_in_flight: 2
`+toService(g))
	c := connected(t, p.Listening())

	var ids []int
	for range 20 {
		ids = append(ids, c.tell(command{"do": "binary", "size": 20_000}))
	}
	held := g.Next()
	for range 10 { // two seconds, in which cryo-connect reads nothing
		require.Equal(t, "ping", c.want("heartbeat").Kind)
	}
	held.Respond(http.StatusOK)
	g.RespondToAll(http.StatusOK)
	for _, id := range ids {
		c.wantDone(id)
	}
	require.Zero(t, c.Count(isEvent("closed")))
}

func TestFrozenClientTimesOut(t *testing.T) {
	t.Parallel()
	s, input := newSource(t)
	p := run(t, input+"output:\n  cryo_server:"+listen+"    heartbeat_interval: 200ms\n")
	c := connected(t, p.Listening())
	s.ready(p)
	require.NoError(t, c.Cmd.Process.Signal(syscall.SIGSTOP))
	defer c.Cmd.Process.Signal(syscall.SIGCONT)
	m := s.post([]byte("lost"))
	p.WantLog("peer timeout")
	m.wantRejected("a message to a client that is frozen")
	require.NoError(t, c.Cmd.Process.Signal(syscall.SIGCONT))
	c.want("closed")
}

func TestClientWithAWrongTokenIsDenied(t *testing.T) {
	t.Parallel()
	p := run(t, "input:\n  cryo_server:"+listen+toLines)
	address := p.Listening()
	c := client(t)
	id := c.tell(command{"do": "connect", "url": "ws://" + address, "token": "wrong"})
	line := p.WantLog("Denied a client", "401")
	require.NotContains(t, line, "wrong")
	require.Contains(t, c.wantFailed(id), "Unable to connect") // after five attempts
	c.connect(address)
	c.run(command{"do": "text", "text": "with the right one"})
}

func TestClientWithATakenIDIsDeniedOrTakesOver(t *testing.T) {
	t.Parallel()
	p := run(t, `
input:
  cryo_server:
    address: 127.0.0.1:0
    authorize: root = true
`+toLines)
	c := connected(t, p.Listening())
	c.run(command{"do": "text", "text": "one"})

	// With another token it belongs to another client.
	require.Contains(t, c.wantFailed(c.tell(command{"do": "again", "token": "another"})), "401")
	c.run(command{"do": "text", "text": "two"})

	// With the same token it is the same client, which reconnects.
	c.run(command{"do": "again"})
	e := c.want("closed")
	require.Equal(t, 4000, e.Code)
	require.Equal(t, "taken over by a newer connection of the same client", e.Reason)
}

func TestClosedClientsAcknowledgementReachesNoOtherClient(t *testing.T) {
	t.Parallel()
	g := testkit.NewWebService(t)
	p := run(t, "input:\n  cryo_server:"+listen+toService(g))
	address := p.Listening()
	c := connected(t, address)
	first := c.tell(command{"do": "text", "text": "delivered"})
	g.Next().Respond(http.StatusOK)
	c.wantDone(first)
	c.tell(command{"do": "text", "text": "in flight"})
	held := g.Next()
	c.run(command{"do": "close"})
	require.Equal(t, 4000, c.want("closed").Code)

	// No acknowledgement for the first session reaches the second.
	c2 := connected(t, address)
	id := c2.tell(command{"do": "text", "text": "of another client"})
	d := g.Next()
	held.Respond(http.StatusOK)
	c2.wantOpen(id)
	d.Respond(http.StatusOK)
	c2.wantDone(id)
}

func TestClientIsClosedAfterTheLastAcknowledgement(t *testing.T) {
	t.Parallel()
	g := testkit.NewWebService(t)
	p := run(t, "input:\n  cryo_server:"+listen+toService(g))
	c := connected(t, p.Listening())
	id := c.tell(command{"do": "text", "text": "in the pipeline at the end"})
	d := g.Next()
	p.Signal(syscall.SIGTERM)
	d.Respond(http.StatusOK)
	c.wantDone(id)
	e := c.want("closed")
	require.Equal(t, 1012, e.Code)
	require.Equal(t, "server is shutting down", e.Reason)
	p.WantExit(0)
}

func TestClientSetsFlowControl(t *testing.T) {
	t.Parallel()
	s, input := newSource(t)
	p := run(t, input+"output:\n  cryo_server:"+listen+`
    message_type: ${! @type }
    send_to: session
    session_id: ${! @session }
    ack_timeout: 1s
    stream:
      name: ${! @name.or("stuck") }
`)
	c := client(t)
	session := "session=" + c.connect(p.Listening())
	s.ready(p)

	c.run(command{"do": "flow", "behaviour": 0})
	s.deliver(numbers(1000, 0), session, "type=stream", "name=pushed")
	c.want("streamed", named("pushed"), is(numbers(1000, 0)))

	// The package has no way to fetch: it gets no stream after that, and is closed.
	c.run(command{"do": "flow", "behaviour": 1})
	stuck := s.post(numbers(1000, 0), session, "type=stream")
	s.deliver([]byte("messages go on"), session, "type=utf8")
	c.want("text", is([]byte("messages go on")))
	stuck.wantRejected("a stream that nobody fetches")
	c.want("closed")
}
