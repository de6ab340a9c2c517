package tests

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/testkit"
)

var numberedPattern = regexp.MustCompile(`m-\d{6}`)

// inFile returns how often each message is in a file. A kill can leave half a message, or
// one without a newline.
func inFile(t *testing.T, path string) map[string]int {
	t.Helper()
	content, err := os.ReadFile(path)
	if !os.IsNotExist(err) {
		require.NoError(t, err)
	}
	found := make(map[string]int)
	for _, text := range numberedPattern.FindAllString(string(content), -1) {
		found[text]++
	}
	return found
}

// route is a pipeline that receives messages.
type route struct {
	config    string
	sessions  <-chan *cryo.Session  // of the sender
	delivered func() map[string]int // how often each message was delivered up to now
}

// toFile is a route to a file.
func toFile(t *testing.T, input string, sessions <-chan *cryo.Session) route {
	path := filepath.Join(t.TempDir(), "messages.txt")
	return route{
		config:    "input: " + input + "\noutput: { file: { path: " + path + ", codec: lines } }",
		sessions:  sessions,
		delivered: func() map[string]int { return inFile(t, path) },
	}
}

var routes = map[string]func(t *testing.T) route{
	"input cryo to a file": func(t *testing.T) route {
		server := testkit.Serve(t)
		return toFile(t, "{ cryo: { url: "+server.URL()+", token: "+token+" } }", server.Sessions)
	},
	"input cryo_server to a file": func(t *testing.T) route {
		address := testkit.ReserveAddress(t)
		return toFile(t, "{ cryo_server: { address: "+address+", tokens: [ "+token+" ] } }", testkit.Redial(t, address, cryo.DialOptions{}))
	},
	"input cryo_server to Kafka": func(t *testing.T) route {
		k, address := runKafka(t, "messages"), testkit.ReserveAddress(t)
		return route{
			config: "input: { cryo_server: { address: " + address + ", tokens: [ " + token + " ] } }\n" +
				"output: { redpanda: { seed_brokers: [ " + k.brokers() + " ], topic: messages, batching: { count: 200, period: 5ms } } }",
			sessions:  testkit.Redial(t, address, cryo.DialOptions{}),
			delivered: func() map[string]int { return k.texts(t, "messages") },
		}
	},
}

// rounds is how often a test ends its process.
func rounds() int {
	if testkit.LongTests() {
		return 40
	}
	return 4
}

// end ends a process with SIGKILL, or with SIGTERM and exit code 0.
func end(p *testkit.Process, signal syscall.Signal) {
	if signal == syscall.SIGKILL {
		p.Kill()
	} else {
		p.Terminate()
	}
}

// The process is killed, and stopped in good order, at random moments. In good order no
// message is even delivered twice: each delivered message was acknowledged by then.
func TestNoMessageIsLostAcrossRestarts(t *testing.T) {
	for name, prepare := range routes {
		t.Run(name, func(t *testing.T) {
			random := testkit.Random(t)
			route := prepare(t)
			run := func() *testkit.Process { return runConfig(t, route.config) }
			texts := numbered(1500 * rounds())
			r := newResender(route.sessions, texts, 256)
			defer func() { r.stop(); r.working.Wait() }()
			for round := range rounds() {
				p := run()
				r.wait(t, min(len(r.acknowledged())+random.IntN(1000), len(texts)))
				time.Sleep(time.Duration(random.IntN(3000)) * time.Microsecond) // a random moment, not a wait
				end(p, []syscall.Signal{syscall.SIGKILL, syscall.SIGTERM}[round%2])
				acked, found := r.acknowledged(), route.delivered()
				for _, text := range acked {
					require.Positive(t, found[text], "%s was acknowledged and not delivered", text)
				}
			}
			p := run()
			r.wait(t, len(texts))
			p.Interrupt()

			found, again := route.delivered(), 0
			for _, text := range texts {
				require.Positive(t, found[text], "%s was not delivered", text)
				require.LessOrEqual(t, found[text]-1, r.maybeDelivered[text], "%s was delivered again needlessly", text)
				again += found[text] - 1
			}
			t.Logf("%d messages, %d sends, %d delivered more than once", len(texts), r.sends, again)
			require.Greater(t, r.sends, len(texts), "no message was sent again: the test did not interrupt anything")
		})
	}
}

// First in good order, which repeats no message, then not.
func TestNoRecordIsLostAcrossRestarts(t *testing.T) {
	const group, topic = "group", "messages"
	random := testkit.Random(t)
	k, server := runKafka(t, topic), testkit.Serve(t)
	config := fmt.Sprintf(`
input: { redpanda: { seed_brokers: [ %q ], topics: [ %s ], consumer_group: %s } }
output: { cryo: { url: %q, token: %q } }
`, k.brokers(), topic, group, server.URL(), token)
	run := func() *testkit.Process { return runConfig(t, config) }
	texts, produced := numbered(500*rounds()+500), 0
	received := make(map[string]int)
	receiveSome := func(s *cryo.Session, n int) {
		for range n {
			m, err := s.Receive(t.Context())
			if err != nil {
				return
			}
			received[string(m.Payload)]++
			_ = m.Ack() // the session may have ended
		}
	}
	wantNoRepeats := func() {
		for text, times := range received {
			require.Equal(t, 1, times, "%s was delivered again needlessly", text)
		}
	}
	for round := range rounds() {
		signal := syscall.SIGTERM
		if round >= rounds()/2 {
			signal = syscall.SIGKILL
		}
		k.produce(t, topic, texts[produced:produced+500]...)
		produced += 500
		p := run()
		s := server.Session(t)
		receiveSome(s, random.IntN(produced-len(received)))
		if round == rounds()/2 { // after the last end in good order
			wantNoRepeats()
		}
		ending := make(chan struct{})
		go func() { defer close(ending); end(p, signal) }()
		receiveSome(s, len(texts)) // until the session ends
		<-ending
		if signal == syscall.SIGTERM {
			wantNoRepeats()
		}
		k.forgetMembers(t, group)
		require.LessOrEqual(t, k.committed(group, topic), len(received), "a record was committed before it was acknowledged")
	}
	k.produce(t, topic, texts[produced:]...)
	p := run()
	s := server.Session(t)
	for len(received) < len(texts) {
		m := testkit.Receive(t, s)
		received[string(m.Payload)]++
		require.NoError(t, m.Ack())
	}
	p.Interrupt()
}
