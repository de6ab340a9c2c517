package cryo_test

import (
	"context"
	"io"
	"math/rand/v2"
	"net"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/cryotest"
	"github.com/cryo-connect/cryo-connect/internal/wire"
)

// quiet keeps the heartbeat out of tests that let time pass.
var quiet = cryo.SessionOptions{HeartbeatInterval: 24 * time.Hour}

func txStart(number, tx uint32, size int32, name string) wire.Frame {
	return wire.Frame{Type: wire.TxStart, Ack: number, Tx: tx, Size: size, Payload: payload(name)}
}

func txChunk(tx, seq uint32, data string) wire.Frame {
	return wire.Frame{Type: wire.TxChunk, Tx: tx, Seq: seq, Payload: payload(data)}
}

func txFinish(number, tx uint32) wire.Frame {
	return wire.Frame{Type: wire.TxFinish, Ack: number, Tx: tx}
}

func txFlow(number uint32, flow wire.Flow) wire.Frame {
	return wire.Frame{Type: wire.TxFlow, Ack: number, Flow: flow}
}

// useFlow has a session get its streams so. Without a word they are pushed.
func useFlow(t *testing.T, s *cryo.Session, flow wire.Flow) {
	t.Helper()
	if flow == wire.FlowPull {
		require.NoError(t, s.PullStreams(t.Context()))
	}
}

func txFetch(number, tx, start, end uint32) wire.Frame {
	return wire.Frame{Type: wire.TxFetch, Ack: number, Tx: tx, Start: start, End: end}
}

func txCancel(number, tx uint32) wire.Frame {
	return wire.Frame{Type: wire.TxCancel, Ack: number, Tx: tx}
}

func payload(text string) []byte {
	if text == "" {
		return nil
	}
	return []byte(text)
}

// noise is data that no two places of have in common.
func noise(n int) []byte {
	data := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{byte(n)}).Read(data)
	return data
}

// pair is a client's and a server's session that talk to each other.
type pair struct {
	client, server *cryo.Session
	conn           *cryotest.Conn // the client's end
	sent           *atomic.Int64  // bytes that the client has written
}

func connect(t testing.TB, client, server cryo.SessionOptions) pair {
	t.Helper()
	sessions := make(chan *cryo.Session, 1)
	handler := newServer(t, cryo.ServerOptions{
		SessionOptions: server,
		Authorize:      cryo.Tokens(token),
		OnSession:      func(s *cryo.Session, _ *cryo.Upgrade) { sessions <- s },
	})
	l := cryotest.Serve(t, handler)
	p := pair{sent: new(atomic.Int64)}
	opts := cryo.DialOptions{SessionOptions: client, Token: token, SessionID: sid}
	opts.NetDial = func(ctx context.Context, network, address string) (net.Conn, error) {
		c, err := l.Dial(ctx, network, address)
		if err != nil {
			return nil, err
		}
		p.conn = c.(*cryotest.Conn)
		return counted{c, p.sent}, nil
	}
	var err error
	p.client, err = cryo.Dial(t.Context(), memoryURL, &opts)
	require.NoError(t, err)
	p.server = <-sessions
	t.Cleanup(func() {
		cut(p.client)
		cut(p.server)
	})
	return p
}

// counted counts what is written.
type counted struct {
	net.Conn
	sent *atomic.Int64
}

func (c counted) Write(p []byte) (int, error) {
	n, err := c.Conn.Write(p)
	c.sent.Add(int64(n))
	return n, err
}

// acceptStream wants a stream to be announced.
func acceptStream(t testing.TB, s *cryo.Session, names ...string) *cryo.IncomingStream {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), cryotest.Patience)
	defer cancel()
	st, err := s.AcceptStream(ctx, names...)
	require.NoError(t, err)
	return st
}

// wantNoStream wants no stream to be there.
func wantNoStream(t *testing.T, s *cryo.Session, names ...string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), instant)
	defer cancel()
	_, err := s.AcceptStream(ctx, names...)
	require.ErrorIs(t, err, context.DeadlineExceeded)
}

// wantBytes wants some bytes to be read next.
func wantBytes(t *testing.T, st io.Reader, want string) {
	t.Helper()
	got := make([]byte, len(want))
	_, err := io.ReadFull(st, got)
	require.NoError(t, err)
	require.Equal(t, want, string(got))
}

// wantRest wants these bytes to be the last of a stream, and returns its error.
func wantRest(t *testing.T, st io.Reader, want string) error {
	t.Helper()
	got, err := io.ReadAll(st)
	require.Equal(t, want, string(got))
	return err
}

// opening starts a stream to a raw peer that pushes, and returns it when the
// peer has acknowledged TX_START.
func opening(t *testing.T, s *cryo.Session, peer *cryotest.Peer, opts *cryo.StreamOptions) (*cryo.OutgoingStream, uint32) {
	t.Helper()
	var st *cryo.OutgoingStream
	open := start(func() (err error) {
		st, err = s.OpenStream(t.Context(), opts)
		return err
	})
	f := peer.WantType("TX_START", wire.TxStart)
	peer.Ack(f)
	open.wantSuccess(t)
	t.Cleanup(func() { _ = st.Close() })
	return st, f.Tx
}

// incoming has a raw peer open a stream whose first byte is read.
func incoming(t *testing.T, s *cryo.Session, peer *cryotest.Peer, number, tx uint32) *cryo.IncomingStream {
	t.Helper()
	peer.WriteFrames(txStart(number, tx, -1, "in"))
	st := acceptStream(t, s)
	read := start(func() error {
		wantBytes(t, st, "<")
		return nil
	})
	peer.WantFrame("TX_START acknowledged", cryotest.Acked(number))
	peer.WriteFrames(txChunk(tx, 0, "<"))
	read.wantSuccess(t)
	return st
}

// wantFree wants just so many bytes to be received and not settled on a session
// that has a budget for itself: it reads while it may hold more, and stops at
// the bound. Under synctest.
func wantFree(t *testing.T, s *cryo.Session, peer *cryotest.Peer, bound, held int) {
	t.Helper()
	probe := func(n uint32) { peer.WriteFrames(cryotest.Text(n, "probe"), cryotest.Ping(n)) }
	reads := func(n uint32) {
		t.Helper()
		peer.WantFrame("it reads", cryotest.Pong(n))
		m := receive(t, s)
		require.Equal(t, "probe", string(m.Payload))
		require.NoError(t, m.Ack())
		peer.WantFrame("and may acknowledge", cryotest.Acked(n))
	}
	most := bound * 8 / 9 // see MaxBufferBytes: eight times what is left
	release := s.Reserve(most - held)
	for n := range uint32(3) {
		probe(n)
		reads(n)
	}
	synctest.Wait() // it is waiting for a frame now
	releaseOne := s.Reserve(1)
	probe(4)
	peer.WantIdle("it doesn't read: less is held than there should be", instant)
	releaseOne()
	reads(4)
	release()
}

// serving wants a raw peer to be answered: the session lives.
func serving(t *testing.T, s *cryo.Session, peer *cryotest.Peer) {
	t.Helper()
	require.NoError(t, s.Err())
	peer.WriteFrames(cryotest.Text(4711, "still there?"))
	require.NoError(t, receive(t, s).Ack())
	peer.WantFrame("it is", cryotest.Acked(4711))
}

// inBubble runs a test in virtual time.
func inBubble(t *testing.T, test func(*testing.T)) { synctest.Test(t, test) }
