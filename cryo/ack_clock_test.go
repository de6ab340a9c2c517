package cryo_test

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/cryotest"
	"github.com/cryo-connect/cryo-connect/internal/wire"
)

// readAll lets a peer that reads slowly end its last slow read.
func readAll(peer *cryotest.Peer) {
	peer.Conn().ReadSlowly(0)
	time.Sleep(time.Hour)
}

// ticks returns how often a clock ticks, every 15 s, until the acknowledgement is late.
func ticks(s *cryo.Session) (n int) {
	clock := s.AckClock()
	for late := false; !late; n++ {
		time.Sleep(15 * time.Second)
		late = clock.Tick()
	}
	return n
}

func TestPeerThatHasReadAllIsLateAfterTheTimeout(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		peer.Read()
		_ = s.Queue([]cryo.OutMessage{cryo.Text("all")})
		synctest.Wait()
		require.Equal(t, 2, ticks(s))
	})
}

func TestPeerThatDoesNotReadIsLateAfterTheTimeout(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		_ = s.Queue([]cryo.OutMessage{cryo.Binary(make([]byte, 2<<20))})
		synctest.Wait()
		require.Equal(t, 2, ticks(s))
	})
}

// 1.5 MB at 30 kB/s take 50 s, so the third tick still sees it move, at 45 s, and the fourth
// that it is there. Two more make it late.
func TestSlowTransferDoesNotCountTowardsTheTimeout(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		peer.Read()
		peer.Conn().ReadSlowly(30_000)
		defer readAll(peer)
		_ = s.Queue([]cryo.OutMessage{cryo.Binary(make([]byte, 1_500_000))})
		require.InDelta(t, 5.5, ticks(s), 0.5)
	})
}

func TestTransferIsLimitedToTenTimesTheTimeout(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		peer.Read()
		peer.Conn().ReadSlowly(7 << 10)
		defer readAll(peer)
		_ = s.Queue([]cryo.OutMessage{cryo.Binary(make([]byte, 16<<20))})
		require.Equal(t, 20, ticks(s))
		peer.Conn().ReadSlowly(0)
		peer.WantType("the rest", wire.Binary)
	})
}

// Such as a ping that is written at the same time.
func TestLittleDataAtTheFirstTickDoesNotDelayATimeout(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		peer.Read()
		_ = s.Queue([]cryo.OutMessage{cryo.Text("all")})
		clock := s.AckClock()
		time.Sleep(15 * time.Second)
		_ = s.Queue([]cryo.OutMessage{cryo.Text("another")})
		require.False(t, clock.Tick())
		time.Sleep(15 * time.Second)
		require.True(t, clock.Tick(), "late")
	})
}

// Later messages keep the line busy, but prove nothing for the first one.
func TestOnlyDataQueuedAtTheFirstTickDelaysATimeout(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		peer.Read()
		peer.Conn().ReadSlowly(64 << 10)
		defer readAll(peer)
		_ = s.Queue([]cryo.OutMessage{cryo.Binary(make([]byte, 64<<10))})
		stop := make(chan struct{})
		later := start(func() error {
			for {
				select {
				case <-stop:
					return nil
				case <-time.After(time.Second):
					_ = s.Queue([]cryo.OutMessage{cryo.Binary(make([]byte, 60<<10))})
				}
			}
		})
		require.LessOrEqual(t, ticks(s), 4)
		close(stop)
		later.wantSuccess(t)
	})
}

func TestStreamStepMayExceedItsTimeoutWhileDataIsTransferred(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		st, _ := opening(t, s, peer, &cryo.StreamOptions{ChunkBytes: 1_500_000, StepTimeout: 30 * time.Second})
		peer.Conn().ReadSlowly(30_000)
		defer readAll(peer)
		sending := start(func() error {
			if _, err := st.Write(make([]byte, 1_500_000)); err != nil {
				return err
			}
			return st.Finish()
		})
		time.Sleep(45 * time.Second)
		peer.WantIdle("it takes 50 s", time.Second)
		time.Sleep(10 * time.Second)
		peer.WantType("all of it", wire.TxChunk)
		peer.Ack(peer.WantType("behind it", wire.TxFinish))
		sending.wantSuccess(t)
	})
}
