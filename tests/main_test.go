// Package tests has what needs more than one package: pipelines end to end, the
// real binary, faults.
package tests

import (
	"context"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/cryo-connect/cryo-connect/cryo"
)

const (
	token = "open sesame"

	// patience is how long something is waited for that has to come.
	patience = 30 * time.Second
)

// binary is the path of cryo-connect, built once. CRYO_CONNECT_BINARY names one
// that is there already.
var binary = os.Getenv("CRYO_CONNECT_BINARY")

func TestMain(m *testing.M) {
	os.Exit(run(m))
}

func run(m *testing.M) int {
	if binary == "" {
		dir, err := os.MkdirTemp("", "cryo-connect")
		if err != nil {
			log.Fatal(err)
		}
		defer func() { _ = os.RemoveAll(dir) }()
		binary = filepath.Join(dir, "cryo-connect")
		build := exec.Command("go", "build", "-o", binary, "../cmd/cryo-connect")
		build.Stderr = os.Stderr
		if err := build.Run(); err != nil {
			log.Printf("building the binary: %v", err)
			return 1
		}
	}
	code := m.Run()
	if err := goleak.Find(); err != nil && code == 0 {
		log.Print(err)
		return 1
	}
	return code
}

// server is a Cryo server on a port of its own.
type server struct {
	*cryo.Server
	address  string
	sessions chan *cryo.Session // as they connect
	stop     func()             // at the latest at the test's end
}

// serve runs a server until the test's end.
func serve(t *testing.T) *server {
	t.Helper()
	return serveAt(t, listen(t))
}

func serveAt(t *testing.T, socket net.Listener) *server {
	t.Helper()
	s := &server{sessions: make(chan *cryo.Session, 100)}
	s.Server = newServer(t, cryo.ServerOptions{
		Authorize: cryo.Tokens(token),
		OnSession: func(session *cryo.Session, _ *cryo.Upgrade) { s.sessions <- session },
	})
	s.address = socket.Addr().String()
	h := &http.Server{Handler: s.Server, ReadHeaderTimeout: patience, ErrorLog: log.New(io.Discard, "", 0)}
	var serving sync.WaitGroup
	serving.Go(func() { _ = h.Serve(socket) })
	s.stop = sync.OnceFunc(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		_ = s.Shutdown(ctx)
		_ = h.Close()
		serving.Wait()
	})
	t.Cleanup(s.stop)
	return s
}

func (s *server) url() string { return "ws://" + s.address }

func (s *server) session(t *testing.T) *cryo.Session {
	t.Helper()
	return next(t, s.sessions)
}

func listen(t testing.TB) net.Listener {
	t.Helper()
	socket, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	return socket
}

// freeAddress is an address on which nobody listens, for components that don't
// tell which port they got.
func freeAddress(t testing.TB) string {
	t.Helper()
	socket := listen(t)
	defer func() { _ = socket.Close() }()
	return socket.Addr().String()
}

// dial connects a client, as soon as somebody listens.
func dial(t *testing.T, address string) *cryo.Session {
	t.Helper()
	return dialAs(t, address, 0)
}

// dialAs does so with a session id, or a random one if it is 0.
func dialAs(t *testing.T, address string, id uint64) *cryo.Session {
	t.Helper()
	var s *cryo.Session
	require.EventuallyWithT(t, func(c *assertT) {
		var err error
		s, err = cryo.Dial(t.Context(), "ws://"+address, &cryo.DialOptions{Token: token, SessionID: id})
		require.NoError(c, err)
	}, patience, 10*time.Millisecond)
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		_ = s.Close(ctx, "")
	})
	return s
}

// next waits for a value.
func next[T any](t *testing.T, values <-chan T) T {
	t.Helper()
	select {
	case v := <-values:
		return v
	case <-time.After(patience):
		require.FailNow(t, "nothing came")
		panic("unreachable")
	}
}

// receive waits for a message.
func receive(t *testing.T, s *cryo.Session) *cryo.Message {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	m, err := s.Receive(ctx)
	require.NoError(t, err)
	return m
}

// start runs something while the test goes on.
func start(f func() error) <-chan error {
	done := make(chan error, 1)
	go func() { done <- f() }()
	return done
}

func send(s *cryo.Session, text string) <-chan error {
	return start(func() error { return s.SendText(context.Background(), text) })
}

// wantPending wants something not to have come to its end.
func wantPending(t *testing.T, done <-chan error, why string) {
	t.Helper()
	select {
	case err := <-done:
		require.FailNow(t, "settled", "%s: %v", why, err)
	default:
	}
}

// testLog shows a pipeline's log when the test fails.
func testLog(t *testing.T) *slog.Logger {
	t.Helper()
	return slog.New(slog.NewTextHandler(writerFunc(func(p []byte) (int, error) {
		t.Log(string(p[:len(p)-1]))
		return len(p), nil
	}), &slog.HandlerOptions{Level: slog.LevelWarn}))
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

func numbered(n int) []string {
	texts := make([]string, n)
	for i := range texts {
		texts[i] = fmt.Sprintf("m-%06d", i)
	}
	return texts
}

// newServer makes a server of valid options.
func newServer(tb testing.TB, opts cryo.ServerOptions) *cryo.Server {
	tb.Helper()
	server, err := cryo.NewServer(&opts)
	require.NoError(tb, err)
	return server
}
