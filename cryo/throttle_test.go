package cryo_test

import (
	"context"
	"log/slog"
	"reflect"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/cryotest"
	"github.com/cryo-connect/cryo-connect/internal/wire"
)

// oracle is a token bucket with the tokens of one second, in billionths of a token so that it is
// exact. What it lacks is waited for.
type oracle struct {
	rate  int64 // tokens per second; 0: no limit
	level int64
	last  time.Time
}

func newOracle(rate int, now time.Time) oracle {
	return oracle{int64(rate), int64(rate) * 1e9, now}
}

// take returns the time to wait for n tokens.
func (o *oracle) take(now time.Time, n int) time.Duration {
	if o.rate == 0 {
		return 0
	}
	full := o.rate * 1e9
	if passed := int64(now.Sub(o.last)); passed < (full-o.level)/o.rate {
		o.level += passed * o.rate
	} else {
		o.level = full
	}
	o.level -= int64(n) * 1e9
	o.last = now
	return time.Duration(max(0, -o.level) / o.rate)
}

// arrival is a frame of a random pattern, which is sent some time after the one before.
type arrival struct {
	After time.Duration
	Chunk bool // whether it is a chunk of the stream, and not a message
	Bytes int
}

var arrivalPatterns = rapid.SliceOfN(rapid.Custom(func(t *rapid.T) arrival {
	pause := rapid.OneOf(rapid.Just(0), rapid.IntRange(0, 3000))
	size := rapid.OneOf(rapid.IntRange(1, 20), rapid.IntRange(1, 2000), rapid.IntRange(1, 200_000))
	return arrival{
		After: time.Duration(pause.Draw(t, "after")) * time.Millisecond,
		Chunk: rapid.Bool().Draw(t, "chunk"),
		Bytes: size.Draw(t, "bytes"),
	}
}), 1, 30)

// receipts are the times at which a session has received its messages and chunks, from its start.
type receipts struct {
	Stream           time.Duration // TX_START
	Messages, Chunks []time.Duration
	Paused           time.Duration // sum of the pauses
}

func TestFramesAreReceivedWhenATokenBucketAllowsIt(t *testing.T) {
	// Divisors of a billion, so that each wait is a whole number of nanoseconds.
	rates := rapid.SampledFrom([]int{0, 1, 2, 5, 10, 1000, 50_000, 1_000_000})
	rapid.Check(t, func(rt *rapid.T) {
		messages, bytes := rates.Draw(rt, "messages"), rates.Draw(rt, "bytes")
		pattern := arrivalPatterns.Draw(rt, "pattern")
		want, last := expectedReceipts(messages, bytes, pattern)
		var got receipts
		synctest.Test(t, func(t *testing.T) { got = throttledReceipts(t, messages, bytes, pattern, last) })
		if !reflect.DeepEqual(want, got) {
			rt.Fatalf("want %v, got %v", want, got)
		}
	})
}

// expectedReceipts returns what the oracle expects, and the time of the last receipt.
func expectedReceipts(messages, bytes int, pattern []arrival) (want receipts, last time.Duration) {
	m, b := newOracle(messages, time.Time{}), newOracle(bytes, time.Time{})
	receive := func(sent time.Duration, count, size int) time.Duration {
		head := max(sent, last) // the frame before has been received
		wait := max(m.take(time.Time{}.Add(head), count), b.take(time.Time{}.Add(head), size))
		want.Paused += wait
		last = head + wait
		return last
	}
	want.Stream = receive(0, 1, 0)
	sent := want.Stream
	for _, a := range pattern {
		sent += a.After
		if a.Chunk {
			want.Chunks = append(want.Chunks, receive(sent, 0, a.Bytes))
		} else {
			want.Messages = append(want.Messages, receive(sent, 1, a.Bytes))
		}
	}
	return want, last
}

// throttledReceipts sends a stream and a pattern, and returns the times of their receipt.
func throttledReceipts(t *testing.T, messages, bytes int, pattern []arrival, last time.Duration) (got receipts) {
	s, peer := accepted(t, cryo.ServerOptions{SessionOptions: cryo.SessionOptions{
		HeartbeatInterval: 1 << 50, MaxBufferBytes: 1 << 30, StreamIdleTimeout: 1 << 50,
		MaxMessagesPerSecond: messages, MaxBytesPerSecond: bytes,
		OnThrottle: func(_ *cryo.Session, d time.Duration) { got.Paused += d },
	}})
	begin := time.Now()
	peer.WriteFrames(txStart(1, 1, -1, ""))
	st := acceptStream(t, s)
	got.Stream = time.Since(begin)

	var frames [][]byte
	var boundaries []int64 // size of the stream at the end of each chunk
	var total int64
	for i, a := range pattern {
		content := strings.Repeat("x", a.Bytes)
		if a.Chunk {
			frames = append(frames, bytesOf(t, peer, txChunk(1, uint32(len(boundaries)), content)))
			total += int64(a.Bytes)
			boundaries = append(boundaries, total)
		} else {
			frames = append(frames, bytesOf(t, peer, cryotest.Binary(uint32(i+2), content)))
		}
	}
	texts := len(pattern) - len(boundaries)
	peer.Read()
	var sending sync.WaitGroup
	sending.Go(func() {
		due := time.Now()
		for i, a := range pattern {
			due = due.Add(a.After)
			time.Sleep(time.Until(due)) // it is later if the session has not read what came before
			if _, err := peer.WS.NetConn().Write(frames[i]); err != nil {
				return
			}
		}
	})
	sending.Go(func() {
		for range texts {
			m, err := s.Receive(t.Context())
			if err != nil {
				return
			}
			got.Messages = append(got.Messages, time.Since(begin))
			_ = m.Ack()
		}
	})
	sending.Go(func() {
		buf := make([]byte, 1<<20)
		for n := int64(0); len(boundaries) > 0; {
			more, err := st.Read(buf)
			if err != nil {
				return
			}
			for n += int64(more); len(boundaries) > 0 && n >= boundaries[0]; boundaries = boundaries[1:] {
				got.Chunks = append(got.Chunks, time.Since(begin))
			}
		}
	})
	time.Sleep(last + time.Second)
	cut(s)
	sending.Wait()
	return got
}

func TestMessageLargerThanTheBytesOfASecondIsReceived(t *testing.T) {
	atBothEnds(t, cryo.SessionOptions{MaxBytesPerSecond: 1000}, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		begin := time.Now()
		large := bytesOf(t, peer, cryotest.Binary(1, strings.Repeat("x", 601_000)))
		if end.dialled { // a server doesn't mask
			large = append([]byte{0x82, 127}, append(large[2:10], large[14:]...)...)
		}
		peer.Conn().StopReading() // an answer to a ping would be in the middle of the message
		sending := start(func() error {
			_, err := peer.WS.NetConn().Write(large)
			return err
		})
		ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
		defer cancel()
		m, err := s.Receive(ctx)
		require.NoError(t, err, "a pause of minutes is no reason to end the session")
		require.Len(t, m.Payload, 601_000)
		require.NoError(t, m.Ack())
		require.Equal(t, 10*time.Minute, time.Since(begin))
		sending.wantSuccess(t)
		peer.Conn().ReadOn()
		peer.WriteFrames(cryotest.Text(2, strings.Repeat("y", 1000)))
		require.NoError(t, receive(t, s).Ack())
		require.Equal(t, 10*time.Minute+time.Second, time.Since(begin))
	})
}

// Pauses within a message would occupy the capacity for large messages that others wait for.
func TestMessageInFragmentsIsPaidByTheNextOne(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, peer := accepted(t, cryo.ServerOptions{SessionOptions: cryo.SessionOptions{
			HeartbeatInterval: 1 << 50, MaxBytesPerSecond: 1000, MaxBufferBytes: 1 << 30,
		}})
		begin := time.Now()
		b := encoded(t, peer, cryotest.Binary(1, strings.Repeat("x", 6_000)))
		head := wire.AckHeaderSize + 1000
		for _, fragment := range [][]byte{raw(end{}, 0x02, b[:head]), raw(end{}, 0x00, b[head:3000]), raw(end{}, 0x80, b[3000:])} {
			_, err := peer.WS.NetConn().Write(fragment)
			require.NoError(t, err)
		}
		require.Len(t, receive(t, s).Payload, 6_000)
		require.Equal(t, time.Duration(0), time.Since(begin))
		peer.WriteFrames(cryotest.Text(2, ""))
		receive(t, s)
		require.Equal(t, 5*time.Second, time.Since(begin))
	})
}

func TestThrottledSessionKeepsNoOtherWaiting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, l, sessions := serve(t, cryo.ServerOptions{SessionOptions: cryo.SessionOptions{
			HeartbeatInterval: 1 << 50, MaxBufferBytes: 100_000, MaxMessagesPerSecond: 10, MaxBytesPerSecond: 20_000,
		}})
		var fast []*cryotest.Peer
		for id := range uint64(5) {
			peer := join(t, l, id+1)
			peer.ClientHandshake()
			fast = append(fast, peer)
			acknowledgeMessages(t, next(t, sessions))
		}
		for _, peer := range fast {
			large := bytesOf(t, peer, cryotest.Binary(1, strings.Repeat("x", 60_000)))
			go func() {
				for err := error(nil); err == nil; {
					_, err = peer.WS.NetConn().Write(large)
				}
			}()
		}
		synctest.Wait()
		time.Sleep(time.Minute)
		slow := join(t, l, 100)
		slow.ClientHandshake()
		s := next(t, sessions)
		for i := range uint32(100) {
			begin := time.Now()
			slow.WriteFrames(cryotest.Text(i, "hello"))
			require.NoError(t, receive(t, s).Ack())
			require.Equal(t, begin, time.Now())
			time.Sleep(100 * time.Millisecond)
		}
		require.False(t, s.Stats().Throttled)
	})
}

// acknowledgeMessages acknowledges all messages until the session ends.
func acknowledgeMessages(t *testing.T, s *cryo.Session) {
	go func() {
		for {
			m, err := s.Receive(t.Context())
			if err != nil {
				return
			}
			_ = m.Ack()
		}
	}()
}

// The acknowledgement is behind messages in the connection, and nothing of these is rejected for it.
func TestAcknowledgementBehindThrottledMessagesIsReadAfterThem(t *testing.T) {
	atBothEnds(t, cryo.SessionOptions{MaxMessagesPerSecond: 2}, func(t *testing.T, _ end, s *cryo.Session, peer *cryotest.Peer) {
		peer.AnswerPings()
		begin := time.Now()
		send := start(func() error { return s.SendText(t.Context(), "to the peer") })
		text := peer.WantType("our message", wire.UTF8)
		for i := range uint32(102) {
			peer.WriteFrames(cryotest.Text(i, "from the peer"))
		}
		peer.Ack(text)
		for range 102 {
			require.NoError(t, receive(t, s).Ack())
		}
		require.NoError(t, <-send.done)
		require.Equal(t, 50*time.Second, time.Since(begin))
		for i := range uint32(102) {
			wantAmongPongs(t, peer, cryotest.Acked(i))
		}
	})
}

func TestThrottledSessionsReadOnAtOnceWhenDataIsNotWanted(t *testing.T) {
	opts := quiet
	opts.MaxMessagesPerSecond = 1
	for what, stop := range map[string]func(t *testing.T, s *cryo.Session, peer *cryotest.Peer){
		"closed": func(t *testing.T, s *cryo.Session, peer *cryotest.Peer) {
			closing := start(func() error { return s.Close(t.Context(), "") })
			peer.WantType("BYE", wire.Bye)
			peer.WriteClose(4000, "")
			closing.wantSuccess(t)
		},
		"drained": func(t *testing.T, s *cryo.Session, peer *cryotest.Peer) {
			draining := start(func() error { return s.Drain(t.Context(), "") })
			peer.WantType("BYE", wire.Bye)
			peer.WriteClose(4000, "")
			draining.wantSuccess(t)
		},
		"closed now": func(t *testing.T, s *cryo.Session, _ *cryotest.Peer) { require.NoError(t, s.CloseNow()) },
		"left by peer": func(t *testing.T, s *cryo.Session, peer *cryotest.Peer) {
			peer.Conn().Cut()
			require.NoError(t, s.CloseNow())
		},
		"send-only": func(t *testing.T, s *cryo.Session, peer *cryotest.Peer) {
			s.SetSendOnly(true)
			for i := range uint32(9) {
				peer.WantFrame("the rejection", cryotest.Error(i+1, "this session receives no messages"))
			}
		},
	} {
		t.Run(what, func(t *testing.T) {
			atBothEnds(t, opts, func(t *testing.T, _ end, s *cryo.Session, peer *cryotest.Peer) {
				for i := range uint32(10) {
					peer.WriteFrames(cryotest.Text(i, "more than allowed"))
				}
				require.NoError(t, receive(t, s).Ack())
				peer.WantFrame("the first", cryotest.Acked(0))
				synctest.Wait() // the second frame is read
				require.True(t, s.Stats().Paused)
				begin := time.Now()
				stop(t, s, peer)
				require.Equal(t, begin, time.Now())
			})
		})
	}
}

func TestThrottledSessionIsReported(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log logged
		var pauses []time.Duration
		s, peer := accepted(t, cryo.ServerOptions{SessionOptions: cryo.SessionOptions{
			MaxMessagesPerSecond: 2, MaxBytesPerSecond: 1 << 20,
			Logger: slog.New(log.handler()), OnThrottle: func(_ *cryo.Session, d time.Duration) { pauses = append(pauses, d) },
		}})
		peer.WriteFrames(cryotest.Text(1, ""), cryotest.Text(2, ""))
		require.NoError(t, receive(t, s).Ack())
		require.NoError(t, receive(t, s).Ack())
		require.False(t, s.Stats().Throttled)
		require.Empty(t, log.text())

		for i := range uint32(3) {
			peer.WriteFrames(cryotest.Text(3+i, ""))
			require.NoError(t, receive(t, s).Ack())
			require.True(t, s.Stats().Throttled)
		}
		require.Equal(t, []time.Duration{time.Second / 2, time.Second / 2, time.Second / 2}, pauses)
		require.Equal(t, 1, strings.Count(log.text(), "\n"), log.text())
		require.Contains(t, log.text(), `level=WARN msg="Reads are paused: the peer sends faster than its limit" session=18446744073709551574 suppressed=0 max_messages_per_second=2 max_bytes_per_second=1048576`)
		time.Sleep(999 * time.Millisecond)
		require.True(t, s.Stats().Throttled)
		time.Sleep(time.Millisecond)
		require.False(t, s.Stats().Throttled)
	})
}
