package cryo_test

import (
	"bytes"
	"encoding/binary"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/cryotest"
	"github.com/cryo-connect/cryo-connect/internal/wire"
)

// rawPeer is the other end of a real socket.
type rawPeer struct {
	*cryotest.Peer
	end   end         // of the session
	pongs chan string // that have come, with their data
}

func newRawPeer(peer *cryotest.Peer, dialled bool) rawPeer {
	p := rawPeer{peer, end{dialled: dialled}, make(chan string, 100)}
	peer.WS.SetPongHandler(func(data string) error { p.pongs <- data; return nil })
	return p
}

// send writes bytes of frames to the network.
func (p rawPeer) send(t *testing.T, b []byte) {
	t.Helper()
	_, err := p.WS.NetConn().Write(b)
	require.NoError(t, err)
}

// overRealSockets runs a test with a session that dialled, and with one that a server
// accepted, each against a raw peer over TCP.
func overRealSockets(t *testing.T, test func(t *testing.T, s *cryo.Session, peer rawPeer)) {
	t.Helper()
	t.Run("dialled", func(t *testing.T) {
		server := cryotest.NewServer(t)
		listener := httptest.NewServer(server)
		t.Cleanup(listener.Close)
		var s *cryo.Session
		dial := start(func() (err error) {
			s, err = cryo.Dial(t.Context(), strings.Replace(listener.URL, "http", "ws", 1), &cryo.DialOptions{Token: token})
			return err
		})
		peer := newRawPeer(server.NextPeer(), true)
		peer.ServerHandshake()
		require.NoError(t, dial.result(t))
		t.Cleanup(func() { cut(s) })
		test(t, s, peer)
	})
	t.Run("accepted", func(t *testing.T) {
		target, sessions := serveTCP(t)
		peer := newRawPeer(cryotest.DialPeer(t, websocket.DefaultDialer, target, token, sid), false)
		peer.ClientHandshake()
		test(t, next(t, sessions), peer)
	})
}

func closePayload(code uint16, reason string) []byte {
	return append(binary.BigEndian.AppendUint16(nil, code), reason...)
}

// What a session answers to the frames of a peer. How they are read is tested by
// internal/ws.
func TestAnswersFollowRFC6455(t *testing.T) {
	for _, c := range []struct {
		section, sends string
		bytes          func(end end) []byte
		code           int
		reason         string
	}{
		{"5.5.1", "a close frame with a code", func(e end) []byte { return raw(e, 0x88, closePayload(1001, "bye")) }, 1001, ""},
		{"5.5.1", "a close frame without payload", func(e end) []byte { return raw(e, 0x88, nil) }, 1000, ""},
		{"5.5.1", "a close frame of one byte", func(e end) []byte { return raw(e, 0x88, []byte{3}) }, 1002, "close frame of one byte"},
		{"7.4", "a code that may not be sent", func(e end) []byte { return raw(e, 0x88, closePayload(1006, "")) }, 1002, "bad close code 1006"},
		{"8.1", "a reason that is no UTF-8", func(e end) []byte { return raw(e, 0x88, closePayload(1000, "\xff")) }, 1002, "invalid utf8 payload in close frame"},
		{"5.1", "a frame masked as by the other end", func(e end) []byte { e.dialled = !e.dialled; return raw(e, 0x82, nil) }, 1002, "bad MASK"},
		{"5.2", "a reserved bit", func(e end) []byte { return raw(e, 0x92, nil) }, 1002, "RSV3 set"},
		{"5.2", "a reserved opcode", func(e end) []byte { return raw(e, 0x8B, nil) }, 1002, "bad opcode 11"},
		{"5.4", "a continuation of nothing", func(e end) []byte { return raw(e, 0x80, nil) }, 1002, "continuation after FIN"},
		{"5.5", "a ping of 126 bytes", func(e end) []byte { return raw(e, 0x89, make([]byte, 126)) }, 1002, "len > 125 for control"},
		{"10.4", "a message over the limit", func(e end) []byte { return raw(e, 0x82, make([]byte, cryo.MaxPayload+100)) }, 1009, "read limit exceeded"},
	} {
		t.Run(c.section+" "+c.sends, func(t *testing.T) {
			overRealSockets(t, func(t *testing.T, s *cryo.Session, peer rawPeer) {
				peer.send(t, c.bytes(peer.end))
				peer.WantClose("the answer", c.code, c.reason)
				require.NoError(t, peer.WS.Close())
				wantEnded(t, s)
			})
		})
	}
}

// RFC 6455, 7.4 and 11.7. gorilla, which the peer is made of, can't read the answer.
func TestPeerMayCloseWith1014(t *testing.T) {
	overRealSockets(t, func(t *testing.T, s *cryo.Session, peer rawPeer) {
		peer.send(t, raw(peer.end, 0x88, closePayload(1014, "")))
		_, err := peer.Try("the answer")
		require.EqualError(t, err, "websocket: bad close code 1014")
		require.EqualError(t, wantEnded(t, s), "session ended: closed by the peer with code 1014")
	})
}

// RFC 6455, 5.4 and 5.5.2: a message of 16 MiB in small fragments, with pings between them.
func TestMessageMayComeInSmallFragments(t *testing.T) {
	const every = 1000 // fragments from ping to ping
	overRealSockets(t, func(t *testing.T, s *cryo.Session, peer rawPeer) {
		payload := bytes.Repeat([]byte("0123456789abcdef"), cryo.MaxPayload/16)
		message, err := wire.Append(nil, &wire.Frame{SID: peer.SID, Type: wire.Binary, Ack: 1, Payload: payload})
		require.NoError(t, err)
		var sent []byte
		op := byte(0x02)
		for i := 0; len(message) > 0; i++ {
			n := min(len(message), 1000)
			if n == len(message) {
				op |= 0x80
			}
			sent = append(sent, raw(peer.end, op, message[:n])...)
			op, message = 0, message[n:]
			if i%every == 0 {
				sent = append(sent, raw(peer.end, 0x89, []byte("there?"))...)
			}
		}
		peer.send(t, sent)
		m := receive(t, s)
		require.True(t, bytes.Equal(payload, m.Payload))
		require.NoError(t, m.Ack())
		peer.WantFrame("the acknowledgement", cryotest.Acked(1))
		require.Equal(t, "there?", next(t, peer.pongs))
	})
}

// RFC 6455, 5.5.3: a pong has the data of the ping that it answers.
func TestPongHasTheDataOfThePing(t *testing.T) {
	overRealSockets(t, func(t *testing.T, s *cryo.Session, peer rawPeer) {
		for _, data := range []string{"", "there?", "\xff\x00", strings.Repeat("x", 125)} {
			for _, b := range raw(peer.end, 0x89, []byte(data)) {
				peer.send(t, []byte{b}) // each byte by itself
			}
			require.Equal(t, data, next(t, peer.pongs))
		}
	})
}
