package cryo_test

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"net"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/cryotest"
	"github.com/cryo-connect/cryo-connect/internal/wire"
)

// wantProtocolError wants a session to end because of its peer, at once, with
// an intact close handshake.
func wantProtocolError(t *testing.T, s *cryo.Session, peer *cryotest.Peer, code int, problem string) {
	t.Helper()
	const broke = "protocol violation: "
	reason := broke + problem
	if code != 4001 {
		reason = strings.TrimPrefix(problem, "websocket: ") // WebSocket's own codes, and words
	}
	peer.WantClose("the end, without BYE", code, reason)
	<-s.Context().Done()
	require.EqualError(t, s.Err(), "session ended: "+broke+problem)
	require.ErrorIs(t, s.Err(), net.ErrClosed)
	_, ok := errors.AsType[*cryo.ProtocolError](s.Err())
	require.True(t, ok)

	require.NoError(t, peer.WS.Close())
	wantEnded(t, s)
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

// tooLong is a message of sid's session that is longer than any frame.
func tooLong(t *testing.T) []byte {
	t.Helper()
	frame, err := wire.Append(nil, &wire.Frame{SID: sid, Type: wire.Binary})
	require.NoError(t, err)
	return append(frame, make([]byte, cryo.MaxPayload+100)...)
}

func TestExcessiveFrameLengthEndsTheSession(t *testing.T) {
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

func TestQueueIsWrittenAfterAProtocolError(t *testing.T) {
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
		peer.WantType("what was being written", wire.Binary)
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
