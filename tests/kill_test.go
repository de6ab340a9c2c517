package tests

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// seeded gives random choices. A failure tells the seed, and CRYO_SEED sets it.
func seeded(t *testing.T) *rand.Rand {
	t.Helper()
	seed := uint64(time.Now().UnixNano())
	if given := os.Getenv("CRYO_SEED"); given != "" {
		var err error
		seed, err = strconv.ParseUint(given, 10, 64)
		require.NoError(t, err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("CRYO_SEED=%d makes the same random choices", seed)
		}
	})
	return rand.New(rand.NewPCG(seed, 0))
}

var numberedPattern = regexp.MustCompile(`m-\d{6}`)

// inFile gives the messages in a file, and how often each is there. A kill may
// leave half a message, or no newline behind one.
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

// route is a way through a process, from Cryo to somewhere else.
type route struct {
	config   string
	sessions <-chan *cryo.Session
	arrived  func() map[string]int // how often each message is there by now
}

func toFile(t *testing.T, input string, sessions <-chan *cryo.Session) route {
	path := filepath.Join(t.TempDir(), "messages.txt")
	return route{
		config:   "input: " + input + "\noutput: { file: { path: " + path + ", codec: lines } }",
		sessions: sessions,
		arrived:  func() map[string]int { return inFile(t, path) },
	}
}

var routes = map[string]func(t *testing.T) route{
	"input cryo to a file": func(t *testing.T) route {
		server := serve(t)
		return toFile(t, "{ cryo: { url: "+server.url()+", token: "+token+" } }", server.sessions)
	},
	"input cryo_server to a file": func(t *testing.T) route {
		address := freeAddress(t)
		return toFile(t, "{ cryo_server: { address: "+address+", tokens: [ "+token+" ] } }", redial(t, address))
	},
	"input cryo_server to Kafka": func(t *testing.T) route {
		k, address := runKafka(t, "messages"), freeAddress(t)
		return route{
			config: "input: { cryo_server: { address: " + address + ", tokens: [ " + token + " ] } }\n" +
				"output: { redpanda: { seed_brokers: [ " + k.brokers() + " ], topic: messages, batching: { count: 200, period: 5ms } } }",
			sessions: redial(t, address),
			arrived:  func() map[string]int { return k.texts(t, "messages") },
		}
	},
}

// rounds is how often a process is ended in a test.
func rounds() int {
	if os.Getenv("CRYO_LONG_TESTS") == "1" {
		return 40
	}
	return 4
}

func launchConfig(t *testing.T, config string) func() *process {
	t.Helper()
	path := filepath.Join(t.TempDir(), "pipeline.yaml")
	require.NoError(t, os.WriteFile(path, []byte("http: { enabled: false }\n"+config), 0o600))
	return func() *process { return launch(t, nil, nil, "run", path) }
}

// endSomehow is SIGKILL or SIGTERM.
func (p *process) endSomehow(signal syscall.Signal) {
	p.t.Helper()
	if signal == syscall.SIGKILL {
		p.kill()
	} else {
		p.terminate()
	}
}

// TestNoMessageIsLostHoweverOftenTheProcessEnds kills the process, and stops it
// in good order, at random moments. In good order nothing is even delivered
// twice: each message that was delivered was acknowledged by then.
func TestNoMessageIsLostHoweverOftenTheProcessEnds(t *testing.T) {
	for name, prepare := range routes {
		t.Run(name, func(t *testing.T) {
			random := seeded(t)
			route := prepare(t)
			run := launchConfig(t, route.config)
			texts := numbered(1500 * rounds())
			r := newResender(route.sessions, texts, 256)
			defer func() { r.stop(); r.working.Wait() }()
			for round := range rounds() {
				p := run()
				r.wait(t, len(r.acknowledged())+random.IntN(1000))
				time.Sleep(time.Duration(random.IntN(3000)) * time.Microsecond) // the moment's chance, not a wait for anything
				p.endSomehow([]syscall.Signal{syscall.SIGKILL, syscall.SIGTERM}[round%2])
				acked, found := r.acknowledged(), route.arrived()
				for _, text := range acked {
					require.Positive(t, found[text], "%s was acknowledged, and is not there", text)
				}
			}
			p := run()
			r.wait(t, len(texts))
			p.interrupt()

			found, again := route.arrived(), 0
			for _, text := range texts {
				require.Positive(t, found[text], "%s is not there", text)
				require.LessOrEqual(t, found[text]-1, r.unclear[text], "%s was delivered again without need", text)
				again += found[text] - 1
			}
			t.Logf("%d messages, %d sends, %d delivered more than once", len(texts), r.sends, again)
			require.Greater(t, r.sends, len(texts), "some had to be sent again, or this has tested nothing")
		})
	}
}

// TestKafkaToCryoHoweverOftenTheProcessEnds: first in good order, which repeats
// nothing, then without.
func TestKafkaToCryoHoweverOftenTheProcessEnds(t *testing.T) {
	const group, topic = "group", "messages"
	random := seeded(t)
	k, server := runKafka(t, topic), serve(t)
	run := launchConfig(t, fmt.Sprintf(`
input: { redpanda: { seed_brokers: [ %q ], topics: [ %s ], consumer_group: %s } }
output: { cryo: { url: %q, token: %q } }
`, k.brokers(), topic, group, server.url(), token))
	texts, produced := numbered(500*rounds()+500), 0
	received := make(map[string]int)
	receiveSome := func(s *cryo.Session, n int) {
		for range n {
			m, err := s.Receive(t.Context())
			if err != nil {
				return
			}
			received[string(m.Payload)]++
			_ = m.Ack() // it may be too late
		}
	}
	wantNoneAgain := func() {
		for text, times := range received {
			require.Equal(t, 1, times, "%s was delivered again without need", text)
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
		s := server.session(t)
		receiveSome(s, random.IntN(produced-len(received)))
		if round == rounds()/2 { // after the last one in good order
			wantNoneAgain()
		}
		ending := make(chan struct{})
		go func() { defer close(ending); p.endSomehow(signal) }()
		receiveSome(s, len(texts)) // to the end of the session
		<-ending
		if signal == syscall.SIGTERM {
			wantNoneAgain()
		}
		k.forgetMembers(t, group)
		require.LessOrEqual(t, k.committed(group, topic), len(received), "committed and not acknowledged")
	}
	k.produce(t, topic, texts[produced:]...)
	p := run()
	s := server.session(t)
	for len(received) < len(texts) {
		m := receive(t, s)
		received[string(m.Payload)]++
		require.NoError(t, m.Ack())
	}
	p.interrupt()
}
