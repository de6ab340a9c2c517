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
)

const (
	token     = "open sesame"
	somewhere = "192.0.2.2:80" // an address in memory
)

// server is a Cryo server for the components that dial.
type server struct {
	e        *engine
	cryo     *cryo.Server
	http     *http.Server
	sessions chan *cryo.Session // as they connect
}

// serve listens on an address in memory until the test's end.
func (e *engine) serve() *server { return e.serveWith(cryo.ServerOptions{}) }

func (e *engine) serveWith(opts cryo.ServerOptions) *server {
	e.t.Helper()
	s := &server{e: e, sessions: make(chan *cryo.Session, 100)}
	opts.Authorize = cryo.Tokens(token)
	opts.OnSession = func(session *cryo.Session, _ *cryo.Upgrade) { s.sessions <- session }
	s.cryo = newServer(e.t, opts)
	s.http = e.serveHTTP(somewhere, s.cryo)
	e.t.Cleanup(s.shutdown)
	return s
}

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

// serveHTTP runs an HTTP server in memory until the test's end.
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

var quiet = log.New(io.Discard, "", 0)

// raw is a server that plays a part with each client.
func (e *engine) raw(part func(peer *cryotest.Peer)) {
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

// dial connects a client to the components that listen.
func (e *engine) dial() *cryo.Session {
	e.t.Helper()
	s, err := e.tryDial(cryo.DialOptions{Token: token})
	require.NoError(e.t, err)
	synctest.Wait() // the component knows of it by then
	return s
}

// tryDial tries to. The session is cut at the test's end.
func (e *engine) tryDial(opts cryo.DialOptions) (*cryo.Session, error) {
	opts.NetDial = e.net.Dial
	s, err := cryo.Dial(context.Background(), "ws://"+somewhere+"/", &opts)
	if err == nil {
		e.t.Cleanup(func() { end(s) })
	}
	return s, err
}

// rawClient connects a client that says what the test says, with the id 77.
func (e *engine) rawClient() *cryotest.Peer {
	e.t.Helper()
	dialer := &websocket.Dialer{NetDialContext: e.net.Dial}
	peer := cryotest.DialPeer(e.t, dialer, "ws://"+somewhere+"/", token, 77)
	peer.ClientHandshake()
	return peer
}

// end cuts a session.
func end(s *cryo.Session) { _ = s.CloseNow() }

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

// wantNothing wants no message to have come by now.
func wantNothing(t *testing.T, s *cryo.Session) {
	t.Helper()
	synctest.Wait()
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	m, err := s.Receive(ctx)
	require.ErrorIs(t, err, context.Canceled, "got %+v", m)
}

const (
	dialInput    = "cryo: { url: ws://" + somewhere + ", token: " + token + " }"
	dialOutput   = dialInput
	listenInput  = "cryo_server: { address: '" + somewhere + "', tokens: [ " + token + " ] }"
	listenOutput = listenInput
	toProbe      = "probe: {}"
	fromFeed     = "feed: {}" // tries again what fails
	fromOnce     = "once: {}" // and this doesn't
)

// with adds fields to a component.
func with(component, fields string) string {
	if fields == "" {
		return component
	}
	return strings.TrimSuffix(component, " }") + ", " + fields + " }"
}

// atBothInputs runs a test with each of the inputs in a pipeline to the probe,
// and with its peer's session.
func atBothInputs(t *testing.T, fields string, test func(t *testing.T, e *engine, p *pipeline, peer *cryo.Session)) {
	t.Helper()
	t.Run("cryo", func(t *testing.T) {
		inEngine(t, func(t *testing.T, e *engine) {
			server := e.serve()
			p := e.run(with(dialInput, fields), toProbe)
			test(t, e, p, server.session())
		})
	})
	t.Run("cryo_server", func(t *testing.T) {
		inEngine(t, func(t *testing.T, e *engine) {
			p := e.run(with(listenInput, fields), toProbe)
			test(t, e, p, e.dial())
		})
	})
}

// runWithBatch starts a pipeline whose first batch is made of these texts, and
// returns what becomes of them for their sender.
func (e *engine) runWithBatch(fields string, texts []string, processors ...string) (*cryo.Session, []*sending) {
	e.t.Helper()
	return e.runWithBatchTo(toProbe, fields, texts, processors...)
}

func (e *engine) runWithBatchTo(output, fields string, texts []string, processors ...string) (*cryo.Session, []*sending) {
	e.t.Helper()
	// While only an output listens, messages wait for an input.
	e.run(fromFeed, listenOutput)
	s := e.dial()
	var sent []*sending
	for _, text := range texts {
		sent = append(sent, send(s, text))
		synctest.Wait()
	}
	e.run(with(listenInput, fields), output, processors...)
	return s, sent
}

// newServer makes a server of valid options.
func newServer(tb testing.TB, opts cryo.ServerOptions) *cryo.Server {
	tb.Helper()
	server, err := cryo.NewServer(&opts)
	require.NoError(tb, err)
	return server
}
