package plugin

import (
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
)

const stallLine = "WARN Pipeline stalled"

func TestABatchThatCanNeverFillIsReportedInOneLine(t *testing.T) {
	for name, c := range map[string]struct {
		fields, policy string
		size           int
	}{
		"count above max_in_flight":        {"max_in_flight: 10", "count: 11", 10},
		"byte_size above max_buffer_bytes": {"max_buffer_bytes: 10000", "byte_size: 20000", 1000},
	} {
		t.Run(name, func(t *testing.T) {
			atBothInputsTo(t, c.fields, "probe: { batching: { "+c.policy+" } }", func(t *testing.T, e *engine, peer *cryo.Session) {
				for i := range 30 {
					_ = send(peer, fmt.Sprintf("%0*d", c.size, i))
				}
				time.Sleep(stallTimeout - time.Second)
				e.wantNoArrival("no batch is full")
				require.Zero(t, e.log.count(stallLine))
				time.Sleep(time.Hour)
				require.Equal(t, 1, e.log.count(stallLine), "once: %s", strings.Join(e.log.all(), "\n"))
				e.log.want(t, "lower its count or byte_size, or set a period")
			})
		})
	}
}

func TestAnOutputThatHangsIsReportedInOneLine(t *testing.T) {
	atBothInputsTo(t, "max_in_flight: 10", toProbe, func(t *testing.T, e *engine, peer *cryo.Session) {
		for i := range 30 {
			_ = send(peer, fmt.Sprint(i))
		}
		time.Sleep(stallTimeout - time.Second)
		require.Zero(t, e.log.count(stallLine))
		time.Sleep(time.Hour)
		fields := []string{"in_flight=10", "idle=10s", "max_in_flight=10"}
		if strings.HasSuffix(t.Name(), "cryo_server") {
			fields = []string{"in_flight=8", "idle=10s", "max_in_flight=10", "client_quota=8"}
		}
		require.Equal(t, 1, e.log.count(append(fields, stallLine)...))
		require.Equal(t, 1, e.log.count(stallLine))
	})
}

// The engine asks for no more messages then.
func TestAnOutputThatHangsWithOneMessageIsReportedOnceReadingPauses(t *testing.T) {
	atBothInputsTo(t, "max_buffer_bytes: 10000, max_batch_count: 1", "serial: {}", func(t *testing.T, e *engine, peer *cryo.Session) {
		one := send(peer, "one")
		hangs := e.arrival()
		time.Sleep(time.Hour)
		require.Zero(t, e.log.count(stallLine), "there is room for more")
		for i := range 30 {
			_ = send(peer, fmt.Sprintf("%01000d", i))
		}
		time.Sleep(2 * stallTimeout)
		require.Equal(t, 1, e.log.count(stallLine), strings.Join(e.log.all(), "\n"))
		hangs.deliver()
		one.wantAcked(t, "delivered after all")
	})
}

func TestAnOutputThatIsVerySlowIsReportedOnceUntilThereIsRoom(t *testing.T) {
	atBothInputsTo(t, "max_buffer_bytes: 10000, max_batch_count: 1", "serial: {}", func(t *testing.T, e *engine, peer *cryo.Session) {
		time.Sleep(stallTimeout / 20) // between two looks: at a delivery there is room for a moment
		for range 2 {
			var all []*sending
			for i := range 30 {
				all = append(all, send(peer, fmt.Sprintf("%01000d", i)))
			}
			before := e.log.count(stallLine)
			for range 15 {
				time.Sleep(4 * stallTimeout)
				e.arrival().deliver()
			}
			require.Equal(t, before+1, e.log.count(stallLine), strings.Join(e.log.all(), "\n"))
			for range 15 {
				e.arrival().deliver()
			}
			for _, one := range all {
				one.wantAcked(t, "delivered in the end")
			}
			time.Sleep(time.Minute) // of room
		}
	})
}

func TestABatchThatFillsByItsPeriodIsNotReported(t *testing.T) {
	atBothInputsTo(t, "max_in_flight: 10", "probe: { batching: { count: 11, period: 5s } }", func(t *testing.T, e *engine, peer *cryo.Session) {
		for i := range 30 {
			_ = send(peer, fmt.Sprint(i))
		}
		for settled := 0; settled < 30; {
			a := e.arrival()
			settled += len(a.batch)
			a.deliver()
		}
		time.Sleep(time.Hour) // of nothing to do
		synctest.Wait()
		require.Zero(t, e.log.count(stallLine))
	})
}

// atBothInputsTo is atBothInputs with another output.
func atBothInputsTo(t *testing.T, fields, output string, test func(t *testing.T, e *engine, peer *cryo.Session)) {
	t.Helper()
	t.Run("cryo", func(t *testing.T) {
		inEngine(t, func(t *testing.T, e *engine) {
			server := e.serve()
			e.run(with(dialInput, fields), output)
			test(t, e, server.session())
		})
	})
	t.Run("cryo_server", func(t *testing.T) {
		inEngine(t, func(t *testing.T, e *engine) {
			e.run(with(listenInput, fields), output)
			test(t, e, e.dial())
		})
	})
}
