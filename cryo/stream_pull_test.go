package cryo_test

import (
	"fmt"
	"io"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/cryotest"
	"github.com/cryo-connect/cryo-connect/internal/wire"
)

// pullStreams has a session ask to pull, of a raw peer.
func pullStreams(t *testing.T, s *cryo.Session, peer *cryotest.Peer) {
	t.Helper()
	asking := start(func() error { return s.PullStreams(t.Context()) })
	f := peer.WantType("TX_FLOW", wire.TxFlow)
	require.Equal(t, wire.FlowPull, f.Flow)
	asking.wantBlocked(t)
	peer.Ack(f)
	asking.wantSuccess(t)
}

// pull is a raw peer's stream that our session pulls.
type pull struct {
	*cryotest.Peer
	t      *testing.T
	st     *cryo.IncomingStream
	number uint32 // of our next TX_FETCH or TX_CANCEL
}

// pullFrom has the raw peer announce a stream of that size, as number 5.
func pullFrom(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer, size int32) *pull {
	t.Helper()
	pullStreams(t, s, peer)
	peer.WriteFrames(txStart(1, 5, size, "n"))
	p := &pull{Peer: peer, t: t, st: acceptStream(t, s), number: end.first + 1}
	require.Equal(t, int64(size), p.st.Size())
	peer.WantIdle("nothing is fetched before the first Read", time.Hour)
	_, err := p.st.Read(nil)
	require.NoError(t, err)
	peer.WantFrame("TX_START acknowledged", cryotest.Acked(1))
	return p
}

// wantFetch wants TX_FETCH next, and acknowledges it.
func (p *pull) wantFetch(start, end uint32) {
	p.t.Helper()
	p.WantFrame("TX_FETCH", txFetch(p.number, 5, start, end))
	p.WriteFrames(cryotest.Acked(p.number))
	p.number++
}

func (p *pull) wantCancel() {
	p.t.Helper()
	p.WantFrame("TX_CANCEL", txCancel(p.number, 5))
	p.WriteFrames(cryotest.Acked(p.number))
	p.number++
}

func TestPullingFetchesOneChunkAtATimeAndNeverPastTheEnd(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		p := pullFrom(t, end, s, peer, 10)
		for i, chunk := range []string{"a", "bcdef", "", "gh", "ij"} { // of any size
			p.wantFetch(uint32(i), uint32(i+1))
			p.WantIdle("no second TX_FETCH meanwhile", time.Second)
			p.WriteFrames(txChunk(5, uint32(i), chunk))
		}
		p.WantIdle("all 10 bytes are there", time.Hour)
		require.NoError(t, wantRest(t, p.st, "abcdefghij"), "whole without TX_FINISH")
		require.NoError(t, p.st.Ack())
		p.WantIdle("TX_FINISH has not come", time.Hour)
		p.WriteFrames(txFinish(2, 5))
		p.WantFrame("TX_FINISH acknowledged", cryotest.Acked(2))
		p.WriteFrames(txFinish(3, 5))
		p.WantIdle("once", instant)
	})
}

func TestPulledStreamIsFinishedBeforeOrBehindAck(t *testing.T) {
	for _, ending := range []string{"TX_FINISH, Ack", "TX_FINISH, Reject", "Reject, TX_FINISH"} {
		t.Run(ending, func(t *testing.T) {
			atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
				p := pullFrom(t, end, s, peer, 3)
				p.wantFetch(0, 1)
				p.WriteFrames(txChunk(5, 0, "abc"))
				require.NoError(t, wantRest(t, p.st, "abc"))
				if strings.HasPrefix(ending, "TX_FINISH") {
					p.WriteFrames(txFinish(2, 5))
					p.WantIdle("not acknowledged by itself", instant)
				}
				if strings.HasSuffix(ending, "Ack") {
					require.NoError(t, p.st.Ack())
					p.WantFrame("TX_FINISH acknowledged", cryotest.Acked(2))
					return
				}
				require.NoError(t, p.st.Close())
				p.wantCancel()
				p.WriteFrames(txFinish(2, 5))
				p.WantIdle("TX_FINISH is never acknowledged", time.Hour)
			})
		})
	}
}

// TX_FINISH may come in the moment in which the stream is acknowledged.
func TestEachTXFinishOfAStreamIsAcknowledgedOnce(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		pullStreams(t, s, peer)
		for i := range uint32(300) {
			peer.WriteFrames(txStart(1, 5, 1, ""))
			st := acceptStream(t, s)
			read := start(func() error { return wantRest(t, st, "x") })
			peer.WantFrame("TX_START acknowledged", cryotest.Acked(1))
			peer.WantType("TX_FETCH", wire.TxFetch)
			peer.WriteFrames(txChunk(5, 0, "x"))
			read.wantSuccess(t)

			acknowledging := start(st.Ack)
			peer.WriteFrames(txFinish(1000+i, 5))
			acknowledging.wantSuccess(t)
			peer.WantFrame("TX_FINISH acknowledged", cryotest.Acked(1000+i))
			peer.WriteFrames(txFinish(2, 5))
			peer.WantIdle("once", instant)
		}
	})
}

func TestEmptyStreamIsPulledByAnEmptyRange(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		p := pullFrom(t, end, s, peer, 0)
		p.wantFetch(0, 0)
		read := start(func() error { return wantRest(t, p.st, "") })
		read.wantBlocked(t)
		p.WriteFrames(txFinish(2, 5))
		read.wantSuccess(t)
		require.NoError(t, p.st.Ack())
		p.WantFrame("TX_FINISH acknowledged", cryotest.Acked(2))
	})
}

func TestPulledStreamOfAnotherSizeIsBroken(t *testing.T) {
	for name, c := range map[string]struct {
		size   int32
		frames []wire.Frame
		came   string
	}{
		"short":             {4, []wire.Frame{txChunk(5, 0, "abc"), txFinish(2, 5)}, "abc"},
		"nothing of it":     {4, []wire.Frame{txFinish(2, 5)}, ""},
		"long":              {4, []wire.Frame{txChunk(5, 0, "abcde")}, ""},
		"long by a chunk":   {4, []wire.Frame{txChunk(5, 0, "abcd"), txChunk(5, 1, "e")}, "abcd"},
		"not empty":         {0, []wire.Frame{txChunk(5, 0, "a")}, ""},
		"another chunk":     {4, []wire.Frame{txChunk(5, 1, "abcd")}, ""},
		"more than fetched": {4, []wire.Frame{txChunk(5, 0, "ab"), txChunk(5, 0, "ab")}, "ab"},
	} {
		t.Run(name, func(t *testing.T) {
			atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
				p := pullFrom(t, end, s, peer, c.size)
				p.wantFetch(0, uint32(min(c.size, 1)))
				p.WriteFrames(c.frames...)
				f := p.Next("TX_CANCEL, or one TX_FETCH before it")
				if f.Type == wire.TxFetch {
					f = p.WantType("TX_CANCEL", wire.TxCancel)
				}
				require.Equal(t, wire.TxCancel, f.Type)
				require.Equal(t, uint32(5), f.Tx)
				require.ErrorIs(t, wantRest(t, p.st, c.came), cryo.ErrStreamBroken)
				require.ErrorIs(t, p.st.Ack(), cryo.ErrStreamBroken)
				p.WriteFrames(txFinish(3, 5))
				p.WantIdle("nothing is acknowledged", time.Hour)
				wantFree(t, s, peer, cryo.DefaultMaxBufferBytes, 0)
			})
		})
	}
}

func TestPullingWaitsForTheReader(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		const chunk = 100 << 10
		p := pullFrom(t, end, s, peer, 10*chunk)
		for i := range uint32(3) {
			p.wantFetch(i, i+1)
			p.WriteFrames(txChunk(5, i, strings.Repeat("x", chunk)))
		}
		p.WantIdle("300 KiB are enough unread", instant)
		for i := uint32(3); i < 10; i++ {
			wantBytes(t, p.st, strings.Repeat("x", chunk))
			p.wantFetch(i, i+1)
			p.WriteFrames(txChunk(5, i, strings.Repeat("x", chunk)))
		}
		require.NoError(t, wantRest(t, p.st, strings.Repeat("x", 3*chunk)))
	})
}

func TestStreamsWithoutASizeAreNotPulled(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		before := incoming(t, s, peer, 1, 0) // started before the peer knows of the flow
		pullStreams(t, s, peer)
		peer.WriteFrames(txChunk(0, 1, "abc"), txFinish(2, 0))
		require.NoError(t, wantRest(t, before, "abc"))
		after := incoming(t, s, peer, 3, 1)
		peer.WriteFrames(txChunk(1, 1, "abc"), txFinish(4, 1))
		require.NoError(t, wantRest(t, after, "abc"))
		peer.WantIdle("no TX_FETCH", time.Hour)
	})
}

func TestAnnouncedSizeIsCheckedForPushedStreams(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		for tx, chunk := range []string{"abc", "abcd", "abcde"} {
			peer.WriteFrames(txStart(1, uint32(tx), 4, ""))
			st := acceptStream(t, s)
			require.Equal(t, int64(4), st.Size())
			_, err := st.Read(nil)
			require.NoError(t, err)
			peer.WantFrame("TX_START acknowledged, and no TX_FETCH", cryotest.Acked(1))
			peer.WriteFrames(txChunk(uint32(tx), 0, chunk))
			read := start(func() error { _, err := io.ReadAll(st); return err })
			if chunk != "abcde" {
				read.wantBlocked(t) // only TX_FINISH makes it whole
			}
			peer.WriteFrames(txFinish(2, uint32(tx)))
			if chunk == "abcd" {
				read.wantSuccess(t)
				continue
			}
			require.ErrorIs(t, read.result(t), cryo.ErrStreamBroken)
			peer.WantType("TX_CANCEL", wire.TxCancel)
		}
	})
}

// Two sessions of ours. A stream may meet TX_FLOW on its way.
func TestPullingMayBeginWhileStreamsStart(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		p := connect(t, quiet, quiet)
		const streams = 200
		sending := start(func() error {
			for i := range streams {
				name := fmt.Sprint(i)
				err := p.client.SendStream(t.Context(), strings.NewReader(strings.Repeat(name, i)), &cryo.StreamOptions{Name: name, ChunkBytes: 100})
				if err != nil {
					return fmt.Errorf("stream %d: %w", i, err)
				}
			}
			return nil
		})
		var pulling *call
		pulled := 0
		for i := range streams {
			if i == streams/4 {
				pulling = start(func() error { return p.server.PullStreams(t.Context()) })
			}
			st := acceptStream(t, p.server)
			if st.Size() >= 0 {
				pulled++
			}
			require.Equal(t, fmt.Sprint(i), st.Name())
			require.NoError(t, wantRest(t, st, strings.Repeat(st.Name(), i)))
			require.NoError(t, st.Ack())
		}
		pulling.wantSuccess(t)
		require.GreaterOrEqual(t, pulled, streams/2)
		require.Less(t, pulled, streams)
		sending.wantSuccess(t)
		synctest.Wait()
	})
}
