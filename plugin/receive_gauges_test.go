package plugin

import (
	"strings"
	"testing"
	"testing/synctest"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// Each way in which messages and streams of an input end, with how many of each there were
// before. The gauges must return to zero.
func TestGaugesOfAnInputReturnToZero(t *testing.T) {
	const conf = "max_in_flight: 4, max_batch_count: 1, " + byWords
	for name, c := range map[string]struct {
		content  string // of a stream that does not end
		messages int64  // unacknowledged then
		end      func(t *testing.T, e *engine, in *pipeline, client *cryo.Session)
	}{
		"a hard stop": {"a b\n", 2, func(_ *testing.T, _ *engine, in *pipeline, _ *cryo.Session) { in.kill() }},
		"a hard stop between two batches of a scanner": {"a b c\nd e\n", 3, func(_ *testing.T, _ *engine, in *pipeline, _ *cryo.Session) { in.kill() }},
		"a hard stop in the middle of a batch":         {"a b c d\n", 3, func(_ *testing.T, _ *engine, in *pipeline, _ *cryo.Session) { in.kill() }},
		"a graceful stop with failures": {"a b\n", 2, func(_ *testing.T, _ *engine, in *pipeline, _ *cryo.Session) {
			in.stopWhile(func(a *arrival) { a.fail(errOutput) })
		}},
		"the end of the session": {"a b\n", 2, func(t *testing.T, e *engine, _ *pipeline, client *cryo.Session) {
			end(client)
			e.wantMetrics("the messages are in the pipeline all the same", map[string]int64{"cryo_messages_unacknowledged": 2, "cryo_streams_open": 0})
			e.deliverNext(2)
		}},
		"the loss of the connection while the scanner waits": {"a b c d\n", 3, func(t *testing.T, e *engine, _ *pipeline, _ *cryo.Session) {
			e.net.cut()
			e.deliverNext(4)
		}},
		"a hand-over": {"a b\n", 2, func(t *testing.T, e *engine, in *pipeline, client *cryo.Session) {
			sent := send(client, "message")
			synctest.Wait()
			in.kill()
			for len(e.probe.arrivals) > 0 {
				<-e.probe.arrivals
			}
			e.run(with(listenInput, conf), toProbe)
			e.wantMetrics("the stream is cancelled, the message is in flight again", map[string]int64{"cryo_messages_unacknowledged": 1, "cryo_streams_open": 0})
			e.deliverNext(1)
			sent.wantAcked(t, "delivered")
		}},
	} {
		t.Run(strings.ReplaceAll(name, " ", "_"), func(t *testing.T) {
			inEngine(t, func(t *testing.T, e *engine) {
				e.scanWords()
				e.run(fromOnce, listenOutput) // has the listener
				in := e.run(with(listenInput, conf), toProbe)
				client := e.dial()
				write(t, open(t, client, "open"), c.content)
				e.wantMetrics("before", map[string]int64{"cryo_messages_unacknowledged": c.messages, "cryo_streams_open": 1})
				c.end(t, e, in, client)
				e.wantMetrics("after", map[string]int64{"cryo_messages_unacknowledged": 0, "cryo_streams_open": 0})
			})
		})
	}
}
