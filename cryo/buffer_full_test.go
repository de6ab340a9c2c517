package cryo_test

import (
	"bytes"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/cryotest"
	"github.com/cryo-connect/cryo-connect/internal/wire"
)

const (
	rejectAfter = 10 * time.Second
	bufferFull  = "receive buffer full: too many unacknowledged messages"
)

// The acknowledgement that our sender waits for is behind a message for which there is no
// capacity, and the capacity may be waiting for our sender: only reading on can end that.
func TestAcknowledgementBehindAFullBufferIsReadAfterTenSeconds(t *testing.T) {
	atBothEnds(t, smallBuffer, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		m := fill(t, s, peer) // 1001 waits
		answer := start(func() error { return s.SendText(t.Context(), "the answer") })
		text := peer.WantType("the answer", wire.UTF8)
		begin := time.Now()
		peer.WriteFrames(cryotest.Text(1002, "rejected too, and at once"))
		peer.Ack(text)
		require.NoError(t, <-answer.done)
		require.Equal(t, rejectAfter, time.Since(begin))
		wantAmongPongs(t, peer, cryotest.Error(1001, bufferFull))
		peer.WantFrame("another rejection", cryotest.Error(1002, bufferFull))

		require.NoError(t, m.Ack())
		peer.WantFrame("what was received is not rejected", cryotest.Acked(1000))
		peer.WriteFrames(cryotest.Text(1003, "there is capacity"))
		require.NoError(t, receive(t, s).Ack())
	})
}

// wantAmongPongs wants a frame behind pongs that nobody asked for.
func wantAmongPongs(t *testing.T, peer *cryotest.Peer, want wire.Frame) {
	for {
		f := peer.Next("a pong, or the frame")
		if f.Type != wire.PingPong {
			want.SID = peer.SID
			require.Equal(t, want, f)
			return
		}
	}
}

func TestBackpressureHasNoTimeLimitWithoutAWaitingSender(t *testing.T) {
	atBothEnds(t, smallBuffer, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		m := fill(t, s, peer)
		time.Sleep(time.Hour)
		require.NoError(t, m.Ack())
		require.Equal(t, "what waits", string(receive(t, s).Payload))
	})
}

func TestSenderThatStartsDuringALongPauseIsDetected(t *testing.T) {
	atBothEnds(t, smallBuffer, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		fill(t, s, peer)
		peer.Read()
		time.Sleep(time.Hour + time.Second) // between two beats
		synctest.Wait()
		peer.Skip()
		answer := start(func() error { return s.SendText(t.Context(), "the answer") })
		begin := time.Now()
		peer.Ack(peer.WantType("the answer", wire.UTF8))
		require.NoError(t, <-answer.done)
		require.LessOrEqual(t, time.Since(begin), time.Second)
	})
}

func TestStreamIsCancelledWithAFullBufferAndAWaitingSender(t *testing.T) {
	atBothEnds(t, bounded(), func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		st := incoming(t, s, peer, 1, 0)
		release := s.Reserve(90_000)
		peer.WriteFrames(txChunk(0, 1, "abc"))
		answer := start(func() error { return s.SendText(t.Context(), "the answer") })
		peer.Ack(peer.WantType("the answer", wire.UTF8))
		require.NoError(t, <-answer.done)
		require.ErrorIs(t, wantRest(t, st, ""), cryo.ErrBufferFull)
		release()
		require.NoError(t, st.Close())
		wantAmongPongs(t, peer, txCancel(end.first+1, 0))
		wantFree(t, s, peer, 90_000, 0)
	})
}

// A client that sends more than can be held and reads nothing meanwhile can't
// even receive a rejection. It times out.
func TestPeerThatFillsTheBufferAndNeverReadsTimesOut(t *testing.T) {
	atBothEnds(t, smallBuffer, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		fill(t, s, peer)
		peer.Conn().StopReading()
		answer := start(func() error { return s.SendBinary(t.Context(), make([]byte, 1<<20)) })
		begin := time.Now()
		frame, err := wire.Append(nil, &wire.Frame{SID: sid, Type: wire.Binary})
		require.NoError(t, err)
		_, err = peer.Conn().Write(bytes.Repeat(raw(end, 0x82, frame), 50_000))
		require.Error(t, err)
		err = <-answer.done
		require.ErrorIs(t, err, cryo.ErrPeerTimeout)
		require.True(t, strings.HasSuffix(err.Error(), "peer timeout after 30s: the peer sends, but does not read acknowledgements"), err)
		require.LessOrEqual(t, time.Since(begin), rejectAfter+3*cryo.DefaultHeartbeatInterval)
		synctest.Wait()
	})
}
