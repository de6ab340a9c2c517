package testkit

import (
	"context"
	"io"
	"log"
	"net"
	"net/http"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// NewServer is cryo.NewServer with valid options.
func NewServer(tb testing.TB, opts cryo.ServerOptions) *cryo.Server {
	tb.Helper()
	server, err := cryo.NewServer(&opts)
	require.NoError(tb, err)
	return server
}

// Server is an application that serves Cryo and accepts [Token].
type Server struct {
	*cryo.Server
	Address  string
	Sessions chan *cryo.Session // as they connect
	Stop     func()             // ends the sessions and closes the listener; the test's end calls it too
}

// Serve runs a server until the test's end.
func Serve(tb testing.TB) *Server {
	tb.Helper()
	return ServeOn(tb, Listen(tb), cryo.SessionOptions{})
}

// ServeOn is [Serve] with a listener and options of the test's own.
func ServeOn(tb testing.TB, l net.Listener, opts cryo.SessionOptions) *Server {
	tb.Helper()
	s := &Server{Address: l.Addr().String(), Sessions: make(chan *cryo.Session, 10_000)}
	s.Server = NewServer(tb, cryo.ServerOptions{
		SessionOptions: opts,
		Authorize:      cryo.Tokens(Token),
		OnSession:      func(session *cryo.Session, _ *cryo.Upgrade) { s.Sessions <- session },
	})
	h := &http.Server{Handler: s.Server, ReadHeaderTimeout: Patience, ErrorLog: log.New(io.Discard, "", 0)}
	var serving sync.WaitGroup
	serving.Go(func() { _ = h.Serve(l) })
	s.Stop = sync.OnceFunc(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		_ = s.Shutdown(ctx)
		_ = h.Close()
		serving.Wait()
	})
	tb.Cleanup(s.Stop)
	return s
}

// URL is the server's address for the field url of a component.
func (s *Server) URL() string { return "ws://" + s.Address }

// Session waits for the next session.
func (s *Server) Session(tb testing.TB) *cryo.Session {
	tb.Helper()
	return Next(tb, s.Sessions)
}

// Dial connects a client with [Token], as soon as a server listens. The test's end
// closes its session.
func Dial(tb testing.TB, address string) *cryo.Session {
	tb.Helper()
	return DialAs(tb, address, 0)
}

// DialAs is [Dial] with a session id.
func DialAs(tb testing.TB, address string, id uint64) *cryo.Session {
	tb.Helper()
	var s *cryo.Session
	Eventually(tb, func(c *assert.CollectT) {
		var err error
		s, err = cryo.Dial(tb.Context(), "ws://"+address, &cryo.DialOptions{Token: Token, SessionID: id})
		require.NoError(c, err)
	})
	tb.Cleanup(func() { HangUp(s) })
	return s
}

// HangUp closes a session, and waits at most a second for its peer.
func HangUp(s *cryo.Session) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	_ = s.Close(ctx, "")
}

// Redial runs a client that connects again, with the same session id, whenever its
// session has ended, until the test's end. Its sessions come one by one.
func Redial(tb testing.TB, address string, opts cryo.DialOptions) <-chan *cryo.Session {
	tb.Helper()
	opts.Token = Token
	if opts.SessionID == 0 {
		opts.SessionID = cryo.NewSessionID()
	}
	sessions := make(chan *cryo.Session)
	ctx, cancel := context.WithCancel(context.Background())
	var dialing sync.WaitGroup
	dialing.Go(func() {
		for ctx.Err() == nil {
			s, err := cryo.Dial(ctx, "ws://"+address, &opts)
			if err != nil {
				select {
				case <-time.After(20 * time.Millisecond): // as any client would
				case <-ctx.Done():
				}
				continue
			}
			select {
			case sessions <- s:
				select {
				case <-s.Done():
				case <-ctx.Done():
				}
			case <-ctx.Done():
			}
			HangUp(s)
		}
	})
	tb.Cleanup(func() {
		cancel()
		dialing.Wait()
	})
	return sessions
}

// Receive waits for the next message.
func Receive(tb testing.TB, s *cryo.Session) *cryo.Message {
	tb.Helper()
	m, err := s.Receive(Context(tb))
	require.NoError(tb, err)
	return m
}

// AcceptStream waits for the next stream.
func AcceptStream(tb testing.TB, s *cryo.Session) *cryo.IncomingStream {
	tb.Helper()
	st, err := s.AcceptStream(Context(tb))
	require.NoError(tb, err)
	return st
}

// Send sends a text; the channel receives whether it was acknowledged.
func Send(s *cryo.Session, text string) <-chan error {
	return Go(func() error { return s.SendText(context.Background(), text) })
}

// SendStream sends a stream; the channel receives whether it was acknowledged.
func SendStream(s *cryo.Session, name string, source io.Reader) <-chan error {
	return Go(func() error { return s.SendStream(context.Background(), source, &cryo.StreamOptions{Name: name}) })
}

// WantDelivered sends a text, and waits until it is acknowledged.
func WantDelivered(tb testing.TB, s *cryo.Session, text string) {
	tb.Helper()
	require.NoError(tb, Next(tb, Send(s, text)), text)
}
