package interop_test

import (
	"fmt"
	"net/http"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/internal/testkit"
)

// How sessions end, and what becomes of what is under way then; a page's are in
// browser_test.go.

// The published client for Node reports the end, and never comes back.
func TestClientDoesNotReconnectAfterACrash(t *testing.T) {
	t.Parallel()
	address := testkit.ReserveAddress(t)
	p, _, _ := serving(t, address, "", sendingAll)
	c := connected(t, address)
	c.run(command{"do": "alive"})
	p.crash()
	require.Equal(t, 1006, c.want("closed").Code)
	p, _, g := serving(t, address, "", sendingAll)
	again := client(t)
	p.WantLog("Session connected", "session="+again.connect(address)) // another one: it has another id
	again.tell(command{"do": "text", "text": "of the new one"})
	g.Next().Respond(http.StatusOK)
	require.Zero(t, p.Count(isConnected), "the first client has not returned")
}

func isConnected(line string) bool {
	return strings.Contains(line, "Session ") && strings.Contains(line, " connected")
}

// A stream that our end does not survive is sent again as a whole, by its
// application.
func TestClientStreamIsTruncatedByACrash(t *testing.T) {
	t.Parallel()
	address := testkit.ReserveAddress(t)
	lines := "    streams:\n      scanner:\n        lines: {}\n"
	p, _, g := serving(t, address, lines, sendingAll)
	c := connected(t, address)
	c.tell(command{"do": "stream", "name": "cut", "source": "s"})
	c.run(command{"do": "chunk", "source": "s", "text": "one\ntwo\npart of "})
	wantPassed(t, g, "one", "two")
	p.crash()
	c.want("closed")

	_, _, g = serving(t, address, lines, sendingAll)
	c = connected(t, address)
	id := c.tell(command{"do": "stream", "name": "again", "source": "s"})
	c.run(command{"do": "chunk", "source": "s", "text": "one\ntwo\npart of three\n"})
	c.run(command{"do": "end", "source": "s"})
	wantPassed(t, g, "one", "two", "part of three")
	c.wantDone(id)
}

// wantPassed wants messages at a gate, in any order, and lets them through.
func wantPassed(t *testing.T, g *testkit.WebService, want ...string) {
	t.Helper()
	var got []string
	for range want {
		d := g.Next()
		got = append(got, d.Body)
		d.Respond(http.StatusOK)
	}
	require.ElementsMatch(t, want, got)
}

// Our stream is sent again as a whole on the next session.
func TestStreamIsResentWhenTheServerIsKilled(t *testing.T) {
	t.Parallel()
	n := server(t, 0, quiet)
	s, _ := output(t, n, "    message_type: stream\n    stream:\n      name: sent\n      chunk_bytes: 1000\n")
	n.run(command{"do": "flow", "behaviour": 1}) // so that it is not over before
	data := numbers(4500, 0)
	m := s.post(data)
	tx := n.want("stream").Tx
	n.run(command{"do": "fetch", "tx": tx, "start": 0, "end": 2})
	n.want("chunk")
	n.stop()
	again := server(t, n.port, quiet)
	again.want("streamed", is(data))
	m.wantDelivered("the stream, as a whole")
}

func TestServerFloodArrivesInOrder(t *testing.T) {
	t.Parallel()
	const count = 5000
	n := server(t, 0, quiet)
	p := input(t, n, "", toLines)
	id := n.tell(command{"do": "texts", "count": count, "prefix": "flood-"})
	for i := range count {
		p.wantMessage(fmt.Sprintf("message %d", i), fmt.Appendf(nil, "flood-%d", i))
	}
	n.wantDone(id)
	p.wantNoMessage()
}

// Why docs/reference/interop.md says that a resolved promise alone proves nothing: the package
// resolves the sends of a session that has ended.
func TestServerResolvesSendsOnAnEndedSession(t *testing.T) {
	t.Parallel()
	n := server(t, 0, quiet)
	p := input(t, n, "    streams:\n      scanner:\n        lines: {}\n", toLines)
	stream := n.tell(command{"do": "stream", "name": "to nobody", "source": "s"})
	n.run(command{"do": "chunk", "source": "s", "text": "a line\n"})
	p.wantMessage("the line", []byte("a line"))
	p.crash()
	n.want("closed")
	n.run(command{"do": "text", "text": "to nobody"})
	n.run(command{"do": "texts", "count": 100, "prefix": "to nobody "})
	n.run(command{"do": "chunk", "source": "s", "size": 10})
	n.run(command{"do": "end", "source": "s"})
	n.wantDone(stream)
}

// When the promise of Stream() settles.
func TestServerResolvesACancelledStreamOnlyWhileSending(t *testing.T) {
	t.Parallel()
	n := server(t, 0, quiet)
	p := input(t, n, "    streams:\n      max_bytes: 1000\n", toLines)

	// While it is sent.
	sending := n.tell(command{"do": "stream", "name": "while it is sent", "source": "s"})
	n.run(command{"do": "chunk", "source": "s", "size": 2000})
	p.WantLog("Stream failed", "while it is sent", "max_bytes")
	for n.Count(responds(sending)) == 0 { // it looks at the next chunk after TX_CANCEL
		n.run(command{"do": "chunk", "source": "s", "size": 1})
	}
	n.wantDone(sending)

	// Before its first chunk.
	before := n.tell(command{"do": "stream", "name": strings.Repeat("x", 1025), "chunks": []int{1}})
	p.WantLog("Rejecting a stream: its name is too long")
	n.wantOpen(before)

	// Behind its last.
	behind := n.tell(command{"do": "stream", "name": "behind its last", "chunks": []int{5000}})
	n.run(command{"do": "text", "text": "behind it"})
	p.wantMessage("the message behind it", []byte("behind it"))
	n.wantOpen(behind)
	p.wantNoMessage()
}

// Why docs/reference/interop.md says that a stream that nobody awaits counts as delivered.
func TestUnawaitedStreamIsAcknowledgedAndRetained(t *testing.T) {
	t.Parallel()
	data := numbers(120_000, 0)
	t.Run("cryo-server", func(t *testing.T) {
		t.Parallel()
		n := server(t, 0, quiet)
		s, _ := output(t, n, "    message_type: stream\n")
		n.run(command{"do": "unawaited"})
		s.deliver(data)
		require.Equal(t, len(data), n.run(command{"do": "held", "tx": n.want("unawaited").Tx}).Bytes)
	})
	t.Run("cryo-client-node", func(t *testing.T) {
		t.Parallel()
		p, s, _ := serving(t, "127.0.0.1:0", "", "    message_type: stream\n")
		c := connected(t, p.Listening())
		c.run(command{"do": "unawaited"})
		s.deliver(data)
		require.Equal(t, len(data), c.run(command{"do": "held", "tx": c.want("unawaited").Tx}).Bytes)
	})
}
