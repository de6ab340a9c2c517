package cryo_test

import (
	"bytes"
	"context"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
	"unsafe"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/cryotest"
	"github.com/cryo-connect/cryo-connect/internal/wire"
)

// Chunks of a byte that wait to be read, each between messages that are acknowledged, hold
// little more memory than they count.
func TestHeldBytesAreAtLeastTheMemoryThatIsPinned(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, peer := accepted(t, cryo.ServerOptions{SessionOptions: quiet})
		st := incoming(t, s, peer, 1, 0)
		const chunks = 5_000
		text := strings.Repeat("m", 7_900)
		go func() {
			for {
				m, err := s.Receive(context.Background())
				if err != nil {
					return
				}
				_ = m.Ack()
			}
		}()
		before := heap()
		for i := range uint32(chunks) {
			peer.WriteFrames(cryotest.Text(1000+2*i, text), txChunk(0, 1+i, "c"), cryotest.Text(1001+2*i, text))
			peer.WantType("an acknowledgement", wire.Ack)
			peer.WantType("an acknowledgement", wire.Ack)
		}
		synctest.Wait()
		require.EqualValues(t, chunks*(1+chunkWeight), s.Held())
		require.Less(t, heap()-before, 2*s.Held(), "with what the tests keep")
		require.NoError(t, st.Close())
		require.Zero(t, s.Held())
		cut(s)
	})
}

// Whatever becomes of what was received, nothing is held in the end.
func TestNothingIsHeldAfterTheLastSettle(t *testing.T) {
	sends := func(peer *cryotest.Peer) {
		peer.WriteFrames(
			cryotest.Text(1000, "small"), cryotest.Binary(1001, string(make([]byte, 50_000))),
			cryotest.Error(1002, "out of paper \xff\xfe"), cryotest.Binary(1003, string(make([]byte, 200_000))),
			txChunk(0, 1, "a"), txChunk(0, 2, strings.Repeat("b", 40_000)), txChunk(0, 3, ""), txChunk(0, 4, strings.Repeat("c", 100_000)),
			txChunk(7, 0, "of no stream"),
		)
	}
	all := func(t *testing.T, s *cryo.Session) []*cryo.Message {
		batch, err := s.ReceiveBatch(t.Context(), 10)
		require.NoError(t, err)
		return batch
	}
	twice := func(settle func(*cryo.Message)) func(*testing.T, *cryo.Session, *cryo.IncomingStream) {
		return func(t *testing.T, s *cryo.Session, st *cryo.IncomingStream) {
			var settling sync.WaitGroup
			for _, m := range all(t, s) {
				settling.Go(func() { settle(m) })
				settling.Go(func() { settle(m) })
			}
			settling.Go(func() { _ = st.Close() })
			settling.Go(func() { _ = st.Close() })
			settling.Wait()
		}
	}
	for name, settle := range map[string]func(*testing.T, *cryo.Session, *cryo.IncomingStream){
		"Ack":    twice(func(m *cryo.Message) { _ = m.Ack() }),
		"Reject": twice(func(m *cryo.Message) { _ = m.Reject("no") }),
		"AckBatch, and the stream is read": func(t *testing.T, s *cryo.Session, st *cryo.IncomingStream) {
			batch := all(t, s)
			require.NoError(t, cryo.AckBatch(append(batch, batch...)))
			_, err := io.CopyN(io.Discard, st, 140_001)
			require.NoError(t, err)
		},
		"begins to reject": func(t *testing.T, s *cryo.Session, st *cryo.IncomingStream) {
			s.SetSendOnly(true)
			require.NoError(t, st.Close())
		},
		"discards": func(_ *testing.T, s *cryo.Session, st *cryo.IncomingStream) {
			s.Discard()
			_ = st.Close()
		},
		"closes with a full queue": func(t *testing.T, s *cryo.Session, st *cryo.IncomingStream) {
			cut(s)
			require.ErrorIs(t, st.Ack(), cryo.ErrClosed)
			for _, m := range all(t, s) {
				require.Error(t, m.Ack())
				require.NoError(t, m.Ack())
			}
		},
		"closes, and discards then": func(_ *testing.T, s *cryo.Session, st *cryo.IncomingStream) {
			cut(s)
			s.Discard()
			_, _ = io.ReadAll(st)
		},
	} {
		t.Run(name, func(t *testing.T) {
			atBothEnds(t, quiet, func(t *testing.T, _ end, s *cryo.Session, peer *cryotest.Peer) {
				peer.Read()
				st := incoming(t, s, peer, 1, 0)
				sends(peer)
				synctest.Wait()
				require.Greater(t, s.Held(), int64(380_000))
				settle(t, s, st)
				synctest.Wait()
				require.Zero(t, s.Held())
				require.Zero(t, s.ComingIn())
			})
		})
	}
}

func TestFrameThatWaitsForCapacityHoldsNone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, l, sessions := serve(t, cryo.ServerOptions{SessionOptions: bounded()})
		first, second := join(t, l, 1), join(t, l, 2)
		first.ClientHandshake()
		holds := next(t, sessions)
		second.ClientHandshake()
		waits := next(t, sessions)
		release := holds.Reserve(90_000)
		for i, f := range []wire.Frame{cryotest.Text(1, "small"), cryotest.Binary(2, string(make([]byte, 60_000))), cryotest.Binary(3, string(make([]byte, 1<<20)))} {
			b := bytesOf(t, second, f)
			before := heap()
			require.NoError(t, second.WS.NetConn().SetWriteDeadline(time.Time{}))
			written := start(func() error {
				_, err := second.WS.NetConn().Write(b)
				return err
			})
			synctest.Wait()
			require.True(t, waits.Stats().Paused)
			require.Zero(t, waits.Held(), "frame %d", i)
			require.Zero(t, waits.ComingIn(), "frame %d", i)
			require.Less(t, heap()-before, int64(256<<10), "what is in the connection")
			release()
			written.wantSuccess(t)
			require.NoError(t, receive(t, waits).Ack())
			second.WantType("its acknowledgement", wire.Ack)
			require.Zero(t, waits.Held())
			release = holds.Reserve(90_000)
		}
	})
}

// However a frame waits, for the receive buffer and then for what is coming in, a local
// sender waits no longer than for one of both.
func TestReadsPauseForAtMostTenSecondsWhileASenderWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, l, accepted := serve(t, cryo.ServerOptions{SessionOptions: cryo.SessionOptions{MaxBufferBytes: large, HeartbeatInterval: time.Hour}})
		slow, waits := join(t, l, 1), join(t, l, 2)
		slow.ClientHandshake()
		holds := next(t, accepted)
		waits.ClientHandshake()
		s := next(t, accepted)
		begin(t, slow, 100) // takes all that there is for what is coming in
		synctest.Wait()
		release := holds.Reserve(large)

		send := start(func() error { return s.SendText(t.Context(), "hello") })
		text := waits.WantType("the text", wire.UTF8)
		begins(t, waits, cryotest.Acked(text.Ack))
		since := time.Now()
		time.Sleep(7 * time.Second)
		require.True(t, s.Stats().Paused)
		release() // by now it waits for the other
		time.Sleep(time.Second)
		require.True(t, s.Stats().Paused)
		send.wantSuccess(t)
		require.Equal(t, rejectAfter, time.Since(since))
		waits.Conn().ReadOn()
		waits.WantFrame("the rejection", cryotest.Error(102, bufferFull))
	})
}

// An ERROR with one of our numbers is an answer, and no data.
func TestRejectionIsReadThoughTheReceiveBufferIsFull(t *testing.T) {
	atBothEnds(t, smallBuffer, func(t *testing.T, _ end, s *cryo.Session, peer *cryotest.Peer) {
		peer.WriteFrames(cryotest.Binary(1000, string(make([]byte, 2000))))
		m := receive(t, s)
		send := start(func() error { return s.SendText(t.Context(), "hello") })
		text := peer.WantType("the text", wire.UTF8)
		begin := time.Now()
		peer.WriteFrames(cryotest.Error(text.Ack, strings.Repeat("no ", 100_000)))
		var rejected *cryo.RejectedError
		require.ErrorAs(t, send.result(t), &rejected)
		require.Equal(t, strings.Repeat("no ", 400)[:1024], rejected.Text)
		require.Zero(t, time.Since(begin))
		require.NoError(t, m.Ack())
	})
}

func TestUnwantedChunksNeedNoCapacity(t *testing.T) {
	atBothEnds(t, bounded(), func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		st := incoming(t, s, peer, 1, 0)
		release := s.Reserve(90_000)
		peer.WriteFrames(txChunk(unknownTx, 0, strings.Repeat("x", 100_000)), cryotest.Ping(1))
		peer.WantFrame("a chunk of no stream is discarded", cryotest.Pong(1))
		peer.WriteFrames(txChunk(0, 1, strings.Repeat("x", 30_000)), cryotest.Ping(2))
		peer.WantIdle("a chunk of a stream waits", time.Second)
		require.NoError(t, st.Close())
		// Reading goes on while TX_CANCEL is queued: either may be first.
		first, second := peer.Next("TX_CANCEL"), peer.Next("until the stream takes no more")
		if first.Type == wire.PingPong {
			first, second = second, first
		}
		cancel, pong := txCancel(end.first, 0), cryotest.Pong(2)
		cancel.SID, pong.SID = sid, sid
		require.Equal(t, cancel, first)
		require.Equal(t, pong, second)
		release()
		require.Zero(t, s.Held())
	})
}

// unknownTx is the number of no stream.
const unknownTx = 4711

// An error in a header is reported before the payload is received.
func TestInvalidHeaderEndsTheSessionBeforeItsPayload(t *testing.T) {
	for problem, f := range map[string]wire.Frame{
		"BINARYDATA frame for another session: 7":        {SID: 7, Type: wire.Binary},
		"unassigned type 9 frame for another session: 7": {SID: 7, Type: 9},
	} {
		synctest.Test(t, func(t *testing.T) {
			s, peer := accepted(t, cryo.ServerOptions{})
			kind := f.Type
			f.Type, f.Payload = wire.Binary, make([]byte, large)
			b := bytesOf(t, &cryotest.Peer{SID: f.SID}, f)
			b[14+8] = byte(kind)
			sends(t, peer, b[:14+13])
			peer.WantClose("the end", 4001, "protocol violation: "+problem)
			require.Error(t, s.Err())
			sends(t, peer, b[14+13:]) // which is discarded
			sends(t, peer, raw(end{}, 0x88, nil))
			wantEnded(t, s)
		})
	}
}

// If an application drops a session without closing or discarding it, its part of the server's
// receive buffer is released when the session is garbage-collected.
func TestGarbageCollectedSessionReleasesItsReceiveBuffer(t *testing.T) {
	_, l, sessions := serve(t, cryo.ServerOptions{SessionOptions: cryo.SessionOptions{MaxBufferBytes: 100_000}})
	func() {
		peer := join(t, l, sid)
		peer.ClientHandshake()
		s := next(t, sessions)
		peer.WriteFrames(cryotest.Binary(1, string(make([]byte, 200_000))))
		require.Eventually(t, func() bool { return s.Held() > 0 }, cryotest.Patience, time.Millisecond)
		cut(s)
	}()
	peer := join(t, l, sid+1)
	peer.ClientHandshake()
	s := next(t, sessions)
	peer.WriteFrames(cryotest.Text(2, "hello"))
	require.Eventually(t, func() bool {
		runtime.GC()
		return !s.Stats().Paused && s.Held() > 0
	}, cryotest.Patience, time.Millisecond)
	require.Equal(t, "hello", string(receive(t, s).Payload))
}

// A client may open any number of sessions.
func TestSessionsOfOneOwnerHaveOneQuotaOfTheReceiveBuffer(t *testing.T) {
	server, l, sessions := serve(t, cryo.ServerOptions{
		SessionOptions: cryo.SessionOptions{MaxBufferBytes: 90_000},
		Authorize:      func(u *cryo.Upgrade) error { u.Owner = []string{"ann", "bob"}[u.SessionID/100]; return nil },
	})
	open := func(id uint64) (*cryo.Session, *cryotest.Peer) {
		peer := join(t, l, id)
		peer.ClientHandshake()
		return next(t, sessions), peer
	}
	func() { // its sessions are not in use afterwards
		var all []*cryo.Session
		for id := range uint64(5) {
			s, peer := open(id)
			all = append(all, s)
			go func() {
				for n := range uint32(100) {
					if peer.TryWriteFrames(cryotest.Text(2+n, strings.Repeat("x", 1000))) != nil {
						return
					}
				}
			}()
			require.Eventually(t, func() bool { return s.Stats().Paused }, cryotest.Patience, time.Millisecond)
		}
		for _, s := range all[1:] {
			require.Zero(t, s.Held(), "the first one has all that the owner may have")
		}
		free, _, _ := all[0].Free()
		require.Greater(t, free, int64(8_000))
		s, peer := open(100)
		peer.WriteFrames(cryotest.Text(2, "of another"))
		require.Equal(t, "of another", string(receive(t, s).Payload))
		require.Equal(t, 2, server.Owners())
		for _, ending := range append(all, s) {
			cut(ending)
		}
	}()
	require.Eventually(t, func() bool {
		runtime.GC()
		return server.Owners() == 0
	}, cryotest.Patience, time.Millisecond)
}

// rawTraffic is what a raw peer sends, and what its session's application does with it.
type rawTraffic struct {
	t    *testing.T
	r    *rand.Rand
	peer *cryotest.Peer

	mu           sync.Mutex
	alive        [][]byte          // payloads in the application's hands
	sums         []uint32          // of these
	acknowledged map[uint32]string // by the application
	stream       []byte            // that was read
}

func (tr *rawTraffic) handedOut(payload []byte) {
	if len(payload) == 0 {
		return
	}
	tr.mu.Lock()
	defer tr.mu.Unlock()
	tr.alive, tr.sums = append(tr.alive, payload), append(tr.sums, crc32.ChecksumIEEE(payload))
}

// check wants no payload to have changed, and none to share memory with another.
func (tr *rawTraffic) check() {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	for i, payload := range tr.alive {
		require.Equal(tr.t, tr.sums[i], crc32.ChecksumIEEE(payload), "a payload of %d bytes has changed", len(payload))
	}
	start := func(b []byte) uintptr { return uintptr(unsafe.Pointer(&b[0])) }
	sorted := slices.SortedFunc(slices.Values(tr.alive), func(a, b []byte) int { return int(start(a)) - int(start(b)) })
	for i := 1; i < len(sorted); i++ {
		require.LessOrEqual(tr.t, start(sorted[i-1])+uintptr(cap(sorted[i-1])), start(sorted[i]), "two payloads share memory")
	}
}

// send writes a frame, in fragments now and then.
func (tr *rawTraffic) send(end end, f wire.Frame) {
	frame := encoded(tr.t, tr.peer, f)
	first := byte(0x02)
	for tr.r.IntN(4) == 0 && len(frame) > 1 {
		n := 1 + tr.r.IntN(len(frame)-1)
		_, err := tr.peer.Conn().Write(raw(end, first, frame[:n]))
		require.NoError(tr.t, err)
		first, frame = 0, frame[n:]
	}
	_, err := tr.peer.Conn().Write(raw(end, first|0x80, frame))
	require.NoError(tr.t, err)
}

// Random traffic of a raw peer: of all sizes, whole and in fragments, with rejections,
// frames that nobody takes, streams and a receive buffer that is full now and then.
func TestReceivedPayloadsNeverChangeAndAreNotAcknowledgedImplicitly(t *testing.T) {
	cryo.Poison(true)
	defer cryo.Poison(false)
	for _, seed := range stormSeeds(t, 20, 2_000) {
		opts := quiet
		opts.MaxBufferBytes = []int{1_000, 100_000, 3 << 20}[seed%3]
		atBothEnds(t, opts, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
			t.Cleanup(func() {
				if t.Failed() {
					t.Logf("CRYO_SEED=%d makes the same random choices", seed)
				}
			})
			tr := &rawTraffic{t: t, r: rand.New(rand.NewPCG(seed, 1)), peer: peer, acknowledged: map[uint32]string{}}
			st := incoming(t, s, peer, 1, 0)
			var application sync.WaitGroup
			application.Go(func() { tr.takeMessages(s, rand.New(rand.NewPCG(seed, 2))) })
			application.Go(func() { tr.readStream(st) })
			seq := uint32(1)
			var stream bytes.Buffer
			for i := range uint32(100) {
				payload := string(noise(size(tr.r)))
				switch tr.r.IntN(8) {
				case 0, 1:
					tr.send(end, txChunk(0, seq, payload))
					stream.WriteString(payload)
					seq++
				case 2:
					tr.send(end, txChunk(unknownTx, 0, payload))
				case 3:
					tr.send(end, cryotest.Error(end.first+1<<20+i, payload)) // an answer to nothing
				case 4:
					tr.send(end, cryotest.Ping(i))
				default:
					tr.send(end, cryotest.Binary(2_000+i, payload))
				}
				if tr.r.IntN(10) == 0 {
					time.Sleep(time.Duration(tr.r.IntN(20)) * time.Second)
					tr.check()
				}
			}
			tr.send(end, txFinish(5, 0))
			time.Sleep(time.Hour)
			tr.check()
			for _, f := range peer.Taken() {
				if f.Type == wire.Ack && f.Ack >= 2_000 {
					require.Equal(t, "acknowledged", tr.acknowledged[f.Ack], "number %d", f.Ack)
					tr.acknowledged[f.Ack] = "twice"
				}
			}
			cut(s)
			application.Wait()
			require.True(t, bytes.HasPrefix(stream.Bytes(), tr.stream), "of a stream")
			require.Zero(t, s.Held())
		})
	}
}

func (tr *rawTraffic) takeMessages(s *cryo.Session, r *rand.Rand) {
	for {
		batch, err := s.ReceiveBatch(context.Background(), 1+r.IntN(5))
		if err != nil {
			return
		}
		for _, m := range batch {
			tr.handedOut(m.Payload)
		}
		time.Sleep(time.Duration(r.IntN(3)) * time.Second)
		for _, m := range batch {
			if r.IntN(3) == 0 {
				_ = m.Reject("no")
				continue
			}
			tr.mu.Lock()
			tr.acknowledged[m.Number()] = "acknowledged"
			tr.mu.Unlock()
			_ = m.Ack()
		}
	}
}

func (tr *rawTraffic) readStream(st *cryo.IncomingStream) {
	tr.stream, _ = io.ReadAll(st)
	_ = st.Ack()
}
