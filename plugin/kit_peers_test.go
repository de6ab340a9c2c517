package plugin

import (
	"context"
	"io"
	"log"
	"net/http"
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

// The other ends of sessions: servers and clients of the library, whose sessions the test uses, and
// raw peers (internal/cryotest) that send and expect single frames.

const (
	token     = "open sesame"
	somewhere = "192.0.2.2:80" // the address in memory of all listeners and servers
)

// server is a Cryo server for the components that dial.
type server struct {
	e        *engine
	cryo     *cryo.Server
	http     *http.Server
	sessions chan *cryo.Session // as they connect
}

// serve runs a server for the components that dial, until the test's end.
func (e *engine) serve() *server {
	return e.serveBehind(func(server http.Handler) http.Handler { return server })
}

// serveBehind is serve with a handler that gets the requests first.
func (e *engine) serveBehind(wrap func(server http.Handler) http.Handler) *server {
	e.t.Helper()
	s := &server{e: e, sessions: make(chan *cryo.Session, 100)}
	s.cryo = newServer(e.t, cryo.ServerOptions{
		Authorize: cryo.Tokens(token),
		OnSession: func(session *cryo.Session, _ *cryo.Upgrade) { s.sessions <- session },
	})
	s.http = e.serveHTTP(somewhere, wrap(s.cryo))
	e.t.Cleanup(s.shutdown)
	return s
}

// shutdown ends the server and its sessions without a close handshake.
func (s *server) shutdown() {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	_ = s.cryo.Shutdown(ctx)
	_ = s.http.Close()
}

// session waits for the next client.
func (s *server) session() *cryo.Session {
	s.e.t.Helper()
	return next(s.e.t, s.sessions)
}

// denyingServer is a server that denies its next clients, and records their attempts.
type denyingServer struct {
	*server
	status     int
	message    string
	retryAfter string // the header; empty: none

	mu    sync.Mutex
	left  int // clients to deny
	times []time.Time
	ids   map[string]bool
}

// serveDenying is serve with a server that denies its first n clients.
func (e *engine) serveDenying(n, status int, message string) *denyingServer {
	e.t.Helper()
	d := &denyingServer{status: status, message: message, left: n, ids: make(map[string]bool)}
	d.server = e.serveBehind(func(server http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if !d.denies(r) {
				server.ServeHTTP(w, r)
				return
			}
			if d.retryAfter != "" {
				w.Header().Set("Retry-After", d.retryAfter)
			}
			http.Error(w, "<html><body><p>"+d.message+"</p></body></html>", d.status)
		})
	})
	return d
}

// denies records an attempt, and reports whether the client is denied.
func (d *denyingServer) denies(r *http.Request) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.times = append(d.times, time.Now())
	d.ids[r.URL.Query().Get("x-cryo-sid")] = true
	d.left--
	return d.left >= 0
}

// deny denies the next n clients.
func (d *denyingServer) deny(n int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.left = n
}

// waits returns the times between the attempts.
func (d *denyingServer) waits() (waits []time.Duration) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for i := 1; i < len(d.times); i++ {
		waits = append(waits, d.times[i].Sub(d.times[i-1]))
	}
	return waits
}

// serveHTTP runs any HTTP server in memory until the test's end.
func (e *engine) serveHTTP(address string, handler http.Handler) *http.Server {
	e.t.Helper()
	socket, err := e.net.Listen("tcp", address)
	require.NoError(e.t, err)
	h := &http.Server{Handler: handler, ReadHeaderTimeout: time.Minute, ErrorLog: quiet}
	var serving sync.WaitGroup
	serving.Go(func() { _ = h.Serve(socket) })
	e.t.Cleanup(func() {
		_ = h.Close()
		serving.Wait()
	})
	return h
}

// newServer makes a server of valid options.
func newServer(tb testing.TB, opts cryo.ServerOptions) *cryo.Server {
	tb.Helper()
	server, err := cryo.NewServer(&opts)
	require.NoError(tb, err)
	return server
}

var quiet = log.New(io.Discard, "", 0)

// dial connects a client to the components that listen. Its session is cut at the test's end.
func (e *engine) dial() *cryo.Session {
	e.t.Helper()
	s, err := e.tryDial(cryo.DialOptions{Token: token})
	require.NoError(e.t, err)
	synctest.Wait() // the component knows of it by then
	return s
}

// tryDial is dial for a client that may be denied.
func (e *engine) tryDial(opts cryo.DialOptions) (*cryo.Session, error) {
	opts.NetDial = e.net.Dial
	s, err := cryo.Dial(context.Background(), "ws://"+somewhere+"/", &opts)
	if err == nil {
		e.t.Cleanup(func() { end(s) })
	}
	return s, err
}

// wantDenied requires that a client is denied with an HTTP status.
func (e *engine) wantDenied(opts cryo.DialOptions, status int) *cryo.HandshakeError {
	e.t.Helper()
	_, err := e.tryDial(opts)
	var denied *cryo.HandshakeError
	require.ErrorAs(e.t, err, &denied)
	require.Equal(e.t, status, denied.StatusCode)
	return denied
}

// dialAs is dial with a session id.
func (e *engine) dialAs(id uint64) *cryo.Session {
	e.t.Helper()
	s, err := e.tryDial(cryo.DialOptions{Token: token, SessionID: id})
	require.NoError(e.t, err)
	return s
}

// end ends a session without a close handshake.
func end(s *cryo.Session) { _ = s.CloseNow() }

// sending is a message or a stream that a session sends in the background, and its result.
type sending struct{ done chan error }

// send sends a text in the background.
func send(s *cryo.Session, text string) *sending {
	return sendAny(func() error { return s.SendText(context.Background(), text) })
}

// sendAll sends texts, each when the one before has arrived.
func sendAll(client *cryo.Session, texts ...string) []*sending {
	var sent []*sending
	for _, text := range texts {
		sent = append(sent, send(client, text))
		synctest.Wait()
	}
	return sent
}

// sendStream sends a whole stream in the background.
func sendStream(s *cryo.Session, name, content string) *sending {
	return sendAny(func() error {
		return s.SendStream(context.Background(), strings.NewReader(content), &cryo.StreamOptions{Name: name})
	})
}

// wantReceives requires that the input works: a message of the session is delivered by the probe,
// and acknowledged.
func (e *engine) wantReceives(t *testing.T, s *cryo.Session, why string) {
	t.Helper()
	m := send(s, "to the pipeline")
	e.arrival().deliver()
	m.wantAcked(t, why)
}

// wantSends requires that the output works: the session receives a message of the pipeline, and its
// acknowledgement is the delivery.
func (e *engine) wantSends(t *testing.T, s *cryo.Session, why string) {
	t.Helper()
	b := e.produce("from the pipeline")
	require.NoError(t, receiveTexts(t, s, "from the pipeline")[0].Ack())
	b.wantDelivered(t, why)
}

// sendAny runs any call in the background.
func sendAny(f func() error) *sending {
	g := &sending{make(chan error, 1)}
	go func() { g.done <- f() }()
	return g
}

// wantPending requires that there is no result by now.
func (g *sending) wantPending(t *testing.T, why string) {
	t.Helper()
	synctest.Wait()
	select {
	case err := <-g.done:
		require.FailNow(t, "settled", "%s: %v", why, err)
	default:
	}
}

// isAcked reports whether it is acknowledged by now; it must not have failed.
func (g *sending) isAcked(t *testing.T) bool {
	t.Helper()
	synctest.Wait()
	select {
	case err := <-g.done:
		require.NoError(t, err)
		return true
	default:
		return false
	}
}

// result waits for the result.
func (g *sending) result(t testing.TB) error {
	t.Helper()
	return next(t, g.done)
}

// wantAcked waits for the acknowledgement.
func (g *sending) wantAcked(t *testing.T, why string) {
	t.Helper()
	require.NoError(t, g.result(t), why)
}

// wantAllAcked waits for the acknowledgement of each.
func wantAllAcked(t *testing.T, all []*sending, why string) {
	t.Helper()
	for _, g := range all {
		g.wantAcked(t, why)
	}
}

// wantRejected waits for the rejection of a message, with this text.
func (g *sending) wantRejected(t *testing.T, words string) {
	t.Helper()
	var rejected *cryo.RejectedError
	require.ErrorAs(t, g.result(t), &rejected)
	require.Equal(t, words, rejected.Text)
}

// wantCancelled waits for the cancellation of a stream.
func (g *sending) wantCancelled(t *testing.T, why string) {
	t.Helper()
	require.ErrorIs(t, g.result(t), cryo.ErrStreamCancelled, why)
}

// receive waits for a message.
func receive(t *testing.T, s *cryo.Session) *cryo.Message {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Hour)
	defer cancel()
	m, err := s.Receive(ctx)
	require.NoError(t, err)
	return m
}

// receiveTexts waits for messages with these texts.
func receiveTexts(t *testing.T, s *cryo.Session, texts ...string) []*cryo.Message {
	t.Helper()
	var messages []*cryo.Message
	for _, text := range texts {
		m := receive(t, s)
		require.Equal(t, text, string(m.Payload))
		messages = append(messages, m)
	}
	return messages
}

// wantNothing requires that a session has received no message by now.
func wantNothing(t *testing.T, s *cryo.Session) {
	t.Helper()
	synctest.Wait()
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	m, err := s.Receive(ctx)
	require.ErrorIs(t, err, context.Canceled, "got %+v", m)
}

func ackAll(t *testing.T, messages []*cryo.Message) {
	t.Helper()
	for i := range messages {
		require.NoError(t, messages[i].Ack())
	}
}

// acknowledgeAll acknowledges all messages and streams of a session in the background, until it ends.
func acknowledgeAll(s *cryo.Session) {
	go func() {
		for {
			st, err := s.AcceptStream(context.Background())
			if err != nil {
				return
			}
			_, _ = io.Copy(io.Discard, st)
			_ = st.Ack()
		}
	}()
	go func() {
		for {
			m, err := s.Receive(context.Background())
			if err != nil {
				return
			}
			_ = m.Ack()
		}
	}()
}

// open opens a stream, which is cancelled at the test's end.
func open(t *testing.T, s *cryo.Session, name string) *cryo.OutgoingStream {
	t.Helper()
	st, err := s.OpenStream(context.Background(), &cryo.StreamOptions{Name: name})
	require.NoError(t, err)
	t.Cleanup(func() { _ = st.Close() })
	return st
}

// write sends a part of a stream, and waits until it has arrived.
func write(t *testing.T, st *cryo.OutgoingStream, part string) {
	t.Helper()
	_, err := st.Write([]byte(part))
	require.NoError(t, err)
	synctest.Wait()
}

// acceptStream waits for a stream.
func acceptStream(t *testing.T, s *cryo.Session) *cryo.IncomingStream {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Hour)
	defer cancel()
	st, err := s.AcceptStream(ctx)
	require.NoError(t, err)
	return st
}

// readStream waits for a stream and reads all of it.
func readStream(t *testing.T, s *cryo.Session) (*cryo.IncomingStream, string) {
	t.Helper()
	st := acceptStream(t, s)
	content, err := io.ReadAll(st)
	require.NoError(t, err)
	return st, string(content)
}

// serveRaw runs a raw server, whose part in the first session the test plays.
func (e *engine) serveRaw(part func(peer *cryotest.Peer)) {
	e.t.Helper()
	server := cryotest.NewServer(e.t)
	e.dialer = server.Dial
	stopped := make(chan struct{})
	var playing sync.WaitGroup
	playing.Go(func() {
		peer := server.NextPeer()
		part(peer)
		<-stopped
	})
	e.t.Cleanup(func() { close(stopped); playing.Wait() })
}

// rawClient connects a raw client with the session id 77, which reads in the background.
func (e *engine) rawClient() *cryotest.Peer {
	e.t.Helper()
	dialer := &websocket.Dialer{NetDialContext: e.net.Dial}
	peer := cryotest.DialPeer(e.t, dialer, "ws://"+somewhere+"/", token, 77)
	peer.ClientHandshake()
	return peer
}

// unreadClient is rawClient for a client that reads only when the test does.
func (e *engine) unreadClient(t *testing.T) *cryotest.Peer {
	t.Helper()
	peer := cryotest.DialPeer(t, &websocket.Dialer{NetDialContext: e.net.Dial}, "ws://"+somewhere+"/", token, 77)
	handshake(t, peer)
	return peer
}

// handshake does the client's handshake without a reader in the background.
func handshake(t *testing.T, peer *cryotest.Peer) {
	t.Helper()
	peer.WriteFrames(cryotest.EndpointInfo(0))
	for _, want := range []wire.Type{wire.Ack, wire.EndpointInfo} {
		_, b, err := peer.WS.ReadMessage()
		require.NoError(t, err)
		f, err := wire.Parse(b)
		require.NoError(t, err)
		require.Equal(t, want, f.Type)
		if want == wire.EndpointInfo {
			peer.Ack(f)
		}
	}
}
