package cryo_test

import (
	"bytes"
	"context"
	"crypto/sha1"
	"crypto/x509"
	"encoding/base64"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"testing"

	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/cryotest"
)

// serveTCP runs a server on a real socket, with TLS if configured so. What its
// sessions receive is up to the test.
func serveTCP(t *testing.T) (target string, sessions <-chan *cryo.Session) {
	t.Helper()
	server, sessions := newRealServer(t)
	server.Start()
	return strings.Replace(server.URL, "http", "ws", 1), sessions
}

func serveTLS(t *testing.T) (target string, sessions <-chan *cryo.Session, roots *x509.CertPool) {
	t.Helper()
	server, sessions := newRealServer(t)
	server.StartTLS()
	roots = x509.NewCertPool()
	roots.AddCert(server.Certificate())
	return strings.Replace(server.URL, "https", "wss", 1), sessions, roots
}

func newRealServer(t *testing.T) (*httptest.Server, <-chan *cryo.Session) {
	t.Helper()
	return newLimitedServer(t, cryo.SessionOptions{})
}

func newLimitedServer(t *testing.T, opts cryo.SessionOptions) (*httptest.Server, <-chan *cryo.Session) {
	t.Helper()
	sessions := make(chan *cryo.Session, 16)
	server := newServer(t, cryo.ServerOptions{
		SessionOptions: opts,
		Authorize:      cryo.Tokens(token),
		OnSession:      func(s *cryo.Session, _ *cryo.Upgrade) { sessions <- s },
	})
	listener := httptest.NewUnstartedServer(server)
	listener.Config.ErrorLog = log.New(io.Discard, "", 0)
	t.Cleanup(func() {
		listener.Close()
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		_ = server.Shutdown(ctx)
	})
	return listener, sessions
}

// wantConversation wants two ends of a session to exchange messages of many
// sizes, both ways at once, and then to part in good order.
func wantConversation(t *testing.T, client, server *cryo.Session) {
	t.Helper()
	var batch []cryo.OutMessage
	for i, size := range []int{0, 1, 125, 126, 1000, 65_535, 65_536, 300_000, 1_000_000, 5} {
		batch = append(batch, cryo.Binary(bytes.Repeat([]byte{byte(i)}, size)))
	}
	var talking sync.WaitGroup
	for _, s := range []*cryo.Session{client, server} {
		talking.Go(func() {
			for range 2 {
				if err := s.SendBatch(t.Context(), batch); err != nil {
					t.Error(err)
				}
			}
		})
		talking.Go(func() {
			for i := range 2 * len(batch) {
				m, err := s.Receive(t.Context())
				if err != nil {
					t.Error(err)
					return
				}
				if !bytes.Equal(m.Payload, batch[i%len(batch)].Payload) {
					t.Errorf("message %d is another", i)
				}
				if err := m.Ack(); err != nil {
					t.Error(err)
				}
			}
		})
	}
	talking.Wait()
	require.NoError(t, client.Close(t.Context(), "done"))
	<-server.Done()
	require.EqualError(t, server.Err(), `session ended: closed by the peer: "done"`)
	require.ErrorIs(t, client.Err(), cryo.ErrClosed)
}

func TestConversationOverTCP(t *testing.T) {
	target, sessions := serveTCP(t)
	client, err := cryo.Dial(t.Context(), target, &cryo.DialOptions{Token: token})
	require.NoError(t, err)
	wantConversation(t, client, next(t, sessions))
}

func TestShutdownOfTheHTTPServerLeavesSessionsOpen(t *testing.T) {
	opened := make(chan *cryo.Session, 1)
	server := newServer(t, cryo.ServerOptions{
		Authorize: cryo.Tokens(token),
		OnSession: func(s *cryo.Session, _ *cryo.Upgrade) { opened <- s },
	})
	web := httptest.NewServer(server)
	client, err := cryo.Dial(t.Context(), "ws"+strings.TrimPrefix(web.URL, "http"), &cryo.DialOptions{Token: token})
	require.NoError(t, err)
	session := next(t, opened)
	require.NoError(t, web.Config.Shutdown(t.Context()))
	require.NoError(t, session.Err())
	sent := make(chan error, 1)
	go func() { sent <- client.SendText(t.Context(), "after the shutdown") }()
	require.NoError(t, receive(t, session).Ack())
	require.NoError(t, <-sent)
	require.NoError(t, server.Shutdown(t.Context()))
	<-client.Done()
}

// TestAcknowledgementsSurviveUnreadData: closing a socket with unread data
// resets it, and can take what was written before along.
func TestAcknowledgementsSurviveUnreadData(t *testing.T) {
	for range 3 {
		target, sessions := serveTCP(t)
		client, err := cryo.Dial(t.Context(), target, &cryo.DialOptions{Token: token})
		require.NoError(t, err)
		server := next(t, sessions)
		batch := make([]cryo.OutMessage, 1000)
		for i := range batch {
			batch[i] = cryo.Binary(make([]byte, 10_000))
		}
		sent := make(chan error, 1)
		go func() { sent <- client.SendBatch(t.Context(), batch) }()
		acked := 0
		for acked < 100 {
			m, err := server.Receive(t.Context())
			require.NoError(t, err)
			require.NoError(t, m.Ack())
			acked++
		}
		require.NoError(t, server.Close(t.Context(), "")) // much of the batch is on its way
		var failed *cryo.BatchError
		require.ErrorAs(t, <-sent, &failed)
		for i, err := range failed.Errs {
			if i < acked {
				require.NoError(t, err, "message %d", i)
			} else {
				require.ErrorIs(t, err, net.ErrClosed, "message %d", i)
			}
		}
		require.NoError(t, client.Close(t.Context(), ""))
	}
}

// TestCloseHandshakeSurvivesUnreadData: the same for a client that is disconnected.
func TestCloseHandshakeSurvivesUnreadData(t *testing.T) {
	target, sessions := serveTCP(t)
	peer := cryotest.DialPeer(t, websocket.DefaultDialer, target, token, sid)
	peer.ClientHandshake()
	server := next(t, sessions)
	peer.WriteFrames(cryotest.Text(1, "good"))
	require.NoError(t, receive(t, server).Ack())
	message := tooLong(t)
	writing := start(func() error {
		_ = peer.WS.WriteMessage(websocket.BinaryMessage, message) // may be cut off
		return nil
	})
	peer.WantFrame("an acknowledgement", cryotest.Acked(1))
	peer.WantClose("the end", websocket.CloseMessageTooBig, "read limit exceeded")
	writing.wantSuccess(t)
	require.NoError(t, peer.WS.Close())
	<-server.Done()
}

// connectProxy is an HTTP proxy that answers CONNECT so, and tunnels after 200.
func connectProxy(t *testing.T, reply string) *url.URL {
	t.Helper()
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c, _, err := http.NewResponseController(w).Hijack()
		if err != nil || r.Method != http.MethodConnect {
			t.Errorf("%s: %v", r.Method, err)
			return
		}
		defer c.Close()
		_, _ = io.WriteString(c, reply)
		if strings.Contains(reply, " 200 ") {
			tunnel(c, r.Host)
		}
	}))
	t.Cleanup(server.Close)
	u, err := url.Parse(server.URL)
	require.NoError(t, err)
	return u
}

// socksProxy is a SOCKS5 proxy for IPv4 addresses.
func socksProxy(t *testing.T) *url.URL {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			serving.Go(func() {
				defer c.Close()
				hello, request := make([]byte, 3), make([]byte, 10)
				_, _ = io.ReadFull(c, hello)
				_, _ = c.Write([]byte{5, 0})
				_, _ = io.ReadFull(c, request)
				_, _ = c.Write([]byte{5, 0, 0, 1, 0, 0, 0, 0, 0, 0})
				ip, port := net.IP(request[4:8]), int(request[8])<<8|int(request[9])
				tunnel(c, (&net.TCPAddr{IP: ip, Port: port}).String())
			})
		}
	})
	t.Cleanup(func() { _ = l.Close(); serving.Wait() })
	return &url.URL{Scheme: "socks5", Host: l.Addr().String()}
}

// tunnel joins two connections, with half-closes, until both directions end.
func tunnel(c net.Conn, address string) {
	target, err := net.Dial("tcp", address)
	if err != nil {
		return
	}
	defer target.Close()
	var copying sync.WaitGroup
	join := func(to, from net.Conn) {
		_, _ = io.Copy(to, from)
		_ = to.(interface{ CloseWrite() error }).CloseWrite()
	}
	copying.Go(func() { join(target, c) })
	copying.Go(func() { join(c, target) })
	copying.Wait()
}

func acceptKey(key string) string {
	sum := sha1.Sum([]byte(key + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"))
	return base64.StdEncoding.EncodeToString(sum[:])
}
