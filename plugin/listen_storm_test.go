package plugin

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/redpanda-data/benthos/v4/public/service"
	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// TestListenerReopensWhileComponentsStartAndStop starts and stops components of one
// address at random, while accepting clients repeatedly fails.
func TestListenerReopensWhileComponentsStartAndStop(t *testing.T) {
	for seed := range uint64(5) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			inEngine(t, func(t *testing.T, e *engine) { listenStorm(t, e, rand.New(rand.NewPCG(seed, 7))) })
		})
	}
}

func listenStorm(t *testing.T, e *engine, rng *rand.Rand) {
	var socket atomic.Pointer[chan error] // breaks the last socket that was opened
	listen := e.shared.listen
	e.shared.listen = func(network, address string) (net.Listener, error) {
		l, err := listen(network, address)
		if err != nil {
			return nil, err
		}
		fail := make(chan error, 1)
		socket.Store(&fail)
		return &brokenListener{l, fail}, nil
	}
	var all sync.WaitGroup
	delivered := make(chan struct{})
	all.Go(func() {
		for {
			select {
			case a := <-e.probe.arrivals:
				a.deliver()
			case <-delivered:
				return
			}
		}
	})
	var running []*pipeline
	var sent []*sending
	for range 60 {
		switch rng.IntN(6) {
		case 0:
			if fail := socket.Load(); fail != nil {
				select {
				case *fail <- errAccept:
				default: // it is broken
				}
			}
		case 1:
			running = append(running, e.start(listenInput, toProbe))
		case 2:
			running = append(running, e.start(fromFeed, with(listenOutput, "no_session: drop")))
		case 3:
			if len(running) == 0 {
				continue
			}
			i := rng.IntN(len(running))
			stop := running[i].stop
			if rng.IntN(2) == 0 {
				stop = running[i].kill
			}
			all.Go(stop)
			running = slices.Delete(running, i, i+1)
		case 4:
			client, err := e.tryDial(cryo.DialOptions{Token: token})
			if err != nil {
				continue
			}
			all.Go(func() {
				for {
					m, err := client.Receive(context.Background())
					if err != nil {
						return
					}
					_ = m.Ack()
				}
			})
			for i := range 3 {
				sent = append(sent, send(client, fmt.Sprint(i)))
			}
		default:
			e.feed <- &produced{service.MessageBatch{service.NewMessage([]byte("m"))}, make(chan error, 100)}
		}
		time.Sleep(time.Duration(rng.IntN(700)) * time.Millisecond)
		synctest.Wait()
	}
	for _, p := range running {
		all.Go(p.stop)
	}
	time.Sleep(2 * time.Minute)
	close(delivered)
	all.Wait()
	synctest.Wait()

	require.Greater(t, e.log.count("Listener failed"), 1)
	require.LessOrEqual(t, e.log.count("Listening for"), e.log.count("Listener failed")+e.log.count("Listener closed"), "no address is opened twice")
	require.Empty(t, e.shared.byAddr)
	for _, s := range sent {
		require.Len(t, s.done, 1, "each message has its result")
	}
	for _, gauge := range []string{"cryo_sessions", "cryo_messages_unacknowledged"} {
		require.Zero(t, e.metrics.value(gauge), gauge)
	}
}
