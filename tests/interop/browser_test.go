package interop_test

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/chromedp/cdproto/runtime"
	"github.com/chromedp/chromedp"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/internal/testkit"
)

// cryo-connect listens, and pages with cryo-client-browser connect, in a headless
// Chromium.

const howToBrowse = "needs Chromium, and cryo-client-browser in the folder that CRYO_NODE_MODULES names"

// browser is a running Chromium, and the server of its page.
type browser struct {
	ctx  context.Context //nolint:containedctx // it is the browser
	page string
}

func newBrowser(t *testing.T) *browser {
	t.Helper()
	client := filepath.Join(nodeModules(t), "cryo-client-browser")
	main, err := mainOf(client)
	if err != nil {
		t.Skip(howToBrowse)
	}
	chromium := ""
	for _, name := range []string{"chromium", "chromium-browser", "google-chrome", "chrome"} {
		if path, err := exec.LookPath(name); err == nil {
			chromium = path
			break
		}
	}
	if chromium == "" {
		t.Skip(howToBrowse)
	}
	files := http.NewServeMux()
	files.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) { http.ServeFile(w, r, "peers/page.html") })
	files.HandleFunc("/cryo-client-browser", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/javascript")
		http.ServeFile(w, r, main)
	})
	server := httptest.NewServer(files)
	t.Cleanup(server.Close)
	allocator, cancel := chromedp.NewExecAllocator(context.Background(), append(chromedp.DefaultExecAllocatorOptions[:],
		chromedp.ExecPath(chromium),
		chromedp.WSURLReadTimeout(2*testkit.Patience), // it starts slowly on a busy machine
		chromedp.NoSandbox,                            // as root it would not start
		chromedp.DisableGPU,
		chromedp.Flag("disable-quic", true),
		chromedp.Flag("disable-component-update", true),
	)...)
	t.Cleanup(cancel)
	ctx, cancel := chromedp.NewContext(allocator)
	t.Cleanup(func() {
		_ = chromedp.Cancel(ctx) // waits for the browser's end
		cancel()
	})
	require.NoError(t, chromedp.Run(ctx))
	return &browser{ctx, server.URL}
}

// mainOf returns the module that a package exports.
func mainOf(folder string) (string, error) {
	text, err := os.ReadFile(filepath.Join(folder, "package.json"))
	if err != nil {
		return "", err
	}
	var about struct {
		Main    string
		Exports map[string]json.RawMessage
	}
	if err := json.Unmarshal(text, &about); err != nil {
		return "", err
	}
	main, exported := about.Main, about.Exports["."]
	var conditions map[string]string
	if json.Unmarshal(exported, &main) != nil && json.Unmarshal(exported, &conditions) == nil {
		main = conditions["import"]
	}
	return filepath.Join(folder, main), nil
}

// tab is a page with one client.
type tab struct {
	t   *testing.T
	ctx context.Context //nolint:containedctx // it is the tab
}

func (b *browser) open(t *testing.T) *tab {
	t.Helper()
	ctx, cancel := chromedp.NewContext(b.ctx)
	t.Cleanup(cancel)
	p := &tab{t, ctx}
	require.NoError(t, chromedp.Run(ctx, chromedp.Navigate(b.page)))
	p.want("globalThis.ready")
	return p
}

// eval evaluates an expression, and waits for a promise.
func (p *tab) eval(expression string) string {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(p.ctx, testkit.Patience)
	defer cancel()
	var result any
	err := chromedp.Run(ctx, chromedp.Evaluate(expression, &result, func(e *runtime.EvaluateParams) *runtime.EvaluateParams { return e.WithAwaitPromise(true) }))
	require.NoError(p.t, err, "%s", expression)
	return fmt.Sprint(result)
}

// run is eval without a result.
func (p *tab) run(expression string) {
	p.t.Helper()
	p.eval(fmt.Sprintf("Promise.resolve(%s).then(() => true)", expression))
}

// want waits until an expression is true.
func (p *tab) want(condition string) {
	p.t.Helper()
	err := chromedp.Run(p.ctx, chromedp.Poll(condition, nil, chromedp.WithPollingTimeout(testkit.Patience), chromedp.WithPollingInterval(20*time.Millisecond)))
	if err != nil {
		var state string
		_ = chromedp.Run(p.ctx, chromedp.Evaluate("JSON.stringify({events, settled, unhandled}).slice(0, 2000)", &state))
		require.NoError(p.t, err, "wanted: %s; the page has: %s", condition, state)
	}
}

// connect opens the page's client, and returns the session's id.
func (p *tab) connect(address string) string {
	p.t.Helper()
	return p.eval(fmt.Sprintf("connect('page', 'ws://%s', %q)", address, token))
}

func (p *tab) wantEvent(event string) {
	p.t.Helper()
	p.want(fmt.Sprintf("events.page.includes(%q)", event))
}

func (p *tab) forget() {
	p.t.Helper()
	p.run("events.page.splice(0)")
}

// start watches a promise under a name.
func (p *tab) start(name, promise string) {
	p.t.Helper()
	p.eval(fmt.Sprintf("watch(%q, %s)", name, promise))
}

func (p *tab) wantSettled(name, how string) {
	p.t.Helper()
	p.want(fmt.Sprintf("settled[%q] === %q", name, how))
}

func described(data []byte) string { return fmt.Sprintf("%d %s", len(data), sum(data)) }

// line is a network between a page and cryo-connect.
type line struct {
	address string
	target  string

	mu      sync.Mutex
	stalled chan struct{} // nil: bytes pass; closed: they pass again
	conns   []net.Conn
}

func newLine(t *testing.T, target string) *line {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	n := &line{address: l.Addr().String(), target: target}
	t.Cleanup(func() {
		_ = l.Close()
		n.pass()
		n.cut()
	})
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go n.carry(c)
		}
	}()
	return n
}

func (n *line) carry(c net.Conn) {
	n.wait()
	other, err := net.Dial("tcp", n.target)
	if err != nil {
		_ = c.Close()
		return
	}
	n.mu.Lock()
	n.conns = append(n.conns, c, other)
	n.mu.Unlock()
	for _, pair := range [][2]net.Conn{{c, other}, {other, c}} {
		go func() {
			buf := make([]byte, 64<<10)
			for {
				k, err := pair[0].Read(buf)
				n.wait()
				if _, errW := pair[1].Write(buf[:k]); err != nil || errW != nil {
					_, _ = pair[0].Close(), pair[1].Close()
					return
				}
			}
		}()
	}
}

func (n *line) wait() {
	n.mu.Lock()
	stalled := n.stalled
	n.mu.Unlock()
	if stalled != nil {
		<-stalled
	}
}

// stall lets nothing pass, not even the end of a connection.
func (n *line) stall() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.stalled = make(chan struct{})
}

func (n *line) pass() {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.stalled != nil {
		close(n.stalled)
		n.stalled = nil
	}
}

// cut closes all connections.
func (n *line) cut() {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, c := range n.conns {
		_ = c.Close()
	}
	n.conns = nil
}

// One browser serves all, a tab each.
func TestBrowser(t *testing.T) {
	t.Parallel()
	b := newBrowser(t)
	for _, test := range []struct {
		name string
		run  func(t *testing.T, b *browser)
	}{
		{"messages go both ways", testBrowserMessages},
		{"thousands of sends at a time", testBrowserFlood},
		{"a rejection rejects the promise", testBrowserRejection},
		{"a page pulls", testBrowserPulls},
		{"a page is pulled from", testBrowserIsPulledFrom},
		{"a page cancels the reader of a stream", testBrowserCancelsAReader},
		{"a page reconnects after a planned restart", testBrowserRestart},
		{"a page stays through a rolling restart", testBrowserRollingRestart},
		{"a page reconnects after a crash", testBrowserCrash},
		{"a page reconnects after a lost network", testBrowserNetworkLoss},
		{"a page reconnects after a timeout", testBrowserTimeout},
		{"a page reconnects after an acknowledgement timed out", testBrowserLate},
		{"a page does not reconnect after a takeover", testBrowserTakenOver},
		{"a page does not reconnect after its token has expired", testBrowserExpired},
		{"a page reconnects after its session has reached the maximum age", testBrowserMaximumAge},
	} {
		t.Run(test.name, func(t *testing.T) { test.run(t, b) })
	}
}

// serving is a pipeline that posts what pages send to a gate, and sends to all
// pages what is posted to a source.
func serving(t *testing.T, address, receiving, sending string) (*pipeline, *source, *testkit.WebService) {
	t.Helper()
	s, in := newSource(t)
	g := testkit.NewWebService(t)
	p := run(t, strings.ReplaceAll(bothWays(in, receiving, serviceIn(g), sending), "127.0.0.1:0", address))
	s.ready(p)
	return p, s, g
}

// sendingAll is the output of serving.
const sendingAll = `    message_type: ${! @type.or("utf8") }
    ack_timeout: 20s
    stream:
      name: down
      chunk_bytes: 50000
`

// wantServed wants messages and streams to go both ways.
func wantServed(t *testing.T, p *tab, s *source, g *testkit.WebService) {
	t.Helper()
	p.start("up", "clients.page.SendUTF8('up')")
	d := g.Next()
	require.Equal(t, "up", d.Body)
	d.Respond(http.StatusOK)
	p.wantSettled("up", "resolved")
	s.deliver([]byte("down"), "type=utf8")
	p.wantEvent("text down")

	p.start("waiting", "clients.page.WaitForStream('down', 60000).then(all)")
	data := numbers(200_000, 0)
	m := s.post(data, "type=stream")
	p.wantSettled("waiting", "resolved "+described(data))
	m.wantDelivered("a stream to the page")
	p.start("stream", "clients.page.Stream(stream([10, 100000, 1]), 'up')")
	d = g.Next()
	require.Equal(t, described(join(10, 100_000, 1)), described([]byte(d.Body)))
	d.Respond(http.StatusOK)
	p.wantSettled("stream", "resolved")
}

func testBrowserMessages(t *testing.T, b *browser) {
	p, s, g := serving(t, "127.0.0.1:0", "", sendingAll)
	page := b.open(t)
	page.connect(p.Listening())
	wantServed(t, page, s, g)
	for _, size := range []int{0, 1, maxPayload} {
		page.start("binary", fmt.Sprintf("clients.page.SendBinary(binary(%d))", size))
		d := g.Next()
		require.Equal(t, described(numbers(size, 0)), described([]byte(d.Body)))
		d.Respond(http.StatusOK)
		page.wantSettled("binary", "resolved")
		s.deliver(numbers(size, 0), "type=binary")
		page.wantEvent("binary " + described(numbers(size, 0)))
	}
	page.start("text", fmt.Sprintf("clients.page.SendUTF8(%q)", multiByte))
	d := g.Next()
	require.Equal(t, multiByte, d.Body)
	d.Respond(http.StatusOK)
	page.wantSettled("text", "resolved")
	page.run("clients.page.Close()")
	page.wantEvent("closed 4000 ")
}

func testBrowserFlood(t *testing.T, b *browser) {
	p := run(t, "input:\n  cryo_server:"+listen+toLines)
	page := b.open(t)
	page.connect(p.Listening())
	const count = 3000
	page.start("flood", fmt.Sprintf("Promise.all(Array.from({length: %d}, (_, i) => clients.page.SendUTF8('message ' + i))).then(() => '')", count))
	for i := range count {
		p.wantMessage(fmt.Sprintf("message %d", i), fmt.Appendf(nil, "message %d", i))
	}
	page.wantSettled("flood", "resolved")
	p.wantNoMessage()
}

func testBrowserRejection(t *testing.T, b *browser) {
	g := testkit.NewWebService(t)
	p := run(t, "input:\n  cryo_server:"+listen+"    auto_replay_nacks: false\n"+toService(g))
	page := b.open(t)
	page.connect(p.Listening())
	page.start("bad", "clients.page.SendUTF8('bad')")
	g.Next().Respond(http.StatusInternalServerError)
	page.wantSettled("bad", "rejected the message could not be delivered")
}

func testBrowserPulls(t *testing.T, b *browser) {
	p, s, g := serving(t, "127.0.0.1:0", "", sendingAll)
	page := b.open(t)
	page.connect(p.Listening())
	page.run("clients.page.SetIncomingFlowControl(1)")
	data := numbers(120_000, 0) // three chunks
	page.start("stream", "clients.page.WaitForStream('down', 60000).then(s => { globalThis.pulled = s; return s.byteLength; })")
	m := s.post(data, "type=stream")
	page.wantSettled("stream", "resolved 120000")
	page.start("data", "all(pulled)")
	page.run("clients.page.StreamFetchRange(pulled, 0, 1)")
	m.wantOpen("a stream that was fetched in part")
	page.run("clients.page.StreamFetchRange(pulled, 1, 9)") // more than there are
	page.wantSettled("data", "resolved "+described(data))
	m.wantDelivered("a stream that was pulled")

	page.run("clients.page.SetIncomingFlowControl(0)")
	wantServed(t, page, s, g)
}

func testBrowserIsPulledFrom(t *testing.T, b *browser) {
	p, s, g := serving(t, "127.0.0.1:0", "    streams:\n      flow_control: pull\n", sendingAll)
	page := b.open(t)
	page.connect(p.Listening())
	s.deliver([]byte("behind the flow control"), "type=utf8")
	page.start("pulled", "clients.page.Stream(stream([10, 100000, 0, 1]), 'up')")
	d := g.Next()
	require.Equal(t, described(join(10, 100_000, 0, 1)), described([]byte(d.Body)))
	d.Respond(http.StatusOK)
	page.start("after", "clients.page.SendUTF8('after it')")
	g.Next().Respond(http.StatusOK)
	page.wantSettled("after", "resolved")
	require.Equal(t, "open", page.eval("settled.pulled"), "the promise of a stream that is pulled never settles")
}

// The client cancels nothing: what is pushed is acknowledged all the same, and what
// would have to be pulled is not.
func testBrowserCancelsAReader(t *testing.T, b *browser) {
	p, s, g := serving(t, "127.0.0.1:0", "", strings.Replace(sendingAll, "20s", "2s", 1))
	page := b.open(t)
	page.connect(p.Listening())
	page.start("pushed", "clients.page.WaitForStream('down', 60000).then(s => s.getReader().cancel())")
	m := s.post(numbers(120_000, 0), "type=stream")
	page.wantSettled("pushed", "resolved")
	m.wantDelivered("a pushed stream whose reader is cancelled")

	page.run("clients.page.SetIncomingFlowControl(1)")
	page.start("pulled", "clients.page.WaitForStream('down', 60000).then(s => s.getReader().cancel())")
	m = s.post(numbers(120_000, 0), "type=stream")
	page.wantSettled("pulled", "resolved")
	m.wantRejected("a stream that is not pulled")
	page.wantEvent("reconnected") // because it was late
	wantServed(t, page, s, g)
}

func testBrowserRestart(t *testing.T, b *browser) {
	address := testkit.ReserveAddress(t)
	p, s, g := serving(t, address, "", sendingAll)
	page := b.open(t)
	id := page.connect(address)
	wantServed(t, page, s, g)
	page.forget()
	p.stop()
	page.wantEvent("disconnected")
	page.start("offline", "clients.page.SendUTF8('offline')")
	page.wantSettled("offline", "rejected No socket.")
	p, s, g = serving(t, address, "", sendingAll)
	p.WantLog("Session connected", "session="+id)
	page.wantEvent("reconnected")
	wantServed(t, page, s, g)
}

// instance is one of several processes behind a balancer.
type instance struct {
	*pipeline
	*source
	gate *testkit.WebService
}

func testBrowserRollingRestart(t *testing.T, b *browser) {
	addresses := []string{testkit.ReserveAddress(t), testkit.ReserveAddress(t)}
	start := func(i int) instance {
		p, s, g := serving(t, addresses[i], "", sendingAll)
		return instance{p, s, g}
	}
	instances := []instance{start(0), start(1)}
	page := b.open(t)
	id := page.connect(testkit.NewProxy(t, addresses...).Address())
	has := func(line string) bool {
		return strings.Contains(line, "Session connected") && strings.Contains(line, id)
	}
	at := 0 // the instance that the page is connected to
	testkit.Eventually(t, func(c *assert.CollectT) {
		at = instances[1].Count(has)
		require.Equal(c, 1, at+instances[0].Count(has))
	})
	for range 2 {
		wantServed(t, page, instances[at].source, instances[at].gate)
		page.forget()
		instances[at].stop()
		page.wantEvent("disconnected")
		page.wantEvent("reconnected")
		instances[at] = start(at)
		at = 1 - at
		instances[at].WantLog("Session connected", "session="+id)
	}
	wantServed(t, page, instances[at].source, instances[at].gate)
}

func testBrowserCrash(t *testing.T, b *browser) {
	address := testkit.ReserveAddress(t)
	p, s, g := serving(t, address, "", sendingAll)
	page := b.open(t)
	id := page.connect(address)
	wantServed(t, page, s, g)
	page.forget()
	page.start("lost", "clients.page.SendUTF8('lost')")
	g.Next()
	p.crash()
	page.wantEvent("disconnected")
	p, s, g = serving(t, address, "", sendingAll)
	p.WantLog("Session connected", "session="+id)
	page.wantEvent("reconnected")
	wantServed(t, page, s, g)
	require.Equal(t, "open", page.eval("settled.lost"), "a send of the lost connection never settles")
}

// crash ends the process as a fault would.
func (p *pipeline) crash() {
	p.t.Helper()
	p.crashed = true
	p.Kill()
}

func testBrowserNetworkLoss(t *testing.T, b *browser) {
	p, s, g := serving(t, "127.0.0.1:0", "", sendingAll)
	network := newLine(t, p.Listening())
	page := b.open(t)
	id := page.connect(network.address)
	wantServed(t, page, s, g)
	page.forget()
	network.cut()
	page.wantEvent("reconnected")
	p.WantLog("Session connected", "session="+id)
	wantServed(t, page, s, g)
}

func testBrowserTimeout(t *testing.T, b *browser) {
	p, s, g := serving(t, "127.0.0.1:0", "    heartbeat_interval: 500ms\n", sendingAll+"    heartbeat_interval: 500ms\n")
	network := newLine(t, p.Listening())
	page := b.open(t)
	id := page.connect(network.address)
	wantServed(t, page, s, g)
	page.forget()
	network.stall()
	p.WantLog("Session disconnected", "session="+id, "peer timeout")
	network.pass()
	page.wantEvent("reconnected")
	p.WantLog("Session connected", "session="+id)
	wantServed(t, page, s, g)
}

func testBrowserLate(t *testing.T, b *browser) {
	p, s, g := serving(t, "127.0.0.1:0", "", strings.Replace(sendingAll, "20s", "1s", 1))
	network := newLine(t, p.Listening())
	page := b.open(t)
	page.connect(network.address)
	wantServed(t, page, s, g)
	page.forget()
	network.stall()
	m := s.post([]byte("late"), "type=utf8")
	p.WantLog("Closing session")
	m.wantRejected("a message that is not acknowledged")
	network.pass()
	page.wantEvent("reconnected")
	wantServed(t, page, s, g)
}

func testBrowserTakenOver(t *testing.T, b *browser) {
	p, s, g := serving(t, "127.0.0.1:0", "", sendingAll)
	address := p.Listening()
	page := b.open(t)
	id := page.connect(address)
	wantServed(t, page, s, g)
	page.forget()
	page.run(fmt.Sprintf("new Promise(r => { globalThis.other = new WebSocket('ws://%s/?x-cryo-sid=%s&authorization=' + encodeURIComponent('Bearer ' + %q)); other.onopen = r; })", address, id, token))
	page.wantEvent("closed 4000 taken over by a newer connection of the same client")
	require.Equal(t, "false", page.eval("events.page.includes('disconnected')"))
}

// What is in flight at the expiry is still acknowledged. The page would return with the same token,
// and be denied.
func testBrowserExpired(t *testing.T, b *browser) {
	const expires = "    session_expires: root = now().ts_unix() + 5\n"
	p, s, g := serving(t, "127.0.0.1:0", expires, sendingAll+expires)
	address := p.Listening()
	page := b.open(t)
	id := page.connect(address)
	s.deliver([]byte("down"), "type=utf8")
	page.wantEvent("text down")
	page.start("in flight", "clients.page.SendUTF8('in flight')")
	d := g.Next()
	time.Sleep(6 * time.Second) // until it has expired
	page.start("late", "clients.page.SendUTF8('late')")
	require.Equal(t, "0", page.eval("events.page.filter(e => e.startsWith('closed')).length"), "the session waits for what is in flight")
	d.Respond(http.StatusOK)
	page.wantSettled("in flight", "resolved")
	page.wantEvent("closed 4000 session expired")
	p.WantLog("Closed an expired session", "session="+id)
	require.Equal(t, "false", page.eval("events.page.includes('disconnected')"))
	require.Equal(t, "open", page.eval("settled.late"), "a send after the expiry never settles")

	page.connect(address) // as the page would with a renewed token
	page.start("renewed", "clients.page.SendUTF8('renewed')")
	g.Next().Respond(http.StatusOK)
	page.wantSettled("renewed", "resolved")
	require.Zero(t, p.Count(func(line string) bool { return strings.Contains(line, "Denied a client") }), "the page has not tried to return")
	require.Equal(t, 2, p.Count(isConnected))
}

func testBrowserMaximumAge(t *testing.T, b *browser) {
	const age = "    max_session_age: 15s\n"
	p, s, g := serving(t, "127.0.0.1:0", age, sendingAll+age)
	page := b.open(t)
	id := page.connect(p.Listening())
	wantServed(t, page, s, g)
	page.wantEvent("disconnected")
	page.wantEvent("reconnected")
	p.WantLog("Closed an expired session", "session="+id, "maximum age of 15s reached")
	page.start("again", "clients.page.SendUTF8('again')")
	g.Next().Respond(http.StatusOK)
	page.wantSettled("again", "resolved")
	require.Equal(t, "0", page.eval("events.page.filter(e => e.startsWith('closed')).length"))
	require.Equal(t, "1", page.eval("events.page.filter(e => e === 'reconnected').length"), "one attempt is enough")
	require.Equal(t, 2, p.Count(isConnected))
}
