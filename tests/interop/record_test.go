package interop_test

import (
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/internal/testkit"
)

// These tests record the transcripts in testdata, between the binary and the published
// packages: CRYO_RECORD=1 go test -run TestRecord ./tests/interop

// recording skips the test unless transcripts are recorded.
func recording(t *testing.T) {
	t.Helper()
	if os.Getenv("CRYO_RECORD") == "" {
		t.Skip("records only with CRYO_RECORD=1")
	}
}

// tap is a WebSocket proxy that records messages.
type tap struct {
	address string
	target  string // host and port

	mu         sync.Mutex
	transcript transcript
	ended      chan struct{}
}

// newTap runs a tap until the test's end.
func newTap(t *testing.T) *tap {
	t.Helper()
	tp := &tap{ended: make(chan struct{})}
	srv := httptest.NewServer(tp)
	t.Cleanup(srv.Close)
	tp.address = strings.TrimPrefix(srv.URL, "http://")
	return tp
}

// ServeHTTP connects the client to the target, and passes messages in both directions.
func (tp *tap) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	accepting, resp, err := websocket.DefaultDialer.Dial("ws://"+tp.target+"/?"+r.URL.RawQuery, nil)
	if err != nil {
		w.WriteHeader(http.StatusBadGateway)
		return
	}
	defer resp.Body.Close()
	defer accepting.Close()
	dialling, err := (&websocket.Upgrader{CheckOrigin: func(*http.Request) bool { return true }}).Upgrade(w, r, nil)
	if err != nil {
		return
	}
	defer dialling.Close()
	var pumps sync.WaitGroup
	pumps.Go(func() { tp.pump(dialling, accepting, tp.transcript.dialled) })
	pumps.Go(func() { tp.pump(accepting, dialling, !tp.transcript.dialled) })
	pumps.Wait()
	close(tp.ended)
}

// pump passes the messages of one direction.
func (tp *tap) pump(from, to *websocket.Conn, ours bool) {
	from.SetCloseHandler(func(int, string) error { return nil }) // the other end sends the close frame
	for {
		_, b, err := from.ReadMessage()
		if err == nil {
			tp.record(entry{ours: ours, wire: b})
			if to.WriteMessage(websocket.BinaryMessage, b) != nil {
				return
			}
			continue
		}
		var closed *websocket.CloseError
		if errors.As(err, &closed) && closed.Code != websocket.CloseAbnormalClosure {
			tp.record(entry{ours: ours, code: closed.Code, reason: closed.Text})
			_ = to.WriteControl(websocket.CloseMessage, websocket.FormatCloseMessage(closed.Code, closed.Text), time.Now().Add(time.Second))
			return
		}
		_ = to.Close()
		return
	}
}

// record adds a frame or a close to the transcript.
func (tp *tap) record(e entry) {
	tp.mu.Lock()
	defer tp.mu.Unlock()
	tp.transcript.entries = append(tp.transcript.entries, e)
}

// finish waits for the session's end and writes the transcript.
func (tp *tap) finish(t *testing.T, name string, n *node, about string) {
	t.Helper()
	select {
	case <-tp.ended:
	case <-time.After(testkit.Patience):
		require.FailNow(t, "timed out waiting for the session's end")
	}
	tp.mu.Lock()
	defer tp.mu.Unlock()
	tp.transcript.about = []string{about, "Recorded between cryo-connect and " + n.version + ` by TestRecord: "<" is the package's, ">" cryo-connect's.`}
	tp.transcript.write(t, name)
}

// through puts a tap in front of a server.
func through(t *testing.T, n *node, sendsOnly bool) *tap {
	t.Helper()
	tp := newTap(t)
	tp.target = net.JoinHostPort("127.0.0.1", fmt.Sprint(n.port))
	tp.transcript.dialled, tp.transcript.sendsOnly = true, sendsOnly
	return tp
}

// dial has the fields of a component that dials the tap.
func (tp *tap) dial() string {
	return fmt.Sprintf(`
    url: ws://%s
    token: ${CRYO_TOKEN}
`, tp.address)
}

func TestRecordClientMessages(t *testing.T) {
	recording(t)
	s, in := newSource(t)
	g := testkit.NewWebService(t)
	p := run(t, bothWays(in, "    auto_replay_nacks: false\n", serviceIn(g), "    message_type: ${! @type }\n"))
	tp := newTap(t)
	tp.target = p.Listening()
	s.ready(p)
	c := connected(t, tp.address)

	for _, m := range []payload{{kind: "text", text: "hello"}, {kind: "text", text: multiByte}, {kind: "binary", size: 5}, {kind: "binary"}} {
		id := c.tell(m.command())
		g.Next().Respond(http.StatusOK)
		c.wantDone(id)
	}
	id := c.tell(command{"do": "text", "text": "bad"})
	g.Next().Respond(http.StatusInternalServerError)
	c.wantFailed(id)
	// Two at a time, the second delivered first.
	first, second := c.tell(command{"do": "text", "text": "first"}), 0
	d := g.Next()
	second = c.tell(command{"do": "text", "text": "second"})
	g.Next().Respond(http.StatusOK)
	c.wantDone(second)
	d.Respond(http.StatusOK)
	c.wantDone(first)
	for _, m := range []payload{{kind: "text", text: "to the client"}, {kind: "binary", size: 5}, {kind: "text"}} {
		s.deliver(m.bytes(), "type="+m.messageType())
	}
	c.run(command{"do": "roundtrip"})
	c.run(command{"do": "close"})
	c.want("closed")
	tp.finish(t, "client_messages", c, "Messages both ways, one of them rejected; the client closes.")
}

// serviceIn is toService for bothWays.
func serviceIn(g *testkit.WebService) string {
	body := strings.TrimPrefix(toService(g), "\noutput:")
	return strings.TrimPrefix(strings.ReplaceAll(body, "\n", "\n  "), "\n")
}

func TestRecordClientStreams(t *testing.T) {
	recording(t)
	s, in := newSource(t)
	g := testkit.NewWebService(t)
	g.RespondToAll(http.StatusOK)
	p := run(t, bothWays(in, "    streams:\n      max_bytes: 100\n", serviceIn(g), "    message_type: stream\n    stream:\n      name: down\n      chunk_bytes: 20\n"))
	tp := newTap(t)
	tp.target = p.Listening()
	s.ready(p)
	c := connected(t, tp.address)

	for _, chunks := range [][]int{{10, 0, 20}, {}} {
		c.run(command{"do": "stream", "name": "up", "chunks": chunks})
	}
	for _, size := range []int{50, 0} {
		s.deliver(numbers(size, 0))
		c.want("streamed", is(numbers(size, 0)))
	}
	c.run(command{"do": "stream", "name": "too long", "chunks": []int{60, 60}})
	p.WantLog("Stream failed")
	c.run(command{"do": "text", "text": "after it"})
	p.stop()
	c.want("closed")
	tp.finish(t, "client_streams", c, "Streams both ways, one of them cancelled; cryo-connect closes.")
}

func TestRecordServerInput(t *testing.T) {
	recording(t)
	n := server(t, 0, quiet)
	tp := through(t, n, false)
	g := testkit.NewWebService(t)
	run(t, "input:\n  cryo:"+tp.dial()+"    auto_replay_nacks: false\n    message_types: [ utf8, binary, stream, error ]\n"+toService(g))
	n.want("connected")
	for _, c := range []command{
		{"do": "text", "text": "hello"},
		{"do": "text", "text": multiByte},
		{"do": "text", "text": ""},
		{"do": "binary", "size": 5},
		{"do": "error", "text": "of the application"},
	} {
		id := n.tell(c)
		g.Next().Respond(http.StatusOK)
		n.wantDone(id)
	}
	n.tell(command{"do": "text", "text": "bad"})
	g.Next().Respond(http.StatusInternalServerError)
	n.want("error")
	id := n.tell(command{"do": "stream", "name": "a stream", "chunks": []int{10, 20}})
	g.Next().Respond(http.StatusOK)
	n.wantDone(id)
	n.tell(command{"do": "stream", "name": "a bad one", "chunks": []int{5}})
	g.Next().Respond(http.StatusInternalServerError)
	n.run(command{"do": "roundtrip"})
	n.tell(command{"do": "close", "reason": "that was it"})
	tp.finish(t, "server_input", n, "Messages and streams of a server, one of each rejected; the server closes.")
}

func TestRecordServerOutput(t *testing.T) {
	recording(t)
	n := server(t, 0, quiet)
	tp := through(t, n, true)
	s, in := newSource(t)
	p := run(t, in+"output:\n  cryo:"+tp.dial()+"    message_type: ${! @type }\n    stream:\n      name: sent\n      chunk_bytes: 20\n")
	n.want("connected")
	s.ready(p)
	for _, m := range []payload{{kind: "text", text: multiByte}, {kind: "binary", size: 5}, {kind: "text"}} {
		s.deliver(m.bytes(), "type="+m.messageType())
	}
	s.deliver(numbers(50, 0), "type=stream")
	n.tell(command{"do": "text", "text": "for nobody"})
	n.want("error")

	n.run(command{"do": "flow", "behaviour": 1})
	m := s.post(numbers(50, 0), "type=stream")
	n.Drop(isEvent("stream", func(e event) bool { return e.Tx == 0 }))
	tx := n.want("stream").Tx
	for _, r := range [][2]int{{0, 2}, {2, 3}} {
		n.run(command{"do": "fetch", "tx": tx, "start": r[0], "end": r[1]})
	}
	m.wantDelivered("a stream that is pulled")
	m = s.post(numbers(50, 0), "type=stream")
	tx = n.want("stream").Tx
	n.run(command{"do": "fetch", "tx": tx, "start": 0, "end": 1})
	n.want("chunk")
	n.run(command{"do": "cancel", "tx": tx})
	m.wantRejected("a stream that is cancelled")
	p.stop()
	n.want("closed")
	tp.finish(t, "server_output", n, "Messages and streams to a server, pushed, pulled and cancelled; cryo-connect closes.")
}

func TestRecordServerPull(t *testing.T) {
	recording(t)
	n := server(t, 0, 300*time.Millisecond)
	tp := through(t, n, false)
	g := testkit.NewWebService(t)
	g.RespondToAll(http.StatusOK)
	p := run(t, "input:\n  cryo:"+tp.dial()+"    streams:\n      flow_control: pull\n"+toService(g))
	n.want("connected")
	n.run(command{"do": "text", "text": "the flow control is set"})
	for i, chunks := range [][]int{{10, 20, 0, 5}, {}} {
		n.tell(command{"do": "stream", "name": fmt.Sprintf("pulled %d", i), "chunks": chunks})
		n.run(command{"do": "roundtrip"})
	}
	for range 3 {
		n.want("heartbeat")
	}
	p.stop()
	n.want("closed")
	tp.finish(t, "server_pull", n, "Streams pulled from a server, and heartbeats; cryo-connect closes.")
}
