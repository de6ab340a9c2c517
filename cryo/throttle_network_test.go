package cryo_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/cryotest"
	"github.com/cryo-connect/cryo-connect/internal/wire"
)

// Whatever a session sends, the server processes no more of it than its rate allows while another
// one sends and receives.
func TestFloodOfOneSessionIsBoundedByItsRate(t *testing.T) {
	const rate, bytesRate = 10, 100_000
	server, sessions := newLimitedServer(t, cryo.SessionOptions{MaxMessagesPerSecond: rate, MaxBytesPerSecond: bytesRate})
	server.Start()
	target := strings.Replace(server.URL, "http", "ws", 1)
	// Each is counted by a frame of an unknown type behind it; only those are.
	floods := map[string]func(t *testing.T, peer *cryotest.Peer) []byte{
		"unknown frames":   func(*testing.T, *cryotest.Peer) []byte { return nil },
		"pings":            func(t *testing.T, peer *cryotest.Peer) []byte { return bytesOf(t, peer, cryotest.Ping(1)) },
		"WebSocket pings":  func(*testing.T, *cryotest.Peer) []byte { return raw(end{}, 0x89, nil) },
		"WebSocket pongs":  func(*testing.T, *cryotest.Peer) []byte { return raw(end{}, 0x8A, nil) },
		"acknowledgements": func(t *testing.T, peer *cryotest.Peer) []byte { return bytesOf(t, peer, cryotest.Acked(1)) },
		"chunks":           func(t *testing.T, peer *cryotest.Peer) []byte { return bytesOf(t, peer, txChunk(7, 0, "")) },
		"ends of streams": func(t *testing.T, peer *cryotest.Peer) []byte {
			return bytesOf(t, peer, wire.Frame{Type: wire.TxFinish, Tx: 7, Ack: 1})
		},
		"fragments": func(t *testing.T, peer *cryotest.Peer) []byte { // of a ping
			b := append(raw(end{}, 0x02, encoded(t, peer, cryotest.Ping(1))), bytes.Repeat(raw(end{}, 0x00, nil), 10)...)
			return append(b, raw(end{}, 0x80, nil)...)
		},
	}
	id := uint64(100)
	for name, of := range floods {
		t.Run(name, func(t *testing.T) {
			begin := time.Now()
			id++
			peer := cryotest.DialPeer(t, websocket.DefaultDialer, target, token, id)
			peer.WS.SetPingHandler(func(string) error { return nil }) // a pong would be in the middle of a frame
			peer.ClientHandshake()
			hostile := next(t, sessions)
			unknown := raw(end{}, 0x82, append(binary.BigEndian.AppendUint64(nil, peer.SID), 77))
			flood := bytes.Repeat(append(of(t, peer), unknown...), 1000)
			flooding := start(func() error {
				for {
					if _, err := peer.WS.NetConn().Write(flood); err != nil {
						return err
					}
				}
			})
			other, err := cryo.Dial(t.Context(), target, &cryo.DialOptions{Token: token, SessionID: 1})
			require.NoError(t, err)
			s := next(t, sessions)
			for i := 0; i < 100 || !hostile.Stats().Throttled; i++ {
				send := start(func() error { return s.SendText(t.Context(), fmt.Sprint(i)) })
				require.NoError(t, receive(t, other).Ack())
				send.wantSuccess(t)
			}
			ignored := hostile.Stats().IgnoredFrames
			cost := map[string]float64{"unknown frames": 1, "fragments": 12}[name]
			if cost == 0 {
				cost = 2 // the frame, and the one that counts it
			}
			require.LessOrEqual(t, float64(ignored)*cost, 100+100*time.Since(begin).Seconds())
			require.NotZero(t, ignored)
			require.NoError(t, hostile.Err())
			cut(other)
			cut(hostile)
			require.Error(t, flooding.result(t))
		})
	}
}
