package plugin

import (
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// The gauges of the sending half count what is unacknowledged, and nothing when that has
// ended, however it ends.

var (
	nothingSent = map[string]int64{"cryo_messages_unacknowledged": 0, "cryo_streams_open": 0}
	twoMessages = map[string]int64{"cryo_messages_unacknowledged": 2, "cryo_streams_open": 0}
	oneStream   = map[string]int64{"cryo_messages_unacknowledged": 0, "cryo_streams_open": 1}
)

const streamsByName = `message_type: '${! if content().has_prefix("s") { "stream" } else { "utf8" } }'`

func TestGaugesOfAnOutputReturnToZeroHoweverAMessageEnds(t *testing.T) {
	for name, end := range map[string]func(t *testing.T, m []*cryo.Message){
		"acknowledged": func(t *testing.T, m []*cryo.Message) { require.NoError(t, cryo.AckBatch(m)) },
		"rejected": func(t *testing.T, m []*cryo.Message) {
			require.NoError(t, m[0].Reject("no"))
			require.NoError(t, m[1].Reject("no"))
		},
		"late":       func(*testing.T, []*cryo.Message) { time.Sleep(10 * time.Second) },
		"half of it": func(t *testing.T, m []*cryo.Message) { require.NoError(t, m[0].Ack()); time.Sleep(10 * time.Second) },
	} {
		t.Run(name, func(t *testing.T) {
			atBothOutputs(t, "ack_timeout: 10s", func(t *testing.T, e *engine, peer *cryo.Session) {
				f := e.give("m0", "m1")
				m := receiveTexts(t, peer, "m0", "m1")
				e.wantMetrics("sent", twoMessages)
				end(t, m)
				next(t, f.verdict)
				e.wantMetrics(name, nothingSent)
			})
		})
	}
}

func TestGaugesOfAnOutputReturnToZeroHoweverAStreamEnds(t *testing.T) {
	for name, end := range map[string]func(t *testing.T, peer *cryo.Session, st *cryo.IncomingStream){
		"cancelled": func(t *testing.T, _ *cryo.Session, st *cryo.IncomingStream) { require.NoError(t, st.Close()) },
		"late":      func(*testing.T, *cryo.Session, *cryo.IncomingStream) { time.Sleep(10 * time.Second) },
		"session closed": func(t *testing.T, peer *cryo.Session, _ *cryo.IncomingStream) {
			require.NoError(t, peer.Close(t.Context(), ""))
		},
	} {
		t.Run(name, func(t *testing.T) {
			atBothOutputs(t, asStream+", ack_timeout: 10s", func(t *testing.T, e *engine, peer *cryo.Session) {
				f := e.give("s")
				st := acceptStream(t, peer)
				e.wantMetrics("sent", oneStream)
				end(t, peer, st)
				require.Error(t, next(t, f.verdict))
				e.wantMetrics(name, nothingSent)
			})
		})
	}
}

func TestGaugesOfAnOutputReturnToZeroWhenItsSessionIsLost(t *testing.T) {
	outputs := map[string]string{
		"cryo":                      dialOutput,
		"cryo_server":               listenOutput,
		"cryo_server, send_to: any": with(listenOutput, toAny),
	}
	for name, output := range outputs {
		t.Run(name, func(t *testing.T) {
			inEngine(t, func(t *testing.T, e *engine) {
				var server *server
				if name == "cryo" {
					server = e.serve()
				}
				e.run(fromOnce, with(output, streamsByName+", ack_timeout: 10s"))
				for _, content := range []string{"m", "s"} {
					peer := e.peerOf(server)
					f := e.give(content)
					if content == "s" {
						acceptStream(t, peer)
						e.wantMetrics("sent", oneStream)
					} else {
						receive(t, peer)
						e.wantMetrics("sent", map[string]int64{"cryo_messages_unacknowledged": 1})
					}
					if server != nil {
						server.shutdown()
					} else {
						require.NoError(t, peer.CloseNow())
					}
					e.wantMetrics("lost", nothingSent)
					require.Error(t, next(t, f.verdict))
					e.wantMetrics("failed", nothingSent)
					if server != nil {
						server = e.serve()
					}
				}
			})
		})
	}
}

// peerOf returns the other end of an output's session: with a server, or its own next client.
func (e *engine) peerOf(s *server) *cryo.Session {
	if s == nil {
		return e.dial()
	}
	return s.session()
}

func TestGaugesOfABroadcastReturnToZeroWhenASessionIsLate(t *testing.T) {
	toAll(t, streamsByName+", ack_timeout: 10s", 2, func(t *testing.T, e *engine, clients []*cryo.Session) {
		f := e.give("m")
		require.NoError(t, receiveTexts(t, clients[0], "m")[0].Ack())
		receiveTexts(t, clients[1], "m")
		e.wantMetrics("sent to two", twoMessages)
		f.wantDelivered(t, "to one")
		e.wantMetrics("one was late", nothingSent)

		clients[1] = e.dial()
		f = e.give("s")
		st, _ := readStream(t, clients[0])
		acceptStream(t, clients[1])
		e.wantMetrics("sent to two", map[string]int64{"cryo_streams_open": 2})
		require.NoError(t, st.Ack())
		f.wantDelivered(t, "to one")
		e.wantMetrics("one was late", nothingSent)
	})
}

func TestGaugesOfAnOutputReturnToZeroAtAHardStop(t *testing.T) {
	for name, output := range map[string]string{
		"cryo":                      dialOutput,
		"cryo_server":               listenOutput,
		"cryo_server, send_to: any": with(listenOutput, toAny),
	} {
		t.Run(name, func(t *testing.T) {
			inEngine(t, func(t *testing.T, e *engine) {
				var server *server
				if name == "cryo" {
					server = e.serve()
				}
				p := e.run(fromOnce, with(output, streamsByName))
				peer := e.peerOf(server)
				e.give("m0", "m1", "s"+strings.Repeat("x", 1<<20))
				m := receive(t, peer)
				if name == "cryo_server, send_to: any" { // the stream does not wait for the messages
					receive(t, peer)
				} else {
					require.NoError(t, m.Ack())
					require.NoError(t, receive(t, peer).Ack())
				}
				acceptStream(t, peer)
				e.wantMetrics("sending", map[string]int64{"cryo_streams_open": 1})
				p.kill()
				e.wantMetrics("stopped", nothingSent)
			})
		})
	}
}
