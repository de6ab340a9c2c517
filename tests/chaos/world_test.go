//go:build linux

package chaos

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"github.com/twmb/franz-go/pkg/kfake"
	"github.com/twmb/franz-go/pkg/kgo"

	"github.com/cryo-connect/cryo-connect/internal/testkit"
)

const (
	heartbeat      = time.Second // of all sessions: a peer timeout takes two
	connectTimeout = 3 * time.Second
	topic, group   = "events", "bridge"
	bridged        = 5 // applications of the gateway
	streaming      = 2 // of these, those that send streams
	journaled      = 2 // applications of the journal
)

// world has two routes:
//
//	apps ─line→ gateway → Kafka → bridge ─line→ relay ←line─ collector → file
//	apps ─line→ journal → file
//
// The gateway, the relay and the journal have an input cryo_server, the bridge an output
// cryo, the relay an output cryo_server too, and the collector an input cryo. The order is
// promised on the second route.
type world struct {
	t           *testing.T
	kafka       *kfake.Cluster
	credentials *credentials
	apps        *apps

	gateway, bridge, relay, collector, journal *process
	lines                                      struct{ gateway, kafka, relayIn, relayOut, journal *line }
	bridged, journaled                         *ledger
	collected, written                         *sink

	mu      sync.Mutex
	records map[int32][]int // ids of the topic's units, by partition and offset; -1 is no unit
	inTopic map[int]bool

	auditing sync.Mutex
	audited  struct { // by earlier audits
		acked     int           // acknowledged units below are in the topic
		committed map[int32]int // committed records below are delivered
	}
}

// newWorld starts everything but the applications.
func newWorld(t *testing.T) *world {
	t.Helper()
	dir := t.TempDir()
	w := &world{
		t:           t,
		credentials: newCredentials(t, dir),
		bridged:     &ledger{t: t},
		journaled:   &ledger{t: t, lastFirst: make(map[int]int)},
		records:     make(map[int32][]int),
		inTopic:     make(map[int]bool),
	}
	w.audited.committed = make(map[int32]int)
	w.collected = &sink{path: filepath.Join(dir, "collected"), ledger: w.bridged}
	w.written = &sink{path: filepath.Join(dir, "written"), ledger: w.journaled}
	w.runKafka()

	gateway, relayIn, relayOut, journal := testkit.ReserveAddress(t), testkit.ReserveAddress(t), testkit.ReserveAddress(t), testkit.ReserveAddress(t)
	w.lines.gateway = newLine(t, "apps to gateway", gateway)
	w.lines.relayIn = newLine(t, "bridge to relay", relayIn)
	w.lines.relayOut = newLine(t, "collector to relay", relayOut)
	w.lines.journal = newLine(t, "apps to journal", journal)
	run := func(name, pipeline string, values ...any) *process {
		return newProcess(t, dir, name, fmt.Sprintf(pipeline, values...), w.credentials.secrets)
	}
	brokers := strings.Join(w.kafka.ListenAddrs(), ",")
	w.gateway = run("gateway", `
input: { label: in, cryo_server: %s }
output:
  label: out
  redpanda: { seed_brokers: [ %q ], topic: %s, key: '${! @cryo_session_id }', metadata: { include_prefixes: [ cryo_ ] } }
`, w.listen(gateway, ""), brokers, topic)
	w.bridge = run("bridge", `
input:
  label: in
  redpanda:
    seed_brokers: [ %q ]
    topics: [ %s ]
    consumer_group: %s
    commit_period: 200ms
    fetch_max_wait: 500ms
    session_timeout: 6s
    rebalance_timeout: 6s
    heartbeat_interval: 500ms
output: { label: out, cryo: %s }
`, brokers, topic, group, w.dial(w.lines.relayIn, sending))
	w.relay = run("relay", `
input: { label: in, cryo_server: %s }
output: { label: out, cryo_server: %s }
`, w.listen(relayIn, ""), w.listen(relayOut, "send_to: any, "+sending))
	w.collector = run("collector", `
input: { label: in, cryo: %s }
pipeline: { processors: [ { mapping: %q } ] }
output: { label: out, file: { path: %q, codec: append } }
`, w.dial(w.lines.relayOut, ""), sinkMapping, w.collected.path)
	w.journal = run("journal", `
input: { label: in, cryo_server: %s }
pipeline: { processors: [ { mapping: %q } ] }
output: { label: out, file: { path: %q, codec: append } }
`, w.listen(journal, "max_in_flight: 1"), sinkMapping, w.written.path)
	return w
}

// sending are fields of the outputs.
const sending = `ack_timeout: 5s, message_type: "${! @cryo_message_type }"`

// listen returns the fields of a component that listens, and others.
func (w *world) listen(address, more string) string {
	c := w.credentials
	return fmt.Sprintf("{ address: %q, tls: { cert_file: %q, key_file: %q }, tokens_file: %q, heartbeat_interval: %v, %s }",
		address, c.cert, c.key, c.tokens, heartbeat, more)
}

// dial returns the fields of a component that dials, and others.
func (w *world) dial(l *line, more string) string {
	c := w.credentials
	return fmt.Sprintf("{ url: %q, tls: { enabled: true, root_cas_file: %q }, token_file: %q, connect_timeout: %v, heartbeat_interval: %v, %s }",
		"wss://"+l.address, c.authorities, c.token, connectTimeout, heartbeat, more)
}

// processes returns all processes.
func (w *world) processes() []*process {
	return []*process{w.gateway, w.bridge, w.relay, w.collector, w.journal}
}

// allLines returns the lines between components of Cryo.
func (w *world) allLines() []*line {
	return []*line{w.lines.gateway, w.lines.relayIn, w.lines.relayOut, w.lines.journal}
}

// linesOf returns the lines of a process.
func (w *world) linesOf(p *process) []*line {
	return map[*process][]*line{
		w.gateway: {w.lines.gateway}, w.bridge: {w.lines.relayIn}, w.relay: {w.lines.relayIn, w.lines.relayOut},
		w.collector: {w.lines.relayOut}, w.journal: {w.lines.journal},
	}[p]
}

// advertised is a listener that names another address to its clients.
type advertised struct {
	net.Listener
	address string
}

func (a advertised) Addr() net.Addr {
	address, _ := net.ResolveTCPAddr("tcp", a.address)
	return address
}

// runKafka runs a cluster of one broker in this process, behind a line.
func (w *world) runKafka() {
	var err error
	w.kafka, err = kfake.NewCluster(
		kfake.NumBrokers(1),
		kfake.SeedTopics(3, topic),
		kfake.ListenFn(func(network, address string) (net.Listener, error) {
			l, err := net.Listen(network, address)
			if err != nil {
				return nil, err
			}
			w.lines.kafka = newLine(w.t, "Kafka", l.Addr().String())
			return advertised{l, w.lines.kafka.address}, nil
		}),
	)
	require.NoError(w.t, err)
	w.t.Cleanup(w.kafka.Close)

	client, err := kgo.NewClient(kgo.SeedBrokers(w.kafka.ListenAddrs()...), kgo.ConsumeTopics(topic), kgo.FetchMaxWait(200*time.Millisecond))
	require.NoError(w.t, err)
	ctx, cancel := context.WithCancel(context.Background())
	var consuming sync.WaitGroup
	consuming.Go(func() {
		for ctx.Err() == nil {
			client.PollFetches(ctx).EachRecord(w.consume)
		}
	})
	w.t.Cleanup(func() {
		cancel()
		consuming.Wait()
		client.Close()
	})
}

// consume records that a unit is in the topic.
func (w *world) consume(r *kgo.Record) {
	headers := make(map[string]string)
	for _, h := range r.Headers {
		headers[h.Key] = string(h.Value)
	}
	id, err := strconv.Atoi(string(r.Value[:min(idDigits, len(r.Value))]))
	w.wantNoError(err, "a record of the topic with %d bytes", len(r.Value))
	if err != nil || !w.bridged.check("the topic", id, headers["cryo_message_type"], headers["cryo_stream_name"], sumOf(r.Value)) {
		id = -1
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.records[r.Partition] = append(w.records[r.Partition], id)
	if id >= 0 {
		w.inTopic[id] = true
	}
}

// runApps starts the applications.
func (w *world) runApps(random *rand.Rand) {
	w.apps = newApps(w.t)
	for i := range bridged {
		w.apps.run("wss://"+w.lines.gateway.address, w.credentials, i < streaming, w.bridged, fork(random), func(ids []int) {
			for _, id := range ids {
				w.bridged.ack(id)
			}
		})
	}
	for range journaled {
		w.apps.run("wss://"+w.lines.journal.address, w.credentials, false, w.journaled, fork(random), func(ids []int) {
			w.wantNoError(w.written.read(), "reading the journal")
			for _, id := range ids {
				assert.True(w.t, w.journaled.isDelivered(id), "unit %d of the journal was acknowledged and is not in the file", id)
				w.journaled.ack(id)
			}
		})
	}
}

// fork returns a separate generator for another goroutine.
func fork(random *rand.Rand) *rand.Rand {
	return rand.New(rand.NewPCG(random.Uint64(), random.Uint64()))
}
