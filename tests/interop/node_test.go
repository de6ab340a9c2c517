package interop_test

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/internal/testkit"
)

const token = "correct horse/battery+staple&more"

// node is a Node process with one of the published packages. At the test's end it must
// still run, respond, and end with exit code 0.
type node struct {
	*testkit.Process
	t       *testing.T
	name    string
	stdin   io.WriteCloser
	version string // of the package
	port    int    // the server's
	number  int
	ended   bool // as the test wants it
}

// command is a command for a Node process; event is what it reports.
type (
	command map[string]any
	event   struct {
		Event   string
		ID      int
		Port    int
		Error   string
		Session string
		Text    string
		Bytes   int
		SHA256  string
		Tx      int
		Name    string
		Version string
		Chunks  int
		Code    int
		Reason  string
		Kind    string
	}
)

// startNode starts a script of peers with the packages, and waits until it is ready.
func startNode(t *testing.T, script string, args ...string) *node {
	t.Helper()
	modules := nodeModules(t)
	cmd := exec.Command("node", append([]string{filepath.Join("peers", script)}, args...)...)
	cmd.Env = append(os.Environ(), "CRYO_NODE_MODULES="+modules)
	stdin, err := cmd.StdinPipe()
	require.NoError(t, err)
	n := &node{Process: testkit.Start(t, cmd), t: t, name: script, stdin: stdin}
	t.Cleanup(n.wantHealthy)
	e := n.want("package")
	n.version = e.Name + " " + e.Version
	n.want("ready")
	return n
}

// wantHealthy is the end of each test: cryo-connect must not have ended the process.
func (n *node) wantHealthy() {
	n.t.Helper()
	if n.ended {
		return
	}
	n.run(command{"do": "alive"})
	_ = n.stdin.Close()
	n.WantExit(0)
}

// client is a Cryo client that has not connected yet.
func client(t *testing.T) *node {
	t.Helper()
	return startNode(t, "client.mjs")
}

// connected is a Cryo client that has connected.
func connected(t *testing.T, address string) *node {
	t.Helper()
	c := client(t)
	c.connect(address)
	return c
}

// connect connects a client and returns the session's id.
func (n *node) connect(address string) string {
	n.t.Helper()
	return n.run(command{"do": "connect", "url": "ws://" + address, "token": token}).Session
}

// quiet is a heartbeat interval that does not pass in a test.
const quiet = time.Hour

// reservePort returns a port for a server that is started again.
func reservePort(t *testing.T) int {
	t.Helper()
	_, port, err := net.SplitHostPort(testkit.ReserveAddress(t))
	require.NoError(t, err)
	n, err := strconv.Atoi(port)
	require.NoError(t, err)
	return n
}

// server is a Cryo server. Port 0 is any port.
func server(t *testing.T, port int, keepAlive time.Duration) *node {
	t.Helper()
	n := startNode(t, "server.mjs", strconv.Itoa(port), token, strconv.FormatInt(keepAlive.Milliseconds(), 10))
	n.port = n.want("listening").Port
	return n
}

// url returns the server's URL.
func (n *node) url() string { return fmt.Sprintf("ws://127.0.0.1:%d", n.port) }

// parseEvent parses a line of a Node process; other lines are not ok.
func parseEvent(line string) (e event, ok bool) {
	return e, strings.HasPrefix(line, "{") && json.Unmarshal([]byte(line), &e) == nil
}

// isEvent suits an event of that name for which all of also are true.
func isEvent(name string, also ...func(event) bool) func(string) bool {
	return func(line string) bool {
		e, ok := parseEvent(line)
		if !ok || e.Event != name {
			return false
		}
		for _, test := range also {
			if !test(e) {
				return false
			}
		}
		return true
	}
}

// want waits for an event.
func (n *node) want(name string, also ...func(event) bool) event {
	n.t.Helper()
	e, _ := parseEvent(n.Take("event "+name, isEvent(name, also...)))
	return e
}

// tell sends a command and does not wait.
func (n *node) tell(c command) (id int) {
	n.t.Helper()
	n.number++
	c["id"] = n.number
	line, err := json.Marshal(c)
	require.NoError(n.t, err)
	_, err = n.stdin.Write(append(line, '\n'))
	require.NoError(n.t, err, "telling %s", n.name)
	return n.number
}

// responds suits the line that ends a command's promise.
func responds(id int) func(string) bool {
	return func(line string) bool {
		e, ok := parseEvent(line)
		return ok && e.ID == id && (e.Event == "done" || e.Event == "failed")
	}
}

// response waits until a command's promise has settled.
func (n *node) response(id int) event {
	n.t.Helper()
	e, _ := parseEvent(n.Take(fmt.Sprintf("the response to command %d", id), responds(id)))
	return e
}

// wantDone waits for a command's promise, which must resolve.
func (n *node) wantDone(id int) event {
	n.t.Helper()
	e := n.response(id)
	require.Equal(n.t, "done", e.Event, "command %d of %s: %s", id, n.name, e.Error)
	return e
}

// wantFailed waits for a command's promise, which must reject, and returns its error.
func (n *node) wantFailed(id int) string {
	n.t.Helper()
	e := n.response(id)
	require.Equal(n.t, "failed", e.Event, "command %d of %s", id, n.name)
	return e.Error
}

// wantOpen wants a command's promise not to have settled, after everything that
// cryo-connect has sent up to now.
func (n *node) wantOpen(id int) {
	n.t.Helper()
	for range 2 { // frames written with the first reply arrive before the second
		n.run(command{"do": "roundtrip"})
	}
	n.run(command{"do": "alive"})
	require.Zero(n.t, n.Count(responds(id)), "the promise of command %d has settled", id)
}

// run sends a command and waits until it is done.
func (n *node) run(c command) event {
	n.t.Helper()
	return n.wantDone(n.tell(c))
}

// stop kills the process.
func (n *node) stop() {
	n.ended = true
	n.Kill()
}

// A payload is data that both a Node process and the test can generate.
type payload struct {
	kind string // text, binary
	text string // instead of size generated bytes
	size int
}

func (p payload) String() string {
	if p.text != "" {
		return fmt.Sprintf("%s %q", p.kind, p.text[:min(len(p.text), 40)])
	}
	return fmt.Sprintf("%s of %d bytes", p.kind, p.size)
}

// command returns the command that sends the payload.
func (p payload) command() command {
	c := command{"do": p.kind, "size": p.size}
	if p.text != "" {
		c["text"] = p.text
	}
	return c
}

// bytes returns the data.
func (p payload) bytes() []byte {
	switch {
	case p.text != "":
		return []byte(p.text)
	case p.kind == "text":
		return letters(p.size)
	default:
		return numbers(p.size, 0)
	}
}

// messageType is cryo-connect's name of the kind.
func (p payload) messageType() string {
	if p.kind == "text" {
		return "utf8"
	}
	return p.kind
}

// letters returns a text that peers/peer.mjs generates too.
func letters(size int) []byte {
	b := make([]byte, size)
	for i := range b {
		b[i] = 'a' + byte(i%26)
	}
	return b
}

// numbers returns bytes that peers/peer.mjs generates too.
func numbers(size, seed int) []byte {
	b := make([]byte, size)
	for i := range b {
		b[i] = byte((i + seed) % 251)
	}
	return b
}

// sum returns the SHA-256 of data in hex.
func sum(b []byte) string {
	s := sha256.Sum256(b)
	return hex.EncodeToString(s[:])
}

// is suits an event with exactly this data.
func is(b []byte) func(event) bool {
	want := sum(b)
	return func(e event) bool { return e.Bytes == len(b) && e.SHA256 == want }
}

// named suits an event of a stream with this name.
func named(name string) func(event) bool { return func(e event) bool { return e.Name == name } }
