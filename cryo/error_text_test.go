package cryo_test

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/cryotest"
)

// What replaces invalid bytes is larger than they are. Large payloads may take no more than
// was reserved for them while they came in.
func TestLargeErrorWithInvalidTextUsesNoMoreThanItsSize(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, _ end, s *cryo.Session, peer *cryotest.Peer) {
		for _, tt := range []struct{ sent, want string }{
			{strings.Repeat("a\xff", 10), strings.Repeat("a\uFFFD", 10)},
			{strings.Repeat("a\xff", 10_000), strings.Repeat("a\uFFFD", 10_000)},
			{strings.Repeat("a\xff", 100_000), strings.Repeat("a\uFFFD", 50_000)},
			{strings.Repeat("ä", 100_000) + "\x00\x00", strings.Repeat("ä", 100_000)},
		} {
			peer.WriteFrames(cryotest.Error(1000, tt.sent))
			m := receive(t, s)
			require.Equal(t, tt.want, string(m.Payload))
			require.GreaterOrEqual(t, s.Held(), int64(len(m.Payload)))
			require.LessOrEqual(t, s.Held(), int64(max(64<<10, len(tt.sent))+256))
			require.NoError(t, m.Ack())
			require.Zero(t, s.Held())
		}
	})
}
