package plugin

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// Inputs of a shared listener start, stop and are cut off at random, while clients come,
// go, take each other's sessions over and send messages and streams, and the output
// fails now and then. When all works again, everything is settled: what was acknowledged
// is delivered, and nothing is rejected, left waiting or counted for ever.
func TestHandoversUnderLoadLoseNothing(t *testing.T) {
	for name, run := range map[string]func(t *testing.T, seed uint64){
		"":                      func(t *testing.T, seed uint64) { handoverStorm(t, seed, false) },
		"acknowledge: received": func(t *testing.T, seed uint64) { handoverStorm(t, seed, true) },
		"with answers":          func(t *testing.T, seed uint64) { handoverStorm(t, seed, false, "ack_timeout: 1s") },
		"with auto_replay_nacks: false": func(t *testing.T, seed uint64) {
			handoverStorm(t, seed, false, "ack_timeout: 1s", "auto_replay_nacks: false")
		},
	} {
		t.Run(name, func(t *testing.T) {
			if given := os.Getenv(seedVariable); given != "" {
				seed, err := strconv.ParseUint(given, 10, 64)
				require.NoError(t, err, seedVariable)
				run(t, seed)
				return
			}
			n := 20
			if os.Getenv("CRYO_LONG_TESTS") == "1" {
				n = 1000
			}
			first := rand.Uint64()
			for i := range n {
				if run(t, first+uint64(i)); t.Failed() {
					t.Fatalf("%s=%d runs it again", seedVariable, first+uint64(i))
				}
			}
		})
	}
}

// stormSend is one send, and what became of it.
type stormSend struct {
	texts  []string
	stream bool
	live   *cryo.Session
	done   chan error
}

func handoverStorm(t *testing.T, seed uint64, receipt bool, more ...string) {
	t.Helper()
	inEngine(t, func(t *testing.T, e *engine) {
		rnd := rand.New(rand.NewPCG(seed, 1))
		dying := make(chan struct{})
		t.Cleanup(func() { close(dying); time.Sleep(10 * time.Second) })
		var mu sync.Mutex
		delivered := map[string]int{}
		failRate := 0.3
		vr := rand.New(rand.NewPCG(seed, 2))
		go func() {
			for {
				select {
				case a := <-e.probe.arrivals:
					mu.Lock()
					fail, wait := vr.Float64() < failRate, time.Duration(vr.IntN(30))*time.Millisecond
					hang := failRate > 0 && vr.IntN(12) == 0
					mu.Unlock()
					go func() {
						if hang {
							wait = 3 * time.Second
						}
						time.Sleep(wait)
						if fail {
							a.fail(errOutput)
							return
						}
						mu.Lock()
						for _, text := range a.texts() {
							delivered[text]++
						}
						mu.Unlock()
						a.deliver()
					}()
				case <-dying:
					return
				}
			}
		}()
		e.run(fromOnce, listenOutput) // it keeps the listener
		conf := func() string {
			f := []string{
				"max_batch_count: " + strconv.Itoa(1+rnd.IntN(4)), "max_in_flight: " + strconv.Itoa(1+rnd.IntN(20)),
				"streams: { max_open: " + strconv.Itoa(1+rnd.IntN(3)) + ", scanner: { lines: {} } }",
			}
			if rnd.IntN(2) == 0 {
				f = append(f, "message_types: [ utf8, binary, stream, session ]")
			}
			if receipt {
				f = append(f, "acknowledge: received")
			}
			return strings.Join(append(f, more...), ", ")
		}
		start := func() *pipeline {
			out := toProbe
			if rnd.IntN(2) == 0 {
				out = toSerial
			}
			if len(more) > 0 && rnd.IntN(2) == 0 {
				return e.run(with(listenInput, conf()), out, "sync_response: {}")
			}
			return e.run(with(listenInput, conf()), out)
		}
		var inputs []*pipeline
		var stopping []*sending
		var clients []*cryo.Session
		var sends []*stormSend
		n := 0
		ids := uint64(0)
		for range 60 {
			switch r := rnd.IntN(20); {
			case r < 2 && len(inputs) < 3 || len(inputs) == 0 && r < 6:
				inputs = append(inputs, start())
			case r < 4 && len(inputs) > 0:
				i := rnd.IntN(len(inputs))
				p := inputs[i]
				inputs = append(inputs[:i], inputs[i+1:]...)
				if rnd.IntN(2) == 0 {
					p.kill()
				} else {
					stopping = append(stopping, sendAny(func() error { p.stop(); return nil }))
				}
			case r < 6 || len(clients) == 0:
				ids++
				id := ids
				if rnd.IntN(3) == 0 {
					id = 1 + rnd.Uint64N(ids)
				}
				s, err := e.tryDial(cryo.DialOptions{Token: token, SessionID: id})
				if err == nil {
					clients = append(clients, s)
					go func() {
						for {
							m, err := s.Receive(context.Background())
							if err != nil {
								return
							}
							mu.Lock()
							r := vr.IntN(10)
							mu.Unlock()
							switch {
							case r == 0:
							case r == 1:
								_ = m.Reject("no")
							case r < 4:
								time.Sleep(50 * time.Millisecond)
								_ = m.Ack()
							default:
								_ = m.Ack()
							}
						}
					}()
					go func() {
						for {
							st, err := s.AcceptStream(context.Background())
							if err != nil {
								return
							}
							_, _ = io.Copy(io.Discard, st)
							_ = st.Ack()
						}
					}()
				}
			case r < 7:
				i := rnd.IntN(len(clients))
				end(clients[i])
				clients = append(clients[:i], clients[i+1:]...)
			case r < 9:
				time.Sleep(time.Duration(rnd.IntN(2000)) * time.Millisecond)
			case r < 12:
				s := clients[rnd.IntN(len(clients))]
				a := &stormSend{stream: true, live: s, done: make(chan error, 1)}
				for range 1 + rnd.IntN(4) {
					n++
					a.texts = append(a.texts, fmt.Sprint("m", n))
				}
				sends = append(sends, a)
				go func() {
					a.done <- s.SendStream(context.Background(), strings.NewReader(strings.Join(a.texts, "\n")), nil)
				}()
			default:
				s := clients[rnd.IntN(len(clients))]
				for range 1 + rnd.IntN(6) {
					n++
					a := &stormSend{texts: []string{fmt.Sprint("m", n)}, live: s, done: make(chan error, 1)}
					sends = append(sends, a)
					go func() { a.done <- s.SendText(context.Background(), a.texts[0]) }()
				}
			}
			if rnd.IntN(2) == 0 {
				synctest.Wait()
			}
		}
		mu.Lock()
		failRate = 0
		mu.Unlock()
		if len(inputs) == 0 {
			start()
		}
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		for _, s := range stopping {
			require.NoError(t, s.result(t))
		}
		for _, a := range sends {
			select {
			case err := <-a.done:
				var rejected *cryo.RejectedError
				switch {
				case err == nil && !receipt:
					mu.Lock()
					for _, text := range a.texts {
						require.Positive(t, delivered[text], "acknowledged, not delivered: %s", text)
					}
					mu.Unlock()
				case len(more) == 0 && errors.As(err, &rejected) && rejected.Text != receivesNothing:
					t.Errorf("rejected %v: %v", a.texts, err)
				case err != nil && !errors.As(err, &rejected) && a.live.Err() == nil && !a.stream:
					t.Errorf("failed %v: %v", a.texts, err)
				}
			default:
				t.Errorf("pending for ever: %v (stream %v, session %v)", a.texts, a.stream, a.live.Err())
			}
		}
		if v := e.metrics.value("cryo_messages_unacknowledged"); v != 0 {
			t.Errorf("gauge unacknowledged %d", v)
		}
		if v := e.metrics.value("cryo_streams_open"); v != 0 {
			t.Errorf("gauge streams_open %d", v)
		}
		for _, in := range e.shared.byAddr[somewhere].inputs.all {
			in.queue.mu.Lock()
			if in.queue.inFlight.Used() != 0 || len(in.queue.deliveries) != 0 || in.queue.streams.Used() != 0 {
				t.Errorf("in flight %d, deliveries %d, open streams %d", in.queue.inFlight.Used(), len(in.queue.deliveries), in.queue.streams.Used())
			}
			in.queue.mu.Unlock()
		}
	})
}
