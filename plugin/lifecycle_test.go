package plugin

import (
	"context"
	"net"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
)

func TestGracefulStopDeliversAndAcknowledgesMessagesInThePipeline(t *testing.T) {
	atBothInputs(t, "", func(t *testing.T, e *engine, p *pipeline, peer *cryo.Session) {
		inFlight := send(peer, "in flight")
		a := e.arrival()
		stopped := sendAny(func() error { p.stop(); return nil })
		stopped.wantPending(t, "the pipeline finishes")
		late := send(peer, "late")
		e.wantNoArrival("nothing new is taken")

		time.Sleep(time.Minute)
		a.deliver()
		inFlight.wantAcked(t, "delivered, before the session is closed")
		stopped.wantAcked(t, "stopped")
		require.ErrorIs(t, late.result(t), net.ErrClosed)
		var closed *cryo.PeerClosedError
		require.ErrorAs(t, peer.Err(), &closed)
	})
}

func TestMessageThatFailsDuringAGracefulStopIsNeitherAcknowledgedNorRejected(t *testing.T) {
	for _, fields := range []string{"", "auto_replay_nacks: false"} {
		t.Run(fields, func(t *testing.T) {
			atBothInputs(t, fields, func(t *testing.T, e *engine, p *pipeline, peer *cryo.Session) {
				m := send(peer, "poison")
				a := e.arrival()
				stopped := sendAny(func() error { p.stop(); return nil })
				stopped.wantPending(t, "the pipeline finishes")
				a.fail(errOutput)
				require.ErrorIs(t, m.result(t), net.ErrClosed)
				stopped.wantAcked(t, "stopped")
			})
		})
	}
}

func TestHardStopAcknowledgesNothing(t *testing.T) {
	atBothInputs(t, "", func(t *testing.T, e *engine, p *pipeline, peer *cryo.Session) {
		first := send(peer, "first")
		e.arrival()
		second := send(peer, "second")
		e.arrival()
		p.kill()
		require.ErrorIs(t, first.result(t), net.ErrClosed)
		require.ErrorIs(t, second.result(t), net.ErrClosed)
	})
}

func TestMessageThatIsNotResentIsNotDelivered(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		p := e.run(listenInput, toProbe)
		once := send(e.dial(), "once")
		require.Equal(t, []string{"once"}, e.arrival().texts()) // and is not delivered
		p.kill()
		require.ErrorIs(t, once.result(t), net.ErrClosed)

		e.run(listenInput, toProbe)
		peer := e.dial()
		time.Sleep(time.Hour)
		e.wantNoArrival("its sender doesn't send it again")
		again := send(peer, "again")
		a := e.arrival()
		require.Equal(t, []string{"again"}, a.texts())
		a.deliver()
		again.wantAcked(t, "delivered")
	})
}

func TestLostConnectionIsRedialledWithTheSameSessionID(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		server := e.serve()
		e.run(dialInput, toProbe)
		id := server.session().ID()
		for range 3 {
			time.Sleep(time.Second) // there is one such line a second
			e.net.cut()
			require.Equal(t, id, server.session().ID())
		}
		synctest.Wait()
		require.Equal(t, 1, e.log.count("INFO Connected", "url=ws://"+somewhere, "session="))
		require.Equal(t, 3, e.log.count("WARN Disconnected", "url=ws://"+somewhere, "error=session ended: connection lost"))
		require.Equal(t, 3, e.log.count("INFO Reconnected", "url=ws://"+somewhere, "session="))
	})
}

func TestLossesOfSessionsAreLoggedOnceASecond(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		const n = 50
		server := e.serve()
		e.run(fromOnce, dialOutput)
		begin := time.Now()
		for range n {
			f := e.produce("acknowledged, so that the waits do not grow")
			require.NoError(t, receive(t, server.session()).Ack())
			f.wantDelivered(t, "acknowledged")
			e.net.cut()
			synctest.Wait()
		}
		e.produce("last")
		server.session()
		synctest.Wait()
		seconds := int(time.Since(begin) / time.Second)
		require.Less(t, seconds, n/2)
		lost, back := e.log.count("WARN Disconnected", "suppressed="), e.log.count("INFO Reconnected")
		require.LessOrEqual(t, lost, seconds+1)
		require.Greater(t, lost, seconds/3)
		require.Equal(t, lost, back, "the last line is that of the session")
	})
}

func TestServerThatSendsByeIsRedialled(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		server := e.serve()
		e.run(dialInput, toProbe)
		s := server.session()
		require.NoError(t, s.Close(t.Context(), "restarting"))
		require.Equal(t, s.ID(), server.session().ID())
		e.log.want(t, "INFO Disconnected", "url=ws://"+somewhere, `error=session ended: closed by the peer: "restarting"`)
	})
}

func TestIdleOutputLogsALostConnectionImmediately(t *testing.T) {
	for name, c := range map[string]struct {
		end        func(e *engine, peer *cryo.Session)
		line, text string
	}{
		"cut":    {func(e *engine, _ *cryo.Session) { e.net.cut() }, "WARN Disconnected", "error=session ended: connection lost"},
		"closed": {func(_ *engine, peer *cryo.Session) { _ = peer.Close(context.Background(), "restarting") }, "INFO Disconnected", "error=session ended: closed by the peer"},
	} {
		t.Run(name, func(t *testing.T) {
			inEngine(t, func(t *testing.T, e *engine) {
				server := e.serve()
				e.run(fromFeed, dialOutput)
				c.end(e, server.session())
				synctest.Wait()
				e.log.want(t, c.line, c.text)
				time.Sleep(time.Hour)
				require.Empty(t, server.sessions, "it has nothing to write")

				f := e.produce("m")
				require.NoError(t, receiveTexts(t, server.session(), "m")[0].Ack())
				f.wantDelivered(t, "on the next connection")
				require.Equal(t, 1, e.log.count("Disconnected"))
			})
		})
	}
}

func TestGracefulStopLogsTheClosedSession(t *testing.T) {
	for name, ends := range dialling {
		t.Run(name, func(t *testing.T) {
			inEngine(t, func(t *testing.T, e *engine) {
				server := e.serve()
				p := e.run(ends[0], ends[1])
				server.session()
				p.stop()
				require.Equal(t, 1, e.log.count("INFO Session closed", "url=ws://"+somewhere))
				require.Zero(t, e.log.count("Disconnected"))
			})
		})
	}
}

// dialling are the pipelines of the components that dial.
var dialling = map[string][2]string{"input": {dialInput, toProbe}, "output": {fromFeed, dialOutput}}

// atBothDialling runs a test with each component that dials, and a server that denies it n times.
func atBothDialling(t *testing.T, n, status int, message string, test func(t *testing.T, e *engine, server *denyingServer)) {
	t.Helper()
	for name, ends := range dialling {
		t.Run(name, func(t *testing.T) {
			inEngine(t, func(t *testing.T, e *engine) {
				server := e.serveDenying(n, status, message)
				p := e.run(ends[0], ends[1])
				test(t, e, server)
				p.stop()
			})
		})
	}
}

func TestDialIsRetriedEverySecondWhileTheLostSessionExists(t *testing.T) {
	atBothDialling(t, 4, http.StatusUnauthorized, "Session already exists", func(t *testing.T, e *engine, server *denyingServer) {
		server.session()
		second := time.Second
		require.Equal(t, []time.Duration{second, second, second, second}, server.waits())
		require.Len(t, server.ids, 1, "always the same id")
		require.Equal(t, 4, e.log.count("the server responded to the upgrade with 401 Unauthorized: Session already exists (if that is the previous connection of this component, the server removes it within seconds)"))
	})
}

func TestRejectedTokenIsRetriedEveryHalfMinute(t *testing.T) {
	atBothDialling(t, 4, http.StatusUnauthorized, "Invalid token", func(t *testing.T, e *engine, server *denyingServer) {
		server.session()
		half := 30 * time.Second
		require.Equal(t, []time.Duration{half, half, half, half}, server.waits())
		require.Equal(t, 4, e.log.count("the server responded to the upgrade with 401 Unauthorized: Invalid token (check the field token; retrying in 30s)"))
	})
}

func TestRetryAfterSetsTheTimeOfTheNextAttempt(t *testing.T) {
	for name, ends := range dialling {
		t.Run(name, func(t *testing.T) {
			inEngine(t, func(t *testing.T, e *engine) {
				server := e.serveDenying(2, http.StatusServiceUnavailable, "Restarting")
				server.retryAfter = "20"
				e.run(ends[0], ends[1])
				server.session()
				require.Len(t, server.waits(), 2)
				for _, wait := range server.waits() {
					require.GreaterOrEqual(t, wait, 20*time.Second)
					require.Less(t, wait, 25*time.Second, "up to a quarter more")
				}
			})
		})
	}
}

// The server sends nothing, and neither end closes the connection.
func TestUnresponsiveServerIsRedialled(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		server := e.serve()
		p := e.run(with(dialInput, "heartbeat_interval: 10s"), toProbe)
		id := server.session().ID()
		time.Sleep(time.Hour)
		require.Empty(t, server.sessions, "nobody sends, but WebSocket pings are answered")
		e.net.freeze()
		begin := time.Now()
		require.Equal(t, id, server.session().ID())
		require.LessOrEqual(t, time.Since(begin), 3*10*time.Second+time.Second)
		e.log.want(t, "peer timeout after 20s")
		p.stop()
	})
}

// growing are the waits between tries that nobody answers well.
var growing = []time.Duration{250 * time.Millisecond, 500 * time.Millisecond, time.Second, 2 * time.Second, 4 * time.Second, 8 * time.Second, 10 * time.Second, 10 * time.Second}

// wantGrowing wants waits as long as the first of those, or up to a quarter shorter.
func wantGrowing(t *testing.T, waits []time.Duration, n int) {
	t.Helper()
	require.Len(t, waits, n)
	for i, wait := range waits {
		require.LessOrEqual(t, wait, growing[i], "wait %d", i)
		require.Greater(t, wait, growing[i]*3/4, "wait %d", i)
	}
}

func TestRetriesOfAnUnreachableServerBackOff(t *testing.T) {
	atBothDialling(t, len(growing), http.StatusServiceUnavailable, "No room", func(t *testing.T, e *engine, server *denyingServer) {
		s := server.session()
		wantGrowing(t, server.waits(), len(growing))
		require.Len(t, server.ids, 1, "always the same id")

		time.Sleep(2 * time.Second) // a session that lasts lets it begin again
		server.deny(3)
		require.NoError(t, s.Close(t.Context(), "restarting"))
		e.produce("m") // an output notices now
		s = server.session()
		acknowledgeAll(s)
		waits := server.waits()[len(growing)+1:]
		require.Len(t, waits, 3)
		require.LessOrEqual(t, waits[2], growing[2])
	})
}

func TestRetriesOfAServerThatDisconnectsImmediatelyBackOff(t *testing.T) {
	for name, ends := range dialling {
		t.Run(name, func(t *testing.T) {
			inEngine(t, func(t *testing.T, e *engine) {
				server := e.serve()
				p := e.run(ends[0], ends[1])
				if name == "output" {
					e.produce("m") // or it would not notice
				}
				var times []time.Time
				for range len(growing) + 1 {
					s := server.session()
					times = append(times, time.Now())
					require.NoError(t, s.Close(t.Context(), "go away"))
				}
				for i, least := range growing {
					require.Greater(t, times[i+1].Sub(times[i]), least*3/4, "wait %d", i)
				}
				server.session()
				p.kill()
			})
		})
	}
}

func TestDialTimesOut(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		_, err := e.net.Listen("tcp", somewhere) // which never accepts
		require.NoError(t, err)
		p := e.run(with(dialInput, "connect_timeout: 3s"), toProbe)
		time.Sleep(3 * time.Second)
		synctest.Wait()
		e.log.want(t, "Failed to connect to cryo: dialling ws://"+somewhere+": timed out after 3s")
		p.stop() // also while dialling
	})
}

func TestInputStopsWithoutWaitingForTheNextAttempt(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		server := e.serveDenying(4, http.StatusUnauthorized, "Invalid token")
		p := e.run(dialInput, toProbe)
		e.log.want(t, "retrying in 30s")
		begin := time.Now()
		p.stop()
		require.Zero(t, time.Since(begin))
		require.Len(t, server.times, 1)
	})
}

func TestHealthyPipelineLogsNoWarnings(t *testing.T) {
	atBothInputs(t, "", func(t *testing.T, e *engine, p *pipeline, peer *cryo.Session) {
		e.wantReceives(t, peer, "delivered")
		p.stop()
		for _, line := range e.log.all() {
			require.False(t, strings.HasPrefix(line, "WARN") || strings.HasPrefix(line, "ERROR"), line)
		}
	})
}
