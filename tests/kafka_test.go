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
	"github.com/cryo-connect/cryo-connect/internal/testkit"
)

// kafka is a cluster of one broker in this process, which speaks the wire protocol of
// Kafka. Its listener can be taken down.
type kafka struct {
	*kfake.Cluster
	*testkit.Listener
}

// runKafka runs a cluster with topics of three partitions, until the test's end.
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
			k.Listener = testkit.NewListener(l)
			return k.Listener, nil
		}),
	)
	require.NoError(t, err)
	t.Cleanup(k.Cluster.Close)
	return k
}

// brokers returns the addresses for a pipeline's configuration.
func (k *kafka) brokers() string { return strings.Join(k.ListenAddrs(), ",") }

// client returns a client of the cluster, which the test's end closes.
func (k *kafka) client(t *testing.T, opts ...kgo.Opt) *kgo.Client {
	t.Helper()
	client, err := kgo.NewClient(append(opts, kgo.SeedBrokers(k.ListenAddrs()...))...)
	require.NoError(t, err)
	t.Cleanup(client.Close)
	return client
}

// stored returns the number of records of a topic, in all partitions.
func (k *kafka) stored(topic string) int {
	n := 0
	for _, p := range k.PartitionInfos(topic) {
		n += int(p.HighWatermark)
	}
	return n
}

// records returns the records of a topic, in all partitions.
func (k *kafka) records(t *testing.T, topic string) []*kgo.Record {
	t.Helper()
	want := k.stored(topic)
	ctx := testkit.Context(t)
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

// texts returns how often each value is in a topic.
func (k *kafka) texts(t *testing.T, topic string) map[string]int {
	t.Helper()
	found := make(map[string]int)
	for _, r := range k.records(t, topic) {
		found[string(r.Value)]++
	}
	return found
}

// produce writes texts to the partitions in turn.
func (k *kafka) produce(t *testing.T, topic string, texts ...string) {
	t.Helper()
	client := k.client(t, kgo.RecordPartitioner(kgo.RoundRobinPartitioner()))
	defer client.Close()
	for _, text := range texts {
		require.NoError(t, client.ProduceSync(t.Context(), &kgo.Record{Topic: topic, Value: []byte(text)}).FirstErr())
	}
}

// committed returns how many records of a topic a group has committed.
func (k *kafka) committed(group, topic string) int {
	done := 0
	if info := k.GroupInfo(group); info != nil {
		for _, commit := range info.Commits[topic] {
			done += int(commit.Offset)
		}
	}
	return done
}

// wantNoneElseCommitted wants no commit beyond the acknowledged records, for several
// commit periods.
func (k *kafka) wantNoneElseCommitted(t *testing.T, group, topic string, acknowledged int) {
	t.Helper()
	require.Never(t, func() bool { return k.committed(group, topic) > acknowledged },
		500*time.Millisecond, 20*time.Millisecond, "committed and not acknowledged")
}

// forgetMembers removes the members of a group that were killed, without waiting for
// their session timeout.
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

// header returns the value of a record's header, or "".
func header(r *kgo.Record, key string) string {
	for _, h := range r.Headers {
		if h.Key == key {
			return string(h.Value)
		}
	}
	return ""
}

func TestMessageIsAcknowledgedWhenKafkaHasIt(t *testing.T) {
	k := runKafka(t, "events")
	p := example(t, "cryo_to_kafka.yaml", "KAFKA_BROKERS="+k.brokers(), "KAFKA_TOPIC=events")
	s := testkit.Dial(t, p.Listening())
	texts := numbered(200)
	for _, text := range texts[:10] {
		testkit.WantDelivered(t, s, text)
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

	k.SetDown(true)
	var sent []<-chan error
	for _, text := range texts[10:] {
		sent = append(sent, testkit.Send(s, text))
	}
	k.WantAttempt(t)
	for _, done := range sent {
		testkit.WantPending(t, done, "the broker is down")
	}
	k.SetDown(false)
	for _, done := range sent {
		require.NoError(t, testkit.Next(t, done))
	}
	found := k.texts(t, "events")
	for _, text := range texts {
		require.Positive(t, found[text], "%s was acknowledged, and is not in the topic", text)
	}
	p.Interrupt()
}

func TestMessageThatCannotBeProcessedBecomesADeadLetter(t *testing.T) {
	k := runKafka(t, "good", "bad")
	p := example(t, "cryo_to_kafka_dead_letters.yaml", "KAFKA_BROKERS="+k.brokers(), "KAFKA_TOPIC=good", "KAFKA_DEAD_LETTERS=bad")
	s := testkit.Dial(t, p.Listening())
	good, poison := testkit.Send(s, `{"n":1}`), testkit.Send(s, `{"n":`)
	require.NoError(t, testkit.Next(t, good))
	require.NoError(t, testkit.Next(t, poison))

	records := k.records(t, "good")
	require.Len(t, records, 1)
	require.JSONEq(t, `{"n":1,"session":"`+strconv.FormatUint(s.ID(), 10)+`"}`, string(records[0].Value))
	letters := k.records(t, "bad")
	require.Len(t, letters, 1)
	require.Equal(t, `{"n":`, string(letters[0].Value), "unchanged")
	require.Equal(t, "not a JSON object", header(letters[0], "reason"))
	require.Equal(t, strconv.FormatUint(s.ID(), 10), header(letters[0], "cryo_session_id"))
	require.NotContains(t, strings.Join(p.All(), "\n"), "level=error", "clients could fill the log")
	p.Interrupt()
}

func TestRecordIsCommittedWhenTheServerAcknowledges(t *testing.T) {
	const group, topic = "bridge", "events"
	k := runKafka(t, topic)
	server := testkit.Serve(t)
	run := func() *testkit.Process {
		env := []string{
			"CRYO_URL=" + server.URL(), "CRYO_TOKEN=" + token,
			"KAFKA_BROKERS=" + k.brokers(), "KAFKA_TOPIC=" + topic, "KAFKA_GROUP=" + group,
		}
		return launch(t, env, "run", "--set", "http.enabled=false",
			"--set", "input.redpanda.commit_period=100ms", // instead of 5 s
			"config/kafka_to_cryo.yaml")
	}
	texts := numbered(150)
	k.produce(t, topic, texts[:100]...)

	// It is killed while half of the records are acknowledged, and has committed no
	// others.
	p := run()
	s := server.Session(t)
	acked := make(map[string]bool)
	for len(acked) < 50 {
		m := testkit.Receive(t, s)
		require.NoError(t, m.Ack())
		acked[string(m.Payload)] = true
	}
	k.wantNoneElseCommitted(t, group, topic, len(acked))
	p.Kill()
	k.forgetMembers(t, group)

	// The next process delivers the others again.
	p = run()
	s = server.Session(t)
	receiveAll(t, s, acked, texts[:100])

	// The Cryo server closes the session; records are produced meanwhile.
	require.NoError(t, s.Close(testkit.Context(t), ""))
	k.produce(t, topic, texts[100:125]...)
	s = server.Session(t)
	testkit.Receive(t, s) // not acknowledged
	k.wantNoneElseCommitted(t, group, topic, len(acked))
	require.NoError(t, s.Close(testkit.Context(t), ""))
	receiveAll(t, server.Session(t), acked, texts[:125])
	p.Interrupt()
	require.Equal(t, 125, k.committed(group, topic))

	// The broker is down for a while.
	p = run()
	s = server.Session(t)
	_, err := k.WaitGroupStable(testkit.Context(t), group, 1)
	require.NoError(t, err)
	k.SetDown(true)
	k.WantAttempt(t)
	k.SetDown(false)
	k.produce(t, topic, texts[125:]...)
	receiveAll(t, s, acked, texts)
	_, err = k.WaitGroupInfo(testkit.Context(t), group, func(*kfake.GroupInfo) bool { return k.committed(group, topic) == 150 })
	require.NoError(t, err, "%d are committed", k.committed(group, topic))
	p.Interrupt()
}

// receiveAll receives and acknowledges until all of texts are in acked.
func receiveAll(t *testing.T, s *cryo.Session, acked map[string]bool, texts []string) {
	t.Helper()
	for _, text := range texts {
		for !acked[text] {
			m := testkit.Receive(t, s)
			require.NoError(t, m.Ack())
			acked[string(m.Payload)] = true
		}
	}
}
