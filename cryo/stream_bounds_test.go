package cryo_test

import (
	"errors"
	"io"
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

func TestNoMoreStreamsAreOpenThanMayBe(t *testing.T) {
	two := quiet
	two.MaxOpenStreams = 2
	atBothEnds(t, two, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		for tx := range uint32(5) {
			peer.WriteFrames(txStart(10+tx, tx, -1, "n"))
		}
		first, second := acceptStream(t, s), acceptStream(t, s)
		finish := func() error {
			peer.WriteFrames(txFinish(20, 0))
			_, err := io.ReadAll(first)
			return errors.Join(err, first.Ack())
		}
		for i, settle := range []func() error{second.Close, finish} {
			var st *cryo.IncomingStream
			waiting := start(func() (err error) {
				st, err = s.AcceptStream(t.Context(), "n")
				return err
			})
			time.Sleep(time.Hour)
			waiting.wantBlocked(t)
			require.NoError(t, settle())
			waiting.wantSuccess(t)
			require.Equal(t, uint32(2+i), st.Tx(), "it came later")
		}
		peer.WantFrame("of the second", txCancel(end.first, 1))
		peer.WantFrame("of the first", cryotest.Acked(10))
		peer.WantFrame("of all of the first", cryotest.Acked(20))
		wantNoStream(t, s)
		s.Refuse(true)
		peer.WantFrame("the one that still waits", txCancel(end.first+1, 4))
		s.Refuse(false)
		wantNoStream(t, s)
	})
}

func TestABrokenStreamKeepsItsPlaceUntilItIsSettled(t *testing.T) {
	one := quiet
	one.MaxOpenStreams = 1
	atBothEnds(t, one, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		st := incoming(t, s, peer, 1, 0)
		peer.WriteFrames(txChunk(0, 7, "x"), txStart(2, 1, -1, ""))
		peer.WantFrame("TX_CANCEL", txCancel(end.first, 0))
		wantNoStream(t, s)
		require.ErrorIs(t, st.Ack(), cryo.ErrStreamBroken)
		require.Equal(t, uint32(1), acceptStream(t, s).Tx())
	})
}

func TestAFailedStreamWhoseErrorWasReadNoLongerCountsAsOpen(t *testing.T) {
	limited := quiet
	limited.MaxOpenStreams = 1
	limited.MaxStreamBytes = 10
	limited.StreamIdleTimeout = time.Minute
	for name, failure := range map[string]struct {
		cause func(peer *cryotest.Peer, tx uint32)
		want  error
	}{
		"broken": {
			func(peer *cryotest.Peer, tx uint32) { peer.WriteFrames(txChunk(tx, 7, "out of order")) },
			cryo.ErrStreamBroken,
		},
		"too long": {
			func(peer *cryotest.Peer, tx uint32) { peer.WriteFrames(txChunk(tx, 1, "more than ten")) },
			cryo.ErrStreamTooLong,
		},
		"idle": {func(*cryotest.Peer, uint32) {}, cryo.ErrStreamIdle},
	} {
		t.Run(name, func(t *testing.T) {
			atBothEnds(t, limited, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
				for i := range uint32(4) {
					st := incoming(t, s, peer, 10+i, i)
					failure.cause(peer, i)
					require.ErrorIs(t, wantRest(t, st, ""), failure.want)
					peer.WantType("TX_CANCEL", wire.TxCancel)
					if i%2 == 0 {
						require.ErrorIs(t, st.Ack(), failure.want, "this frees no second slot")
					}
				}
				incoming(t, s, peer, 200, 500)
				peer.WriteFrames(txStart(201, 501, -1, "in"))
				wantNoStream(t, s)
			})
		})
	}
}

func TestMoreThan256StreamsAreNotKeptWaiting(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		for tx := range uint32(256) {
			peer.WriteFrames(txStart(1, tx, -1, ""))
		}
		peer.WantIdle("256 wait", time.Hour)
		for i := range uint32(10) {
			peer.WriteFrames(txStart(1, 256+i, -1, ""))
			peer.WantFrame("TX_CANCEL", txCancel(end.first+i, 256+i))
		}
		require.Zero(t, acceptStream(t, s).Tx())
		peer.WriteFrames(txStart(1, 300, -1, ""))
		peer.WantIdle("a place was free", time.Hour)
		s.Refuse(true)
		for range 256 {
			peer.WantType("TX_CANCEL of all of them", wire.TxCancel)
		}
		peer.WantIdle("and no more", instant)
	})
}

func TestNoMoreSettledStreamsAreRememberedThan1024(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		setIncomingFlow(t, s, peer, cryo.FlowPull)
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

func TestAStreamThatIsTooLongIsCancelledAfterWhatIsAllowed(t *testing.T) {
	six := quiet
	six.MaxStreamBytes = 6
	atBothEnds(t, six, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		fits := incoming(t, s, peer, 1, 0)
		peer.WriteFrames(txChunk(0, 1, "abcde"), txChunk(0, 2, ""), txFinish(2, 0))
		require.NoError(t, wantRest(t, fits, "abcde"))

		long := incoming(t, s, peer, 1, 1)
		peer.WriteFrames(txChunk(1, 1, "abc"), txChunk(1, 2, "def"), txChunk(1, 3, "g"), txFinish(3, 1))
		peer.WantFrame("TX_CANCEL", txCancel(end.first, 1))
		require.ErrorIs(t, wantRest(t, long, "abc"), cryo.ErrStreamTooLong)
		require.Equal(t, int64(4), long.Received())
		require.ErrorIs(t, long.Ack(), cryo.ErrStreamTooLong)
		peer.WantIdle("TX_FINISH is never acknowledged", time.Hour)
		wantFree(t, s, peer, cryo.DefaultMaxBufferBytes, 0)
	})
}

func TestAnEndlessStreamIsTakenByDefault(t *testing.T) {
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

func TestASilentStreamIsCancelled(t *testing.T) {
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
		require.EqualError(t, err, "the stream fell silent for 10s after 3 bytes")
		peer.WriteFrames(txChunk(0, 3, "late"), txFinish(2, 0))
		require.ErrorIs(t, st.Ack(), cryo.ErrStreamIdle)
		peer.WantIdle("TX_FINISH is never acknowledged", time.Hour)
		serving(t, s, peer)
	})
}

func TestEmptyChunksKeepNoStreamOpen(t *testing.T) {
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

func TestAStreamIsNotSilentWhileItIsOurTurn(t *testing.T) {
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
		s.Hold(100_000)
		stopReading(peer)
		time.Sleep(time.Hour + time.Second)
		peer.Skip() // a dialling end says that it is alive
		s.Release(100_000)
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

// A pause that ends just before the time-out must not look like silence.
func TestAPauseOfReadingIsNoSilenceAfterwards(t *testing.T) {
	idle := quiet
	idle.StreamIdleTimeout = 10 * time.Second
	idle.MaxBufferBytes = 100_000
	atBothEnds(t, idle, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		st := incoming(t, s, peer, 1, 0)
		s.Hold(100_000)
		stopReading(peer)
		time.Sleep(9 * time.Second)
		peer.Skip()
		s.Release(100_000)
		time.Sleep(9 * time.Second)
		peer.WriteFrames(txChunk(0, 1, "abc"), txFinish(2, 0))
		require.NoError(t, wantRest(t, st, "abc"))
		require.NoError(t, st.Ack())
		peer.WantFrame("TX_FINISH acknowledged", cryotest.Acked(2))
	})
}

// stopReading sends what a session without room waits at.
func stopReading(peer *cryotest.Peer) { peer.WriteFrames(txChunk(unknownTx, 0, "")) }

func TestASilentPulledStreamIsCancelled(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		p := pullFrom(t, end, s, peer, 10)
		p.wantFetch(0, 1)
		p.WriteFrames(txChunk(5, 0, "abc"))
		p.wantFetch(1, 2)
		require.NoError(t, s.Err())
		wantBytes(t, p.st, "abc")
		p.WantIdle("silence", cryo.DefaultStreamIdleTimeout-instant)
		p.wantCancel()
		require.ErrorIs(t, wantRest(t, p.st, ""), cryo.ErrStreamIdle)
	})
}

func TestALongNameIsRefusedHoweverLongItIs(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		for i := range uint32(3) {
			peer.WriteFrames(txStart(1, i, -1, strings.Repeat("n", 1025<<(6*i))))
			peer.WantFrame("TX_CANCEL", txCancel(end.first+i, i))
		}
		serving(t, s, peer)
	})
}

func TestAnOpenStreamKeepsNoEndedSessionInMemory(t *testing.T) {
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
