package plugin

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
)

var errPoison = errors.New("never that one")

// refusePoison delivers what arrives until nothing more does, but for messages that
// begin with "poison", and gives the texts of those that it delivered.
func (e *engine) refusePoison(during time.Duration) (delivered []string) {
	e.t.Helper()
	enough := time.After(during)
	for {
		select {
		case a := <-e.probe.arrivals:
			if text := a.texts()[0]; text[:6] == "poison" {
				a.fail(errPoison)
			} else {
				delivered = append(delivered, text)
				a.deliver()
			}
		case <-enough:
			return delivered
		}
	}
}

func TestOneClientsPoisonLeavesRoomForOthers(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(with(listenInput, "max_in_flight: 16, max_batch_count: 1"), toProbe)
		bad := e.visit(t, 1)
		for i := range 100 {
			send(bad, fmt.Sprint("poison ", i))
		}
		require.Empty(t, e.refusePoison(10*time.Second))
		good := send(e.visit(t, 2), "of another")
		require.Equal(t, []string{"of another"}, e.refusePoison(time.Second))
		good.wantAcked(t, "delivered")

		// It has left, and what failed of it is tried on; it comes back, and brings
		// more: it has the same share of the room.
		end(bad)
		bad = e.visit(t, 1)
		for i := range 100 {
			send(bad, fmt.Sprint("poison again ", i))
		}
		require.Empty(t, e.refusePoison(10*time.Second))
		good = send(e.visit(t, 3), "of a third")
		require.Equal(t, []string{"of a third"}, e.refusePoison(time.Second))
		good.wantAcked(t, "delivered")
	})
}

func TestAClientThatTakesNoAnswersLeavesRoomForOthers(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(with(listenInput, "max_in_flight: 16"), answering)
		deaf := e.dial()
		for i := range 100 {
			send(deaf, fmt.Sprint(i))
		}
		synctest.Wait()
		begin := time.Now()
		other := e.dial()
		for range 100 {
			m := send(other, "hello")
			require.NoError(t, receiveTexts(t, other, "hello")[0].Ack())
			m.wantAcked(t, "with its answer")
		}
		require.Zero(t, time.Since(begin))
	})
}

func TestAClientsStreamsHaveNoMoreThanItsShare(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(with(listenInput, "max_in_flight: 4, max_batch_count: 1, streams: { scanner: { lines: {} } }"), toProbe)
		client := e.dial()
		sending := sendAny(func() error {
			return client.SendStream(t.Context(), strings.NewReader("1\n2\n3\n4\n5\n"), nil)
		})
		arrivals := e.arrivalsOf("1", "2", "3")
		e.wantNoArrival("one place is for others")
		for _, a := range arrivals {
			a.deliver()
		}
		for range 2 {
			e.arrival().deliver()
		}
		sending.wantAcked(t, "all of it")
	})
}

// Neither kind knows what the other is about to take.
func TestAClientsMessagesAndStreamsHaveOneShare(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(with(listenInput, "max_in_flight: 4, max_batch_count: 1, streams: { scanner: { lines: {} } }"), toProbe)
		client := e.dial()
		sending := sendAny(func() error {
			return client.SendStream(t.Context(), strings.NewReader("1\n2\n3\n"), nil)
		})
		arrivals := e.arrivalsOf("1", "2", "3")
		message := send(client, "4")
		e.wantNoArrival("one place is for others")
		other := send(e.dial(), "of another")
		e.arrivalsOf("of another")["of another"].deliver()
		other.wantAcked(t, "delivered")
		for _, a := range arrivals {
			a.deliver()
		}
		sending.wantAcked(t, "all of it")
		e.arrivalsOf("4")["4"].deliver()
		message.wantAcked(t, "delivered")
	})
}

// Each message that waits keeps what there is of its session.
func TestAStalledPipelineKeepsOnlySoManySessionsThatHaveLeft(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(with(listenInput, "max_in_flight: 1, max_sessions: 3"), toProbe)
		for id := range uint64(6) { // as many as may be connected, and have left
			visitor := e.visit(t, 1+id)
			send(visitor, fmt.Sprint(id))
			synctest.Wait()
			end(visitor)
			synctest.Wait()
		}
		_, err := e.tryDial(cryo.DialOptions{Token: token})
		require.ErrorContains(t, err, "503 Service Unavailable: Overloaded: closed sessions are still draining.")
		for range 6 {
			e.arrival().deliver()
		}
		e.dial()
	})
}
