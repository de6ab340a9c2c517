package cryo_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"io"
	"log/slog"
	"reflect"
	"slices"
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

// oracle is a token bucket that holds the tokens of one second at most, in billionths of a token so
// that it is exact. What it lacks is waited for.
type oracle struct {
	rate  int64 // tokens per second; 0: no limit
	level int64
	last  time.Duration // since the start of the session
}

func newOracle(rate, tokens int) oracle { return oracle{rate: int64(rate), level: int64(tokens) * 1e9} }

// take returns the time to wait for n tokens.
func (o *oracle) take(now time.Duration, n int) time.Duration {
	if o.rate == 0 {
		return 0
	}
	full := o.rate * 1e9
	if passed := int64(now - o.last); passed < (full-o.level)/o.rate {
		o.level += passed * o.rate
	} else {
		o.level = full
	}
	o.level -= int64(n) * 1e9
	o.last = now
	return time.Duration(max(0, -o.level) / o.rate)
}

// kind is what an arrival is.
type kind int

const (
	aMessage   kind = iota
	inPieces        // a message with empty fragments
	aChunk          // chunk of an accepted stream
	strayChunk      // chunk of an unknown stream
	unknownFrame
	aPing
	aWebSocketPing
	aWebSocketPong
	anIdleAck // answers nothing
	kinds
)

// arrival is a frame of a random pattern, which is sent some time after the one before.
type arrival struct {
	Kind  kind
	After time.Duration
	Bytes int
	Count int // of empty fragments, or of frames without bytes
}

var arrivalPatterns = rapid.SliceOfN(rapid.Custom(func(t *rapid.T) arrival {
	pause := rapid.OneOf(rapid.Just(0), rapid.Just(0), rapid.IntRange(0, 3000))
	size := rapid.OneOf(rapid.IntRange(1, 200), rapid.IntRange(1, 2000), rapid.IntRange(1, 200_000))
	return arrival{
		Kind:  kind(rapid.IntRange(0, int(kinds)-1).Draw(t, "kind")),
		After: time.Duration(pause.Draw(t, "after")) * time.Millisecond,
		Bytes: size.Draw(t, "bytes"),
		Count: rapid.OneOf(rapid.IntRange(1, 5), rapid.IntRange(1, 150)).Draw(t, "count"),
	}
}), 1, 40)

// receipts are the times at which a session has received its frames, from its start.
type receipts struct {
	Stream                    time.Duration // TX_START
	Messages, Chunks, Ignored []time.Duration
	Paused                    time.Duration // sum of the pauses that are reported
}

func TestFramesAreReceivedWhenATokenBucketAllowsIt(t *testing.T) {
	// Each wait is a whole number of nanoseconds.
	messageRates := rapid.SampledFrom([]int{0, 1, 2, 5, 10, 1000, 25_000, 1_000_000})
	byteRates := rapid.SampledFrom([]int{0, 1, 2, 5, 10, 1000, 25_000, 4_000_000})
	rapid.Check(t, func(rt *rapid.T) {
		messages, bytes := messageRates.Draw(rt, "messages"), byteRates.Draw(rt, "bytes")
		pattern := arrivalPatterns.Draw(rt, "pattern")
		want, last := expectedReceipts(messages, bytes, pattern)
		var got receipts
		synctest.Test(t, func(t *testing.T) { got = throttledReceipts(t, messages, bytes, pattern, last) })
		if !reflect.DeepEqual(want, got) {
			rt.Fatalf("want %v, got %v", want, got)
		}
		for i, at := range got.Messages {
			if i++; messages > 0 && float64(i) > at.Seconds()*float64(messages)+1e-9 {
				rt.Fatalf("%d messages within %v", i, at)
			}
		}
	})
}

// expectedReceipts returns what the oracles expect, and the time of the last receipt.
func expectedReceipts(messages, bytes int, pattern []arrival) (want receipts, last time.Duration) {
	m, b := newOracle(messages, 0), newOracle(bytes, 0)
	var others oracle
	switch {
	case messages > 0:
		others = newOracle(max(100, 4*messages), 100)
	case bytes > 0:
		others = newOracle(max(100, bytes/256), 100)
	}
	others.take(0, 2) // ENDPOINT_INFO, and the acknowledgement of ours, for which nobody waits
	unreported := time.Second
	pause := func(wait time.Duration) {
		last += wait
		if wait <= unreported {
			unreported -= wait
		} else {
			want.Paused += wait
		}
	}
	receive := func(sent time.Duration, count, other, size int) time.Duration {
		last = max(sent, last) // the frame before has been received
		wait := max(m.take(last, count), b.take(last, size))
		if other > 0 {
			wait = max(wait, others.take(last, other))
		}
		pause(wait)
		return last
	}
	want.Stream = receive(0, 1, 0, 64)
	sent := want.Stream
	for _, a := range pattern {
		sent += a.After
		switch a.Kind {
		case aMessage:
			want.Messages = append(want.Messages, receive(sent, 1, 0, max(64, a.Bytes)))
		case inPieces:
			receive(sent, 1, 0, max(64, a.Bytes))
			for range a.Count {
				pause(others.take(last, 1))
			}
			want.Messages = append(want.Messages, last)
		case aChunk:
			other := 0
			if a.Bytes < 1024 {
				other = 1
			}
			want.Chunks = append(want.Chunks, receive(sent, 0, other, max(64, a.Bytes)))
		case unknownFrame:
			want.Ignored = append(want.Ignored, receive(sent, 0, 1, a.Bytes))
		case strayChunk:
			receive(sent, 0, 1, a.Bytes)
		default:
			for range a.Count {
				receive(sent, 0, 1, 0)
			}
		}
	}
	return want, last
}

// bytesOfArrival encodes a frame. number is its own, and chunk the index of a chunk.
func bytesOfArrival(t *testing.T, peer *cryotest.Peer, a arrival, number, chunk uint32) []byte {
	content := strings.Repeat("x", a.Bytes)
	switch a.Kind {
	case aMessage:
		return bytesOf(t, peer, cryotest.Binary(number, content))
	case inPieces:
		b := raw(end{}, 0x02, encoded(t, peer, cryotest.Binary(number, content)))
		for range a.Count {
			b = append(b, raw(end{}, 0x00, nil)...)
		}
		return append(b, raw(end{}, 0x80, nil)...)
	case aChunk:
		return bytesOf(t, peer, txChunk(1, chunk, content))
	case strayChunk:
		return bytesOf(t, peer, txChunk(77, 0, content))
	case unknownFrame:
		return raw(end{}, 0x82, append(append(binary.BigEndian.AppendUint64(nil, peer.SID), 77), content...))
	case aPing:
		return bytes.Repeat(bytesOf(t, peer, cryotest.Ping(number)), a.Count)
	case aWebSocketPing:
		return bytes.Repeat(raw(end{}, 0x89, nil), a.Count)
	case aWebSocketPong:
		return bytes.Repeat(raw(end{}, 0x8A, nil), a.Count)
	default:
		return bytes.Repeat(bytesOf(t, peer, cryotest.Acked(number)), a.Count)
	}
}

// throttledReceipts sends a stream and a pattern, and returns the times of their receipt.
func throttledReceipts(t *testing.T, messages, bytes int, pattern []arrival, last time.Duration) (got receipts) {
	var begin time.Time
	s, peer := accepted(t, cryo.ServerOptions{SessionOptions: cryo.SessionOptions{
		HeartbeatInterval: 1 << 50, MaxBufferBytes: 1 << 30, StreamIdleTimeout: 1 << 50,
		MaxMessagesPerSecond: messages, MaxBytesPerSecond: bytes,
		OnThrottle: func(_ *cryo.Session, d time.Duration) { got.Paused += d },
		OnIgnore:   func(*cryo.Session) { got.Ignored = append(got.Ignored, time.Since(begin)) },
	}})
	begin = time.Now()
	peer.WriteFrames(txStart(1, 1, -1, ""))
	ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
	defer cancel()
	st, err := s.AcceptStream(ctx)
	require.NoError(t, err)
	got.Stream = time.Since(begin)

	var frames [][]byte
	var boundaries []int64 // size of the stream at the end of each chunk
	var total int64
	texts := 0
	for i, a := range pattern {
		frames = append(frames, bytesOfArrival(t, peer, a, uint32(i+2), uint32(len(boundaries))))
		switch a.Kind {
		case aMessage, inPieces:
			texts++
		case aChunk:
			total += int64(a.Bytes)
			boundaries = append(boundaries, total)
		}
	}
	go func() { // acknowledgements and pongs
		_, _ = io.Copy(io.Discard, peer.WS.NetConn())
	}()
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
		large := bytesOf(t, peer, cryotest.Binary(1, strings.Repeat("x", 600_000)))
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
		require.Len(t, m.Payload, 600_000)
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
func TestCostOfAFragmentedMessageDelaysTheNextMessage(t *testing.T) {
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
		require.Equal(t, time.Second, time.Since(begin), "that of the first fragment")
		peer.WriteFrames(cryotest.Text(2, strings.Repeat("x", 1000)))
		receive(t, s)
		require.Equal(t, 7*time.Second, time.Since(begin))
	})
}

func TestIgnoredBytesOfAnyFrameCount(t *testing.T) {
	const ignored = 10_000
	for name, f := range map[string]wire.Frame{
		"ENDPOINT_INFO": cryotest.EndpointInfo(1),
		"ACK":           cryotest.Acked(1),
		"TX_FINISH":     txFinish(1, 7),
		"TX_START":      txStart(1, 7, -1, strings.Repeat("x", 2048)),
		"TX_CANCEL":     txCancel(1, 7),
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s, peer := accepted(t, cryo.ServerOptions{SessionOptions: cryo.SessionOptions{HeartbeatInterval: 1 << 50, MaxBytesPerSecond: 1000}})
				time.Sleep(time.Second)
				b := raw(end{}, 0x82, append(encoded(t, peer, f), make([]byte, ignored)...))
				sends(t, peer, b)
				peer.WriteFrames(cryotest.Text(2, ""))
				begin := time.Now()
				receive(t, s)
				require.GreaterOrEqual(t, time.Since(begin), 9*time.Second)
			})
		})
	}
}

func TestThrottledSessionDoesNotDelayOthers(t *testing.T) {
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
		time.Sleep(100 * time.Millisecond) // that of its first message
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
		require.Equal(t, 51*time.Second, time.Since(begin))
		for i := range uint32(102) {
			wantAmongPongs(t, peer, cryotest.Acked(i))
		}
	})
}

func TestThrottledSessionReadsImmediatelyWhenDataIsDiscarded(t *testing.T) {
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
		require.True(t, s.Stats().Throttled)
		require.Empty(t, log.text(), "any client may have to wait at the start")
		require.Empty(t, pauses)

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

func TestReconnectingDoesNotRaiseTheRate(t *testing.T) {
	const rate, bytesRate = 100, 50_000
	for name, opts := range map[string]cryo.SessionOptions{"messages": {MaxMessagesPerSecond: rate}, "bytes": {MaxBytesPerSecond: bytesRate}} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				_, l, sessions := serve(t, cryo.ServerOptions{SessionOptions: opts})
				begin := time.Now()
				received := 0
				for i := range uint64(200) {
					peer := join(t, l, i+1)
					peer.ClientHandshake()
					s := next(t, sessions)
					flooding := start(func() error {
						return peer.TryWriteFrames(slices.Repeat([]wire.Frame{cryotest.Text(2, strings.Repeat("x", 500))}, 300)...)
					})
					time.Sleep(time.Duration(i%40) * time.Millisecond)
					cut(s)
					<-flooding.done
					received += s.Stats().UnsettledMessages
					s.Discard()
				}
				require.LessOrEqual(t, float64(received), rate*time.Since(begin).Seconds())
				require.NotZero(t, received)
			})
		})
	}
}

// An honest client acknowledges, sends pings, and answers those of the server.
func TestAcknowledgementsAndHeartbeatsAreNotThrottled(t *testing.T) {
	atBothEnds(t, cryo.SessionOptions{MaxMessagesPerSecond: 1, MaxBytesPerSecond: 1}, func(t *testing.T, _ end, s *cryo.Session, peer *cryotest.Peer) {
		begin := time.Now()
		for range 1000 {
			send := start(func() error { return s.SendText(t.Context(), "to the peer") })
			peer.Ack(peer.WantType("our message", wire.UTF8))
			send.wantSuccess(t)
		}
		require.Zero(t, time.Since(begin))
		peer.AnswerPings()
		for i := range uint32(100) {
			time.Sleep(15 * time.Second)
			begin := time.Now()
			peer.WriteFrames(cryotest.Ping(1000 + i))
			for f := (wire.Frame{}); f.Ack != 1000+i; {
				f = peer.Next("the pong")
			}
			require.Zero(t, time.Since(begin))
		}
		require.False(t, s.Stats().Throttled)
	})
}

// What the peer sends is behind its answers to our pings, and paid for during hours.
func TestFloodOfPingsIsSlowedDownAndEndsNoSession(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log logged
		ignored := 0
		_, l, sessions := serve(t, cryo.ServerOptions{SessionOptions: cryo.SessionOptions{
			MaxMessagesPerSecond: 1, Logger: slog.New(log.handler()), OnIgnore: func(*cryo.Session) { ignored++ },
		}})
		peer := join(t, l, sid)
		peer.WS.SetPingHandler(func(string) error { return nil }) // a pong would be in the middle of a frame
		peer.ClientHandshake()
		s := next(t, sessions)
		unknown := raw(end{}, 0x82, append(binary.BigEndian.AppendUint64(nil, peer.SID), 77))
		flood := bytes.Repeat(slices.Concat(raw(end{}, 0x89, nil), raw(end{}, 0x8A, nil), unknown, bytesOf(t, peer, cryotest.Ping(1))), 1000)
		require.NoError(t, peer.WS.NetConn().SetWriteDeadline(time.Time{}))
		go func() {
			for err := error(nil); err == nil; {
				_, err = peer.WS.NetConn().Write(flood)
			}
		}()
		time.Sleep(time.Hour)
		require.NoError(t, s.Err())
		require.True(t, s.Stats().Throttled)
		require.InDelta(t, 3600*100/4, ignored, 100)
		require.Equal(t, 1, strings.Count(log.text(), "Reads are paused: the peer sends faster than its limit"))
		cut(s)
	})
}
