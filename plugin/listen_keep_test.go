package plugin

import (
	"net"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
)

func TestSessionsStayWhenOnlyThePipelineChanges(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.shared.setKeeping(true)
		defer e.shared.setKeeping(false)
		p := e.run(listenInput, toProbe)
		client := e.dial()
		e.wantReceives(t, client, "before")
		p.stop()
		waiting := send(client, "while there is no pipeline")
		time.Sleep(4 * time.Second)
		waiting.wantPending(t, "neither acknowledged nor rejected")

		e.run(listenInput, toProbe, "mapping: root = content().uppercase()")
		e.want("WHILE THERE IS NO PIPELINE")[0].deliver()
		waiting.wantAcked(t, "by the changed pipeline")
		time.Sleep(time.Minute)
		require.NoError(t, client.Err())
		require.Equal(t, int64(1), e.metrics.value("cryo_sessions"))
		require.Equal(t, int64(1), e.metrics.value("cryo_listening"))
		e.dial()
		require.Zero(t, e.log.count("Listener closed"))
	})
}

func TestSessionsOfAnOutputStayWhenOnlyThePipelineChanges(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.shared.setKeeping(true)
		defer e.shared.setKeeping(false)
		p := e.run(fromFeed, listenOutput)
		client := e.dial()
		p.stop()
		e.run(fromFeed, listenOutput)
		e.wantSends(t, client, "of the new output")
	})
}

func TestKeptListenerClosesWhenNoPipelineFollows(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.shared.setKeeping(true)
		defer e.shared.setKeeping(false)
		p := e.run(listenInput, toProbe)
		client := e.dial()
		p.stop()
		e.wantDenied(cryo.DialOptions{Token: token}, 503)
		e.log.want(t, "WARN Denied a client", "status=503", "no pipeline uses the listener: it is being replaced or stopped")
		require.Zero(t, e.log.count("the listener is closing"), "a pipeline may follow")
		waiting := send(client, "m")
		time.Sleep(6 * time.Second)
		require.ErrorIs(t, waiting.result(t), net.ErrClosed, "its sender can send it again")
		e.wantRefused(t)
		e.shared.mu.Lock()
		require.Empty(t, e.shared.byAddr)
		e.shared.mu.Unlock()
		require.Zero(t, e.metrics.value("cryo_sessions"))

		e.run(listenInput, toProbe)
		e.wantReceives(t, e.dial(), "it listens again")
	})
}

func TestKeptListenerWithOtherSettingsIsReplaced(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.shared.setKeeping(true)
		defer e.shared.setKeeping(false)
		p := e.run(listenInput, toProbe)
		client := e.dial()
		p.stop()
		e.run(with(listenInput, "max_sessions: 5"), toProbe)
		synctest.Wait()
		require.Error(t, client.Err())
		e.wantReceives(t, e.dial(), "of the new listener")
		require.Equal(t, 1, e.log.count("Listener closed"))
	})
}

func TestKeptListenerReleasesItsPortForAnotherAddress(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		listen := e.shared.listen
		e.shared.listen = func(network, address string) (net.Listener, error) {
			return listen(network, strings.Replace(address, "0.0.0.0:", "192.0.2.2:", 1))
		}
		e.shared.setKeeping(true)
		defer e.shared.setKeeping(false)
		p := e.run(listenInput, toProbe)
		client := e.dial()
		p.stop()
		begin := time.Now()
		e.run(strings.Replace(listenInput, somewhere, "0.0.0.0:80", 1), toProbe)
		require.Error(t, client.Err())
		e.wantReceives(t, e.dial(), "of the new listener")
		require.Zero(t, time.Since(begin))
		require.Zero(t, e.log.count("ERROR "))
	})
}

// Each of them finds the port in use, the second one while the kept listener closes.
func TestKeptListenerReleasesItsPortForSeveralComponents(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		listen := e.shared.listen
		var closed atomic.Bool
		e.log.onLine("Listener closed", func() { closed.Store(true) })
		e.shared.listen = func(network, address string) (net.Listener, error) {
			if strings.HasPrefix(address, "0.0.0.0:") && !closed.Load() {
				return nil, &net.OpError{Op: "listen", Net: "tcp", Err: syscall.EADDRINUSE}
			}
			return listen(network, strings.Replace(address, "0.0.0.0:", "192.0.2.2:", 1))
		}
		e.shared.setKeeping(true)
		defer e.shared.setKeeping(false)
		p := e.run(listenInput, listenOutput)
		e.unreadClient(t) // it does not close its end
		p.stop()
		moved := strings.Replace(listenInput, somewhere, "0.0.0.0:80", 1)
		e.run(moved, moved)
		time.Sleep(closeTime)
		require.Equal(t, 1, e.log.count("Listener closed"))
		e.dial()
		require.Zero(t, e.log.count("ERROR "))
	})
}

func TestStoppingProcessKeepsNoListener(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.shared.setKeeping(true)
		defer e.shared.setKeeping(false)
		p := e.run(listenInput, toProbe)
		client := e.dial()
		e.shared.setKeeping(false)
		p.stop()
		var closed *cryo.PeerClosedError
		require.ErrorAs(t, client.Err(), &closed)
		require.Equal(t, 1012, closed.Code)
	})
}

func TestKeptListenerClosesWhenTheProcessStops(t *testing.T) {
	for name, stop := range map[string]func(*listeners){
		"as shutdown_delay begins":      func(l *listeners) { l.setKeeping(false) },
		"when the pipelines have ended": (*listeners).closeKept,
	} {
		t.Run(name, func(t *testing.T) {
			inEngine(t, func(t *testing.T, e *engine) {
				e.shared.setKeeping(true)
				p := e.run(listenInput, toProbe)
				client := e.dial()
				p.stop()
				require.NoError(t, client.Err())
				stop(e.shared)
				if name == "as shutdown_delay begins" {
					synctest.Wait()
				}
				var closed *cryo.PeerClosedError
				require.ErrorAs(t, client.Err(), &closed)
				require.Equal(t, 1012, closed.Code)
				e.shared.closeKept() // nothing is left to wait for
				e.wantRefused(t)
			})
		})
	}
}

// A hard stop leaves messages without a result: the changed pipeline may deliver them again.
func TestMessagesOfAKilledPipelineGoToTheNext(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.shared.setKeeping(true)
		defer e.shared.setKeeping(false)
		p := e.run(listenInput, toProbe)
		m := send(e.dial(), "m")
		e.arrival()
		p.kill()
		e.run(listenInput, toProbe)
		e.want("m")[0].deliver()
		m.wantAcked(t, "delivered by the second")
	})
}
