package tests

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/testkit"
)

// Several instances behind a load balancer, with Kafka between them
// (docs/guides/scaling.md).

// plenty is a buffer that no test fills.
const plenty = 10_000

// instance is one of several processes that run the same pipelines.
type instance struct {
	*testkit.Process
	address string
}

// runInstance runs pipelines of config/ in streams mode. Instances differ in
// name and address.
func runInstance(t *testing.T, name, address string, k *kafka, files ...string) *instance {
	t.Helper()
	args := []string{"streams", "--set", "http.enabled=false"}
	for _, file := range files {
		args = append(args, "config/"+file)
	}
	p := launch(t, []string{
		"INSTANCE=" + name, "CRYO_ADDRESS=" + address, "CRYO_TOKEN=" + token,
		"KAFKA_BROKERS=" + k.brokers(), "KAFKA_TOPIC=events", "KAFKA_JOBS=jobs", "KAFKA_GROUP=workers",
	}, args...)
	return &instance{p, p.Listening()}
}

// employ runs a client that does jobs, on one session after the other, and sends what it
// has done to done.
func employ(t *testing.T, address string, done chan<- string) {
	t.Helper()
	sessions := testkit.Redial(t, address, cryo.DialOptions{})
	ctx, leave := context.WithCancel(context.Background())
	var working sync.WaitGroup
	working.Go(func() {
		for {
			select {
			case s := <-sessions:
				work(ctx, s, done)
			case <-ctx.Done():
				return
			}
		}
	})
	t.Cleanup(func() {
		leave()
		working.Wait()
	})
}

// work receives and acknowledges jobs until the session ends, and sends them to done.
func work(ctx context.Context, s *cryo.Session, done chan<- string) {
	for {
		m, err := s.Receive(ctx)
		if err != nil {
			return
		}
		if m.Ack() == nil { // or it is delivered again
			done <- string(m.Payload)
		}
	}
}

func TestBroadcastReachesTheClientsOfAllInstances(t *testing.T) {
	k := runKafka(t, "events")
	files := []string{"cryo_to_kafka.yaml", "scaling/broadcast.yaml"}
	a := runInstance(t, "a", "127.0.0.1:0", k, files...)
	b := runInstance(t, "b", "127.0.0.1:0", k, files...)
	atA, atB := testkit.Dial(t, a.address), testkit.Dial(t, b.address)
	gotA, gotB := make(chan string, plenty), make(chan string, plenty)
	go work(t.Context(), atA, gotA)
	go work(t.Context(), atB, gotB)

	// An instance receives the records that are produced after it has found the topic's end.
	for _, s := range []*cryo.Session{atA, atB} {
		for _, got := range []chan string{gotA, gotB} {
			wantProbe(t, s, got)
		}
	}

	texts := numbered(40)
	for i, text := range texts {
		s := atA
		if i%2 == 1 {
			s = atB
		}
		testkit.WantDelivered(t, s, text)
	}
	for _, got := range []chan string{gotA, gotB} {
		var odd, even []string
		for range texts {
			text := testkit.Next(t, got)
			for text == areYouThere {
				text = testkit.Next(t, got)
			}
			if (text[len(text)-1]-'0')%2 == 1 {
				odd = append(odd, text)
			} else {
				even = append(even, text)
			}
		}
		for i, text := range texts {
			require.Equal(t, text, [][]string{even, odd}[i%2][i/2], "the messages of a client arrive once, and in order")
		}
	}
	a.Interrupt()
	b.Interrupt()
}

const areYouThere = "are you there?"

// wantProbe sends until a message arrives.
func wantProbe(t *testing.T, s *cryo.Session, got <-chan string) {
	t.Helper()
	for deadline := time.Now().Add(testkit.Patience); ; {
		testkit.WantDelivered(t, s, areYouThere)
		select {
		case <-got:
			return
		case <-time.After(100 * time.Millisecond):
			require.True(t, time.Now().Before(deadline), "no message arrived")
		}
	}
}

func TestEachJobIsDoneOnceAcrossInstances(t *testing.T) {
	k := runKafka(t, "jobs")
	a := runInstance(t, "a", "127.0.0.1:0", k, "scaling/work_queue.yaml")
	b := runInstance(t, "b", "127.0.0.1:0", k, "scaling/work_queue.yaml")
	_, err := k.WaitGroupStable(testkit.Context(t), "workers", 2)
	require.NoError(t, err)
	gotA, gotB := make(chan string, plenty), make(chan string, plenty)
	for range 2 {
		employ(t, a.address, gotA)
		employ(t, b.address, gotB)
	}
	jobs := numbered(200)
	k.produce(t, "jobs", jobs...)
	done := make(map[string]int)
	byA, byB := 0, 0
	for range jobs {
		select {
		case job := <-gotA:
			byA++
			done[job]++
		case job := <-gotB:
			byB++
			done[job]++
		case <-time.After(testkit.Patience):
			require.FailNow(t, "timed out waiting for jobs", "%d of %d are done", len(done), len(jobs))
		}
	}
	require.Len(t, done, len(jobs), "each once")
	require.Positive(t, byA)
	require.Positive(t, byB)
	a.Interrupt()
	b.Interrupt()
	require.Equal(t, len(jobs), k.committed("workers", "jobs"))
}

func TestRestartingInstancesInTurnLosesNothing(t *testing.T) {
	k := runKafka(t, "events", "jobs")
	run := func(name, address string) *instance {
		return runInstance(t, name, address, k, "cryo_to_kafka.yaml", "scaling/work_queue.yaml")
	}
	instances := []*instance{run("a", testkit.ReserveAddress(t)), run("b", testkit.ReserveAddress(t))}
	_, err := k.WaitGroupStable(testkit.Context(t), "workers", 2)
	require.NoError(t, err)

	// Workers have a session with each instance. A client behind a load balancer does
	// jobs too, and sends events, each until it is acknowledged.
	done := make(chan string, plenty)
	for _, i := range instances {
		for range 2 {
			employ(t, i.address, done)
		}
	}
	lb := testkit.NewProxy(t, instances[0].address, instances[1].address)
	restarted, finish := context.WithCancel(t.Context())
	defer finish()
	sent := make(chan []string, 1)
	go func() { sent <- sendUntil(restarted, lb.Address(), done) }()
	jobs := numbered(400)

	counts := make(map[string]int)
	wantDone := func(jobs []string) {
		for _, job := range jobs {
			for counts[job] == 0 {
				counts[testkit.Next(t, done)]++
			}
		}
	}
	k.produce(t, "jobs", jobs[:100]...)
	wantDone(jobs[:100])
	for i, name := range []string{"a", "b"} {
		now := jobs[100*(i+1) : 100*(i+2)]
		k.produce(t, "jobs", now[:50]...)
		instances[i].Interrupt() // with some of them in flight
		k.produce(t, "jobs", now[50:]...)
		wantDone(now)
		instances[i] = run(name, instances[i].address)
	}
	k.produce(t, "jobs", jobs[300:]...)
	wantDone(jobs)
	finish()
	events := testkit.Next(t, sent)
	require.NotEmpty(t, events)
	for _, i := range instances {
		i.Interrupt()
	}
	require.Equal(t, len(jobs), k.committed("workers", "jobs"))
	found := k.texts(t, "events")
	for _, text := range events {
		require.Positive(t, found[text], "%s was acknowledged and is not in the topic", text)
	}
}

func TestBroadcastContinuesWhileAnotherInstanceRestarts(t *testing.T) {
	k := runKafka(t, "events")
	run := func(name, address string) *instance {
		return runInstance(t, name, address, k, "cryo_to_kafka.yaml", "scaling/broadcast.yaml")
	}
	a, b := run("a", testkit.ReserveAddress(t)), run("b", "127.0.0.1:0")
	atB, gotB := testkit.Dial(t, b.address), make(chan string, plenty)
	go work(t.Context(), atB, gotB)
	wantProbe(t, atB, gotB)
	restarted, finish := context.WithCancel(t.Context())
	defer finish()
	sent := make(chan []string, 1)
	go func() { sent <- sendUntil(restarted, b.address, make(chan string, plenty)) }()

	a.Interrupt()
	a = run("a", a.address)
	atA, gotA := testkit.Dial(t, a.address), make(chan string, plenty)
	go work(t.Context(), atA, gotA)
	wantProbe(t, atB, gotA)
	finish()
	events := testkit.Next(t, sent)
	require.NotEmpty(t, events)
	for _, event := range events {
		text := testkit.Next(t, gotB)
		for text == areYouThere {
			text = testkit.Next(t, gotB)
		}
		require.Equal(t, event, text, "each once, and in order")
	}
	a.Interrupt()
	b.Interrupt()
}

// sendUntil sends texts one after the other, on one session after the other, and returns
// those that were acknowledged.
func sendUntil(finished context.Context, address string, done chan<- string) (acked []string) {
	for finished.Err() == nil {
		s, err := cryo.Dial(finished, "ws://"+address, &cryo.DialOptions{Token: token})
		if err != nil {
			time.Sleep(10 * time.Millisecond) // as clients do between tries
			continue
		}
		go work(finished, s, done)
		for err == nil {
			text := fmt.Sprintf("event-%06d", len(acked))
			if err = s.SendText(finished, text); err == nil {
				acked = append(acked, text)
			}
		}
		_ = s.Close(finished, "")
	}
	return acked
}
