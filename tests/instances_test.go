package tests

import (
	"context"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// Several instances behind a load balancer, with Kafka between them
// (docs/scaling.md).

// plenty is more than a test makes of anything.
const plenty = 10_000

// instance is one of several processes that run the same pipelines.
type instance struct {
	*process
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
	p := launch(t, nil, []string{
		"INSTANCE=" + name, "CRYO_ADDRESS=" + address, "CRYO_TOKEN=" + token,
		"KAFKA_BROKERS=" + k.brokers(), "KAFKA_TOPIC=events", "KAFKA_JOBS=jobs", "KAFKA_GROUP=workers",
	}, args...)
	return &instance{p, p.wantLogged("Listening for Cryo clients on ")}
}

// balancer is a load balancer: it passes connections on to backends in turn, and
// over those that don't answer.
type balancer struct {
	net.Listener
	backends []string
	turn     atomic.Int64
	running  sync.WaitGroup
}

func balance(t *testing.T, backends ...string) *balancer {
	t.Helper()
	b := &balancer{Listener: listen(t), backends: backends}
	b.running.Go(func() {
		for {
			client, err := b.Accept()
			if err != nil {
				return
			}
			b.running.Go(func() { b.pass(client) })
		}
	})
	t.Cleanup(func() {
		_ = b.Close()
		b.running.Wait()
	})
	return b
}

func (b *balancer) address() string { return b.Addr().String() }

func (b *balancer) pass(client net.Conn) {
	defer client.Close()
	for range b.backends {
		backend, err := net.Dial("tcp", b.backends[int(b.turn.Add(1))%len(b.backends)])
		if err != nil {
			continue
		}
		var answers sync.WaitGroup
		answers.Go(func() {
			_, _ = io.Copy(client, backend)
			_ = client.(*net.TCPConn).CloseWrite()
		})
		_, _ = io.Copy(backend, client)
		_ = backend.(*net.TCPConn).CloseWrite()
		answers.Wait()
		_ = backend.Close()
		return
	}
}

// employ runs a client that does jobs and comes back whenever its session ends.
// What it has done goes to done.
func employ(t *testing.T, address string, done chan<- string) {
	t.Helper()
	ctx, leave := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() {
		for ctx.Err() == nil {
			s, err := cryo.Dial(ctx, "ws://"+address, &cryo.DialOptions{Token: token})
			if err != nil {
				time.Sleep(10 * time.Millisecond) // as clients do between tries
				continue
			}
			work(ctx, s, done)
			_ = s.Close(ctx, "")
		}
	})
	t.Cleanup(func() {
		leave()
		running.Wait()
	})
}

// work does jobs until the session ends.
func work(ctx context.Context, s *cryo.Session, done chan<- string) {
	for {
		m, err := s.Receive(ctx)
		if err != nil {
			return
		}
		if m.Ack() == nil { // or it comes again
			done <- string(m.Payload)
		}
	}
}

func TestABroadcastReachesTheClientsOfAllInstances(t *testing.T) {
	k := runKafka(t, "events")
	files := []string{"cryo_to_kafka.yaml", "scaling/broadcast.yaml"}
	a := runInstance(t, "a", "127.0.0.1:0", k, files...)
	b := runInstance(t, "b", "127.0.0.1:0", k, files...)
	atA, atB := dial(t, a.address), dial(t, b.address)
	gotA, gotB := make(chan string, plenty), make(chan string, plenty)
	go work(t.Context(), atA, gotA)
	go work(t.Context(), atB, gotB)

	// A new instance gets what comes from when it has found the topic's end.
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
		require.NoError(t, next(t, send(s, text)))
	}
	for _, got := range []chan string{gotA, gotB} {
		var odd, even []string
		for range texts {
			text := next(t, got)
			for text == areYouThere {
				text = next(t, got)
			}
			if (text[len(text)-1]-'0')%2 == 1 {
				odd = append(odd, text)
			} else {
				even = append(even, text)
			}
		}
		for i, text := range texts {
			require.Equal(t, text, [][]string{even, odd}[i%2][i/2], "what one client sends arrives once, and in order")
		}
	}
	a.interrupt()
	b.interrupt()
}

const areYouThere = "are you there?"

// wantProbe sends until something arrives.
func wantProbe(t *testing.T, s *cryo.Session, got <-chan string) {
	t.Helper()
	for deadline := time.Now().Add(patience); ; {
		require.NoError(t, next(t, send(s, areYouThere)))
		select {
		case <-got:
			return
		case <-time.After(100 * time.Millisecond):
			require.True(t, time.Now().Before(deadline), "nothing arrived")
		}
	}
}

func TestAJobIsDoneOnceByAClientOfOneInstance(t *testing.T) {
	k := runKafka(t, "jobs")
	a := runInstance(t, "a", "127.0.0.1:0", k, "scaling/work_queue.yaml")
	b := runInstance(t, "b", "127.0.0.1:0", k, "scaling/work_queue.yaml")
	_, err := k.WaitGroupStable(contextFor(t), "workers", 2)
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
		case <-time.After(patience):
			require.FailNow(t, "jobs are missing", "%d of %d are done", len(done), len(jobs))
		}
	}
	require.Len(t, done, len(jobs), "each once")
	require.Positive(t, byA)
	require.Positive(t, byB)
	a.interrupt()
	b.interrupt()
	require.Equal(t, len(jobs), k.committed("workers", "jobs"))
}

func TestRestartingInstancesInTurnLosesNothing(t *testing.T) {
	k := runKafka(t, "events", "jobs")
	run := func(name, address string) *instance {
		return runInstance(t, name, address, k, "cryo_to_kafka.yaml", "scaling/work_queue.yaml")
	}
	instances := []*instance{run("a", freeAddress(t)), run("b", freeAddress(t))}
	_, err := k.WaitGroupStable(contextFor(t), "workers", 2)
	require.NoError(t, err)

	// Workers have a session with each instance. A client of the balancer's does
	// jobs too, and sends events, again if they are not acknowledged.
	done := make(chan string, plenty)
	for _, i := range instances {
		for range 2 {
			employ(t, i.address, done)
		}
	}
	lb := balance(t, instances[0].address, instances[1].address)
	restarted, finish := context.WithCancel(t.Context())
	defer finish()
	sent := make(chan []string, 1)
	go func() { sent <- sendUntil(restarted, lb.address(), done) }()
	jobs := numbered(400)

	counts := make(map[string]int)
	wantDone := func(jobs []string) {
		for _, job := range jobs {
			for counts[job] == 0 {
				counts[next(t, done)]++
			}
		}
	}
	k.produce(t, "jobs", jobs[:100]...)
	wantDone(jobs[:100])
	for i, name := range []string{"a", "b"} {
		now := jobs[100*(i+1) : 100*(i+2)]
		k.produce(t, "jobs", now[:50]...)
		instances[i].interrupt() // with some of them under way
		k.produce(t, "jobs", now[50:]...)
		wantDone(now)
		instances[i] = run(name, instances[i].address)
	}
	k.produce(t, "jobs", jobs[300:]...)
	wantDone(jobs)
	finish()
	events := next(t, sent)
	require.NotEmpty(t, events)
	for _, i := range instances {
		i.interrupt()
	}
	require.Equal(t, len(jobs), k.committed("workers", "jobs"))
	found := k.texts(t, "events")
	for _, text := range events {
		require.Positive(t, found[text], "%s was acknowledged, and is not in the topic", text)
	}
}

func TestABroadcastGoesOnWhileAnotherInstanceRestarts(t *testing.T) {
	k := runKafka(t, "events")
	run := func(name, address string) *instance {
		return runInstance(t, name, address, k, "cryo_to_kafka.yaml", "scaling/broadcast.yaml")
	}
	a, b := run("a", freeAddress(t)), run("b", "127.0.0.1:0")
	atB, gotB := dial(t, b.address), make(chan string, plenty)
	go work(t.Context(), atB, gotB)
	wantProbe(t, atB, gotB)
	restarted, finish := context.WithCancel(t.Context())
	defer finish()
	sent := make(chan []string, 1)
	go func() { sent <- sendUntil(restarted, b.address, make(chan string, plenty)) }()

	a.interrupt()
	a = run("a", a.address)
	atA, gotA := dial(t, a.address), make(chan string, plenty)
	go work(t.Context(), atA, gotA)
	wantProbe(t, atB, gotA)
	finish()
	events := next(t, sent)
	require.NotEmpty(t, events)
	for _, event := range events {
		text := next(t, gotB)
		for text == areYouThere {
			text = next(t, gotB)
		}
		require.Equal(t, event, text, "each once, and in order")
	}
	a.interrupt()
	b.interrupt()
}

// sendUntil sends texts one after the other, each until it is acknowledged, over
// as many sessions as it takes, and gives those that were.
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
