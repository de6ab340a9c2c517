package cryo_test

import (
	"testing"
	"testing/synctest"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/cryotest"
	"github.com/cryo-connect/cryo-connect/internal/wire"
)

// The end of a session interrupts the reading of a large payload, and of nothing else: that
// payload may be whole by then, and an acknowledgement be read.
func TestOnlyALargePayloadIsInterrupted(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		send := start(func() error { return s.SendText(t.Context(), "hello") })
		text := peer.WantType("the text", wire.UTF8)
		b := raw(end, 0x82, encoded(t, peer, cryotest.Acked(text.Ack)))
		sends(t, peer, b[:len(b)-1])
		closing := start(func() error { return s.Close(t.Context(), "") })
		closing.wantBlocked(t)
		s.Interrupt()
		synctest.Wait()
		sends(t, peer, b[len(b)-1:])
		send.wantSuccess(t)
		sends(t, peer, raw(end, 0x88, nil))
		closing.wantSuccess(t)
	})
}
