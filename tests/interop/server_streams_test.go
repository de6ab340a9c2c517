package interop_test

import (
	"fmt"
	"testing"

	"github.com/stretchr/testify/require"
)

// Streams between cryo-connect, which dials, and cryo-server.

func TestServerReceivesStreams(t *testing.T) {
	t.Parallel()
	n := server(t, 0, quiet)
	s, _ := output(t, n, `
    message_type: stream
    stream:
      name: ${! @name }
      chunk_bytes: 5000
`)
	wantStreamsOfAllSizes(t, s, n)
}

func TestServerSendsStreams(t *testing.T) {
	t.Parallel()
	n := server(t, 0, quiet)
	p := input(t, n, "", toLines)
	testServerStreams(t, n, p, -1)
}

func TestServerStreamsCanBePulled(t *testing.T) {
	t.Parallel()
	n := server(t, 0, quiet)
	p := input(t, n, "    streams:\n      flow_control: pull\n", toLines)
	// The acknowledgement of a text follows that of TX_FLOW.
	n.run(command{"do": "text", "text": "the flow control is set"})
	p.wantMessage("a message", []byte("the flow control is set"))
	testServerStreams(t, n, p, 0)
}

// testServerStreams makes the server send streams. announced is -1 if the package does not
// announce their size.
func testServerStreams(t *testing.T, n *node, p *pipeline, announced int) {
	t.Helper()
	const most = 4<<20 - 17 - 1 // as above
	for i, chunks := range [][]int{{}, {1}, {10, 100_000, 1, 0, 7}, {most, 3}} {
		name := fmt.Sprintf("stream %d", i)
		id := n.tell(command{"do": "stream", "name": name, "chunks": chunks})
		r := p.wantMessage(name, join(chunks...))
		require.Equal(t, name, r.Name)
		require.Equal(t, "stream", r.Type)
		if announced < 0 {
			require.Equal(t, -1, r.Size)
			n.wantDone(id)
		} else { // the package's promise of a pulled stream never settles
			require.Equal(t, len(join(chunks...)), r.Size)
		}
	}
	for i := range 3 {
		n.tell(command{"do": "stream", "name": fmt.Sprintf("of three %d", i), "chunks": []int{1000 * (i + 1), 20_000, 1}})
	}
	for i := range 3 {
		data := join(1000*(i+1), 20_000, 1)
		require.Equal(t, fmt.Sprintf("of three %d", i), p.wantMessage("one of three streams", data).Name)
	}
	p.wantNoMessage()
}

func TestServerCanPullStreams(t *testing.T) {
	t.Parallel()
	n := server(t, 0, quiet)
	s, _ := output(t, n, `
    message_type: stream
    stream:
      name: pulled
      chunk_bytes: 1000
`)
	n.run(command{"do": "flow", "behaviour": 1})
	data := numbers(4500, 0)
	m := s.post(data)
	tx := n.want("stream", named("pulled")).Tx
	for _, r := range [][2]int{{0, 1}, {1, 3}} {
		n.run(command{"do": "fetch", "tx": tx, "start": r[0], "end": r[1]})
		for range r[1] - r[0] {
			n.want("chunk", func(e event) bool { return e.Bytes == 1000 })
		}
	}
	m.wantOpen("a stream that was fetched in part")
	n.run(command{"do": "fetch", "tx": tx, "start": 3, "end": 5})
	n.want("streamed", is(data))
	m.wantDelivered("a stream that was pulled")

	n.run(command{"do": "flow", "behaviour": 0})
	s.deliver(numbers(2500, 0))
	n.want("streamed", is(numbers(2500, 0)))
}

func TestStreamCancelledByTheServerIsRejected(t *testing.T) {
	t.Parallel()
	n := server(t, 0, quiet)
	s, _ := output(t, n, `
    message_type: ${! @type }
    stream:
      chunk_bytes: 1000
`)
	n.run(command{"do": "flow", "behaviour": 1}) // so that it is not over before
	m := s.post(numbers(4500, 0), "type=stream")
	n.run(command{"do": "cancel", "tx": n.want("stream").Tx})
	m.wantRejected("a stream that was cancelled")
	s.deliver([]byte("goes on"), "type=utf8")
}

func TestServerStreamIsCancelled(t *testing.T) {
	t.Parallel()
	n := server(t, 0, quiet)
	p := input(t, n, `
    streams:
      max_bytes: 1000
      idle_timeout: 1200ms # so that each is logged: streams are at most once a second
`, toLines)
	n.tell(command{"do": "stream", "name": "long", "source": "long"})
	for range 3 {
		n.run(command{"do": "chunk", "source": "long", "size": 600})
	}
	p.WantLog("Stream failed", "long", "max_bytes")

	n.tell(command{"do": "stream", "name": "silent", "source": "silent"})
	n.run(command{"do": "chunk", "source": "silent", "size": 10})
	p.WantLog("Stream failed", "silent", "stream idle")

	n.tell(command{"do": "stream", "name": "broken", "source": "broken"})
	n.run(command{"do": "chunk", "source": "broken", "size": 10})
	n.run(command{"do": "fail", "source": "broken"})
	p.WantLog("Stream failed", "broken", "stream idle")

	n.run(command{"do": "stream", "name": "short", "chunks": []int{1000}})
	require.Equal(t, "short", p.wantMessage("the stream that is short enough", numbers(1000, 0)).Name)
	p.wantNoMessage()
}

func TestTruncatedServerStreamFails(t *testing.T) {
	t.Parallel()
	for _, cut := range []string{"terminate", "close"} {
		t.Run(cut, func(t *testing.T) {
			t.Parallel()
			n := server(t, 0, quiet)
			p := input(t, n, `
    streams:
      scanner:
        lines: {}
`, toLines)
			n.tell(command{"do": "stream", "name": "cut", "source": "s"})
			n.run(command{"do": "chunk", "source": "s", "text": "whole line\npart of a "})
			p.wantMessage("the line that was whole", []byte("whole line"))
			n.run(command{"do": cut})
			p.WantLog("Stream failed", "cut", "unexpected EOF")
			n.want("closed")
			n.want("connected") // again
			p.wantNoMessage()
		})
	}
}
