package plugin

import (
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/cryotest"
)

func TestClientsCannotFloodTheLog(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(with(listenInput, "streams: { max_bytes: 1 }"), toProbe)
		client, peer := e.dial(), e.rawClient()
		peer.Read()
		flood := func() {
			for i := range uint32(100) {
				require.Error(t, client.SendStream(t.Context(), strings.NewReader("too long"), &cryo.StreamOptions{Name: "long"}))
				peer.WriteFrames(cryotest.Error(i, "fire"))
			}
			synctest.Wait()
		}
		for seconds := range 3 {
			flood()
			require.Equal(t, 1+seconds, e.log.count("Stream failed"))
			require.Equal(t, 1+seconds, e.log.count("reported an error"))
			require.Equal(t, 2*seconds, e.log.count("suppressed=99"))
			time.Sleep(time.Second)
		}
	})
}

func TestRejectionsDoNotFloodTheLog(t *testing.T) {
	for name, c := range map[string]struct{ fields, line string }{
		"acknowledged when delivered": {"auto_replay_nacks: false", "ERROR Rejected messages that were not delivered"},
		"acknowledged when received":  {"acknowledge: received, auto_replay_nacks: false", "ERROR Lost messages that were acknowledged on receipt"},
	} {
		t.Run(name, func(t *testing.T) {
			atBothInputs(t, c.fields, func(t *testing.T, e *engine, _ *pipeline, peer *cryo.Session) {
				for seconds := range 3 {
					for range 100 {
						send(peer, "poison")
						e.arrival().fail(errOutput)
						synctest.Wait()
					}
					require.Equal(t, 1+seconds, e.log.count(c.line))
					require.Equal(t, seconds, e.log.count("suppressed=99"))
					time.Sleep(time.Second)
				}
			})
		})
	}
}

func TestClosingLateClientsDoesNotFloodTheLog(t *testing.T) {
	toAll(t, "ack_timeout: 1s", 10, func(t *testing.T, e *engine, clients []*cryo.Session) {
		require.ErrorIs(t, next(t, e.produce("m").verdict), errLate)
		synctest.Wait()
		for _, c := range clients {
			require.Error(t, c.Err())
		}
		require.Equal(t, 1, e.log.count("WARN Closing session: "))

		e.dial()
		require.Error(t, next(t, e.produce("m").verdict))
		require.Equal(t, 2, e.log.count("WARN Closing session: "))
		e.log.want(t, "suppressed=9")
	})
}
