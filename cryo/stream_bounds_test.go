package cryo_test

import (
	"runtime"
	"strings"
	"testing"
	"time"
	"weak"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/cryotest"
	"github.com/cryo-connect/cryo-connect/internal/wire"
)

func TestFailedStreamDoesNotCountAsOpen(t *testing.T) {
	for name, failure := range map[string]struct {
		cause func(peer *cryotest.Peer, tx uint32)
		want  error
	}{
		"broken": {
			func(peer *cryotest.Peer, tx uint32) { peer.WriteFrames(txChunk(tx, 7, "out of order")) },
			cryo.ErrStreamBroken,
		},
		"idle": {func(*cryotest.Peer, uint32) { time.Sleep(cryo.DefaultStreamIdleTimeout) }, cryo.ErrStreamIdle},
	} {
		t.Run(name, func(t *testing.T) {
			atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
				const number = 5
				var failed []*cryo.IncomingStream
				for range 300 {
					st := incoming(t, s, peer, 10, number)
					failure.cause(peer, number)
					require.Equal(t, uint32(number), peer.WantType("TX_CANCEL: the number is free", wire.TxCancel).Tx)
					failed = append(failed, st)
				}
				st := incoming(t, s, peer, 10, number)
				peer.WriteFrames(txFinish(11, number))
				require.NoError(t, wantRest(t, st, ""))
				for i, st := range failed {
					if i%2 == 0 {
						require.ErrorIs(t, wantRest(t, st, ""), failure.want)
					}
					require.ErrorIs(t, st.Ack(), failure.want)
					require.NoError(t, st.Close())
				}
				peer.WantIdle("nothing of them is acknowledged or cancelled again", time.Second)
				require.NoError(t, st.Ack(), "it is another stream")
				peer.WantFrame("TX_FINISH acknowledged", cryotest.Acked(11))
			})
		})
	}
}

func TestBrokenStreamIsCancelledOnce(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		for i := range uint32(200) {
			st := incoming(t, s, peer, 1, i)
			closing := start(st.Close)
			peer.WriteFrames(txChunk(i, 7, "out of order"), txFinish(2, i))
			closing.wantSuccess(t)
			require.Equal(t, i, peer.WantType("TX_CANCEL", wire.TxCancel).Tx)
			require.Error(t, st.Ack())
		}
		peer.WantIdle("once each, and nothing is acknowledged", instant)
	})
}

func TestMoreThan256StreamsAreCancelled(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		for tx := range uint32(256) {
			peer.WriteFrames(txStart(1, tx, -1, ""))
		}
		peer.WantIdle("256 wait", cryo.DefaultStreamIdleTimeout)
		for i := range uint32(10) {
			peer.WriteFrames(txStart(1, 256+i, -1, ""))
			peer.WantFrame("TX_CANCEL", txCancel(end.first+i, 256+i))
		}
		accepted := acceptStream(t, s)
		require.Zero(t, accepted.Tx())
		peer.WriteFrames(txStart(1, 300, -1, ""))
		peer.WantFrame("an open stream counts too", txCancel(end.first+10, 300))
		require.NoError(t, accepted.Close())
		peer.WantFrame("TX_CANCEL", txCancel(end.first+11, 0))
		peer.WriteFrames(txStart(1, 301, -1, ""))
		peer.WantIdle("a slot was free", instant)
		s.SetSendOnly(true)
		for range 256 {
			peer.WantType("TX_CANCEL of all of them", wire.TxCancel)
		}
		peer.WantIdle("and no more", instant)
	})
}

// A serial consumer may let streams wait for as long as it likes. Only where there are too
// many, those that nobody seems to want make way, the oldest first.
func TestOldestUnacceptedStreamIsEvictedFromAFullTable(t *testing.T) {
	var rejected []cryo.Kind
	counting := quiet
	counting.OnReject = func(_ *cryo.Session, kind cryo.Kind) { rejected = append(rejected, kind) }
	counting.StreamIdleTimeout = 10 * time.Second
	atBothEnds(t, counting, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		rejected = nil
		names := []string{"unwanted", "wanted"}
		for tx := range uint32(256) {
			peer.WriteFrames(txStart(1, tx, -1, names[tx%2]))
		}
		peer.WantIdle("none is cancelled for being waited with", 10*time.Second+instant)
		first := acceptStream(t, s, "unwanted")
		require.Zero(t, first.Tx())
		for i := range uint32(200) {
			peer.WriteFrames(txStart(1, 1000+i, -1, "wanted"))
			peer.WantFrame("the oldest that nobody has accepted", txCancel(end.first+i, 1+i))
		}
		require.Len(t, rejected, 200)
		require.Equal(t, cryo.KindStream, rejected[0])
		require.Equal(t, uint32(201), acceptStream(t, s, "wanted").Tx())
		require.Equal(t, uint32(202), acceptStream(t, s, "unwanted").Tx())
		for tx := uint32(203); tx < 256; tx++ {
			require.Equal(t, tx, acceptStream(t, s).Tx())
		}
		peer.WriteFrames(txStart(1, 2000, -1, "wanted"))
		peer.WantFrame("those that wait are too young", txCancel(end.first+200, 2000))
		require.Equal(t, uint32(1000), acceptStream(t, s).Tx())

		peer.WriteFrames(txChunk(1, 0, "late"), txFinish(2, 1))
		peer.WantIdle("nothing of those that were cancelled is acknowledged", time.Hour)
		peer.WriteFrames(txFinish(3, 0))
		reading := start(func() error { return wantRest(t, first, "") })
		peer.WantFrame("TX_START acknowledged: an accepted one stays", cryotest.Acked(1))
		reading.wantSuccess(t)
		require.NoError(t, first.Ack())
		peer.WantFrame("TX_FINISH acknowledged", cryotest.Acked(3))
	})
}

func TestRememberedStreamsAreBounded(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		pullStreams(t, s, peer)
		for tx := range uint32(1030) {
			peer.WriteFrames(txStart(1, tx, 1, ""))
			st := acceptStream(t, s)
			read := start(func() error { return wantRest(t, st, "x") })
			peer.WantFrame("TX_START acknowledged", cryotest.Acked(1))
			peer.WantType("TX_FETCH", wire.TxFetch)
			peer.WriteFrames(txChunk(tx, 0, "x"))
			read.wantSuccess(t)
			require.NoError(t, st.Ack(), "it is whole by its size")
		}
		for tx := range uint32(1030) {
			peer.WriteFrames(txFinish(tx, tx))
		}
		for tx := uint32(6); tx < 1030; tx++ {
			peer.WantFrame("TX_FINISH acknowledged", cryotest.Acked(tx))
		}
		peer.WantIdle("the first were forgotten", instant)
	})
}

func TestEndlessStreamIsReceivedByDefault(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		little := quiet
		little.MaxBufferBytes = 100_000
		p := connect(t, quiet, little)
		const size = 20 << 20
		sending := start(func() error {
			return p.client.SendStream(t.Context(), vast{size: size}.limited(), &cryo.StreamOptions{ChunkBytes: 1 << 20})
		})
		st := acceptStream(t, p.server)
		got := 0
		buf := make([]byte, 32<<10)
		for {
			n, err := st.Read(buf)
			got += n
			if err != nil {
				break
			}
		}
		require.Equal(t, size, got)
		require.NoError(t, st.Ack())
		sending.wantSuccess(t)
	})
}

func TestIdleStreamIsCancelled(t *testing.T) {
	idle := quiet
	idle.StreamIdleTimeout = 10 * time.Second
	atBothEnds(t, idle, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		peer.WriteFrames(txStart(1, 0, -1, ""))
		st := acceptStream(t, s)
		time.Sleep(time.Hour) // nothing may come before the first Read
		read := start(func() error { return wantRest(t, st, "abc") })
		peer.WantFrame("TX_START acknowledged", cryotest.Acked(1))
		for i, c := range []string{"a", "b", "c"} {
			time.Sleep(9 * time.Second)
			peer.WriteFrames(txChunk(0, uint32(i), c))
		}
		peer.WantIdle("no frame while chunks come", 10*time.Second-instant)
		peer.WantFrame("TX_CANCEL", txCancel(end.first, 0))
		err := read.result(t)
		require.ErrorIs(t, err, cryo.ErrStreamIdle)
		require.EqualError(t, err, "stream idle for 10s after 3 bytes")
		peer.WriteFrames(txChunk(0, 3, "late"), txFinish(2, 0))
		require.ErrorIs(t, st.Ack(), cryo.ErrStreamIdle)
		peer.WantIdle("TX_FINISH is never acknowledged", time.Hour)
		serving(t, s, peer)
	})
}

func TestStreamMayHaveItsOwnIdleTimeout(t *testing.T) {
	idle := quiet
	idle.StreamIdleTimeout = 10 * time.Second
	for name, c := range map[string]struct{ set, want time.Duration }{
		"shorter":       {time.Second, time.Second},
		"longer":        {time.Hour, time.Hour},
		"the session's": {0, 10 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			atBothEnds(t, idle, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
				peer.WriteFrames(txStart(1, 0, -1, ""))
				st := acceptStream(t, s)
				st.SetIdleTimeout(c.set)
				read := start(func() error { return wantRest(t, st, "") })
				peer.WantFrame("TX_START acknowledged", cryotest.Acked(1))
				peer.WantIdle("no TX_CANCEL yet", c.want-instant)
				peer.WantFrame("TX_CANCEL", txCancel(end.first, 0))
				require.ErrorIs(t, read.result(t), cryo.ErrStreamIdle)
			})
		})
	}
}

func TestEmptyChunksDoNotExtendTheIdleTimeout(t *testing.T) {
	idle := quiet
	idle.StreamIdleTimeout = 10 * time.Second
	atBothEnds(t, idle, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		st := incoming(t, s, peer, 1, 0)
		time.Sleep(9 * time.Second)
		peer.WriteFrames(txChunk(0, 1, ""))
		time.Sleep(time.Second)
		peer.WantFrame("TX_CANCEL", txCancel(end.first, 0))
		require.ErrorIs(t, wantRest(t, st, ""), cryo.ErrStreamIdle)
	})
}

func TestStreamIsNotIdleWhileItsBytesAreUnread(t *testing.T) {
	idle := quiet
	idle.StreamIdleTimeout = 10 * time.Second
	idle.MaxBufferBytes = 100_000
	atBothEnds(t, idle, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		unread := incoming(t, s, peer, 1, 0)
		peer.WriteFrames(txChunk(0, 1, "abc"))
		peer.WantIdle("bytes wait to be read", time.Hour)
		wantBytes(t, unread, "abc")
		peer.WantIdle("then time begins", 10*time.Second-instant)
		peer.WantFrame("and ends", txCancel(end.first, 0))

		paused := incoming(t, s, peer, 1, 1)
		release := s.Reserve(100_000)
		stopReading(peer)
		time.Sleep(time.Hour + time.Second)
		peer.Skip() // keepalives of a dialling end
		release()
		readsOn(t, s, peer)
		peer.WantIdle("time begins when reading goes on", 10*time.Second-instant)
		peer.WantFrame("and ends", txCancel(end.first+1, 1))
		require.ErrorIs(t, wantRest(t, paused, ""), cryo.ErrStreamIdle)

		whole := incoming(t, s, peer, 1, 2)
		peer.WriteFrames(txFinish(2, 2))
		require.NoError(t, wantRest(t, whole, ""))
		peer.WantIdle("it is our turn to settle it", time.Hour)
		require.NoError(t, whole.Ack())
		peer.WantFrame("TX_FINISH acknowledged", cryotest.Acked(2))
		require.NoError(t, unread.Close())
		require.NoError(t, paused.Close())
	})
}

// A pause that ends just before the time-out must not count as idle.
func TestPausedReadsDoNotCountAsIdle(t *testing.T) {
	idle := quiet
	idle.StreamIdleTimeout = 10 * time.Second
	idle.MaxBufferBytes = 100_000
	atBothEnds(t, idle, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		st := incoming(t, s, peer, 1, 0)
		release := s.Reserve(100_000)
		stopReading(peer)
		time.Sleep(9 * time.Second)
		peer.Skip()
		release()
		readsOn(t, s, peer)
		time.Sleep(9 * time.Second)
		peer.WriteFrames(txChunk(0, 1, "abc"), txFinish(2, 0))
		require.NoError(t, wantRest(t, st, "abc"))
		require.NoError(t, st.Ack())
		peer.WantFrame("TX_FINISH acknowledged", cryotest.Acked(2))
	})
}

// stopReading sends what a session waits at whose receive buffer is full.
func stopReading(peer *cryotest.Peer) { peer.WriteFrames(cryotest.Text(4711, "waits")) }

// readsOn wants a session to read that.
func readsOn(t *testing.T, s *cryo.Session, peer *cryotest.Peer) {
	t.Helper()
	require.NoError(t, receive(t, s).Ack())
	peer.WantFrame("the acknowledgement", cryotest.Acked(4711))
}

func TestIdlePulledStreamIsCancelled(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		p := pullFrom(t, end, s, peer, 10)
		p.wantFetch(0, 1)
		p.WriteFrames(txChunk(5, 0, "abc"))
		p.wantFetch(1, 2)
		require.NoError(t, s.Err())
		wantBytes(t, p.st, "abc")
		p.WantIdle("no TX_CANCEL yet", cryo.DefaultStreamIdleTimeout-instant)
		p.wantCancel()
		require.ErrorIs(t, wantRest(t, p.st, ""), cryo.ErrStreamIdle)
	})
}

func TestStreamWithALongNameIsCancelled(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		for i := range uint32(3) {
			peer.WriteFrames(txStart(1, i, -1, strings.Repeat("n", 1025<<(6*i))))
			peer.WantFrame("TX_CANCEL", txCancel(end.first+i, i))
		}
		serving(t, s, peer)
	})
}

func TestOpenStreamDoesNotRetainAnEndedSession(t *testing.T) {
	long := quiet
	long.StreamIdleTimeout = 24 * time.Hour
	for name, run := range map[string]func(s *cryo.Session, peer *cryotest.Peer) *cryo.IncomingStream{
		"a stream that is read": func(s *cryo.Session, peer *cryotest.Peer) *cryo.IncomingStream {
			return incoming(t, s, peer, 1, 0)
		},
		"a stream that has failed": func(s *cryo.Session, peer *cryotest.Peer) *cryo.IncomingStream {
			st := incoming(t, s, peer, 1, 0)
			peer.WriteFrames(txChunk(0, 7, "out of order"))
			require.ErrorIs(t, wantRest(t, st, ""), cryo.ErrStreamBroken)
			return st
		},
	} {
		t.Run(name, func(t *testing.T) {
			var (
				stream  weak.Pointer[cryo.IncomingStream]
				session weak.Pointer[cryo.Session]
			)
			func() {
				s, peer := accepted(t, cryo.ServerOptions{SessionOptions: long})
				stream, session = weak.Make(run(s, peer)), weak.Make(s)
				cut(s)
			}()
			require.Eventually(t, func() bool {
				runtime.GC()
				return stream.Value() == nil && session.Value() == nil
			}, cryotest.Patience, time.Millisecond)
		})
	}
}
