package cryo_test

import (
	"strings"
	"testing"
	"testing/synctest"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/cryotest"
	"github.com/cryo-connect/cryo-connect/internal/wire"
)

func TestStatsCountUnsettledUnacknowledgedAndQueued(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, _ end, s *cryo.Session, peer *cryotest.Peer) {
		require.Equal(t, cryo.Stats{}, s.Stats())
		peer.WriteFrames(cryotest.Text(1, "abc"), cryotest.Text(2, "de"), txStart(3, 0, -1, "announced"))
		m := receive(t, s)
		synctest.Wait()
		release := s.Reserve(1000)
		require.Equal(t, cryo.Stats{HeldBytes: 256 + 3 + 256 + 2 + 1000, UnsettledMessages: 2, OpenStreams: 1}, s.Stats())
		release()
		release()
		require.NoError(t, m.Ack())
		require.NoError(t, m.Ack())
		require.NoError(t, receive(t, s).Reject("no"))
		require.NoError(t, acceptStream(t, s).Close())
		peer.WantFrame("ACK", cryotest.Acked(1))
		peer.WantFrame("ERROR", cryotest.Error(2, "no"))
		peer.WantType("TX_CANCEL", wire.TxCancel)
		synctest.Wait() // until its write has returned
		require.Equal(t, cryo.Stats{}, s.Stats())

		peer.Conn().StopReading()
		first := start(func() error { return s.SendBinary(t.Context(), make([]byte, 1<<20)) }) // is being written
		synctest.Wait()
		second := start(func() error { return s.SendText(t.Context(), strings.Repeat("x", 1000)) })
		synctest.Wait()
		require.Equal(t, cryo.Stats{AwaitingAcks: 2, QueuedBytes: 1000}, s.Stats())
		peer.Conn().ReadOn()
		peer.Ack(peer.WantType("first", wire.Binary), peer.WantType("second", wire.UTF8))
		first.wantSuccess(t)
		second.wantSuccess(t)
		synctest.Wait()
		require.Equal(t, cryo.Stats{}, s.Stats())
	})
}

func TestStatsReportThatReadsArePaused(t *testing.T) {
	atBothEnds(t, smallBuffer, func(t *testing.T, _ end, s *cryo.Session, peer *cryotest.Peer) {
		m := fill(t, s, peer)
		require.Equal(t, cryo.Stats{Paused: true, HeldBytes: 2256, UnsettledMessages: 1}, s.Stats())
		require.NoError(t, m.Ack())
		receive(t, s)
		require.False(t, s.Stats().Paused)
	})
}

func TestStatsOfAClosedSessionCountUnsettledMessages(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, _ end, s *cryo.Session, peer *cryotest.Peer) {
		peer.WriteFrames(cryotest.Text(1, "abc"))
		synctest.Wait()
		require.NoError(t, s.CloseNow())
		require.Equal(t, cryo.Stats{HeldBytes: 259, UnsettledMessages: 1}, s.Stats())
		s.Discard()
		require.Equal(t, cryo.Stats{}, s.Stats())
	})
}
