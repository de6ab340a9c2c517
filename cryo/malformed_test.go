package cryo_test

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"net"
	"testing"
	"testing/synctest"

	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/cryotest"
)

// wantProtocolError wants a session to end because of its peer, at once, with
// an intact goodbye.
func wantProtocolError(t *testing.T, s *cryo.Session, peer *cryotest.Peer, code int, problem string) {
	t.Helper()
	const broke = "the peer broke the protocol: "
	reason := broke + problem
	if code != 4001 {
		reason = "" // the WebSocket library says it in words of its own
	}
	peer.WantClose("the end, without BYE", code, reason)
	<-s.Ending()
	require.EqualError(t, s.Err(), "session ended: "+broke+problem)
	require.ErrorIs(t, s.Err(), net.ErrClosed)
	_, ok := errors.AsType[*cryo.ProtocolError](s.Err())
	require.True(t, ok)

	require.NoError(t, peer.WS.Close())
	wantEnded(t, s)
}

func TestMalformedFramesEndTheSession(t *testing.T) {
	const id = "ffffffffffffffd6" // sid
	for name, c := range map[string]struct{ frame, problem string }{
		"nothing":           {"", "malformed frame of 0 bytes: shorter than session id and type"},
		"half an id":        {"ffff", "malformed frame of 2 bytes: shorter than session id and type"},
		"no type":           {id, "malformed frame of 8 bytes: shorter than session id and type"},
		"an unknown type":   {id + "06" + "00000001", "malformed unassigned type 6 frame of 13 bytes: no such frame type"},
		"no number":         {id + "fa" + "0000", "malformed UTF8DATA frame of 11 bytes: shorter than its 13 bytes"},
		"a strange ping":    {id + "fb" + "00000001" + "70696e67ff", "malformed PING_PONG frame of 18 bytes: neither ping nor pong"},
		"half a version":    {id + "ff" + "00000001" + "0000", "malformed ENDPOINT_INFO frame of 15 bytes: shorter than its 25 bytes"},
		"a strange flow":    {id + "03" + "00000001" + "02", "malformed TX_FLOW frame of 14 bytes: flow 2 is neither push (0) nor pull (1)"},
		"a foreign session": {"0000000000000001" + "fa" + "00000001", "UTF8DATA frame for the foreign session 1"},
		"a foreign ACK":     {"0000000000000001" + "fd" + "40000001", "ACK frame for the foreign session 1"},
	} {
		frame, err := hex.DecodeString(c.frame)
		require.NoError(t, err)
		t.Run(name, func(t *testing.T) {
			atBothEnds(t, cryo.SessionOptions{}, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
				peer.WriteBytes(frame)
				wantProtocolError(t, s, peer, 4001, c.problem)
			})
		})
	}
}

func TestATextMessageEndsTheSession(t *testing.T) {
	atBothEnds(t, cryo.SessionOptions{}, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		require.NoError(t, peer.WS.WriteMessage(websocket.TextMessage, []byte("hello")))
		wantProtocolError(t, s, peer, 4001, "text message on the WebSocket")
	})
}

func TestAPayloadOver16MiBEndsTheSession(t *testing.T) {
	atBothEnds(t, cryo.SessionOptions{}, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		frame, err := cryo.AppendFrame(nil, &cryo.Frame{SID: sid, Type: cryo.TypeBinary, Payload: make([]byte, cryo.MaxPayload)})
		require.NoError(t, err)
		write := start(func() error { return peer.WS.WriteMessage(websocket.BinaryMessage, append(frame, 0)) })
		wantProtocolError(t, s, peer, 4001, "malformed BINARYDATA frame of 16777230 bytes: payload over 16 MiB")
		write.wantSuccess(t)
	})
}

func TestAMessageLongerThanAnyFrameIsNotRead(t *testing.T) {
	atBothEnds(t, cryo.SessionOptions{}, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		write := start(func() error {
			for {
				// The session reads and discards until the peer closes.
				if err := peer.WS.WriteMessage(websocket.BinaryMessage, make([]byte, cryo.MaxPayload+100)); err != nil {
					return err
				}
			}
		})
		wantProtocolError(t, s, peer, websocket.CloseMessageTooBig, "websocket: read limit exceeded")
		require.Error(t, write.result(t))
	})
}

// raw is a WebSocket frame: its first byte, then a payload, masked (with zeros)
// if the client sends it.
func raw(end end, first byte, payload []byte) []byte {
	b := []byte{first}
	var mask byte
	if !end.dialled {
		mask = 0x80
	}
	switch n := len(payload); {
	case n < 126:
		b = append(b, mask|byte(n))
	case n < 1<<16:
		b = binary.BigEndian.AppendUint16(append(b, mask|126), uint16(n))
	default:
		b = binary.BigEndian.AppendUint64(append(b, mask|127), uint64(n))
	}
	if mask != 0 {
		b = append(b, 0, 0, 0, 0)
	}
	return append(b, payload...)
}

func TestBrokenWebSocketEndsTheSession(t *testing.T) {
	for name, c := range map[string]struct {
		bytes   func(end end) []byte
		problem string
	}{
		"compressed":          {func(e end) []byte { return raw(e, 0xC2, []byte("x")) }, "websocket: RSV1 set"},
		"unknown opcode":      {func(e end) []byte { return raw(e, 0x83, []byte("x")) }, "websocket: bad opcode 3"},
		"fragmented ping":     {func(e end) []byte { return raw(e, 0x09, []byte("x")) }, "websocket: FIN not set on control"},
		"long ping":           {func(e end) []byte { return raw(e, 0x89, make([]byte, 126)) }, "websocket: len > 125 for control"},
		"continued nothing":   {func(e end) []byte { return raw(e, 0x80, []byte("x")) }, "websocket: continuation after FIN"},
		"a message in one":    {func(e end) []byte { return append(raw(e, 0x02, []byte("x")), raw(e, 0x82, nil)...) }, "websocket: data before FIN"},
		"wrong masking":       {func(e end) []byte { e.dialled = !e.dialled; return raw(e, 0x82, nil) }, "websocket: bad MASK"},
		"strange close code":  {func(e end) []byte { return raw(e, 0x88, []byte{0x03, 0xED}) }, "websocket: bad close code 1005"},
		"strange close words": {func(e end) []byte { return raw(e, 0x88, []byte{0x03, 0xE8, 0xFF}) }, "websocket: invalid utf8 payload in close frame"},
	} {
		t.Run(name, func(t *testing.T) {
			atBothEnds(t, cryo.SessionOptions{}, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
				_, err := peer.Conn().Write(c.bytes(end))
				require.NoError(t, err)
				peer.WantClose("the end", websocket.CloseProtocolError, c.problem[len("websocket: "):])
				require.EqualError(t, s.Err(), "session ended: the peer broke the protocol: "+c.problem)
				require.NoError(t, peer.WS.Close())
				wantEnded(t, s)
			})
		})
	}
}

func TestALengthBeyondAllBoundsEndsTheSession(t *testing.T) {
	atBothEnds(t, cryo.SessionOptions{}, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		header := raw(end, 0x82, make([]byte, 1<<16))[:10]
		binary.BigEndian.PutUint64(header[2:], 1<<63)
		_, err := peer.Conn().Write(header)
		require.NoError(t, err)
		synctest.Wait()
		_, ok := errors.AsType[*cryo.ProtocolError](s.Err())
		require.True(t, ok)
	})
}

func TestFragmentedMessagesAreWhole(t *testing.T) {
	atBothEnds(t, cryo.SessionOptions{}, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		frame, err := cryo.AppendFrame(nil, &cryo.Frame{SID: sid, Type: cryo.TypeUTF8, Ack: 5, Payload: []byte("in pieces")})
		require.NoError(t, err)
		wire := raw(end, 0x02, frame[:3])
		wire = append(wire, raw(end, 0x00, nil)...)
		wire = append(wire, raw(end, 0x89, []byte("ping in between"))...)
		for _, b := range frame[3:] {
			wire = append(wire, raw(end, 0x00, []byte{b})...)
		}
		wire = append(wire, raw(end, 0x80, nil)...)
		for _, b := range wire { // and each byte by itself
			_, err := peer.Conn().Write([]byte{b})
			require.NoError(t, err)
			synctest.Wait()
		}
		m := receive(t, s)
		require.Equal(t, "in pieces", string(m.Payload))
		require.NoError(t, m.Ack())
		peer.WantFrame("its acknowledgement", cryotest.Acked(5))
	})
}

func TestAMessageThatTheEndCutsOffIsNotReceived(t *testing.T) {
	atBothEnds(t, cryo.SessionOptions{}, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		frame, err := cryo.AppendFrame(nil, &cryo.Frame{SID: sid, Type: cryo.TypeUTF8, Payload: []byte("the first half")})
		require.NoError(t, err)
		_, err = peer.Conn().Write(raw(end, 0x02, frame)) // not final
		require.NoError(t, err)
		require.NoError(t, peer.Conn().CloseWrite())
		require.ErrorContains(t, wantEnded(t, s), "session ended: connection lost: ")
		_, err = s.Receive(t.Context())
		require.Equal(t, s.Err(), err)
	})
}

func TestWhatIsQueuedStillGoesOutWhenThePeerBreaksTheProtocol(t *testing.T) {
	atBothEnds(t, cryo.SessionOptions{}, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		peer.WriteFrames(cryotest.Text(1, "good"), cryotest.Text(2, "good"))
		peer.Conn().StopReading()
		stuck := start(func() error { return s.SendBinary(t.Context(), make([]byte, 1<<20)) })
		stuck.wantBlocked(t)
		require.NoError(t, receive(t, s).Ack())
		require.NoError(t, receive(t, s).Ack())
		peer.WriteBytes([]byte("bad"))
		synctest.Wait()
		peer.WriteFrames(cryotest.Text(3, "discarded"))
		peer.Conn().ReadOn()
		peer.WantType("what was being written", cryo.TypeBinary)
		peer.WantFrame("an acknowledgement", cryotest.Acked(1))
		peer.WantFrame("an acknowledgement", cryotest.Acked(2))
		wantProtocolError(t, s, peer, 4001, "malformed frame of 3 bytes: shorter than session id and type")
		require.ErrorIs(t, stuck.result(t), net.ErrClosed)
		_, err := s.Receive(context.Background())
		require.Equal(t, s.Err(), err)
	})
}

func TestNoiseEndsTheSession(t *testing.T) {
	for range 20 {
		atBothEnds(t, cryo.SessionOptions{}, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
			noise := make([]byte, 1<<10)
			_, _ = rand.Read(noise)
			_, _ = peer.Conn().Write(noise)
			_ = peer.Conn().Close()
			wantEnded(t, s)
		})
	}
}
