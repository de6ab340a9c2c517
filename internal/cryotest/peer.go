package cryotest

import (
	"errors"
	"net/http"
	"sync"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/internal/wire"
)

// Patience is the time that a Peer waits for an expected frame; virtual time under
// testing/synctest.
const Patience = time.Minute

// Peer is the other end of a Cryo connection. It sends what the test sends and
// nothing else, except WebSocket pongs, and fails the test when an expected
// frame is not received. Reading begins with the first Want, or with Read.
type Peer struct {
	WS *websocket.Conn
	// SID is set in frames that are written without one, and expected in all frames that
	// are read.
	SID uint64
	// Request is the upgrade request; nil for a client.
	Request *http.Request
	// First is the number of the other end's first frame, its ENDPOINT_INFO, once that is
	// received. Each session starts at another number.
	First uint32

	tb      testing.TB
	reading sync.Once
	writing chan struct{} // a lock; waiting for a mutex would stop synctest's clock

	mu      sync.Mutex
	pongs   bool // respond to pings, and do not report them
	events  []event
	arrived chan struct{} // holds a token when there are events
}

// event is a frame, or the end of reading: err.
type event struct {
	frame wire.Frame
	err   error
}

func newPeer(tb testing.TB, ws *websocket.Conn, sid uint64, r *http.Request) *Peer {
	p := &Peer{WS: ws, SID: sid, Request: r, tb: tb, writing: make(chan struct{}, 1), arrived: make(chan struct{}, 1)}
	ws.SetCloseHandler(func(int, string) error { return nil }) // sends no close frame
	tb.Cleanup(func() { _ = ws.Close() })
	return p
}

// Conn is the peer's end of a connection in memory.
func (p *Peer) Conn() *Conn {
	p.tb.Helper()
	c, ok := p.WS.NetConn().(*Conn)
	require.True(p.tb, ok, "the peer's connection is not one in memory, but %T", p.WS.NetConn())
	return c
}

// WriteFrames sends frames, each in its own message.
func (p *Peer) WriteFrames(frames ...wire.Frame) {
	p.tb.Helper()
	require.NoError(p.tb, p.TryWriteFrames(frames...))
}

// TryWriteFrames is WriteFrames for a connection that may have ended.
func (p *Peer) TryWriteFrames(frames ...wire.Frame) error {
	for _, f := range frames {
		if f.SID == 0 {
			f.SID = p.SID
		}
		b, err := wire.Append(nil, &f)
		if err != nil {
			return err
		}
		if err := p.write(websocket.BinaryMessage, b); err != nil {
			return err
		}
	}
	return nil
}

// WriteBytes sends a binary message.
func (p *Peer) WriteBytes(b []byte) {
	p.tb.Helper()
	require.NoError(p.tb, p.write(websocket.BinaryMessage, b))
}

func (p *Peer) write(kind int, b []byte) error {
	p.writing <- struct{}{}
	defer func() { <-p.writing }()
	return p.WS.WriteMessage(kind, b)
}

// Ack acknowledges frames.
func (p *Peer) Ack(frames ...wire.Frame) {
	p.tb.Helper()
	for _, f := range frames {
		p.WriteFrames(wire.Frame{Type: wire.Ack, Ack: f.Ack})
	}
}

// WriteClose sends a close frame.
func (p *Peer) WriteClose(code int, reason string) {
	p.tb.Helper()
	require.NoError(p.tb, p.write(websocket.CloseMessage, websocket.FormatCloseMessage(code, reason)))
}

// AnswerPings makes the peer respond to pings, as the published packages do.
func (p *Peer) AnswerPings() {
	p.mu.Lock()
	p.pongs = true
	p.mu.Unlock()
	p.Read()
}

// Read makes the peer read continuously from now on.
func (p *Peer) Read() { p.reading.Do(func() { go p.read() }) }

func (p *Peer) read() {
	for {
		kind, b, err := p.WS.ReadMessage()
		if err == nil && kind != websocket.BinaryMessage {
			err = errors.New("not a binary message")
		}
		var f wire.Frame
		if err == nil {
			f, err = wire.Parse(b)
		}
		if len(f.Payload) == 0 {
			f.Payload = nil // so that frames compare equal
		}
		p.add(event{f, err})
		if err != nil {
			return
		}
	}
}

func (p *Peer) add(e event) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.pongs && e.err == nil && e.frame.Type == wire.PingPong && string(e.frame.Payload) == "ping" {
		pong := e.frame
		pong.Payload = []byte("pong")
		b, _ := wire.Append(nil, &pong)
		go func() { _ = p.write(websocket.BinaryMessage, b) }()
		return
	}
	p.events = append(p.events, e)
	select {
	case p.arrived <- struct{}{}:
	default:
	}
}

func (p *Peer) next(what string) event {
	p.tb.Helper()
	p.Read()
	var patience <-chan time.Time
	for {
		if e, ok := p.take(); ok {
			return e
		}
		if patience == nil {
			patience = time.After(Patience)
		}
		select {
		case <-p.arrived:
		case <-patience:
			require.FailNow(p.tb, "timed out", "wanted: %s", what)
		}
	}
}

func (p *Peer) take() (e event, ok bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.events) == 0 {
		return e, false
	}
	e, p.events = p.events[0], p.events[1:]
	return e, true
}

// WantType expects a frame of a type next, and returns it.
func (p *Peer) WantType(what string, typ wire.Type) wire.Frame {
	p.tb.Helper()
	e := p.next(what)
	require.NoError(p.tb, e.err, "wanted: %s", what)
	if e.frame.Type != typ || e.frame.SID != p.SID {
		require.FailNow(p.tb, "another frame", "wanted: %s, a %v of session %d, got %v %+v", what, typ, p.SID, e.frame.Type, e.frame)
	}
	return e.frame
}

// WantFrame expects exactly this frame next.
func (p *Peer) WantFrame(what string, want wire.Frame) {
	p.tb.Helper()
	e := p.next(what)
	require.NoError(p.tb, e.err, "wanted: %s", what)
	if want.SID == 0 {
		want.SID = p.SID
	}
	require.Equal(p.tb, want, e.frame, "wanted: %s", what)
}

// WantClose expects a close frame next.
func (p *Peer) WantClose(what string, code int, reason string) {
	p.tb.Helper()
	e := p.next(what)
	require.Error(p.tb, e.err, "wanted: %s, got %+v", what, e.frame)
	var closed *websocket.CloseError
	require.ErrorAs(p.tb, e.err, &closed, "wanted: %s", what)
	require.Equal(p.tb, websocket.CloseError{Code: code, Text: reason}, *closed, "wanted: %s", what)
}

// WantLost expects the connection to end next, without a close frame.
func (p *Peer) WantLost(what string) {
	p.tb.Helper()
	e := p.next(what)
	require.Error(p.tb, e.err, "wanted: %s, got %+v", what, e.frame)
	if closed, ok := errors.AsType[*websocket.CloseError](e.err); ok {
		require.Equal(p.tb, websocket.CloseAbnormalClosure, closed.Code, "wanted: %s", what)
	}
}

// WantIdle expects no frame for some time. Under synctest, a nanosecond covers everything
// that happens without a timer.
func (p *Peer) WantIdle(what string, during time.Duration) {
	p.tb.Helper()
	p.Read()
	time.Sleep(during)
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.events) > 0 {
		e := p.events[0]
		require.NoError(p.tb, e.err, "wanted: %s", what)
		require.FailNow(p.tb, "unexpected frame", "wanted: %s, got %v %+v", what, e.frame.Type, e.frame)
	}
}

// Taken returns the frames that are received and not yet expected.
func (p *Peer) Taken() (frames []wire.Frame) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for len(p.events) > 0 && p.events[0].err == nil {
		frames = append(frames, p.events[0].frame)
		p.events = p.events[1:]
	}
	return frames
}

// Skip drops the frames that Taken returns, and returns their number.
func (p *Peer) Skip() (frames int) { return len(p.Taken()) }

// WantEndpointInfo expects the other end's ENDPOINT_INFO next, which sets First.
func (p *Peer) WantEndpointInfo(what string) {
	p.tb.Helper()
	f := p.WantType(what, wire.EndpointInfo)
	p.First = f.Ack
	want := EndpointInfo(p.First)
	want.SID = p.SID
	require.Equal(p.tb, want, f, "wanted: %s", what)
}

// ClientHandshake does the client's part of the handshake, as cryo-client-node does.
func (p *Peer) ClientHandshake() {
	p.tb.Helper()
	p.WriteFrames(EndpointInfo(0))
	p.WantFrame("the server acknowledges ENDPOINT_INFO", Acked(0))
	p.WantEndpointInfo("the server's ENDPOINT_INFO")
	p.WriteFrames(Acked(p.First))
}

// ServerHandshake does the server's part of the handshake, as cryo-server does.
func (p *Peer) ServerHandshake() {
	p.tb.Helper()
	p.WantEndpointInfo("the client's ENDPOINT_INFO")
	p.WriteFrames(EndpointInfo(0), Acked(p.First))
	p.WantFrame("the client acknowledges ENDPOINT_INFO", Acked(0))
}

// Next expects any frame, and returns it.
func (p *Peer) Next(what string) wire.Frame {
	p.tb.Helper()
	e := p.next(what)
	require.NoError(p.tb, e.err, "wanted: %s", what)
	return e.frame
}

// Try waits for any frame, or for the end of the connection, which is the error.
func (p *Peer) Try(what string) (wire.Frame, error) {
	p.tb.Helper()
	e := p.next(what)
	return e.frame, e.err
}
