package cryo_test

import (
	"context"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/cryotest"
	"github.com/cryo-connect/cryo-connect/internal/wire"
)

// A fetch is progress only when it goes further than the ones before.
func TestRepeatedFetchesDoNotExtendTheStepTimeout(t *testing.T) {
	for _, end0 := range []uint32{0, 1} {
		synctest.Test(t, func(t *testing.T) {
			s, peer := dialled(t, cryo.DialOptions{SessionOptions: quiet})
			setFlow(peer, wire.FlowPull)
			send := start(func() error {
				return s.SendStream(context.Background(), strings.NewReader("abcdefghij"), &cryo.StreamOptions{ChunkBytes: 4, StepTimeout: time.Second})
			})
			f := peer.WantType("start", wire.TxStart)
			peer.Ack(f)
			for range 1000 {
				time.Sleep(900 * time.Millisecond)
				peer.WriteFrames(txFetch(50, f.Tx, 0, end0))
				synctest.Wait()
				peer.Skip()
				select {
				case <-send.done:
					return
				default:
				}
			}
			cut(s)
			<-send.done
			t.Errorf("still sending after 900 s with a StepTimeout of 1 s (fetch [0,%d))", end0)
		})
	}
}

func TestUnreadStreamIsBoundedInASendOnlySession(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		opts := bounded()
		s, peer := dialled(t, cryo.DialOptions{SessionOptions: opts})
		st := incoming(t, s, peer, 1, 0)
		s.SetSendOnly(true)
		go func() {
			for i := range uint32(1000) {
				if peer.TryWriteFrames(txChunk(0, i+1, strings.Repeat("x", 10_000))) != nil {
					return
				}
			}
		}()
		synctest.Wait()
		got := st.Received()
		cut(s)
		require.Less(t, got, int64(200_000), "MaxBufferBytes is 90,000")
	})
}

func TestErrorIsNotAnsweredWithAnError(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, peer := dialled(t, cryo.DialOptions{SessionOptions: quiet})
		peer.WriteFrames(cryotest.Error(0, "app says"))
		m := receive(t, s)
		require.NoError(t, m.Reject("no"))
		peer.WantIdle("an ERROR is not answered with an ERROR", time.Second)
	})
}

func TestMessageWithAReplacedPayloadReleasesItsReservation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, peer := dialled(t, cryo.DialOptions{SessionOptions: bounded()})
		peer.WriteFrames(cryotest.Text(0, strings.Repeat("x", 1000)))
		m := receive(t, s)
		m.Payload = nil
		require.NoError(t, m.Ack())
		peer.WantFrame("ack", cryotest.Acked(0))
		wantFree(t, s, peer, 90_000, 0)
	})
}

// A message's memory is a part of a block. Frames that nobody keeps must not use up
// the rest of it, or what MaxBufferBytes counts would be a small part of what is held.
func TestRetainedMessageRetainsLittleElse(t *testing.T) {
	atBothEnds(t, cryo.SessionOptions{}, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		const messages = 100
		var encoded []byte
		add := func(f wire.Frame) {
			f.SID = sid
			b, err := wire.Append(nil, &f)
			require.NoError(t, err)
			encoded = append(encoded, raw(end, 0x82, b)...)
		}
		add(cryotest.Binary(1, "x"))
		for range 1000 {
			add(cryotest.Acked(7))
		}
		before := heap()
		for range messages {
			_, err := peer.Conn().Write(encoded)
			require.NoError(t, err)
		}
		synctest.Wait()
		kept, err := s.ReceiveBatch(t.Context(), messages)
		require.NoError(t, err)
		require.Less(t, heap()-before, int64(512<<10))
		require.Len(t, kept, messages)
	})
}

func TestTruncatedTextRetainsNothingElse(t *testing.T) {
	atBothEnds(t, cryo.SessionOptions{}, func(t *testing.T, _ end, s *cryo.Session, peer *cryotest.Peer) {
		const messages = 20
		batch := make([]cryo.OutMessage, messages)
		for i := range batch {
			batch[i].Kind = cryo.KindText
		}
		before := heap()
		sending := start(func() error { return s.SendBatch(t.Context(), batch) })
		for range batch {
			peer.WriteFrames(cryotest.Error(peer.WantType("a text", wire.UTF8).Ack, strings.Repeat("no ", 512<<10)))
		}
		err := sending.result(t)
		require.Less(t, heap()-before, int64(4<<20))
		var failed *cryo.BatchError
		require.ErrorAs(t, err, &failed)
		var rejected *cryo.RejectedError
		require.ErrorAs(t, failed.Errs[messages-1], &rejected)
		require.Len(t, rejected.Text, 1024)
	})
}
