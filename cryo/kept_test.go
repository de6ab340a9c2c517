package cryo_test

import (
	"strings"
	"testing"
	"testing/synctest"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/cryotest"
)

// What nobody keeps gives its memory back. That must never be the memory of a
// message that came before it.
func TestAMessageKeepsItsMemoryWhateverComesBehindIt(t *testing.T) {
	for name, dropped := range map[string][]cryo.Frame{
		"chunks of no stream": {
			{Type: cryo.TypeTxChunk, Tx: 1, Seq: 0, Payload: make([]byte, cryo.DefaultChunkBytes)},
			{Type: cryo.TypeTxChunk, Tx: 1, Seq: 1, Payload: make([]byte, cryo.DefaultChunkBytes)},
		},
		"small frames": {cryotest.Ping(1), cryotest.Acked(1), cryotest.Ping(2)},
		"nothing":      nil,
	} {
		t.Run(name, func(t *testing.T) {
			atBothEnds(t, cryo.SessionOptions{}, func(t *testing.T, _ end, s *cryo.Session, peer *cryotest.Peer) {
				peer.Read()
				var kept []*cryo.Message
				for i, text := range []string{"short", strings.Repeat("long ", 50), "", "next", strings.Repeat("x", 20_000), "last"} {
					peer.WriteFrames(cryotest.Text(uint32(100+i), text))
					kept = append(kept, receive(t, s))
					peer.WriteFrames(dropped...)
					synctest.Wait()
				}
				var got []string
				for _, m := range kept {
					got = append(got, string(m.Payload))
				}
				require.Equal(t, []string{"short", strings.Repeat("long ", 50), "", "next", strings.Repeat("x", 20_000), "last"}, got)
			})
		})
	}
}
