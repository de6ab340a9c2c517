package cryo_test

import (
	"context"
	"encoding/binary"
	"encoding/hex"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/cryotest"
	"github.com/cryo-connect/cryo-connect/internal/wire"
)

// misbehaviour is a fault of a peer after its handshake, and its effect on the session: a row of
// "Peers with a session" in docs/development/fault-matrix.md.
type misbehaviour struct {
	does string
	how  func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer)
	// problem is how the session ends: with this close code, and as a
	// ProtocolError. Empty: it goes on, and serves the peer at once.
	problem string
	code    int // default 4001
	// lost: it ends with its connection.
	lost bool
}

const misbehaviourBound = 90_000

func TestMisbehaviour(t *testing.T) {
	opts := quiet
	opts.MaxBufferBytes = misbehaviourBound
	opts.StreamIdleTimeout = time.Minute
	page, err := os.ReadFile("../docs/development/fault-matrix.md")
	require.NoError(t, err)
	for _, m := range slices.Concat(malformedFrames(t), brokenWebSocket(), floods(), strangeNumbers(), strangeStreams()) {
		t.Run(m.does, func(t *testing.T) {
			if !strings.HasPrefix(m.does, "sends the malformed vector") {
				require.Contains(t, string(page), "`"+m.does+"`", "the page describes the effect")
			}
			t.Run("dialled", func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					before := heap()
					s, peer := dialled(t, cryo.DialOptions{SessionOptions: opts})
					m.play(t, end{"dialled", true, peer.First + 1}, s, peer)
					// Another session of the process.
					other, otherPeer := dialled(t, cryo.DialOptions{SessionOptions: opts})
					serving(t, other, otherPeer)
					m.leave(t, s, peer, before)
				})
			})
			t.Run("accepted", func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					_, l, sessions := serve(t, cryo.ServerOptions{SessionOptions: opts})
					good := join(t, l, 1)
					good.ClientHandshake()
					goodSession := next(t, sessions)
					before := heap()
					peer := join(t, l, sid)
					peer.ClientHandshake()
					s := next(t, sessions)
					m.play(t, end{"accepted", false, peer.First + 1}, s, peer)
					begin := time.Now()
					serving(t, goodSession, good)
					newcomer := join(t, l, 2)
					newcomer.ClientHandshake()
					serving(t, next(t, sessions), newcomer)
					require.Zero(t, time.Since(begin), "others are served at once")
					m.leave(t, s, peer, before)
					wantFree(t, goodSession, good, misbehaviourBound, 0)
				})
			})
		})
	}
}

// play does it, and wants what should become of it.
func (m *misbehaviour) play(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
	t.Helper()
	m.how(t, end, s, peer)
	switch {
	case m.lost:
		require.ErrorContains(t, wantEnded(t, s), "session ended: connection lost: ")
	case m.problem == "":
		serving(t, s, peer)
		wantNoMessage(t, s)
	case m.code == websocket.CloseProtocolError:
		peer.WantClose("the end", m.code, strings.TrimPrefix(m.problem, "websocket: "))
		require.EqualError(t, s.Err(), "session ended: protocol violation: "+m.problem)
	case m.code != 0:
		wantProtocolError(t, s, peer, m.code, m.problem)
	default:
		wantProtocolError(t, s, peer, 4001, m.problem)
	}
}

// leave ends the connection, and wants nothing to be left of the session; that
// no goroutine is, synctest sees.
func (m *misbehaviour) leave(t *testing.T, s *cryo.Session, peer *cryotest.Peer, before int64) {
	t.Helper()
	if s.Err() == nil && !m.lost {
		wantFree(t, s, peer, misbehaviourBound, 0)
	}
	_ = peer.WS.Close()
	wantEnded(t, s)
	synctest.Wait()
	require.Less(t, heap()-before, int64(1<<20), "memory is back")
}

// heap is what is in use, without what pools keep.
func heap() int64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

func wantNoMessage(t *testing.T, s *cryo.Session) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), instant)
	defer cancel()
	_, err := s.Receive(ctx)
	require.ErrorIs(t, err, context.DeadlineExceeded)
}

// malformedFrames end the session, unless the reference too takes them.
func malformedFrames(t *testing.T) (rows []misbehaviour) {
	message := func(frame []byte) func(*testing.T, end, *cryo.Session, *cryotest.Peer) {
		return func(_ *testing.T, _ end, _ *cryo.Session, peer *cryotest.Peer) { peer.WriteBytes(frame) }
	}
	_, malformed := cryotest.Vectors(t)
	for _, v := range malformed {
		frame := slices.Clone(v.Bytes)
		if len(frame) >= 8 {
			binary.BigEndian.PutUint64(frame, sid)
		}
		row := misbehaviour{does: "sends the malformed vector " + v.Name}
		_, err := wire.Parse(frame)
		if v.Reference == "accepted" {
			require.NoError(t, err)
			row.how = func(t *testing.T, _ end, s *cryo.Session, peer *cryotest.Peer) {
				peer.WriteBytes(frame)
				if wire.Type(frame[8]) == wire.UTF8 { // passed on as it came
					require.NoError(t, receive(t, s).Ack())
					peer.WantFrame("its acknowledgement", cryotest.Acked(1))
				}
			}
		} else {
			require.Error(t, err)
			row.how, row.problem = message(frame), err.Error()
		}
		rows = append(rows, row)
	}

	const id = "ffffffffffffffd6" // sid
	for _, c := range []struct{ does, frame, problem string }{
		{"sends half a session id", "ffff", "malformed frame of 2 bytes: shorter than session id and type"},
		{"sends a frame without a type", id, "malformed frame of 8 bytes: shorter than session id and type"},
		{"sends an unknown type", id + "06" + "00000001", ""},
		{"sends a TX_START of CAMP", id + "00" + "00000001" + "00000000" + "ffffffffffffffff" + "00" + "6e616d65", "malformed TX_START frame of 30 bytes: it is a frame of another protocol, CAMP"},
		{"sends a PING_PONG of CAMP", id + "fb" + "706f6e67", "malformed PING_PONG frame of 13 bytes: it is a frame of another protocol, CAMP"},
		{"sends half a number", id + "fa" + "0000", "malformed UTF8DATA frame of 11 bytes: shorter than its 13 bytes"},
		{"sends a ping with an extra byte", id + "fb" + "00000001" + "70696e67ff", "malformed PING_PONG frame of 18 bytes: neither ping nor pong"},
		{"sends a message for another session", "0000000000000001" + "fa" + "00000001", "UTF8DATA frame for another session: 1"},
		{"acknowledges for another session", "0000000000000001" + "fd" + "40000001", "ACK frame for another session: 1"},
		{"announces another version after the handshake", id + "ff" + "00000001" + "00000002" + "0000000000000001", "unsupported protocol version 2: only 1 is supported"},
	} {
		frame, err := hex.DecodeString(c.frame)
		require.NoError(t, err)
		rows = append(rows, misbehaviour{does: c.does, how: message(frame), problem: c.problem})
	}
	return append(rows,
		misbehaviour{
			does: "sends a text message", problem: "text message on the WebSocket",
			how: func(t *testing.T, _ end, _ *cryo.Session, peer *cryotest.Peer) {
				require.NoError(t, peer.WS.WriteMessage(websocket.TextMessage, []byte("hello")))
			},
		},
		misbehaviour{
			does: "sends a payload over 16 MiB", problem: "malformed BINARYDATA frame of 16777230 bytes: payload over 16 MiB",
			how: func(t *testing.T, _ end, _ *cryo.Session, peer *cryotest.Peer) {
				frame, err := wire.Append(nil, &wire.Frame{SID: sid, Type: wire.Binary, Payload: make([]byte, cryo.MaxPayload)})
				require.NoError(t, err)
				require.NoError(t, peer.WS.WriteMessage(websocket.BinaryMessage, append(frame, 0)))
			},
		},
		misbehaviour{
			does: "sends oversized messages endlessly", problem: "websocket: read limit exceeded", code: websocket.CloseMessageTooBig,
			how: func(t *testing.T, _ end, s *cryo.Session, peer *cryotest.Peer) {
				message := tooLong(t)
				go func() {
					var err error
					for err == nil { // until the session has discarded enough of it
						err = peer.WS.WriteMessage(websocket.BinaryMessage, message)
					}
				}()
			},
		},
		misbehaviour{
			does: "sends ENDPOINT_INFO repeatedly",
			how: func(t *testing.T, _ end, _ *cryo.Session, peer *cryotest.Peer) {
				for i := range uint32(10) {
					peer.WriteFrames(cryotest.EndpointInfo(i))
					peer.WantFrame("its acknowledgement", cryotest.Acked(i))
				}
			},
		},
	)
}

func brokenWebSocket() (rows []misbehaviour) {
	for _, c := range []struct {
		does    string
		bytes   func(end end) []byte
		problem string
	}{
		{"sends a compressed frame", func(e end) []byte { return raw(e, 0xC2, []byte("x")) }, "websocket: RSV1 set"},
		{"sends an unknown opcode", func(e end) []byte { return raw(e, 0x83, []byte("x")) }, "websocket: bad opcode 3"},
		{"sends a ping in fragments", func(e end) []byte { return raw(e, 0x09, []byte("x")) }, "websocket: FIN not set on control"},
		{"sends a WebSocket ping that is too long", func(e end) []byte { return raw(e, 0x89, make([]byte, 126)) }, "websocket: len > 125 for control"},
		{"continues a message that never began", func(e end) []byte { return raw(e, 0x80, []byte("x")) }, "websocket: continuation after FIN"},
		{"begins a message within another", func(e end) []byte { return append(raw(e, 0x02, []byte("x")), raw(e, 0x82, nil)...) }, "websocket: data before FIN"},
		{"masks frames that must not be masked, or omits the mask", func(e end) []byte { e.dialled = !e.dialled; return raw(e, 0x82, nil) }, "websocket: bad MASK"},
		{"closes with a code that must not be sent", func(e end) []byte { return raw(e, 0x88, []byte{0x03, 0xED}) }, "websocket: bad close code 1005"},
		{"closes with half a code", func(e end) []byte { return raw(e, 0x88, []byte{0x03}) }, "websocket: close frame of one byte"},
		{"closes with a reason that is not UTF-8", func(e end) []byte { return raw(e, 0x88, []byte{0x03, 0xE8, 0xFF}) }, "websocket: invalid utf8 payload in close frame"},
	} {
		rows = append(rows, misbehaviour{
			does: c.does, problem: c.problem, code: websocket.CloseProtocolError,
			how: func(t *testing.T, end end, _ *cryo.Session, peer *cryotest.Peer) {
				_, err := peer.Conn().Write(c.bytes(end))
				require.NoError(t, err)
			},
		})
	}
	return append(rows,
		misbehaviour{
			does: "sends a message in fragments of a byte, and pings in between",
			how: func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
				frame, err := wire.Append(nil, &wire.Frame{SID: sid, Type: wire.UTF8, Ack: 5, Payload: []byte("in pieces")})
				require.NoError(t, err)
				encoded := append(raw(end, 0x02, frame[:3]), raw(end, 0x89, []byte("ping"))...)
				for _, b := range frame[3:] {
					encoded = append(encoded, raw(end, 0x00, []byte{b})...)
				}
				for _, b := range append(encoded, raw(end, 0x80, nil)...) {
					_, err := peer.Conn().Write([]byte{b})
					require.NoError(t, err)
					synctest.Wait()
				}
				m := receive(t, s)
				require.Equal(t, "in pieces", string(m.Payload))
				require.NoError(t, m.Ack())
				peer.WantFrame("its acknowledgement", cryotest.Acked(5))
			},
		},
		misbehaviour{
			does: "sends half a message and disconnects", lost: true,
			how: func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
				frame, err := wire.Append(nil, &wire.Frame{SID: sid, Type: wire.UTF8, Payload: []byte("the first half")})
				require.NoError(t, err)
				_, err = peer.Conn().Write(raw(end, 0x02, frame)) // not final
				require.NoError(t, err)
				require.NoError(t, peer.Conn().CloseWrite())
				wantEnded(t, s)
				_, err = s.Receive(t.Context())
				require.Equal(t, s.Err(), err, "it is not received")
			},
		},
	)
}

func floods() []misbehaviour {
	// flooded has the peer send a frame many times without reading the answers.
	flooded := func(t *testing.T, peer *cryotest.Peer, n int, frame func(i uint32) wire.Frame) (written int) {
		t.Helper()
		peer.Conn().StopReading()
		done := start(func() error {
			for i := range n {
				if err := peer.TryWriteFrames(frame(uint32(i))); err != nil {
					return err
				}
				written++
			}
			return nil
		})
		synctest.Wait() // all of it, or as much as is read
		peer.Conn().ReadOn()
		peer.Read()
		done.wantSuccess(t)
		synctest.Wait()
		return written
	}
	return []misbehaviour{
		{
			does: "sends 10,000 pings, of Cryo and of the WebSocket, and reads no answer",
			how: func(t *testing.T, _ end, s *cryo.Session, peer *cryotest.Peer) {
				peer.Conn().StopReading()
				stuck := start(func() error { return s.SendBinary(t.Context(), make([]byte, 1<<20)) })
				stuck.wantBlocked(t) // so that answers queue up
				flooded(t, peer, 10_000, func(i uint32) wire.Frame {
					_ = peer.WS.WriteMessage(websocket.PingMessage, nil)
					return cryotest.Ping(i)
				})
				answers := peer.Taken()
				require.Len(t, answers, 1+16, "what was being written, and the pongs that wait at most")
				peer.Ack(answers[0])
				stuck.wantSuccess(t)
			},
		},
		{
			does: "sends 20,000 acknowledgements for numbers that were never used",
			how: func(t *testing.T, _ end, s *cryo.Session, peer *cryotest.Peer) {
				flooded(t, peer, 20_000, cryotest.Acked)
				require.Zero(t, peer.Skip(), "they are ignored")
			},
		},
		{
			does: "sends 20,000 TX_FLOW and reads no acknowledgement",
			how: func(t *testing.T, _ end, s *cryo.Session, peer *cryotest.Peer) {
				flooded(t, peer, 20_000, func(i uint32) wire.Frame { return txFlow(i, wire.FlowPush) })
				require.Equal(t, 20_000, peer.Skip(), "each is acknowledged, when it reads")
			},
		},
		{
			does: "sends thousands of TX_START that are not accepted",
			how: func(t *testing.T, _ end, s *cryo.Session, peer *cryotest.Peer) {
				flooded(t, peer, 5000, func(i uint32) wire.Frame { return txStart(i, i, -1, strings.Repeat("n", 1000)) })
				require.Equal(t, 5000-256, peer.Skip(), "256 wait, the others are cancelled")
				s.SetSendOnly(true)
				synctest.Wait()
				require.Equal(t, 256, peer.Skip())
				s.SetSendOnly(false)
			},
		},
		{
			does: "floods with chunks of a rejected stream",
			how: func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
				st := incoming(t, s, peer, 1, 0)
				require.NoError(t, st.Close())
				peer.WantFrame("TX_CANCEL", txCancel(end.first, 0))
				flooded(t, peer, 1000, func(i uint32) wire.Frame { return txChunk(0, 1+i, strings.Repeat("x", 10_000)) })
				require.Zero(t, peer.Skip(), "they are ignored")
			},
		},
		{
			does: "sends more than max_buffer_bytes, then messages are settled",
			how: func(t *testing.T, _ end, s *cryo.Session, peer *cryotest.Peer) {
				settling := start(func() error {
					for range 1000 {
						m, err := s.Receive(t.Context())
						if err != nil {
							return err
						}
						if err := m.Ack(); err != nil {
							return err
						}
					}
					return nil
				})
				flooded(t, peer, 1000, func(i uint32) wire.Frame { return cryotest.Binary(i, strings.Repeat("x", 10_000)) })
				settling.wantSuccess(t)
				synctest.Wait()
				require.Equal(t, 1000, peer.Skip())
			},
		},
	}
}

func strangeNumbers() []misbehaviour {
	return []misbehaviour{
		{
			does: "acknowledges a number other than the awaited one",
			how: func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
				send := start(func() error { return s.SendText(t.Context(), "hello") })
				text := peer.WantType("the text", wire.UTF8)
				for _, n := range []uint32{0, end.first - 1, end.first + 1, 1<<32 - 1} {
					peer.WriteFrames(cryotest.Acked(n))
				}
				send.wantBlocked(t)
				peer.Ack(text, text)
				send.wantSuccess(t)
			},
		},
		{
			does: "sends an ERROR for a number that was never used",
			how: func(t *testing.T, _ end, s *cryo.Session, peer *cryotest.Peer) {
				for _, n := range []uint32{0, 7, 1<<32 - 1} {
					peer.WriteFrames(cryotest.Error(n, "what?")) // a message of the application
					m := receive(t, s)
					require.Equal(t, cryo.KindError, m.Kind)
					require.NoError(t, m.Ack())
					peer.WantFrame("its acknowledgement", cryotest.Acked(n))
				}
			},
		},
		{
			does: "rejects a message that it has acknowledged",
			how: func(t *testing.T, _ end, s *cryo.Session, peer *cryotest.Peer) {
				send := start(func() error { return s.SendText(t.Context(), "hello") })
				text := peer.WantType("the text", wire.UTF8)
				peer.Ack(text)
				send.wantSuccess(t)
				peer.WriteFrames(cryotest.Error(text.Ack, "no"))
				peer.WantIdle("a refusal is never acknowledged", instant)
			},
		},
		{
			does: "reuses one number for many messages",
			how: func(t *testing.T, _ end, s *cryo.Session, peer *cryotest.Peer) {
				for range 3 {
					peer.WriteFrames(cryotest.Text(5, "again"))
				}
				for range 3 { // each is a message, and has its acknowledgement
					require.NoError(t, receive(t, s).Ack())
					peer.WantFrame("its acknowledgement", cryotest.Acked(5))
				}
			},
		},
	}
}

func strangeStreams() []misbehaviour {
	rejected := func(t *testing.T, end end, peer *cryotest.Peer, st *cryo.IncomingStream, tx uint32) {
		t.Helper()
		peer.WantFrame("TX_CANCEL", txCancel(end.first, tx))
		require.NoError(t, st.Close())
		peer.WantIdle("cancelled once, and never acknowledged", instant)
	}
	return []misbehaviour{
		{
			does: "opens a stream under the number of an open one", problem: "TX_START for stream 5, which is already open",
			how: func(t *testing.T, _ end, s *cryo.Session, peer *cryotest.Peer) {
				incoming(t, s, peer, 1, 5)
				peer.WriteFrames(txStart(2, 5, -1, "again"))
				peer.Ack(peer.WantType("the open one is cancelled", wire.TxCancel))
			},
		},
		{
			does: "sends chunks, ends and fetches of unknown streams",
			how: func(t *testing.T, _ end, s *cryo.Session, peer *cryotest.Peer) {
				for _, tx := range []uint32{0, 1, 1 << 31} {
					peer.WriteFrames(txChunk(tx, 0, "?"), txFinish(2, tx))
				}
				peer.WantIdle("nothing", instant)
				peer.WriteFrames(txFetch(3, 9, 0, 1<<32-1), txCancel(4, 9))
				peer.WantFrame("that it was heard", cryotest.Acked(3))
				peer.WantFrame("that it was heard", cryotest.Acked(4))
			},
		},
		{
			does: "sends chunks before TX_START is acknowledged",
			how: func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
				peer.WriteFrames(txStart(1, 5, -1, ""))
				st := acceptStream(t, s)
				peer.WriteFrames(txChunk(5, 0, "x"))
				rejected(t, end, peer, st, 5)
			},
		},
		{
			does: "skips a chunk",
			how: func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
				st := incoming(t, s, peer, 1, 5)
				peer.WriteFrames(txChunk(5, 2, "x"), txChunk(5, 3, "y"), txFinish(2, 5))
				rejected(t, end, peer, st, 5)
			},
		},
		{
			does: "sends chunks after TX_FINISH",
			how: func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
				st := incoming(t, s, peer, 1, 5)
				peer.WriteFrames(txFinish(2, 5), txChunk(5, 1, "x"))
				rejected(t, end, peer, st, 5)
			},
		},
		{
			does: "sends more of a stream than announced",
			how: func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
				peer.WriteFrames(txStart(1, 5, 3, ""))
				st := acceptStream(t, s)
				_, err := st.Read(nil)
				require.NoError(t, err)
				peer.WantFrame("TX_START acknowledged", cryotest.Acked(1))
				peer.WriteFrames(txChunk(5, 0, "four"))
				rejected(t, end, peer, st, 5)
			},
		},
		{
			does: "opens a stream with a name of 16 MiB",
			how: func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
				peer.WriteFrames(txStart(1, 5, -1, strings.Repeat("n", cryo.MaxPayload)))
				peer.WantFrame("TX_CANCEL", txCancel(end.first, 5))
			},
		},
		{
			does: "never finishes a stream",
			how: func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
				st := incoming(t, s, peer, 1, 5)
				for i := range uint32(5) { // empty chunks keep it no longer
					peer.WriteFrames(txChunk(5, 1+i, ""))
					time.Sleep(10 * time.Second)
				}
				time.Sleep(10 * time.Second)
				rejected(t, end, peer, st, 5)
			},
		},
		{
			does: "never reads a stream that it has accepted",
			how: func(t *testing.T, _ end, s *cryo.Session, peer *cryotest.Peer) {
				st, _ := opening(t, s, peer, &cryo.StreamOptions{StepTimeout: 5 * time.Second})
				peer.Conn().StopReading()
				write := start(func() (err error) {
					for err == nil {
						_, err = st.Write(make([]byte, 10_000))
					}
					return err
				})
				require.Error(t, write.result(t))
				peer.Conn().ReadOn()
				peer.Read()
				synctest.Wait()
				peer.Skip()
			},
		},
	}
}
