package tests

import (
	"net"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"github.com/twmb/franz-go/pkg/kfake"
	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/kmsg"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// kafka is a cluster of one broker in this process, which speaks the real wire
// protocol.
type kafka struct {
	*kfake.Cluster
	*gate
}

func runKafka(t *testing.T, topics ...string) *kafka {
	t.Helper()
	k := &kafka{}
	var err error
	k.Cluster, err = kfake.NewCluster(
		kfake.NumBrokers(1),
		kfake.SeedTopics(3, topics...),
		kfake.ListenFn(func(network, address string) (net.Listener, error) {
			l, err := net.Listen(network, address)
			if err != nil {
				return nil, err
			}
			k.gate = newGate(l)
			return k.gate, nil
		}),
	)
	require.NoError(t, err)
	t.Cleanup(k.Cluster.Close)
	return k
}

func (k *kafka) brokers() string { return strings.Join(k.ListenAddrs(), ",") }

func (k *kafka) client(t *testing.T, opts ...kgo.Opt) *kgo.Client {
	t.Helper()
	client, err := kgo.NewClient(append(opts, kgo.SeedBrokers(k.ListenAddrs()...))...)
	require.NoError(t, err)
	t.Cleanup(client.Close)
	return client
}

// records are all that is in a topic now.
func (k *kafka) records(t *testing.T, topic string) []*kgo.Record {
	t.Helper()
	want := 0
	for _, p := range k.PartitionInfos(topic) {
		want += int(p.HighWatermark)
	}
	ctx := patient(t)
	client := k.client(t, kgo.ConsumeTopics(topic))
	defer client.Close()
	var records []*kgo.Record
	for len(records) < want {
		fetches := client.PollFetches(ctx)
		require.NoError(t, fetches.Err())
		records = append(records, fetches.Records()...)
	}
	return records
}

// texts counts how often each value is in a topic.
func (k *kafka) texts(t *testing.T, topic string) map[string]int {
	t.Helper()
	found := make(map[string]int)
	for _, r := range k.records(t, topic) {
		found[string(r.Value)]++
	}
	return found
}

// produce spreads texts over the partitions.
func (k *kafka) produce(t *testing.T, topic string, texts ...string) {
	t.Helper()
	client := k.client(t, kgo.RecordPartitioner(kgo.RoundRobinPartitioner()))
	defer client.Close()
	for _, text := range texts {
		require.NoError(t, client.ProduceSync(t.Context(), &kgo.Record{Topic: topic, Value: []byte(text)}).FirstErr())
	}
}

// committed is how many records of a topic a group has done with.
func (k *kafka) committed(group, topic string) int {
	done := 0
	if info := k.GroupInfo(group); info != nil {
		for _, commit := range info.Commits[topic] {
			done += int(commit.Offset)
		}
	}
	return done
}

// wantNoneElseCommitted watches for the time of several commits.
func (k *kafka) wantNoneElseCommitted(t *testing.T, group, topic string, acknowledged int) {
	t.Helper()
	require.Never(t, func() bool { return k.committed(group, topic) > acknowledged },
		500*time.Millisecond, 20*time.Millisecond, "committed and not acknowledged")
}

// forgetMembers spares a test the time after which a group gives up on a member
// that was killed.
func (k *kafka) forgetMembers(t *testing.T, group string) {
	t.Helper()
	leave := kmsg.NewPtrLeaveGroupRequest()
	leave.Group = group
	for _, m := range k.GroupInfo(group).Members {
		member := kmsg.NewLeaveGroupRequestMember()
		member.MemberID = m.MemberID
		leave.Members = append(leave.Members, member)
	}
	client := k.client(t)
	defer client.Close()
	_, err := leave.RequestWith(t.Context(), client)
	require.NoError(t, err)
}

func header(r *kgo.Record, key string) string {
	for _, h := range r.Headers {
		if h.Key == key {
			return string(h.Value)
		}
	}
	return ""
}

func TestCryoToKafka(t *testing.T) {
	k := runKafka(t, "events")
	p := example(t, "cryo_to_kafka.yaml", nil,
		"CRYO_ADDRESS=127.0.0.1:0", "CRYO_TOKEN="+token, "KAFKA_BROKERS="+k.brokers(), "KAFKA_TOPIC=events")
	s := dial(t, p.wantLogged("Listening for Cryo clients on "))
	texts := numbered(200)
	for _, text := range texts[:10] {
		require.NoError(t, next(t, send(s, text)))
		require.Equal(t, 1, k.texts(t, "events")[text], "what is acknowledged is in the topic")
	}
	partition := int32(-1)
	for _, r := range k.records(t, "events") {
		require.Equal(t, strconv.FormatUint(s.ID(), 10), string(r.Key))
		require.Equal(t, "utf8", header(r, "cryo_message_type"))
		if partition >= 0 {
			require.Equal(t, partition, r.Partition, "a session's messages share a partition")
		}
		partition = r.Partition
	}

	k.goAway()
	var sent []<-chan error
	for _, text := range texts[10:] {
		sent = append(sent, send(s, text))
	}
	k.wantTries(t, 1)
	for _, done := range sent {
		wantPending(t, done, "the broker is away")
	}
	k.comeBack()
	for _, done := range sent {
		require.NoError(t, next(t, done))
	}
	found := k.texts(t, "events")
	for _, text := range texts {
		require.Positive(t, found[text], "%s was acknowledged, and is not in the topic", text)
	}
	p.interrupt()
}

func TestMessagesThatCannotBeProcessedBecomeDeadLetters(t *testing.T) {
	k := runKafka(t, "good", "bad")
	p := example(t, "cryo_to_kafka_dead_letters.yaml", nil,
		"CRYO_ADDRESS=127.0.0.1:0", "CRYO_TOKEN="+token, "KAFKA_BROKERS="+k.brokers(), "KAFKA_TOPIC=good", "KAFKA_DEAD_LETTERS=bad")
	s := dial(t, p.wantLogged("Listening for Cryo clients on "))
	good, poison := send(s, `{"n":1}`), send(s, `{"n":`)
	require.NoError(t, next(t, good))
	require.NoError(t, next(t, poison))

	records := k.records(t, "good")
	require.Len(t, records, 1)
	require.JSONEq(t, `{"n":1,"session":"`+strconv.FormatUint(s.ID(), 10)+`"}`, string(records[0].Value))
	letters := k.records(t, "bad")
	require.Len(t, letters, 1)
	require.Equal(t, `{"n":`, string(letters[0].Value), "as it came")
	require.Contains(t, header(letters[0], "reason"), "parse as json")
	require.Equal(t, strconv.FormatUint(s.ID(), 10), header(letters[0], "cryo_session_id"))
	p.interrupt()
}

func TestKafkaToCryo(t *testing.T) {
	const group, topic = "bridge", "events"
	k := runKafka(t, topic)
	server := serve(t)
	run := func() *process {
		env := []string{
			"CRYO_URL=" + server.url(), "CRYO_TOKEN=" + token,
			"KAFKA_BROKERS=" + k.brokers(), "KAFKA_TOPIC=" + topic, "KAFKA_GROUP=" + group,
		}
		return launch(t, nil, env, "run", "--set", "http.enabled=false",
			"--set", "input.redpanda.commit_period=100ms", // not the 5 s that it is otherwise
			"config/kafka_to_cryo.yaml")
	}
	texts := numbered(150)
	k.produce(t, topic, texts[:100]...)

	// It is killed while half is acknowledged. By then it has committed no
	// more than that.
	p := run()
	s := server.session(t)
	acked := make(map[string]bool)
	for len(acked) < 50 {
		m := receive(t, s)
		require.NoError(t, m.Ack())
		acked[string(m.Payload)] = true
	}
	k.wantNoneElseCommitted(t, group, topic, len(acked))
	p.kill()
	k.forgetMembers(t, group)

	// What was not acknowledged comes again to whoever takes over.
	p = run()
	s = server.session(t)
	receiveAll(t, s, acked, texts[:100])

	// The Cryo server goes away, and others produce meanwhile.
	require.NoError(t, s.Close(contextFor(t), ""))
	k.produce(t, topic, texts[100:125]...)
	s = server.session(t)
	receive(t, s) // and does not acknowledge
	k.wantNoneElseCommitted(t, group, topic, len(acked))
	require.NoError(t, s.Close(contextFor(t), ""))
	receiveAll(t, server.session(t), acked, texts[:125])
	p.interrupt()
	require.Equal(t, 125, k.committed(group, topic))

	// The broker goes away.
	p = run()
	s = server.session(t)
	_, err := k.WaitGroupStable(patient(t), group, 1)
	require.NoError(t, err)
	k.goAway()
	k.wantTries(t, 1)
	k.comeBack()
	k.produce(t, topic, texts[125:]...)
	receiveAll(t, s, acked, texts)
	_, err = k.WaitGroupInfo(patient(t), group, func(*kfake.GroupInfo) bool { return k.committed(group, topic) == 150 })
	require.NoError(t, err, "%d are committed", k.committed(group, topic))
	p.interrupt()
}

// receiveAll receives and acknowledges until it has all of texts, those
// included that it had before.
func receiveAll(t *testing.T, s *cryo.Session, acked map[string]bool, texts []string) {
	t.Helper()
	for _, text := range texts {
		for !acked[text] {
			m := receive(t, s)
			require.NoError(t, m.Ack())
			acked[string(m.Payload)] = true
		}
	}
}
