package cryo_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/cryotest"
	"github.com/cryo-connect/cryo-connect/internal/wire"
)

func TestWriteBlocksWhileThePeerDoesNotRead(t *testing.T) {
	for _, chunk := range []int{1, 1000, cryo.DefaultChunkBytes, 1 << 20} {
		t.Run(fmt.Sprintf("chunks of %d", chunk), func(t *testing.T) {
			atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
				st, _ := opening(t, s, peer, &cryo.StreamOptions{ChunkBytes: 1 << 20})
				peer.Conn().StopReading()
				taken := 0
				writing := start(func() error {
					for {
						n, err := st.Write(make([]byte, chunk))
						taken += n
						if err != nil {
							return err
						}
					}
				})
				time.Sleep(time.Hour)
				writing.wantBlocked(t)
				// The network's buffer, what is being written, and what waits.
				require.LessOrEqual(t, taken, 64<<10+256<<10+max(chunk, 256<<10)+chunk)
				if chunk == 1 {
					require.LessOrEqual(t, taken, 30_000, "many small chunks weigh more than their bytes")
				}
				_ = st.Close()
				require.Error(t, writing.result(t))
			})
		})
	}
}

// A source that gives single bytes must not have each of them keep a chunk's
// memory.
func TestSmallReadsRetainLittleMemory(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		s, peer := accepted(t, cryo.ServerOptions{SessionOptions: quiet})
		st, _ := opening(t, s, peer, &cryo.StreamOptions{ChunkBytes: 1 << 20})
		peer.Conn().StopReading()
		before := heapInUse()
		reading := start(func() error {
			_, err := st.ReadFrom(oneByte{})
			return err
		})
		reading.wantBlocked(t)
		require.Less(t, heapInUse(), before+8<<20)
		_ = st.Close()
		require.Error(t, reading.result(t))
	})
}

type oneByte struct{}

func (oneByte) Read(p []byte) (int, error) { return copy(p, "x"), nil }

func TestMessagesAreNotStarvedByStreams(t *testing.T) {
	atBothEnds(t, quiet, func(t *testing.T, end end, s *cryo.Session, peer *cryotest.Peer) {
		const streams = 4
		ctx, cancel := context.WithCancel(t.Context())
		var sending sync.WaitGroup
		for range streams {
			sending.Go(func() { _ = s.SendStream(ctx, endless{}, nil) })
		}
		var starts []wire.Frame
		for range streams {
			starts = append(starts, peer.WantType("TX_START", wire.TxStart))
		}
		peer.Ack(starts...)
		for i := range 10 {
			peer.Conn().StopReading()
			synctest.Wait()
			peer.Skip()
			text := start(func() error { return s.SendText(t.Context(), fmt.Sprint(i)) })
			text.wantBlocked(t)
			peer.Conn().ReadOn()
			between := 0
			for {
				f := peer.Next("a chunk or the message")
				if f.Type == wire.UTF8 {
					require.Equal(t, fmt.Sprint(i), string(f.Payload))
					peer.Ack(f)
					break
				}
				require.Equal(t, wire.TxChunk, f.Type)
				between += len(f.Payload)
			}
			text.wantSuccess(t)
			// As much as each stream may have waiting, and the network.
			require.LessOrEqual(t, between, streams*256<<10+128<<10)
		}
		cancel()
		sending.Wait()
	})
}

func TestConcurrentStreamsAndMessagesBothWays(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		opts := quiet
		opts.MaxBufferBytes = 100_000
		p := connect(t, opts, opts)
		data := noise(50_000)
		var all sync.WaitGroup
		for _, way := range [][2]*cryo.Session{{p.client, p.server}, {p.server, p.client}} {
			from, to := way[0], way[1]
			const n = 40
			for i := range n {
				all.Go(func() {
					opts := &cryo.StreamOptions{Name: fmt.Sprint(i), ChunkBytes: 100 + i*97}
					require.NoError(t, from.SendStream(t.Context(), bytes.NewReader(data[i*10:]), opts))
				})
				all.Go(func() {
					require.NoError(t, from.SendBinary(t.Context(), data[:i*100]))
				})
				all.Go(func() {
					st, err := to.AcceptStream(t.Context())
					require.NoError(t, err)
					got, err := io.ReadAll(st)
					require.NoError(t, err)
					var i int
					_, _ = fmt.Sscan(st.Name(), &i)
					require.True(t, bytes.Equal(data[i*10:], got))
					require.NoError(t, st.Ack())
				})
				all.Go(func() {
					m, err := to.Receive(t.Context())
					require.NoError(t, err)
					require.True(t, bytes.HasPrefix(data, m.Payload))
					require.NoError(t, m.Ack())
				})
			}
		}
		all.Wait()
		synctest.Wait()
	})
}

// A long stream costs no more memory than a short one, at either end.
func TestLongStreamNeedsBoundedMemory(t *testing.T) {
	const size = 256 << 20
	client, server := overTCP(t) // a server doesn't mask what it sends, which takes time
	before := heapInUse()
	sending := start(func() error {
		return server.SendStream(t.Context(), vast{size: size}.limited(), &cryo.StreamOptions{ChunkBytes: 256 << 10})
	})
	st := acceptStream(t, client)
	peak := uint64(0)
	for range 8 {
		n, err := io.CopyN(io.Discard, st, size/8)
		require.NoError(t, err)
		require.Equal(t, int64(size/8), n)
		peak = max(peak, heapInUse())
	}
	require.NoError(t, wantRest(t, st, ""))
	require.NoError(t, st.Ack())
	sending.wantSuccess(t)
	require.Less(t, peak, before+64<<20)
	t.Logf("%d MiB, and %d MiB of memory at most", size>>20, (peak-min(peak, before))>>20)
}

// overTCP connects two sessions over the loopback interface.
func overTCP(tb testing.TB) (client, server *cryo.Session) {
	tb.Helper()
	sessions := make(chan *cryo.Session, 1)
	listener := httptest.NewServer(newServer(tb, cryo.ServerOptions{
		Authorize: cryo.Tokens(token),
		OnSession: func(s *cryo.Session, _ *cryo.Upgrade) { sessions <- s },
	}))
	tb.Cleanup(listener.Close)
	client, err := cryo.Dial(tb.Context(), strings.Replace(listener.URL, "http", "ws", 1), &cryo.DialOptions{
		Token:   token,
		NetDial: (&net.Dialer{}).DialContext,
	})
	require.NoError(tb, err)
	server = <-sessions
	tb.Cleanup(func() {
		cut(client)
		cut(server)
	})
	return client, server
}
