package interop_test

import (
	"fmt"
	"net/http"
	"strconv"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/testkit"
)

// Recording the transcripts of the browser client and of cryo-server 2.12; see
// record_test.go.

// recordedBrowser stands for the page in a transcript.
var recordedBrowser = &node{version: "cryo-client-browser"}

func TestRecordBrowserMessages(t *testing.T) {
	recording(t)
	p, s, g := serving(t, "127.0.0.1:0", "    auto_replay_nacks: false\n", sendingAll)
	tp := newTap(t)
	tp.target = p.Listening()
	page := newBrowser(t).open(t)
	page.connect(tp.address)

	for _, send := range []string{fmt.Sprintf("SendUTF8(%q)", multiByte), "SendUTF8('')", "SendBinary(binary(5))", "SendBinary(binary(0))"} {
		page.start("send", "clients.page."+send)
		g.Next().Respond(http.StatusOK)
		page.wantSettled("send", "resolved")
	}
	page.start("bad", "clients.page.SendUTF8('bad')")
	g.Next().Respond(http.StatusInternalServerError)
	page.wantSettled("bad", "rejected the message could not be delivered")
	s.deliver([]byte("to the page"), "type=utf8")
	s.deliver(numbers(5, 0), "type=binary")
	page.wantEvent("binary " + described(numbers(5, 0)))
	p.stop()
	page.wantEvent("disconnected")
	tp.finish(t, "browser_messages", recordedBrowser, "Messages of a page both ways, one of them refused; cryo-connect shuts down.")
}

func TestRecordBrowserStreams(t *testing.T) {
	recording(t)
	p, s, g := serving(t, "127.0.0.1:0", "", "    message_type: stream\n    stream:\n      name: down\n      chunk_bytes: 20\n")
	g.RespondToAll(http.StatusOK)
	tp := newTap(t)
	tp.target = p.Listening()
	page := newBrowser(t).open(t)
	page.connect(tp.address)

	for _, chunks := range []string{"[10, 0, 20]", "[]"} {
		page.run(fmt.Sprintf("clients.page.Stream(stream(%s), 'up')", chunks))
	}
	for _, size := range []int{50, 0} {
		page.start("down", "clients.page.WaitForStream('down', 60000).then(all)")
		s.deliver(numbers(size, 0))
		page.wantSettled("down", "resolved "+described(numbers(size, 0)))
	}
	page.run("clients.page.SetIncomingFlowControl(1)")
	page.start("pulled", "clients.page.WaitForStream('down', 60000).then(async s => { const data = all(s); await clients.page.StreamFetchRange(s, 0, 2); await clients.page.StreamFetchRange(s, 2, 3); return data; })")
	s.deliver(numbers(50, 0))
	page.wantSettled("pulled", "resolved "+described(numbers(50, 0)))
	page.run("clients.page.Close()")
	page.wantEvent("closed 4000 ")
	tp.finish(t, "browser_streams", recordedBrowser, "Streams of a page both ways, the last one pulled; the page closes.")
}

func TestRecordBrowserReconnect(t *testing.T) {
	recording(t)
	p, s, g := serving(t, "127.0.0.1:0", "", sendingAll)
	network := newLine(t, p.Listening())
	page := newBrowser(t).open(t)
	page.connect(network.address)
	page.run("clients.page.SetIncomingFlowControl(0)")
	tp := newTap(t)
	tp.target = network.target
	network.target = tp.address
	network.cut()
	page.wantEvent("reconnected")
	s.deliver([]byte("welcome back"), "type=utf8")
	page.wantEvent("text welcome back")
	page.start("send", "clients.page.SendUTF8('here I am')")
	g.Next().Respond(http.StatusOK)
	page.wantSettled("send", "resolved")
	page.start("down", "clients.page.WaitForStream('down', 60000).then(all)")
	s.deliver(numbers(50, 0), "type=stream")
	page.wantSettled("down", "resolved "+described(numbers(50, 0)))
	page.start("up", "clients.page.Stream(stream([10, 20]), 'up')")
	g.Next().Respond(http.StatusOK)
	page.wantSettled("up", "resolved")
	page.run("clients.page.Close()")
	tp.finish(t, "browser_return", recordedBrowser, "A page that returns after a lost connection, without ENDPOINT_INFO; the page closes.")
}

func TestRecordOldServer(t *testing.T) {
	recording(t)
	n := oldServer(t)
	tp := through(t, n, false)
	g := testkit.NewWebService(t)
	g.RespondToAll(http.StatusOK)
	p := run(t, "input:\n  cryo:"+tp.dial()+toService(g))
	n.want("connected")
	n.run(command{"do": "text", "text": multiByte})
	n.run(command{"do": "binary", "size": 5})
	n.run(command{"do": "stream", "name": "a stream", "chunks": []int{10, 20}})
	p.stop()
	n.want("closed")
	tp.finish(t, "server2_input", n, "Messages and a stream of a server of version 2.12; cryo-connect closes.")
}

func TestRecordUnawaitedStream(t *testing.T) {
	recording(t)
	n := server(t, 0, quiet)
	tp := through(t, n, true)
	s, in := newSource(t)
	p := run(t, in+"output:\n  cryo:"+tp.dial()+"    message_type: stream\n    stream:\n      name: for nobody\n      chunk_bytes: 20\n")
	n.want("connected")
	s.ready(p)
	n.run(command{"do": "unawaited"})
	s.deliver(numbers(50, 0))
	n.want("unawaited")
	p.stop()
	n.want("closed")
	tp.finish(t, "server_unawaited", n, "A stream to a server whose application awaits none: it is acknowledged, so it counts as delivered; cryo-connect closes.")
}

func TestRecordTakeover(t *testing.T) {
	recording(t)
	p, s, g := serving(t, "127.0.0.1:0", "", sendingAll)
	tp := newTap(t)
	tp.target = p.Listening()
	c := client(t)
	id, err := strconv.ParseUint(c.connect(tp.address), 10, 64)
	require.NoError(t, err)
	sent := c.tell(command{"do": "text", "text": "from the elder"})
	g.Next().Respond(http.StatusOK)
	c.wantDone(sent)
	s.deliver([]byte("to the elder"), "type=utf8")
	newer, err := cryo.Dial(t.Context(), "ws://"+tp.target, &cryo.DialOptions{Token: token, SessionID: id})
	require.NoError(t, err)
	t.Cleanup(func() { testkit.HangUp(newer) })
	c.want("closed")
	tp.finish(t, "client_takeover", c, "Messages both ways; a newer connection with the client's id and token takes the session over.")
}
