package cryo_test

import (
	"bytes"
	"io"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/cryotest"
	"github.com/cryo-connect/cryo-connect/internal/wire"
)

// pulled is a stream of ours that a raw peer pulls: "abcdefghij" in chunks of 4.
type pulled struct {
	*cryotest.Peer
	t       *testing.T
	sending *call
	number  uint32 // of its frames, the next one
	tx      uint32
}

func pulling(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) *pulled {
	t.Helper()
	setFlow(peer, wire.FlowPull)
	p := &pulled{Peer: peer, t: t, number: end.first}
	p.sending = start(func() error {
		return s.SendStream(t.Context(), strings.NewReader("abcdefghij"), &cryo.StreamOptions{Name: "n", ChunkBytes: 4})
	})
	p.WantFrame("TX_START with the size", txStart(p.number, 0, 10, "n"))
	p.WriteFrames(cryotest.Acked(p.number))
	p.number++
	return p
}

func (p *pulled) fetch(start, end uint32, chunks ...int) {
	p.t.Helper()
	p.WriteFrames(txFetch(50, p.tx, start, end))
	p.WantFrame("TX_FETCH acknowledged", cryotest.Acked(50))
	for _, i := range chunks {
		p.WantFrame("a chunk", txChunk(p.tx, uint32(i), []string{"abcd", "efgh", "ij"}[i]))
	}
}

func (p *pulled) finish() {
	p.t.Helper()
	p.WantFrame("TX_FINISH", txFinish(p.number, p.tx))
	p.sending.wantBlocked(p.t)
	p.WriteFrames(cryotest.Acked(p.number))
	p.sending.wantSuccess(p.t)
	p.WantIdle("nothing follows", time.Hour)
}

func TestPulledStreamIsSentAsFetched(t *testing.T) {
	for name, fetch := range map[string]func(*pulled){
		"one by one": func(p *pulled) {
			for i := range 3 {
				p.WantIdle("no chunk that was not asked for", time.Hour)
				p.fetch(uint32(i), uint32(i+1), i)
			}
		},
		"all at once":                func(p *pulled) { p.fetch(0, 3, 0, 1, 2) },
		"more than there is":         func(p *pulled) { p.fetch(0, math.MaxUint32, 0, 1, 2) },
		"all twice":                  func(p *pulled) { p.fetch(0, 2, 0, 1); p.fetch(0, 3, 0, 1, 2) },
		"overlapping":                func(p *pulled) { p.fetch(0, 2, 0, 1); p.fetch(1, 3, 1, 2) },
		"out of order":               func(p *pulled) { p.fetch(1, 2, 1); p.fetch(0, 1, 0); p.fetch(2, 3, 2) },
		"the last chunk alone":       func(p *pulled) { p.fetch(2, 3, 2) },
		"nothing, then all":          func(p *pulled) { p.fetch(0, 0); p.fetch(1, 1); p.fetch(2, 1); p.fetch(0, 3, 0, 1, 2) },
		"past the end":               func(p *pulled) { p.fetch(3, 4) },
		"far past the end":           func(p *pulled) { p.fetch(math.MaxUint32-1, math.MaxUint32) },
		"backwards, past the end":    func(p *pulled) { p.fetch(9, 3) },
		"with others' in between":    func(p *pulled) { p.tx = 7; p.fetch(0, 3); p.tx = 0; p.fetch(0, 3, 0, 1, 2) },
		"after a change of the flow": func(p *pulled) { setFlow(p.Peer, wire.FlowPush); p.fetch(0, 3, 0, 1, 2) },
	} {
		t.Run(name, func(t *testing.T) {
			atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
				p := pulling(t, end, s, peer)
				fetch(p)
				p.finish()
			})
		})
	}
}

func TestPulledStreamCanBeCancelledBetweenFetches(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		p := pulling(t, end, s, peer)
		p.fetch(0, 1, 0)
		p.WriteFrames(txCancel(51, 0))
		p.WantFrame("TX_CANCEL acknowledged", cryotest.Acked(51))
		require.ErrorIs(t, p.sending.result(t), cryo.ErrStreamCancelled)
		p.fetch(1, 3)
		p.WantIdle("no chunk of it", time.Hour)
	})
}

func TestEarlyFetchIsServedAfterTheStartIsAcknowledged(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		setFlow(peer, wire.FlowPull)
		send := start(func() error { return s.SendStream(t.Context(), strings.NewReader("abc"), nil) })
		f := peer.WantType("TX_START", wire.TxStart)
		peer.WriteFrames(txFetch(1, 0, 0, 1))
		peer.WantFrame("TX_FETCH acknowledged", cryotest.Acked(1))
		peer.WantIdle("no chunk yet", time.Hour)
		peer.Ack(f)
		peer.WantFrame("the chunk", txChunk(0, 0, "abc"))
		peer.Ack(peer.WantType("TX_FINISH", wire.TxFinish))
		send.wantSuccess(t)
	})
}

func TestEmptyPulledStreamFinishesOnAnEmptyFetch(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		setFlow(peer, wire.FlowPull)
		past := strings.NewReader("abc")
		_, _ = past.Seek(10, io.SeekStart)
		for tx, source := range []io.Reader{strings.NewReader(""), file(t, ""), past} {
			send := start(func() error { return s.SendStream(t.Context(), source, nil) })
			f := peer.WantType("TX_START", wire.TxStart)
			require.Zero(t, f.Size)
			peer.Ack(f)
			peer.WantIdle("no TX_FINISH by itself", time.Hour)
			peer.WriteFrames(txFetch(1, uint32(tx), 0, 0))
			peer.WantFrame("TX_FETCH acknowledged", cryotest.Acked(1))
			peer.Ack(peer.WantType("TX_FINISH", wire.TxFinish))
			send.wantSuccess(t)
		}
	})
}

func TestQueuedFetchesAreBounded(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		setFlow(peer, wire.FlowPull)
		send := start(func() error {
			return s.SendStream(t.Context(), strings.NewReader("abcdef"), &cryo.StreamOptions{ChunkBytes: 3})
		})
		f := peer.WantType("TX_START", wire.TxStart)
		for range 100 {
			peer.WriteFrames(txFetch(1, 0, 0, 1))
			peer.WantFrame("TX_FETCH acknowledged", cryotest.Acked(1))
		}
		peer.Ack(f)
		for range 64 {
			peer.WantFrame("the chunk, as often as is remembered", txChunk(0, 0, "abc"))
		}
		peer.WantIdle("and no more often", time.Hour)
		peer.WriteFrames(txFetch(1, 0, 1, 2))
		peer.WantFrame("TX_FETCH acknowledged", cryotest.Acked(1))
		peer.WantFrame("the other chunk", txChunk(0, 1, "def"))
		peer.Ack(peer.WantType("TX_FINISH", wire.TxFinish))
		send.wantSuccess(t)
	})
}

func TestFlowAppliesToLaterStreams(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		pushed, tx := opening(t, s, peer, nil)
		setFlow(peer, wire.FlowPull)
		_, err := pushed.Write([]byte("x"))
		require.NoError(t, err)
		peer.WantFrame("pushed on", txChunk(tx, 0, "x"))
		peer.WriteFrames(txFetch(1, tx, 0, 1))
		peer.WantFrame("TX_FETCH acknowledged", cryotest.Acked(1))
		peer.WantIdle("a pushed stream can't be pulled", instant)

		sending := start(func() error { return s.SendStream(t.Context(), strings.NewReader("later"), nil) })
		f := peer.WantType("TX_START", wire.TxStart)
		require.Equal(t, int32(5), f.Size)
		setFlow(peer, wire.FlowPush)
		peer.Ack(f)
		peer.WantIdle("no chunk that was not asked for", time.Hour)
		peer.WriteFrames(txFetch(1, f.Tx, 0, 1))
		peer.WantFrame("TX_FETCH acknowledged", cryotest.Acked(1))
		peer.WantFrame("the chunk", txChunk(f.Tx, 0, "later"))
		peer.Ack(peer.WantType("TX_FINISH", wire.TxFinish))
		sending.wantSuccess(t)

		_, tx = opening(t, s, peer, nil)
		require.Equal(t, uint32(2), tx)
	})
}

// vast is data of any size, all zeros.
type vast struct{ size int64 }

func (v vast) limited() io.Reader { return io.LimitReader(endless{}, v.size) }

// file is one on disk, with these bytes.
func file(t *testing.T, data string) *os.File {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "file"))
	require.NoError(t, err)
	t.Cleanup(func() { _ = f.Close() })
	_, err = f.WriteAt([]byte(data), 0)
	require.NoError(t, err)
	return f
}

func TestOnlyStreamsBelow2GiBCanBePulled(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		setFlow(peer, wire.FlowPull)
		source := file(t, "")
		require.NoError(t, source.Truncate(2<<30)) // all zeros, and none of them on disk
		err := s.SendStream(t.Context(), source, nil)
		require.EqualError(t, err, `stream "anonymous" of 2147483648 bytes is too large: the peer pulls, and only streams below 2 GiB can be pulled`)
		require.ErrorIs(t, err, cryo.ErrTooLarge)
		peer.WantIdle("nothing is announced", instant)

		_, err = source.Seek(1, io.SeekStart)
		require.NoError(t, err)
		send := start(func() error { return s.SendStream(t.Context(), source, nil) })
		f := peer.WantType("TX_START", wire.TxStart)
		require.Equal(t, int32(math.MaxInt32), f.Size)
		peer.Ack(f)
		peer.WriteFrames(txFetch(1, f.Tx, 32767, 32768))
		peer.WantFrame("TX_FETCH acknowledged", cryotest.Acked(1))
		peer.WantFrame("the last chunk", txChunk(f.Tx, 32767, strings.Repeat("\x00", 65535)))
		peer.Ack(peer.WantType("TX_FINISH", wire.TxFinish))
		send.wantSuccess(t)
	})
}

func TestNoStreamIsOpenedForWritingToAPeerThatPulls(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		setFlow(peer, wire.FlowPull)
		_, err := s.OpenStream(t.Context(), &cryo.StreamOptions{Name: "log"})
		require.ErrorIs(t, err, cryo.ErrPeerPulls)
		require.EqualError(t, err, `sending the stream "log": the peer pulls streams: use SendStream, which announces their size`)
		peer.WantIdle("nothing is announced", time.Hour)
		setFlow(peer, wire.FlowPush)
		opening(t, s, peer, nil)
	})
}

// Only where it is known what a source has may its size be announced. Others say that
// they have nothing, or would have to be believed.
func TestSourceOfUnknownSizeIsOnlyPushed(t *testing.T) {
	open := func(name string) func(*testing.T) (io.Reader, string) {
		return func(t *testing.T) (io.Reader, string) {
			want, err := os.ReadFile(name)
			if err != nil {
				t.Skip(err)
			}
			require.NotEmpty(t, want)
			f, err := os.Open(name)
			require.NoError(t, err)
			t.Cleanup(func() { _ = f.Close() })
			return f, string(want)
		}
	}
	for name, source := range map[string]func(*testing.T) (source io.Reader, has string){
		"a file that says it is empty": open("/proc/self/environ"),
		"a file that can't seek":       open("/proc/version"),
		"a file that says it has more": open("/sys/kernel/mm/transparent_hugepage/enabled"),
		"a pipe": func(t *testing.T) (io.Reader, string) {
			r, w, err := os.Pipe()
			require.NoError(t, err)
			t.Cleanup(func() { _ = r.Close() })
			_, err = w.WriteString("abc")
			require.NoError(t, err)
			require.NoError(t, w.Close())
			return r, "abc"
		},
		"a reader of another type":     func(*testing.T) (io.Reader, string) { return io.MultiReader(strings.NewReader("abc")), "abc" },
		"a type that says it is empty": func(*testing.T) (io.Reader, string) { return liar{strings.NewReader("abc")}, "abc" },
		"a section of such a type": func(*testing.T) (io.Reader, string) {
			return io.NewSectionReader(liar{strings.NewReader("abc")}, 0, 1<<40), "abc"
		},
	} {
		t.Run(name, func(t *testing.T) {
			for _, flow := range []wire.Flow{wire.FlowPush, wire.FlowPull} {
				from, has := source(t)
				inBubble(t, func(t *testing.T) {
					p := connect(t, quiet, quiet)
					useFlow(t, p.server, flow)
					sending := start(func() error { return p.client.SendStream(t.Context(), from, nil) })
					if flow == wire.FlowPull {
						require.ErrorIs(t, sending.result(t), cryo.ErrNotSeekable)
						wantNoStream(t, p.server)
						return
					}
					st := acceptStream(t, p.server)
					require.NoError(t, wantRest(t, st, has))
					require.NoError(t, st.Ack())
					sending.wantSuccess(t)
				})
			}
		})
	}
}

// liar is a source that says it is empty, as a device does.
type liar struct{ *strings.Reader }

func (liar) Seek(int64, int) (int64, error) { return 0, nil }

func TestEndlessSourceIsNotReadForAPull(t *testing.T) {
	device, err := os.Open("/dev/zero")
	if err != nil {
		t.Skip(err)
	}
	defer device.Close()
	atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		setFlow(peer, wire.FlowPull)
		require.ErrorIs(t, s.SendStream(t.Context(), device, nil), cryo.ErrNotSeekable)
		require.ErrorIs(t, s.SendStream(t.Context(), vast{size: 1 << 40}.limited(), nil), cryo.ErrNotSeekable)
		peer.WantIdle("nothing is announced", instant)
	})
}

func TestPulledSourceIsSentFromItsPosition(t *testing.T) {
	for name, source := range map[string]func(*testing.T) io.ReadSeeker{
		"a file":    func(t *testing.T) io.ReadSeeker { return file(t, "..abc") },
		"a text":    func(*testing.T) io.ReadSeeker { return strings.NewReader("..abc") },
		"bytes":     func(*testing.T) io.ReadSeeker { return bytes.NewReader([]byte("..abc")) },
		"a section": func(t *testing.T) io.ReadSeeker { return io.NewSectionReader(file(t, ".....abc and more"), 3, 5) },
	} {
		t.Run(name, func(t *testing.T) {
			atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
				setFlow(peer, wire.FlowPull)
				source := source(t)
				_, err := source.Seek(2, io.SeekStart)
				require.NoError(t, err)
				send := start(func() error { return s.SendStream(t.Context(), source, nil) })
				f := peer.WantType("TX_START", wire.TxStart)
				require.Equal(t, int32(3), f.Size)
				peer.Ack(f)
				peer.WriteFrames(txFetch(1, f.Tx, 0, 1))
				peer.WantFrame("TX_FETCH acknowledged", cryotest.Acked(1))
				peer.WantFrame("what is there", txChunk(f.Tx, 0, "abc"))
				peer.Ack(peer.WantType("TX_FINISH", wire.TxFinish))
				send.wantSuccess(t)
				rest, err := io.ReadAll(source)
				require.NoError(t, err)
				require.Empty(t, rest, "it was read")
			})
		})
	}
}

func TestPulledFileThatChangesItsSizeFailsTheStream(t *testing.T) {
	for name, c := range map[string]struct {
		size int64
		err  string
	}{
		"it shrinks to nothing":          {0, "the source has shrunk: it has fewer than the announced 10 bytes: unexpected EOF"},
		"it shrinks by a byte":           {9, "the source has shrunk: it has fewer than the announced 10 bytes: unexpected EOF"},
		"it shrinks by more than a part": {5, "the source has shrunk: it has fewer than the announced 10 bytes: unexpected EOF"},
		"it grows by a byte":             {11, "the source has grown: it has more than the announced 10 bytes"},
		"it grows by a lot":              {1 << 20, "the source has grown: it has more than the announced 10 bytes"},
	} {
		t.Run(name, func(t *testing.T) {
			atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
				setFlow(peer, wire.FlowPull)
				source := file(t, "abcdefghij")
				send := start(func() error { return s.SendStream(t.Context(), source, &cryo.StreamOptions{ChunkBytes: 4}) })
				f := peer.WantType("TX_START", wire.TxStart)
				require.Equal(t, int32(10), f.Size)
				peer.Ack(f)
				peer.WriteFrames(txFetch(1, f.Tx, 0, 1))
				peer.WantFrame("TX_FETCH acknowledged", cryotest.Acked(1))
				peer.WantFrame("the first chunk", txChunk(f.Tx, 0, "abcd"))
				require.NoError(t, source.Truncate(c.size))
				peer.WriteFrames(txFetch(2, f.Tx, 1, 3))
				peer.WantFrame("TX_FETCH acknowledged", cryotest.Acked(2))
				require.EqualError(t, send.result(t), c.err)
				time.Sleep(time.Hour)
				for _, f := range peer.Taken() {
					require.Equal(t, wire.TxChunk, f.Type, "no TX_FINISH")
					require.Equal(t, uint32(1), f.Seq, "nor the last chunk")
				}
			})
		})
	}
}

// A receiver would close the session: it takes the TX_START for one of CAMP.
func TestNameThatAPullingPeerMistakesForCAMPIsNotSent(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		setFlow(peer, wire.FlowPull)
		err := s.SendStream(t.Context(), strings.NewReader("abc"), &cryo.StreamOptions{Name: "name\x00"})
		require.EqualError(t, err, `stream name "name\x00" can't be sent to a peer that pulls: its fifth byte must not be 0 or 1`)
		peer.WantIdle("TX_START", time.Minute)
		require.NoError(t, s.Err())
	})
}
