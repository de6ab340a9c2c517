package interop_test

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

const token = "correct horse/battery+staple&more"

// node is a Node process with one of the published packages. It has to outlive
// the test: when the test ends, it must be there, answer, and end with code 0.
type node struct {
	*process
	version string // of the package
	port    int    // the server's
	number  int
	killed  bool // by the test
}

// command is what a Node process is told; event what it says.
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

func startNode(t *testing.T, script string, args ...string) *node {
	t.Helper()
	modules := nodeModules(t)
	cmd := exec.Command("node", append([]string{filepath.Join("peers", script)}, args...)...)
	cmd.Env = append(os.Environ(), "CRYO_NODE_MODULES="+modules)
	n := &node{process: start(t, script, cmd)}
	t.Cleanup(n.wantHealthy)
	e := n.want("package")
	n.version = e.Name + " " + e.Version
	n.want("ready")
	return n
}

// wantHealthy is the last of each test: nothing that cryo-connect sent may have
// ended the process.
func (n *node) wantHealthy() {
	n.t.Helper()
	if n.killed {
		return
	}
	n.run(command{"do": "alive"})
	_ = n.stdin.Close()
	n.wantExit(0)
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

// connect connects a client and gives the session's id.
func (n *node) connect(address string) string {
	n.t.Helper()
	return n.run(command{"do": "connect", "url": "ws://" + address, "token": token}).Session
}

// quiet is a heartbeat that never comes in a test.
const quiet = time.Hour

// server is a Cryo server. Port 0 chooses one.
func server(t *testing.T, port int, keepAlive time.Duration) *node {
	t.Helper()
	n := startNode(t, "server.mjs", strconv.Itoa(port), token, strconv.FormatInt(keepAlive.Milliseconds(), 10))
	n.port = n.want("listening").Port
	return n
}

func (n *node) url() string { return fmt.Sprintf("ws://127.0.0.1:%d", n.port) }

func parseEvent(line string) (e event, ok bool) {
	return e, strings.HasPrefix(line, "{") && json.Unmarshal([]byte(line), &e) == nil
}

// isEvent suits an event of that name to which all of the tests apply.
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
	e, _ := parseEvent(n.take("event "+name, isEvent(name, also...)))
	return e
}

// tell gives a command and does not wait.
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

func answers(id int) func(string) bool {
	return func(line string) bool {
		e, ok := parseEvent(line)
		return ok && e.ID == id && (e.Event == "done" || e.Event == "failed")
	}
}

// answer waits for a command's promise to settle.
func (n *node) answer(id int) event {
	n.t.Helper()
	e, _ := parseEvent(n.take(fmt.Sprintf("the answer to command %d", id), answers(id)))
	return e
}

// wantDone waits for a command's promise, which has to resolve.
func (n *node) wantDone(id int) event {
	n.t.Helper()
	e := n.answer(id)
	require.Equal(n.t, "done", e.Event, "command %d of %s: %s", id, n.name, e.Error)
	return e
}

// wantFailed waits for a command's promise, which has to reject.
func (n *node) wantFailed(id int) string {
	n.t.Helper()
	e := n.answer(id)
	require.Equal(n.t, "failed", e.Event, "command %d of %s", id, n.name)
	return e.Error
}

// wantOpen wants a command's promise not to have settled: what cryo-connect has
// said up to now is awaited.
func (n *node) wantOpen(id int) {
	n.t.Helper()
	for range 2 { // what is written with the answer to the first comes before the second's
		n.run(command{"do": "roundtrip"})
	}
	n.run(command{"do": "alive"})
	require.Zero(n.t, n.count(answers(id)), "the promise of command %d has settled", id)
}

// run gives a command and waits until it is done.
func (n *node) run(c command) event {
	n.t.Helper()
	return n.wantDone(n.tell(c))
}

// stop kills the process, as the test wants it.
func (n *node) stop() {
	n.killed = true
	n.kill()
}

// A payload is data that both a Node process and the test can make.
type payload struct {
	kind string // text, binary
	text string // if it is not made of size
	size int
}

func (p payload) String() string {
	if p.text != "" {
		return fmt.Sprintf("%s %q", p.kind, p.text[:min(len(p.text), 40)])
	}
	return fmt.Sprintf("%s of %d bytes", p.kind, p.size)
}

func (p payload) command() command {
	c := command{"do": p.kind, "size": p.size}
	if p.text != "" {
		c["text"] = p.text
	}
	return c
}

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

// messageType is the kind as cryo-connect names it.
func (p payload) messageType() string {
	if p.kind == "text" {
		return "utf8"
	}
	return p.kind
}

func letters(size int) []byte {
	b := make([]byte, size)
	for i := range b {
		b[i] = 'a' + byte(i%26)
	}
	return b
}

func numbers(size, seed int) []byte {
	b := make([]byte, size)
	for i := range b {
		b[i] = byte((i + seed) % 251)
	}
	return b
}

func sum(b []byte) string {
	s := sha256.Sum256(b)
	return hex.EncodeToString(s[:])
}

// is suits an event with exactly this data.
func is(b []byte) func(event) bool {
	want := sum(b)
	return func(e event) bool { return e.Bytes == len(b) && e.SHA256 == want }
}

func named(name string) func(event) bool { return func(e event) bool { return e.Name == name } }
