package plugin

import (
	"context"
	"net/http"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

// A stop waits for the acknowledgements that a server owes, until the sends are cancelled.
func TestCancelledSendsFailAndLetTheStopFinish(t *testing.T) {
	for name, fields := range map[string]string{"messages": "", "streams": "message_type: stream", "batches": "batching: { count: 2, period: 1s }"} {
		t.Run(name, func(t *testing.T) {
			inEngine(t, func(t *testing.T, e *engine) {
				server := e.serve()
				p := e.run(fromOnce, with(dialOutput, fields))
				server.session() // acknowledges nothing
				f := e.produce("m")
				time.Sleep(2 * time.Second)
				begin := time.Now()
				stopped := sendAny(func() error { p.stop(); return nil })
				time.Sleep(5 * time.Second)
				stopped.wantPending(t, "the server may still acknowledge")
				CancelSends(e.feeds)
				require.ErrorContains(t, next(t, f.verdict), errStopping.Error())
				stopped.wantAcked(t, "stopped")
				require.Equal(t, 5*time.Second, time.Since(begin))
			})
		})
	}
}

func TestCancelledSendsWaitForNoConnection(t *testing.T) {
	for name, send := range map[string]func(e *engine, cut func()) *produced{
		"lost in flight": func(e *engine, cut func()) *produced {
			f := e.produce("m")
			synctest.Wait()
			cut()
			return f
		},
		"sent without a connection": func(e *engine, cut func()) *produced {
			cut()
			return e.produce("m")
		},
	} {
		t.Run(name, func(t *testing.T) {
			inEngine(t, func(t *testing.T, e *engine) {
				server := e.serveDenying(0, http.StatusUnauthorized, "Invalid token")
				p := e.run(fromOnce, with(dialOutput, "ack_timeout: 1h"))
				server.session()
				f := send(e, func() {
					server.deny(1000)
					e.net.cut()
					synctest.Wait()
				})
				time.Sleep(45 * time.Second) // the next attempt is due in 15 s
				stopped := sendAny(func() error { p.stop(); return nil })
				stopped.wantPending(t, "the server may still return")
				begin := time.Now()
				CancelSends(e.feeds)
				require.ErrorIs(t, next(t, f.verdict), errStopping)
				stopped.wantAcked(t, "stopped")
				require.Zero(t, time.Since(begin))
			})
		})
	}
}

func TestNothingIsSentOnceSendsAreCancelled(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		server := e.serve()
		e.run(fromOnce, dialOutput)
		s := server.session()
		e.wantSends(t, s, "before")
		CancelSends(e.feeds)
		require.ErrorIs(t, next(t, e.produce("m").verdict), errStopping)
		wantNothing(t, s)
	})
}

// A buffer, for example, repeats at once what fails.
func TestCancelledSendsThatAreRepeatedFailSlowly(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		out, _, _ := e.connectedOutput("")
		out.sends.cancel(errStopping)
		begin := time.Now()
		fail := func(ctx context.Context) { require.ErrorIs(t, out.WriteBatch(ctx, batchOf("m")), errStopping) }
		for range immediateFailures {
			fail(t.Context())
		}
		require.Zero(t, time.Since(begin))
		for range 10 {
			fail(t.Context())
		}
		require.Equal(t, time.Second, time.Since(begin))
		ended, end := context.WithCancel(t.Context())
		end()
		fail(ended)
		require.Equal(t, time.Second, time.Since(begin), "a hard stop waits for nothing")
	})
}

// What outputs of the engine make of a cancelled send, as of each other failure.
func TestWrappedOutputsHandleACancelledSend(t *testing.T) {
	cancelled := func(t *testing.T, output string, check func(t *testing.T, e *engine, f *produced)) {
		t.Helper()
		inEngine(t, func(t *testing.T, e *engine) {
			server := e.serve()
			p := e.run(fromOnce, output)
			server.session() // acknowledges nothing
			f := e.produce("m")
			synctest.Wait()
			stopped := sendAny(func() error { return p.stream.StopWithin(20 * time.Second) })
			time.Sleep(5 * time.Second)
			CancelSends(e.feeds)
			check(t, e, f)
			stopped.wantAcked(t, "stopped")
		})
	}
	t.Run("drop_on drops it", func(t *testing.T) {
		cancelled(t, "drop_on: { error: true, output: { "+dialOutput+" } }", func(t *testing.T, _ *engine, f *produced) {
			f.wantDelivered(t, "as drop_on reports it")
		})
	})
	t.Run("drop_on passes it on", func(t *testing.T) {
		cancelled(t, "drop_on: { error: false, back_pressure: 1h, output: { "+dialOutput+" } }", func(t *testing.T, _ *engine, f *produced) {
			require.ErrorIs(t, next(t, f.verdict), errStopping)
		})
	})
	t.Run("fallback uses the next output", func(t *testing.T) {
		cancelled(t, "fallback: [ { "+dialOutput+" }, { "+toProbe+" } ]", func(t *testing.T, e *engine, f *produced) {
			e.want("m")[0].deliver()
			f.wantDelivered(t, "by the other")
		})
	})
	for name, output := range map[string]string{
		"retry":            "retry: { output: { " + dialOutput + " } }",
		"retry in drop_on": "drop_on: { error: true, output: { retry: { output: { " + dialOutput + " } } } }",
		"a broker":         "broker: { pattern: fan_out, outputs: [ { " + dialOutput + " }, { drop: {} } ] }",
	} {
		t.Run(name+" keeps it", func(t *testing.T) {
			cancelled(t, output, func(t *testing.T, e *engine, f *produced) {
				time.Sleep(10*time.Second - time.Nanosecond)
				f.wantPending(t, "until the hard stop")
				require.Less(t, e.log.count("Failed to send message to cryo"), 20)
			})
		})
	}
}
