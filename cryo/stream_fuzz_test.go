package cryo_test

import (
	"context"
	"io"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/cryotest"
	"github.com/cryo-connect/cryo-connect/internal/wire"
)

// FuzzStreams has a raw peer send any sequence of frames about streams, well
// formed or not, to a session that receives streams and sends some. Whatever
// comes, it goes on serving or ends, and owes nothing once all is settled.
func FuzzStreams(f *testing.F) {
	const start, chunk, finish, flow, fetch, cancel, ack, flip, wait = 0, 1, 2, 3, 4, 5, 6, 7, 8
	for _, script := range [][]byte{
		{},
		{start, 0, 255, 0, chunk, 0, 0, 9, chunk, 0, 1, 90, finish, 0, 0, 0},
		{start, 0, 255, 0, start, 1, 255, 0, chunk, 1, 0, 9, chunk, 0, 0, 90, finish, 1, 0, 0, finish, 0, 0, 0},
		{start, 0, 10, 0, chunk, 0, 0, 4, chunk, 0, 1, 6, finish, 0, 0, 0, finish, 0, 0, 0},
		{start, 0, 10, 0, chunk, 0, 0, 4, finish, 0, 0, 0, chunk, 0, 1, 1},
		{start, 3, 255, 0, chunk, 3, 0, 255, chunk, 3, 1, 255, chunk, 3, 2, 255, wait, 60, 0, 0},
		{start, 2, 255, 0, chunk, 2, 0, 1, start, 2, 255, 0, chunk, 2, 0, 1},
		{start, 0, 255, 0, start, 0, 255, 0},
		{ack, 1, 0, 0, ack, 2, 0, 0, cancel, 0, 0, 0, ack, 3, 0, 0, cancel, 1, 0, 0},
		{flow, 1, 0, 0, ack, 1, 0, 0, ack, 2, 0, 0, fetch, 0, 0, 1, fetch, 1, 2, 9, fetch, 0, 9, 255, cancel, 0, 0, 0},
		{start, 0, 255, 0, flip, 8, 250, 0, chunk, 0, 0, 9, flip, 9, 1, 0, finish, 0, 0, 0, flip, 40, 1, 0},
		{start, 1, 255, 0, wait, 59, 0, 0, chunk, 1, 0, 0, wait, 59, 0, 0, chunk, 1, 1, 0, wait, 61, 0, 0, chunk, 1, 2, 3},
	} {
		for _, dials := range []bool{false, true} {
			f.Add(script, false, dials)
			f.Add(script, true, dials)
		}
	}
	f.Fuzz(func(t *testing.T, script []byte, pull, dials bool) {
		synctest.Test(t, func(t *testing.T) {
			opts := bounded()
			var (
				s        *cryo.Session
				peer     *cryotest.Peer
				l        *cryotest.Listener
				sessions <-chan *cryo.Session
			)
			if dials {
				s, peer = dialled(t, cryo.DialOptions{SessionOptions: opts})
			} else {
				_, l, sessions = serve(t, cryo.ServerOptions{SessionOptions: opts})
				peer = join(t, l, sid)
				peer.ClientHandshake()
				s = next(t, sessions)
			}
			app := startFuzzed(t, s, pull)
			for len(script) >= 4 && len(script) < 400 {
				op, a, b, c := script[0], script[1], script[2], script[3]
				script = script[4:]
				frame := wire.Frame{SID: peer.SID, Ack: uint32(b), Tx: uint32(a)}
				at, xor := -1, byte(0)
				switch op {
				case start:
					frame.Type, frame.Size, frame.Payload = wire.TxStart, int32(max(int8(b), -1)), []byte("n")
				case chunk:
					frame.Type, frame.Seq, frame.Payload = wire.TxChunk, uint32(b), []byte(strings.Repeat("x", int(c)))
				case finish:
					frame.Type = wire.TxFinish
				case flow:
					frame.Type, frame.Flow = wire.TxFlow, wire.Flow(a%2)
				case fetch:
					frame.Type, frame.Start, frame.End = wire.TxFetch, uint32(b), uint32(c)
				case cancel:
					frame.Type = wire.TxCancel
				case ack:
					frame.Type, frame.Ack = wire.Ack, peer.First+uint32(a)
				case flip:
					frame.Type, at, xor = wire.TxStart, int(a), b
				default:
					time.Sleep(time.Duration(a) * time.Second)
					continue
				}
				bytes, err := wire.Append(nil, &frame)
				require.NoError(t, err)
				if at >= 0 {
					bytes[at%len(bytes)] ^= xor
				}
				_ = peer.WS.WriteMessage(websocket.BinaryMessage, bytes) // it may have closed
				if c%2 == 0 {
					synctest.Wait()
				}
			}
			app.stop()
			if s.Err() == nil {
				peer.Skip()
				wantFree(t, s, peer, opts.MaxBufferBytes, 0)
				return
			}
			_ = peer.WS.Close()
			wantEnded(t, s)
			if dials {
				return
			}
			other := join(t, l, 1)
			other.ClientHandshake()
			wantFree(t, next(t, sessions), other, opts.MaxBufferBytes, 0)
		})
	})
}

// fuzzed is what an application does with a session.
type fuzzed struct {
	s      *cryo.Session
	cancel context.CancelFunc
	all    sync.WaitGroup

	mu   sync.Mutex
	open []*cryo.IncomingStream
}

func startFuzzed(t *testing.T, s *cryo.Session, pull bool) *fuzzed {
	app := &fuzzed{s: s}
	ctx, cancel := context.WithCancel(t.Context())
	app.cancel = cancel
	if pull {
		app.all.Go(func() { _ = s.PullStreams(ctx) })
		synctest.Wait()
	}
	for range 2 {
		app.all.Go(func() {
			_ = s.SendStream(ctx, strings.NewReader(strings.Repeat("x", 1000)), &cryo.StreamOptions{ChunkBytes: 300})
		})
	}
	app.all.Go(func() { // a flipped bit can make a message
		for {
			m, err := s.Receive(ctx)
			if err != nil {
				return
			}
			_ = m.Ack()
		}
	})
	app.all.Go(func() {
		for {
			st, err := s.AcceptStream(ctx)
			if err != nil {
				return
			}
			app.mu.Lock()
			app.open = append(app.open, st)
			app.mu.Unlock()
			app.all.Go(func() { take(st) })
		}
	})
	return app
}

// take handles a stream as its number selects.
func take(st *cryo.IncomingStream) {
	switch st.Tx() % 4 {
	case 0:
		if _, err := io.Copy(io.Discard, st); err == nil {
			_ = st.Ack()
		} else {
			_ = st.Close()
		}
	case 1:
		_, _ = io.CopyN(io.Discard, st, 5)
		_ = st.Close()
	case 2:
		_ = st.Ack()
	default:
		_, _ = st.Read(make([]byte, 1)) // left unsettled
	}
}

// stop settles everything.
func (app *fuzzed) stop() {
	synctest.Wait()
	app.cancel()
	synctest.Wait()
	app.mu.Lock()
	open := app.open
	app.mu.Unlock()
	for _, st := range open {
		_ = st.Close()
	}
	app.all.Wait()
	for synctest.Wait(); app.s.Stats().Paused; synctest.Wait() {
		time.Sleep(time.Second) // a chunk waits for its stream to be accepted
	}
}
