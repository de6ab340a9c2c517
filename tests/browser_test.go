package tests

import (
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/chromedp/cdproto/runtime"
	"github.com/chromedp/chromedp"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/cryotest"
	"github.com/cryo-connect/cryo-connect/internal/testkit"
	"github.com/cryo-connect/cryo-connect/internal/wire"
)

// The page of config/browser, in a headless Chromium.

// page is a tab of a separate browser.
type page struct {
	t   *testing.T
	ctx context.Context //nolint:containedctx // it is the tab
}

// browse opens the page, with the address of a server.
func browse(t *testing.T, pageURL, server string) *page {
	t.Helper()
	return openBrowser(t, hash(pageURL, server))
}

// openBrowser opens a URL in a separate browser.
func openBrowser(t *testing.T, address string) *page {
	t.Helper()
	browser := ""
	for _, name := range []string{"chromium", "chromium-browser", "google-chrome", "chrome"} {
		if path, err := exec.LookPath(name); err == nil {
			browser = path
			break
		}
	}
	if browser == "" {
		t.Skip("no browser is installed: apt-get install chromium")
	}
	allocator, cancel := chromedp.NewExecAllocator(context.Background(), append(chromedp.DefaultExecAllocatorOptions[:],
		chromedp.ExecPath(browser),
		chromedp.WSURLReadTimeout(2*testkit.Patience), // it starts slowly on a busy machine
		chromedp.NoSandbox,                            // or it does not start as root
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
	require.NoError(t, chromedp.Run(ctx)) // starts it, for as long as ctx lives
	p := &page{t, ctx}
	p.do(chromedp.Navigate(address))
	return p
}

// hash adds the server's address and the token to the page's URL.
func hash(pageURL, server string) string {
	return pageURL + "#" + url.Values{"server": {server}, "token": {token}}.Encode()
}

// servePage serves the page of config/browser.
func servePage(w http.ResponseWriter, r *http.Request) {
	http.ServeFile(w, r, "../config/browser/index.html")
}

// do runs actions in the tab.
func (p *page) do(actions ...chromedp.Action) {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(p.ctx, testkit.Patience)
	defer cancel()
	require.NoError(p.t, chromedp.Run(ctx, actions...))
}

// want waits until a condition, in JavaScript, is true.
func (p *page) want(condition string) {
	p.t.Helper()
	err := chromedp.Run(p.ctx, chromedp.Poll(condition, nil, chromedp.WithPollingTimeout(testkit.Patience)))
	if err != nil {
		var text string
		_ = chromedp.Run(p.ctx, chromedp.Evaluate("document.body.innerText", &text))
		require.NoError(p.t, err, "wanted: %s; the page shows:\n%s", condition, text)
	}
}

// wantState waits until the page shows a state of its connection.
func (p *page) wantState(state string) {
	p.t.Helper()
	p.want(fmt.Sprintf("document.querySelector('#state').textContent === %q", state))
}

// wantLine waits for a line in the page's log, sent or received, with this note.
func (p *page) wantLine(kind, words, note string) {
	p.t.Helper()
	p.want(fmt.Sprintf("[...document.querySelectorAll('#log li.%s')].some(li => li.firstChild.textContent === %q && li.lastChild.textContent === %q)", kind, words, note))
}

// send types a text and sends it.
func (p *page) send(text string) {
	p.t.Helper()
	p.do(chromedp.SendKeys("#text", text, chromedp.ByQuery), chromedp.Click("button", chromedp.ByQuery))
}

// sendFile chooses a file, which the page sends as a stream.
func (p *page) sendFile(name string, content []byte) {
	p.t.Helper()
	path := filepath.Join(p.t.TempDir(), name)
	require.NoError(p.t, os.WriteFile(path, content, 0o600))
	p.do(chromedp.SetUploadFiles("#file", []string{path}, chromedp.ByQuery))
}

// picture makes the documentation's picture of the page, which must be below 100 KB. It is stored with
// CRYO_PICTURES=1 only, because session ids are random.
func (p *page) picture(path string) {
	p.t.Helper()
	var png []byte
	p.do(chromedp.EmulateViewport(640, 480), chromedp.CaptureScreenshot(&png))
	require.Less(p.t, len(png), 100_000)
	if os.Getenv("CRYO_PICTURES") == "1" {
		require.NoError(p.t, os.WriteFile(path, png, 0o644))
	}
}

const (
	pending   = "sending …"
	delivered = "✓ delivered"
)

func TestBrowsersExchangeMessagesThroughAPipeline(t *testing.T) {
	pageAddress := testkit.ReserveAddress(t)
	p := launch(t, []string{"CRYO_ADDRESS=127.0.0.1:0", "CRYO_TOKEN=" + token, "PAGE_ADDRESS=" + pageAddress, "PAGE_ORIGIN=http://" + pageAddress},
		"streams", "--set", "http.enabled=false", "config/browser")
	address := p.Listening()
	p.WantLog("Receiving HTTP messages at: ")
	other := testkit.Dial(t, address)
	browser := browse(t, "http://"+pageAddress+"/", "ws://"+address)
	browser.wantState("connected")

	browser.send("grüße")
	m := testkit.Receive(t, other)
	require.Equal(t, cryo.KindText, m.Kind)
	name, words, _ := strings.Cut(string(m.Payload), ": ")
	require.Regexp(t, `^\d{1,4}$`, name)
	require.Equal(t, "grüße", words)
	browser.wantLine("received", string(m.Payload), "message")
	browser.wantLine("sent", "grüße", pending)
	require.NoError(t, m.Ack())
	browser.wantLine("sent", "grüße", delivered)

	sent := testkit.Send(other, "hello")
	m = testkit.Receive(t, other)
	require.Contains(t, string(m.Payload), ": hello")
	browser.wantLine("received", string(m.Payload), "message")
	require.NoError(t, m.Ack())
	require.NoError(t, testkit.Next(t, sent), "the page acknowledged it")

	content := testkit.RandomBytes(200_000)
	browser.sendFile("photo.jpg", content)
	st := testkit.AcceptStream(t, other)
	require.Equal(t, "photo.jpg", st.Name())
	got, err := io.ReadAll(st)
	require.NoError(t, err)
	require.Equal(t, content, got)
	browser.wantLine("received", "photo.jpg", "stream of 200000 bytes")
	browser.wantLine("sent", "photo.jpg", pending)
	require.NoError(t, st.Ack())
	browser.wantLine("sent", "photo.jpg", delivered)
	browser.picture("../docs/images/browser.png")

	var sum string
	browser.do(chromedp.Evaluate(`fetch(document.querySelector("#log a").href)
		.then(response => response.arrayBuffer())
		.then(bytes => crypto.subtle.digest("SHA-256", bytes))
		.then(sum => [...new Uint8Array(sum)].map(b => b.toString(16).padStart(2, "0")).join(""))`,
		&sum, func(p *runtime.EvaluateParams) *runtime.EvaluateParams { return p.WithAwaitPromise(true) }))
	require.Equal(t, fmt.Sprintf("%x", sha256.Sum256(content)), sum, "the bytes that the page received")

	// The same page of another origin is denied. The page does not learn the reason from
	// its browser.
	stranger := testkit.Listen(t)
	cryotest.ServeOn(t, stranger, http.HandlerFunc(servePage))
	browser.do(chromedp.Navigate(hash("http://"+stranger.Addr().String()+"/", "ws://"+address)))
	p.WantLog("Denied a client", "403")
	browser.wantState("connecting …")
}

// withPeer serves the page, and a peer that sends what the test sends.
func withPeer(t *testing.T) (*page, *cryotest.Server) {
	t.Helper()
	server := cryotest.NewServer(t)
	routes := http.NewServeMux()
	routes.Handle("/cryo", server)
	routes.HandleFunc("/", servePage)
	socket := testkit.Listen(t)
	cryotest.ServeOn(t, socket, routes)
	address := socket.Addr().String()
	return browse(t, "http://"+address+"/", "ws://"+address+"/cryo"), server
}

func TestBrowserPageFollowsTheProtocol(t *testing.T) {
	browser, server := withPeer(t)
	peer := server.NextPeer()
	require.Equal(t, "Bearer "+token, peer.Request.URL.Query().Get("authorization"))
	peer.ServerHandshake()
	browser.wantState("connected")

	peer.WriteFrames(cryotest.Ping(7))
	peer.WantFrame("a ping is answered", cryotest.Pong(7))
	peer.WriteFrames(cryotest.Pong(7), cryotest.Text(8, "text"), cryotest.Binary(9, "\x00\xff"), cryotest.Error(10, "oh"))
	peer.WantFrame("text is acknowledged, and a pong is not answered", cryotest.Acked(8))
	peer.WantFrame("bytes are acknowledged", cryotest.Acked(9))
	peer.WantFrame("an application's error is acknowledged", cryotest.Acked(10))
	browser.wantLine("received", "text", "message")
	browser.wantLine("received", "2 bytes", "message")
	browser.wantLine("received", "error: oh", "message")

	browser.send("good")
	good := peer.WantType("a message", wire.UTF8)
	browser.send("bad")
	bad := peer.WantType("a message", wire.UTF8)
	require.Equal(t, "bad", string(bad.Payload))
	peer.WriteFrames(cryotest.Error(bad.Ack, "no"))
	browser.wantLine("sent", "bad", "not delivered: no")
	browser.wantLine("sent", "good", pending)
	peer.Ack(good)
	browser.wantLine("sent", "good", delivered)

	browser.sendFile("file", []byte("content"))
	opening := peer.WantType("a stream", wire.TxStart)
	require.Equal(t, "file", string(opening.Payload))
	require.EqualValues(t, -1, opening.Size)
	peer.Ack(opening)
	chunk := peer.WantType("its chunk, once it is acknowledged", wire.TxChunk)
	require.Equal(t, "content", string(chunk.Payload))
	finish := peer.WantType("its end", wire.TxFinish)
	peer.WriteFrames(wire.Frame{Type: wire.TxCancel, Ack: 11, Tx: finish.Tx})
	peer.WantFrame("it is cancelled", cryotest.Acked(11))
	browser.wantLine("sent", "file", "not delivered: the server cancelled the stream")

	peer.WriteFrames(cryotest.Bye(12, "bye"))
	peer.WantFrame("BYE is acknowledged", cryotest.Acked(12))
	peer.WantClose("and the connection closed", 4000, "")
}

func TestBrowserPageReconnectsAndResendsUnacknowledgedMessages(t *testing.T) {
	browser, server := withPeer(t)
	peer := server.NextPeer()
	peer.ServerHandshake()
	browser.send("one")
	peer.Ack(peer.WantType("the first message", wire.UTF8))
	browser.wantLine("sent", "one", delivered)
	browser.send("two")
	peer.WantType("the second message", wire.UTF8)
	require.NoError(t, peer.WS.Close())

	again := server.NextPeer()
	require.Equal(t, peer.SID, again.SID, "the session's id stays")
	again.ServerHandshake()
	two := again.WantType("the second message again", wire.UTF8)
	require.Equal(t, "two", string(two.Payload))
	browser.wantLine("sent", "two", pending)
	again.Ack(two)
	browser.wantLine("sent", "two", delivered)
}

// Two instances behind a balancer restart one after the other, each while the page is connected
// to it. What is in flight is delivered by the instance that stops; what comes too late for that,
// by the other.
func TestPageSurvivesARollingRestart(t *testing.T) {
	service := testkit.NewWebService(t)
	addresses := []string{testkit.ReserveAddress(t), testkit.ReserveAddress(t)}
	start := func(i int) *testkit.Process {
		p := runConfig(t, fmt.Sprintf(`
input: { cryo_server: { address: %q, tokens: [ "${CRYO_TOKEN}" ] } }
output: { http_client: { url: %q, verb: POST, retries: 0 } }
logger: { level: DEBUG }
`, addresses[i], service.URL))
		p.Listening()
		return p
	}
	instances := []*testkit.Process{start(0), start(1)}
	balancer := testkit.NewProxy(t, addresses...)
	pages := testkit.Listen(t)
	cryotest.ServeOn(t, pages, http.HandlerFunc(servePage))
	browser := browse(t, "http://"+pages.Addr().String()+"/", "ws://"+balancer.Address())
	browser.wantState("connected")
	deliver := func(text string) *testkit.Request {
		t.Helper()
		r := service.Next()
		require.Equal(t, text, r.Body, "each message is delivered once")
		return r
	}

	at := 0 // the instance that the page is connected to
	testkit.Eventually(t, func(c *assert.CollectT) {
		at = instances[1].Count(sessionConnected)
		require.Equal(c, 1, at+instances[0].Count(sessionConnected))
	})
	for restart := range 4 {
		p := instances[at]
		p.WantLog("Session connected")
		held, late := fmt.Sprintf("in flight at restart %d", restart), fmt.Sprintf("too late for restart %d", restart)
		browser.send(held)
		inFlight := deliver(held)
		p.Signal(syscall.SIGTERM)
		p.WantLog("the service is closing")
		p.WantLog("Waiting for pending acks to resolve")
		browser.send(late)
		browser.wantLine("sent", late, pending)
		inFlight.Respond(http.StatusOK)
		browser.wantLine("sent", held, delivered)
		p.WantExit(0)
		deliver(late).Respond(http.StatusOK)
		browser.wantLine("sent", late, delivered)
		browser.wantState("connected")
		instances[at] = start(at)
		at = 1 - at
	}
	require.Empty(t, service.Requests)
}

func sessionConnected(line string) bool { return strings.Contains(line, "Session connected") }
