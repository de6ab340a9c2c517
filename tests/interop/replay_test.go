package interop_test

import (
	"bytes"
	"context"
	"io"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/cryotest"
	"github.com/cryo-connect/cryo-connect/internal/testkit"
	"github.com/cryo-connect/cryo-connect/internal/wire"
)

// A session of the library that reads the recorded frames of a package sends the recorded
// frames of cryo-connect: the same ones, except for the numbers that it chooses, and for
// the order of independent frames.
func TestRecordedSessionsAreReplayedWithTheSameFrames(t *testing.T) {
	t.Parallel()
	for _, file := range transcripts(t) {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txt"), func(t *testing.T) {
			t.Parallel()
			newReplay(t, readTranscript(t, file)).run()
		})
	}
}

// replay plays the package over a connection in memory, and the application of the
// session: it acknowledges, rejects and sends where the transcript does.
type replay struct {
	t       *testing.T
	tr      *transcript
	ctx     context.Context
	server  *cryo.Server      // nil when dialled
	dialer  *websocket.Dialer // of its clients; nil when dialled
	session *cryo.Session     // nil until the handshake
	accept  chan *cryo.Session
	peer    *cryotest.Peer

	sent     chan entry        // by the session
	extra    []entry           // sent and not yet expected
	numbers  map[uint32]uint32 // of the session's frames: actual by recorded
	txs      map[uint32]uint32 // of its streams, likewise
	theirs   map[uint32]wire.Frame
	messages map[uint32]*cryo.Message
	streams  map[uint32]*incoming
	calls    []*call
}

// incoming is a stream that the session receives.
type incoming struct {
	stream *cryo.IncomingStream
	data   []byte
	err    error
	read   chan struct{} // closed at its end
}

// call is an application's call that waits for the peer.
type call struct {
	what string
	done chan error
}

// newReplay opens the session and its peer.
func newReplay(t *testing.T, tr *transcript) *replay {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 3*testkit.Patience)
	t.Cleanup(cancel)
	r := &replay{
		t: t, tr: tr, ctx: ctx, sent: make(chan entry, 1000), accept: make(chan *cryo.Session, 1),
		numbers: make(map[uint32]uint32), txs: make(map[uint32]uint32), theirs: make(map[uint32]wire.Frame),
		messages: make(map[uint32]*cryo.Message), streams: make(map[uint32]*incoming),
	}
	options := cryo.SessionOptions{SendOnly: tr.sendsOnly, HeartbeatInterval: quiet}
	sid := tr.entries[0].frame(t).SID
	if tr.dialled {
		l := cryotest.NewServer(t)
		go func() {
			s, err := cryo.Dial(ctx, "ws://replay.test", &cryo.DialOptions{
				SessionOptions: options, Token: token, SessionID: sid, NetDial: l.Dial, ConnectTimeout: testkit.Patience,
			})
			if err == nil {
				r.accept <- s
			}
		}()
		r.peer = l.NextPeer()
	} else {
		r.server = testkit.NewServer(t, cryo.ServerOptions{
			SessionOptions: options, Authorize: cryo.Tokens(token),
			OnSession: func(s *cryo.Session, _ *cryo.Upgrade) { r.accept <- s },
		})
		l := cryotest.Serve(t, r.server)
		r.dialer = l.Dialer()
		r.peer = cryotest.DialPeer(t, r.dialer, "ws://replay.test", token, sid)
	}
	r.peer.WS.SetCloseHandler(func(int, string) error { return nil }) // the transcript has the close frame
	go r.listen()
	return r
}

// listen reads what the session sends.
func (r *replay) listen() {
	defer close(r.sent)
	for {
		_, b, err := r.peer.WS.ReadMessage()
		if err == nil {
			r.sent <- entry{ours: true, wire: b}
			continue
		}
		if closed, ok := err.(*websocket.CloseError); ok && closed.Code != websocket.CloseAbnormalClosure { //nolint:errorlint // never wrapped
			r.sent <- entry{ours: true, code: closed.Code, reason: closed.Text}
		}
		return
	}
}

// run plays the transcript, and wants no frame that it does not have.
func (r *replay) run() {
	r.t.Helper()
	for i := range r.tr.entries {
		e := &r.tr.entries[i]
		switch {
		case e.ours && e.wire == nil:
			switch {
			case e.code == websocket.CloseServiceRestart:
				r.call("the shutdown", func(*cryo.Session) error { return r.server.Shutdown(r.ctx) })
			case e.reason == cryo.ErrTakenOver.Error():
				cryotest.DialPeer(r.t, r.dialer, "ws://replay.test", token, r.theSession().ID())
			}
			r.wantClose(e)
		case e.ours:
			f := e.frame(r.t)
			r.act(&f, i)
			r.wantFrame(&f, e)
		case e.wire == nil:
			r.peer.WriteClose(e.code, e.reason)
		default:
			r.feed(e.frame(r.t))
		}
	}
	for _, c := range r.calls {
		select {
		case <-c.done: // with the outcome that the transcript has
		case <-r.ctx.Done():
			require.FailNow(r.t, "timed out", "%s", c.what)
		}
	}
	select {
	case <-r.theSession().Done():
	case <-r.ctx.Done():
		require.FailNow(r.t, "timed out waiting for the session's end")
	}
	for e := range r.sent {
		r.extra = append(r.extra, e)
	}
	for i := range r.extra {
		require.Fail(r.t, "not in the transcript", "%s", &r.extra[i])
	}
}

// theSession waits for the handshake, and returns the session.
func (r *replay) theSession() *cryo.Session {
	r.t.Helper()
	if r.session == nil {
		select {
		case r.session = <-r.accept:
		case <-r.ctx.Done():
			require.FailNow(r.t, "timed out waiting for the handshake")
		}
	}
	return r.session
}

// feed sends a frame of the package to the session, with the session's numbers.
func (r *replay) feed(f wire.Frame) {
	r.t.Helper()
	switch f.Type {
	case wire.Ack, wire.Error:
		own, ours := r.numbers[f.Ack]
		if ours {
			f.Ack = own
		} else {
			r.theirs[f.Ack] = f
		}
	case wire.TxFetch, wire.TxCancel:
		r.theirs[f.Ack] = f
		f.Tx = r.txs[f.Tx]
	case wire.TxChunk, wire.PingPong:
	default:
		r.theirs[f.Ack] = f
	}
	r.peer.WriteFrames(f)

	message := f.Type == wire.UTF8 || f.Type == wire.Binary || f.Type == wire.Error && r.theirs[f.Ack].Type == wire.Error
	if message && !r.tr.sendsOnly {
		m, err := r.theSession().Receive(r.ctx)
		require.NoError(r.t, err)
		require.Equal(r.t, kinds[f.Type], m.Kind)
		require.Equal(r.t, string(f.Payload), string(m.Payload))
		r.messages[f.Ack] = m
	}
}

// act does what makes the application's session send a frame: nothing for frames that a
// session sends by itself.
func (r *replay) act(f *wire.Frame, at int) {
	r.t.Helper()
	switch f.Type {
	case wire.Ack:
		r.acknowledge(f.Ack)
	case wire.Error:
		if m := r.messages[f.Ack]; m != nil {
			require.NoError(r.t, m.Reject(string(f.Payload)))
		}
	case wire.TxCancel:
		if st := r.streams[f.Tx]; st != nil {
			require.NoError(r.t, st.stream.Close())
		}
	case wire.UTF8:
		r.call(describe(f), func(s *cryo.Session) error { return s.SendText(r.ctx, string(f.Payload)) })
	case wire.Binary:
		r.call(describe(f), func(s *cryo.Session) error { return s.SendBinary(r.ctx, f.Payload) })
	case wire.TxStart:
		data, chunk := r.outgoing(f, at)
		r.call(describe(f), func(s *cryo.Session) error {
			return s.SendStream(r.ctx, bytes.NewReader(data), &cryo.StreamOptions{Name: string(f.Payload), ChunkBytes: chunk})
		})
	case wire.TxFlow:
		require.Equal(r.t, wire.FlowPull, f.Flow, "the library requests nothing else")
		r.call(describe(f), func(s *cryo.Session) error { return s.PullStreams(r.ctx) })
	case wire.Bye:
		r.call(describe(f), func(s *cryo.Session) error { return s.Close(r.ctx, string(f.Payload)) })
	}
}

// call runs a call of the application that waits for the peer.
func (r *replay) call(what string, f func(*cryo.Session) error) {
	c := &call{what, make(chan error, 1)}
	r.calls = append(r.calls, c)
	s := r.theSession()
	go func() { c.done <- f(s) }()
}

// acknowledge does what makes the session acknowledge one of the peer's frames.
func (r *replay) acknowledge(number uint32) {
	r.t.Helper()
	f, ok := r.theirs[number]
	require.True(r.t, ok, "an ACK for %d, which the package has not used", number)
	switch f.Type {
	case wire.UTF8, wire.Binary, wire.Error:
		require.NoError(r.t, r.messages[number].Ack())
	case wire.TxStart:
		r.receive(&f)
	case wire.TxFinish:
		st := r.streams[f.Tx]
		select {
		case <-st.read:
		case <-r.ctx.Done():
			require.FailNow(r.t, "timed out waiting for the stream's end", "tx %d", f.Tx)
		}
		require.NoError(r.t, st.err)
		require.Equal(r.t, string(r.chunks(f.Tx, false)), string(st.data), "the stream's bytes")
		require.NoError(r.t, st.stream.Ack())
	}
}

// receive accepts and reads a stream.
func (r *replay) receive(f *wire.Frame) {
	r.t.Helper()
	stream, err := r.theSession().AcceptStream(r.ctx)
	require.NoError(r.t, err)
	require.Equal(r.t, string(f.Payload), stream.Name())
	require.Equal(r.t, f.Tx, stream.Tx())
	require.Equal(r.t, int64(f.Size), stream.Size())
	st := &incoming{stream: stream, read: make(chan struct{})}
	r.streams[f.Tx] = st
	go func() {
		defer close(st.read)
		st.data, st.err = io.ReadAll(stream)
	}()
}

// outgoing returns the data of a stream that the session sends. The bytes that were not
// recorded, of a cancelled stream, are zeros.
func (r *replay) outgoing(f *wire.Frame, at int) (data []byte, chunk int) {
	r.t.Helper()
	for i := at; i < len(r.tr.entries); i++ {
		e := &r.tr.entries[i]
		if !e.ours || e.wire == nil {
			continue
		}
		if c := e.frame(r.t); c.Type == wire.TxChunk && c.Tx == f.Tx {
			chunk = max(chunk, len(c.Payload))
		}
	}
	data = r.chunks(f.Tx, true)
	if missing := int(f.Size) - len(data); missing > 0 {
		data = append(data, make([]byte, missing)...)
	}
	return data, max(chunk, 1)
}

// chunks returns the recorded bytes of a stream.
func (r *replay) chunks(tx uint32, ours bool) []byte {
	r.t.Helper()
	var data []byte
	for i := range r.tr.entries {
		if e := &r.tr.entries[i]; e.ours == ours && e.wire != nil {
			if c := e.frame(r.t); c.Type == wire.TxChunk && c.Tx == tx {
				data = append(data, c.Payload...)
			}
		}
	}
	return data
}

// next waits for a frame or a close of the session, and adds it to extra.
func (r *replay) next(want string) {
	r.t.Helper()
	select {
	case e, ok := <-r.sent:
		if !ok {
			require.FailNow(r.t, "the connection has ended", "wanted %s, left over: %v", want, r.leftOver())
		}
		r.extra = append(r.extra, e)
	case <-time.After(testkit.Patience):
		require.FailNow(r.t, "timed out", "wanted %s, left over: %v", want, r.leftOver())
	}
}

// leftOver describes extra.
func (r *replay) leftOver() (all []string) {
	for i := range r.extra {
		all = append(all, r.extra[i].String())
	}
	return all
}

// wantFrame wants the session to send a frame.
func (r *replay) wantFrame(want *wire.Frame, e *entry) {
	r.t.Helper()
	for {
		i := slices.IndexFunc(r.extra, func(got entry) bool { return got.wire != nil && r.equal(want, got.frame(r.t)) })
		if i >= 0 {
			// The order must be the same, except for responses, which are sent as early as possible.
			for _, before := range r.extra[:i] {
				f := before.frame(r.t)
				require.True(r.t, isResponse(f.Type) || isResponse(want.Type), "%s before %s", &before, e)
			}
			r.extra = slices.Delete(r.extra, i, i+1)
			return
		}
		r.next(e.String())
	}
}

// isResponse reports whether a session sends frames of this type in response to others.
func isResponse(typ wire.Type) bool {
	return typ == wire.Ack || typ == wire.Error || typ == wire.PingPong || typ == wire.TxFetch || typ == wire.TxCancel
}

// equal compares a recorded frame of ours with a frame that was sent, and records the
// numbers of the first equal one.
func (r *replay) equal(want *wire.Frame, got wire.Frame) bool {
	expected := *want
	switch expected.Type {
	case wire.Ack, wire.Error, wire.PingPong: // the peer's numbers
	case wire.TxChunk, wire.TxFinish:
		expected.Tx, expected.Ack = r.txs[expected.Tx], got.Ack
	case wire.TxStart:
		expected.Tx, expected.Ack = got.Tx, got.Ack
	default:
		expected.Ack = got.Ack
	}
	a, errA := wire.Append(nil, &expected)
	b, errB := wire.Append(nil, &got)
	if errA != nil || errB != nil || !bytes.Equal(a, b) {
		return false
	}
	switch want.Type {
	case wire.Ack, wire.Error, wire.PingPong, wire.TxChunk:
	default:
		r.numbers[want.Ack] = got.Ack
	}
	if want.Type == wire.TxStart {
		r.txs[want.Tx] = got.Tx
	}
	return true
}

// wantClose wants the session to close the WebSocket.
func (r *replay) wantClose(want *entry) {
	r.t.Helper()
	for {
		for i, got := range r.extra {
			if got.wire == nil {
				require.Equal(r.t, want.String(), got.String())
				r.extra = slices.Delete(r.extra, i, i+1)
				return
			}
		}
		r.next(want.String())
	}
}

var kinds = map[wire.Type]cryo.Kind{wire.UTF8: cryo.KindText, wire.Binary: cryo.KindBinary, wire.Error: cryo.KindError}
