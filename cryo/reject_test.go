package cryo_test

import (
	"bytes"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"testing/synctest"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/cryotest"
	"github.com/cryo-connect/cryo-connect/internal/wire"
)

func TestTextsOfRejectionsAreValidUTF8AndShort(t *testing.T) {
	atBothEnds(t, cryo.SessionOptions{}, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		peer.WriteFrames(cryotest.Text(1, ""), cryotest.Text(2, ""))
		require.NoError(t, receive(t, s).Reject(strings.Repeat("€", 1000)))
		peer.WantFrame("1 KiB of whole characters", cryotest.Error(1, strings.Repeat("€", 341)))
		require.NoError(t, receive(t, s).Reject("not \xff text"))
		peer.WantFrame("valid UTF-8", cryotest.Error(2, "not \uFFFD text"))
	})
}

func TestErrorsOfThePeersApplicationAreMessages(t *testing.T) {
	atBothEnds(t, cryo.SessionOptions{}, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		peer.WriteFrames(
			cryotest.Error(0, "out of paper"),
			cryotest.Error(end.first^0x80000000, "\xc3\xa4\x00\x00"), // the other end's range
			cryotest.Error(end.first, "with a number of ours that was not issued yet"),
		)
		m := receive(t, s)
		require.Equal(t, cryo.KindError, m.Kind)
		require.Equal(t, "out of paper", string(m.Payload))
		peer.WantIdle("no acknowledgement yet", instant)
		require.NoError(t, m.Ack())
		peer.WantFrame("the acknowledgement", cryotest.Acked(0))

		m = receive(t, s)
		require.Equal(t, "ä", string(m.Payload))
		require.NoError(t, m.Ack())
		peer.WantFrame("the acknowledgement", cryotest.Acked(end.first^0x80000000))
		require.Equal(t, end.first, receive(t, s).Number())
	})
}

func TestSessionThatOnlySendsRejectsMessages(t *testing.T) {
	lines := &logged{}
	opts := cryo.SessionOptions{SendOnly: true, Logger: slog.New(lines.handler())}
	atBothEnds(t, opts, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		peer.WriteFrames(cryotest.Text(3, "hello"), cryotest.Binary(4, "hello"))
		peer.WantFrame("a rejection", cryotest.Error(3, "this session receives no messages"))
		peer.WantFrame("a rejection", cryotest.Error(4, "this session receives no messages"))

		lines.reset()
		for range 5 {
			peer.WriteFrames(cryotest.Error(5, "out of paper "+strings.Repeat("!", 5000)))
		}
		peer.WantIdle("neither rejection nor acknowledgement of an error", instant)
		require.Equal(t, 1, strings.Count(lines.text(), "out of paper"), "logged once a second")
		require.Less(t, len(lines.text()), 2000, "and not at length")

		send := start(func() error { return s.SendText(t.Context(), "still sends") })
		peer.Ack(peer.WantType("the text", wire.UTF8))
		send.wantSuccess(t)
	})
}

func TestSessionCanStopAndBeginReceiving(t *testing.T) {
	atBothEnds(t, cryo.SessionOptions{}, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		peer.WriteFrames(cryotest.Text(1, "taken"), cryotest.Text(2, "queued"), cryotest.Text(3, "queued"))
		taken := receive(t, s)
		synctest.Wait()
		s.SetSendOnly(true)
		peer.WantFrame("a rejection of what waits", cryotest.Error(2, "this session receives no messages"))
		peer.WantFrame("a rejection of what waits", cryotest.Error(3, "this session receives no messages"))
		peer.WriteFrames(cryotest.Text(4, "rejected"))
		peer.WantFrame("a rejection of what comes", cryotest.Error(4, "this session receives no messages"))
		require.NoError(t, taken.Ack())
		peer.WantFrame("the acknowledgement of what was taken", cryotest.Acked(1))

		s.SetSendOnly(false)
		peer.WriteFrames(cryotest.Text(5, "welcome"))
		require.Equal(t, "welcome", string(receive(t, s).Payload))
	})
}

// logged keeps what is logged.
type logged struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *logged) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *logged) handler() slog.Handler { return slog.NewTextHandler(l, nil) }

func (l *logged) text() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

func (l *logged) reset() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.buf.Reset()
}
