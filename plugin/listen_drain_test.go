package plugin

import (
	"net"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/cryotest"
)

// withShutdownDelay sets the engine's shutdown_delay for a test.
func withShutdownDelay(t *testing.T, delay time.Duration) {
	t.Helper()
	before := shutdownDelay.Load()
	SetShutdownDelay(delay)
	t.Cleanup(func() { shutdownDelay.Store(before) })
}

// wantRefused requires that nothing listens for clients.
func (e *engine) wantRefused(t *testing.T) {
	t.Helper()
	_, err := e.tryDial(cryo.DialOptions{Token: token})
	require.ErrorIs(t, err, syscall.ECONNREFUSED)
}

// wantOpen requires that n of the sessions are open by now.
func wantOpen(t *testing.T, n int, sessions []*cryo.Session) {
	t.Helper()
	synctest.Wait()
	open := 0
	for _, s := range sessions {
		if s.Err() == nil {
			open++
		}
	}
	require.Equal(t, n, open)
}

func TestSessionsOfAStoppingListenerEndOverTime(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		withShutdownDelay(t, 15*time.Second)
		p := e.run(with(listenInput, "drain_period: 10s"), toProbe)
		var sessions []*cryo.Session
		for range 10 {
			sessions = append(sessions, e.dial())
		}
		e.shared.drain(15 * time.Second)
		time.Sleep(4500 * time.Millisecond)
		sessions = append(sessions, e.dial()) // still before the period
		require.Equal(t, int64(1), e.metrics.value("cryo_listening"))

		time.Sleep(time.Second)
		e.wantRefused(t)
		require.Zero(t, e.metrics.value("cryo_listening"))
		e.log.want(t, "INFO Draining", "sessions=11", "period=10s")
		for left := 10; left > 0; left-- {
			wantOpen(t, left, sessions)
			for _, s := range sessions {
				if s.Err() == nil {
					e.wantReceives(t, s, "it goes on as before")
					break
				}
			}
			time.Sleep(10 * time.Second / 11)
		}
		wantOpen(t, 0, sessions)
		for _, s := range sessions {
			var closed *cryo.PeerClosedError
			require.ErrorAs(t, s.Err(), &closed)
			require.Equal(t, 1012, closed.Code)
		}
		begin := time.Now()
		p.stop()
		require.Zero(t, time.Since(begin))
		require.Equal(t, 1, e.log.count("Listener closed"))
	})
}

func TestDrainedSessionIsClosedWhenItsMessagesAreAcknowledged(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		withShutdownDelay(t, 10*time.Second)
		p := e.run(with(listenInput, "drain_period: 10s"), toProbe)
		client := e.dial()
		inFlight := send(client, "in flight")
		a := e.arrival()
		e.shared.drain(10 * time.Second)
		time.Sleep(9 * time.Second)
		inFlight.wantPending(t, "the pipeline is slow")
		require.NoError(t, client.Err())
		late := send(client, "late")
		e.wantNoArrival("it is left to another server")
		a.deliver()
		inFlight.wantAcked(t, "before the session ends")
		require.ErrorIs(t, late.result(t), net.ErrClosed)
		p.stop()
	})
}

// The engine's stop ends a drain: a message that the pipeline does not deliver holds up nothing.
func TestStopEndsADrain(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		withShutdownDelay(t, time.Hour)
		p := e.run(with(listenInput, "drain_period: 1h"), toProbe)
		sessions := []*cryo.Session{e.dial(), e.dial(), e.dial()}
		stuck := send(sessions[0], "stuck")
		a := e.arrival()
		e.shared.drain(time.Hour)
		time.Sleep(time.Minute)
		stopped := sendAny(func() error { p.stop(); return nil })
		stopped.wantPending(t, "of the message in flight")
		a.deliver()
		stuck.wantAcked(t, "delivered")
		stopped.wantAcked(t, "stopped")
		wantOpen(t, 0, sessions)
	})
}

// The turn of a session may come immediately before the stop: it has as much time for the close
// handshake as one that the stop closes.
func TestStopDoesNotDisconnectSessionsThatADrainIsClosing(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		withShutdownDelay(t, 10*time.Second)
		p := e.run(with(listenInput, "drain_period: 10s"), toProbe)
		peer := e.unreadClient(t)
		peer.WriteFrames(cryotest.Text(2, "in flight"))
		a := e.arrival()
		e.shared.drain(10 * time.Second)
		time.Sleep(time.Second)
		a.deliver()
		synctest.Wait()
		time.AfterFunc(3*time.Second, func() { peer.WriteClose(1012, "") })
		begin := time.Now()
		p.stop()
		require.Equal(t, 3*time.Second, time.Since(begin))
		peer.WantFrame("the acknowledgement", cryotest.Acked(2))
		peer.WantClose("the last frame", 1012, "server is shutting down")
	})
}

func TestDrainWaitsForTheAcknowledgementsOfAnOutput(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		withShutdownDelay(t, 10*time.Second)
		p := e.run(fromFeed, with(listenOutput, "drain_period: 10s"))
		client := e.dial()
		f := e.produce("m")
		m := receiveTexts(t, client, "m")
		DrainListeners(e.feeds)
		e.shared.drain(10 * time.Second)
		time.Sleep(5 * time.Second)
		f.wantPending(t, "the client is slow")
		require.NoError(t, client.Err())
		require.NoError(t, m[0].Ack())
		f.wantDelivered(t, "before the session ends")
		wantOpen(t, 0, []*cryo.Session{client})
		p.stop()
	})
}

func TestListenerWithoutADrainPeriodAcceptsClientsUntilTheStop(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		withShutdownDelay(t, time.Minute)
		p := e.run(listenInput, toProbe)
		sessions := []*cryo.Session{e.dial()}
		e.shared.drain(time.Minute)
		time.Sleep(59 * time.Second)
		sessions = append(sessions, e.dial())
		p.stop()
		wantOpen(t, 0, sessions)
	})
}

func TestDrainPeriodMustFitIntoShutdownDelay(t *testing.T) {
	fields := "address: ':0', tokens: [ " + token + " ], drain_period: 10s"
	require.NoError(t, construct(t, "input", "cryo_server", "{ "+fields+" }"), "the delay is not known")
	withShutdownDelay(t, 5*time.Second)
	for _, kind := range []string{"input", "output"} {
		err := construct(t, kind, "cryo_server", "{ "+fields+" }")
		require.ErrorContains(t, err, "field drain_period is 10s, but shutdown_delay of the configuration is 5s")
	}
	withShutdownDelay(t, 10*time.Second)
	require.NoError(t, construct(t, "input", "cryo_server", "{ "+fields+" }"))
	withShutdownDelay(t, -time.Second)
	require.NoError(t, construct(t, "input", "cryo_server", "{ address: ':0', tokens: [ "+token+" ] }"), "no period exceeds it")
}

func TestDrainPeriodInAProgramThatDoesNotDrainIsLogged(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(with(listenInput, "drain_period: 10s"), toProbe)
		e.log.want(t, "WARN Field drain_period has no effect", "drain_period=10s")
	})
}
