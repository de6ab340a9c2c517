package cryo_test

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"runtime"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/cryotest"
	"github.com/cryo-connect/cryo-connect/internal/wire"
)

// knock asks a server for an upgrade, or for something else, and returns the
// answer.
func knock(t *testing.T, l *cryotest.Listener, query string, header http.Header) (status int, answer http.Header, body string) {
	t.Helper()
	transport := &http.Transport{DialContext: l.Dial, DisableKeepAlives: true}
	defer transport.CloseIdleConnections()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://cryo.test/any/path?"+query, nil)
	require.NoError(t, err)
	req.Header = header
	resp, err := transport.RoundTrip(req)
	require.NoError(t, err)
	defer resp.Body.Close()
	b := []byte{}
	if resp.StatusCode != http.StatusSwitchingProtocols {
		b, err = io.ReadAll(resp.Body)
		require.NoError(t, err)
	}
	return resp.StatusCode, resp.Header, strings.TrimSpace(string(b))
}

func upgrade() http.Header {
	return http.Header{
		"Connection":            {"Upgrade"},
		"Upgrade":               {"websocket"},
		"Sec-Websocket-Version": {"13"},
		"Sec-Websocket-Key":     {"dGhlIHNhbXBsZSBub25jZQ=="},
	}
}

func TestServerChecksRequestsInOrder(t *testing.T) {
	good := "authorization=" + url.QueryEscape("Bearer "+token)
	const (
		missing = "The parameter authorization with a Bearer token is missing."
		denied  = "The token was rejected."
		badID   = "The parameter x-cryo-sid must be an unsigned 64-bit decimal number."
	)
	for name, c := range map[string]struct {
		query    string
		header   http.Header
		status   int
		sentence string
	}{
		"no upgrade":                     {good, http.Header{}, 426, "This is a Cryo server: connect with a Cryo client, over WebSocket."},
		"no token":                       {"x-cryo-sid=1", upgrade(), 401, missing},
		"no Bearer":                      {"authorization=Basic+abc&x-cryo-sid=1", upgrade(), 401, missing},
		"another token":                  {"authorization=Bearer+wrong&x-cryo-sid=1", upgrade(), 401, denied},
		"an empty token":                 {"authorization=Bearer&x-cryo-sid=1", upgrade(), 401, denied},
		"another token and no id":        {"authorization=Bearer+wrong", upgrade(), 401, badID},
		"no id":                          {good, upgrade(), 401, badID},
		"a negative id":                  {good + "&x-cryo-sid=-1", upgrade(), 401, badID},
		"a signed id":                    {good + "&x-cryo-sid=%2B1", upgrade(), 401, badID},
		"a hexadecimal id":               {good + "&x-cryo-sid=0x1", upgrade(), 401, badID},
		"an id of 65 bits":               {good + "&x-cryo-sid=18446744073709551616", upgrade(), 401, badID},
		"a query that can't be read":     {good + "&x-cryo-sid=1;a=b", upgrade(), 400, "The URL's query is malformed."},
		"an origin that is not allowed":  {good + "&x-cryo-sid=1", with(upgrade(), "Origin", "https://evil.test"), 403, "This origin is not allowed."},
		"another origin, another token":  {"authorization=Bearer+wrong&x-cryo-sid=1", with(upgrade(), "Origin", "https://evil.test"), 403, "This origin is not allowed."},
		"an origin that is allowed":      {good + "&x-cryo-sid=1", with(upgrade(), "Origin", "https://good.test"), 101, ""},
		"the largest id, and compressed": {good + "&x-cryo-sid=18446744073709551615", with(upgrade(), "Sec-Websocket-Extensions", "permessage-deflate"), 101, ""},
		"a token without the space":      {"authorization=" + url.QueryEscape("Bearer"+token) + "&x-cryo-sid=0&more=1", upgrade(), 101, ""},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				_, l, _ := serve(t, cryo.ServerOptions{
					CheckOrigin: func(r *http.Request) bool {
						return r.Header.Get("Origin") != "https://evil.test"
					},
				})
				status, header, body := knock(t, l, c.query, c.header)
				require.Equal(t, c.status, status)
				require.Equal(t, c.sentence, body)
				require.Empty(t, header.Get("Sec-Websocket-Extensions"), "compression is never negotiated")
				if status == 426 {
					require.Equal(t, "websocket", header.Get("Upgrade"))
				}
			})
		})
	}
}

func with(h http.Header, name, value string) http.Header {
	h.Set(name, value)
	return h
}

// knockRaw sends a request word for word, and returns the whole of the answer.
func knockRaw(t *testing.T, l *cryotest.Listener, request string) string {
	t.Helper()
	c, err := l.Dial(t.Context(), "", "")
	require.NoError(t, err)
	defer c.Close()
	_, err = io.WriteString(c, request)
	require.NoError(t, err)
	answer, err := http.ReadResponse(bufio.NewReader(c), nil)
	require.NoError(t, err)
	defer answer.Body.Close()
	var b strings.Builder
	require.NoError(t, answer.Write(&b))
	return b.String()
}

func TestInvalidUpgradeDoesNotTakeOverASession(t *testing.T) {
	const (
		webSocket = "Connection: Upgrade\r\nUpgrade: websocket\r\n"
		version   = "Sec-WebSocket-Version: 13\r\n"
		key       = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"

		noUpgrade  = "This is a Cryo server: connect with a Cryo client, over WebSocket."
		badMethod  = "The method of an upgrade must be GET."
		badVersion = "The upgrade must have one header Sec-WebSocket-Version: 13."
		badKey     = "The upgrade must have one header Sec-WebSocket-Key: 16 bytes in base64."
	)
	for name, c := range map[string]struct {
		method, protocol, headers string
		status                    int
		header, value             string // of the answer
		sentence                  string
	}{
		"no upgrade":               {"GET", "1.1", "", 426, "Connection", "upgrade", noUpgrade},
		"no Connection":            {"GET", "1.1", "Upgrade: websocket\r\n" + version + key, 426, "Upgrade", "websocket", noUpgrade},
		"another protocol":         {"GET", "1.1", "Connection: Upgrade\r\nUpgrade: h2c\r\n" + version + key, 426, "Upgrade", "websocket", noUpgrade},
		"HTTP/1.0":                 {"GET", "1.0", webSocket + version + key, 426, "Upgrade", "websocket", noUpgrade},
		"POST":                     {"POST", "1.1", webSocket + version + key + "Content-Length: 0\r\n", 405, "Allow", "GET", badMethod},
		"PUT":                      {"PUT", "1.1", webSocket + version + key, 405, "Allow", "GET", badMethod},
		"no key":                   {"GET", "1.1", webSocket + version, 400, "", "", badKey},
		"an empty key":             {"GET", "1.1", webSocket + version + "Sec-WebSocket-Key:\r\n", 400, "", "", badKey},
		"a short key":              {"GET", "1.1", webSocket + version + "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25j\r\n", 400, "", "", badKey},
		"two keys":                 {"GET", "1.1", webSocket + version + key + key, 400, "", "", badKey},
		"no version":               {"GET", "1.1", webSocket + key, 400, "Sec-Websocket-Version", "13", badVersion},
		"another version":          {"GET", "1.1", webSocket + key + "Sec-WebSocket-Version: 8\r\n", 400, "Sec-Websocket-Version", "13", badVersion},
		"a list of versions":       {"GET", "1.1", webSocket + key + "Sec-WebSocket-Version: 8, 13\r\n", 400, "Sec-Websocket-Version", "13", badVersion},
		"two versions, ours last":  {"GET", "1.1", webSocket + key + "Sec-WebSocket-Version: 8\r\n" + version, 400, "Sec-Websocket-Version", "13", badVersion},
		"two versions, ours first": {"GET", "1.1", webSocket + key + version + "Sec-WebSocket-Version: 8\r\n", 400, "Sec-Websocket-Version", "13", badVersion},
		"the same version twice":   {"GET", "1.1", webSocket + key + version + version, 400, "Sec-Websocket-Version", "13", badVersion},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				statuses := make(chan int, 1)
				server, l, sessions := serve(t, cryo.ServerOptions{OnDeny: func(status int) { statuses <- status }})
				join(t, l, 1).ClientHandshake()
				s := next(t, sessions)
				answer := knockRaw(t, l, c.method+" /?x-cryo-sid=1&authorization="+url.QueryEscape("Bearer "+token)+" HTTP/"+c.protocol+"\r\nHost: cryo.test\r\n"+c.headers+"\r\n")
				synctest.Wait()
				require.NoError(t, s.Err())
				require.Equal(t, []*cryo.Session{s}, server.Sessions())
				require.Contains(t, answer, fmt.Sprintf(" %d %s\r\n", c.status, http.StatusText(c.status)))
				require.Contains(t, answer, c.sentence)
				if c.header != "" {
					require.Contains(t, answer, "\r\n"+c.header+": "+c.value+"\r\n")
				}
				require.Equal(t, c.status, next(t, statuses), "it has a token, so it is a client's")
				require.Empty(t, statuses)
			})
		})
	}
}

func TestClientThatSendsBeforeTheResponseIsDenied(t *testing.T) {
	request := "GET /?x-cryo-sid=1&authorization=" + url.QueryEscape("Bearer "+token) + " HTTP/1.1\r\nHost: cryo.test\r\n" +
		"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
	for name, early := range map[string]string{
		"a frame":           "\r\n\x82\x80\x00\x00\x00\x00",
		"a byte":            "\r\n\x82",
		"a body":            "Content-Length: 5\r\n\r\nearly",
		"a megabyte":        "\r\n" + strings.Repeat("x", 1<<20),
		"a further request": "\r\n" + request + "\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				lines, httpLines := &logged{}, &logged{}
				statuses := make(chan int, 1)
				server := newServer(t, cryo.ServerOptions{
					SessionOptions: cryo.SessionOptions{Logger: slog.New(lines.handler())},
					Authorize:      cryo.Tokens(token),
					MaxSessions:    1,
					OnDeny:         func(status int) { statuses <- status },
				})
				l := cryotest.Listen()
				listening := &http.Server{Handler: server, ErrorLog: slog.NewLogLogger(httpLines.handler(), slog.LevelError)}
				serving := start(func() error { return listening.Serve(l) })
				defer listening.Close()
				c, err := l.Dial(t.Context(), "", "")
				require.NoError(t, err)
				defer c.Close()
				go func() { _, _ = io.WriteString(c, request+early) }() // it may not be read to its end
				reply, err := io.ReadAll(c)
				require.NoError(t, err)
				require.Equal(t, "HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: 62\r\n\r\n"+
					"The client must not send data before the upgrade is answered.\n", string(reply))
				require.Equal(t, 400, next(t, statuses))
				synctest.Wait()
				require.Contains(t, lines.text(), "The client must not send data before the upgrade is answered.")

				peer := join(t, l, 2) // its slot is free again
				peer.ClientHandshake()
				require.NoError(t, peer.WS.Close())
				require.NoError(t, server.Shutdown(t.Context()))
				require.NoError(t, listening.Close())
				require.ErrorIs(t, serving.result(t), http.ErrServerClosed)
				require.Empty(t, httpLines.text())
			})
		})
	}
}

func TestAllClientsAreDeniedByDefault(t *testing.T) {
	for name, authorize := range map[string]func(*cryo.Upgrade) error{
		"no Authorize": nil,
		"no tokens":    cryo.Tokens(),
		"empty tokens": cryo.Tokens("", ""),
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l := cryotest.Serve(t, newServer(t, cryo.ServerOptions{Authorize: authorize}))
				for _, token := range []string{"", "x"} {
					status, _, body := knock(t, l, "x-cryo-sid=1&authorization=Bearer+"+token, upgrade())
					require.Equal(t, 401, status)
					require.Equal(t, "The token was rejected.", body)
				}
			})
		})
	}
}

func TestEachOfTheTokensIsAccepted(t *testing.T) {
	authorize := cryo.Tokens("one", "two")
	require.NoError(t, authorize(&cryo.Upgrade{Token: "one"}))
	require.NoError(t, authorize(&cryo.Upgrade{Token: "two"}))
	require.Error(t, authorize(&cryo.Upgrade{Token: "three"}))
	require.Error(t, authorize(&cryo.Upgrade{Token: "on"}))
	require.Error(t, authorize(&cryo.Upgrade{}))
}

func TestInvalidRequestIsDeniedBeforeAuthorize(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		called := false
		l := cryotest.Serve(t, newServer(t, cryo.ServerOptions{
			Authorize:   func(*cryo.Upgrade) error { called = true; return nil },
			CheckOrigin: func(r *http.Request) bool { return r.Header.Get("Origin") == "" },
		}))
		status, _, _ := knock(t, l, "authorization=Bearer+t&x-cryo-sid=a", upgrade())
		require.Equal(t, 401, status, "a malformed session id")
		status, _, _ = knock(t, l, "authorization=Bearer+t&x-cryo-sid=1", with(upgrade(), "Origin", "https://evil.test"))
		require.Equal(t, 403, status, "an origin that is not allowed")
		require.False(t, called)
	})
}

func TestAuthorizeReceivesTheRequestAndSetsAValue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		type seen struct {
			token, more, remote string
			id                  uint64
		}
		values := make(chan any, 1)
		_, l, _ := serve(t, cryo.ServerOptions{
			Authorize: func(u *cryo.Upgrade) error {
				u.Value = seen{u.Token, u.Request.URL.Query().Get("more"), u.Request.RemoteAddr, u.SessionID}
				return nil
			},
			OnSession: func(s *cryo.Session, u *cryo.Upgrade) {
				values <- u.Value
				if s.Value() != u.Value {
					t.Errorf("the session has the value %v, its upgrade %v", s.Value(), u.Value)
				}
				if s.RemoteAddr().String() != u.Request.RemoteAddr {
					t.Errorf("the session comes from %v, its request from %v", s.RemoteAddr(), u.Request.RemoteAddr)
				}
			},
		})
		s, err := cryo.Dial(t.Context(), memoryURL, &cryo.DialOptions{
			NetDial: l.Dial, SessionID: sid, Token: token, Query: url.Values{"more": {"a&b"}},
		})
		require.NoError(t, err)
		defer cut(s)
		require.Equal(t, seen{token, "a&b", "192.0.2.1:50000", sid}, next(t, values))
		require.Nil(t, s.Value(), "of the end that dialled")
	})
}

func TestAuthorizeErrorIsLoggedWithoutTheTokenAndNotSent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		lines := &logged{}
		_, l, _ := serve(t, cryo.ServerOptions{
			SessionOptions: cryo.SessionOptions{Logger: slog.New(lines.handler())},
			Authorize:      func(u *cryo.Upgrade) error { return errors.New("no such tenant for " + u.Token) },
		})
		for range 5 {
			_, _, body := knock(t, l, "x-cryo-sid=1&authorization=Bearer+s3cret", upgrade())
			require.Equal(t, "The token was rejected.", body)
		}
		require.Equal(t, 1, strings.Count(lines.text(), "authorizing: the error is redacted"), "logged once a second: %s", lines.text())
		require.NotContains(t, lines.text(), "s3cret")
		time.Sleep(time.Second)
		knock(t, l, "x-cryo-sid=1&authorization=Bearer+s3cret", upgrade())
		require.Equal(t, 2, strings.Count(lines.text(), "authorizing: the error is redacted"))
	})
}

func TestAdmissionErrorIsSentToTheClient(t *testing.T) {
	for status, words := range map[int]string{0: "403 Forbidden", http.StatusPaymentRequired: "402 Payment Required"} {
		synctest.Test(t, func(t *testing.T) {
			lines := &logged{}
			statuses := make(chan int, 1)
			_, l, _ := serve(t, cryo.ServerOptions{
				SessionOptions: cryo.SessionOptions{Logger: slog.New(lines.handler())},
				Authorize: func(u *cryo.Upgrade) error {
					return fmt.Errorf("tenant 5: %w", &cryo.AdmissionError{StatusCode: status, Message: "The tenant has no more credit."})
				},
				OnDeny: func(status int) { statuses <- status },
			})
			_, err := cryo.Dial(t.Context(), memoryURL, &cryo.DialOptions{NetDial: l.Dial, Token: token})
			require.EqualError(t, err, "dialling ws://cryo.test: the server responded to the upgrade with "+words+": The tenant has no more credit.")
			require.NotErrorIs(t, err, cryo.ErrUnauthorized)
			require.Contains(t, lines.text(), "authorizing: tenant 5: The tenant has no more credit.")
			require.Equal(t, words[:3], strconv.Itoa(next(t, statuses)))
		})
	}
}

func TestFullServerDeniesClients(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, l, sessions := serve(t, cryo.ServerOptions{MaxSessions: 2})
		first := join(t, l, 1)
		first.ClientHandshake()
		join(t, l, 2) // in its handshake, which counts
		_, err := cryo.Dial(t.Context(), memoryURL, &cryo.DialOptions{NetDial: l.Dial, Token: token})
		require.EqualError(t, err, "dialling ws://cryo.test: the server responded to the upgrade with 503 Service Unavailable: The server has reached its limit of sessions.")
		require.NotErrorIs(t, err, cryo.ErrUnauthorized)

		first.Conn().Cut()
		wantEnded(t, next(t, sessions))
		synctest.Wait() // until OnSession has returned, too, it counts
		join(t, l, 3).ClientHandshake()
	})
}

func TestClosingSessionsCountAgainstTheLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sessions := make(chan *cryo.Session, 4)
		server := newServer(t, cryo.ServerOptions{
			Authorize:   cryo.Tokens(token),
			MaxSessions: 2,
			OnSession:   func(s *cryo.Session, _ *cryo.Upgrade) { sessions <- s },
		})
		l := &slowListener{Listener: cryotest.Listen(), slow: 100, closing: make(chan struct{})}
		defer l.release()
		cryotest.ServeOn(t, l, server)
		comes := func(id uint64) *cryo.Session {
			t.Helper()
			join(t, l.Listener, id).ClientHandshake()
			return next(t, sessions)
		}
		full := func(id uint64) {
			t.Helper()
			status, _, body := knock(t, l.Listener, fmt.Sprintf("x-cryo-sid=%d&authorization=", id)+url.QueryEscape("Bearer "+token), upgrade())
			require.Equal(t, 503, status)
			require.Equal(t, "The server has reached its limit of sessions.", body)
		}
		first := comes(1)
		second := comes(1) // the first is closing
		full(2)
		third := comes(1)
		fourth := comes(1) // as many are closing as there may be sessions
		full(1)
		full(2)
		require.NoError(t, fourth.Err(), "the session that could not be taken over is connected")
		require.Len(t, server.Sessions(), 1)

		l.release()
		require.ErrorIs(t, wantEnded(t, first), cryo.ErrTakenOver)
		require.ErrorIs(t, wantEnded(t, second), cryo.ErrTakenOver)
		require.ErrorIs(t, wantEnded(t, third), cryo.ErrTakenOver)
		synctest.Wait()
		comes(2)
		full(3)
		comes(1)
		require.NoError(t, server.Shutdown(t.Context()))
	})
}

func TestSessionIDBelongsToItsToken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server, l, sessions := serve(t, cryo.ServerOptions{Authorize: cryo.Tokens(token, "another")})
		peer := join(t, l, sid)
		peer.ClientHandshake()
		s := next(t, sessions)

		_, err := cryo.Dial(t.Context(), memoryURL, &cryo.DialOptions{NetDial: l.Dial, Token: "another", SessionID: sid})
		require.EqualError(t, err, "dialling ws://cryo.test: the server responded to the upgrade with 401 Unauthorized: The session already exists.")
		require.ErrorIs(t, err, cryo.ErrSessionExists)
		require.NotErrorIs(t, err, cryo.ErrUnauthorized)
		require.NoError(t, s.Err())
		found, ok := server.Session(sid)
		require.True(t, ok)
		require.Same(t, s, found)
	})
}

func TestReturningClientTakesOverItsSession(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server, l, sessions := serve(t, cryo.ServerOptions{MaxSessions: 1})
		old := join(t, l, sid)
		old.ClientHandshake()
		lost := next(t, sessions)
		waiting := start(func() error { return lost.SendText(t.Context(), "lost") })
		old.WantType("the text", wire.UTF8)
		old.Conn().StopReading() // its network is gone

		peer := join(t, l, sid) // a full server has a slot for it too
		begin := time.Now()
		require.ErrorIs(t, waiting.result(t), cryo.ErrTakenOver)
		require.Zero(t, time.Since(begin), "it can be sent again at once")
		_, known := server.Session(sid)
		require.False(t, known, "neither the old session, nor one in its handshake")

		peer.ClientHandshake()
		wantEnded(t, lost)
		require.Equal(t, time.Second, time.Since(begin), "the close handshake of a lost connection is short")
		require.ErrorIs(t, lost.Err(), net.ErrClosed)
		s := next(t, sessions)
		require.NotSame(t, lost, s)
		found, known := server.Session(sid)
		require.True(t, known)
		require.Same(t, s, found)
		require.Len(t, server.Sessions(), 1)
	})
}

func TestSessionCanBeTakenOverDuringItsHandshake(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server, l, sessions := serve(t, cryo.ServerOptions{})
		old := join(t, l, sid)
		synctest.Wait() // its session is there, not only the answer to its upgrade
		peer := join(t, l, sid)
		old.WantClose("the end of the first connection", 4000, "taken over by a newer connection of the same client")
		peer.ClientHandshake()
		next(t, sessions)
		require.Empty(t, sessions)
		require.Len(t, server.Sessions(), 1)
	})
}

func TestSessionsOfAnAddressAreLimited(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server := newServer(t, cryo.ServerOptions{Authorize: cryo.Tokens(token), MaxSessionsPerAddress: 2})
		l := cryotest.Serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			r.RemoteAddr = r.URL.Query().Get("from") // as behind a proxy
			server.ServeHTTP(w, r)
		}))
		from := func(address string, id uint64) (*cryo.Session, error) {
			return cryo.Dial(t.Context(), memoryURL, &cryo.DialOptions{NetDial: l.Dial, Token: token, SessionID: id, Query: url.Values{"from": {address}}})
		}
		welcome := func(address string, id uint64) *cryo.Session {
			t.Helper()
			s, err := from(address, id)
			require.NoError(t, err, address)
			t.Cleanup(func() { cut(s) })
			return s
		}
		denied := func(address string, id uint64) {
			t.Helper()
			_, err := from(address, id)
			require.EqualError(t, err, "dialling ws://cryo.test: the server responded to the upgrade with 429 Too Many Requests: This address has reached its limit of sessions.")
		}
		first := welcome("192.0.2.1:1", 1)
		welcome("192.0.2.1:2", 2)
		denied("192.0.2.1:3", 3)
		denied("192.0.2.1", 3)
		denied("[::ffff:192.0.2.1]:3", 3)
		welcome("192.0.2.2:1", 3)
		welcome("192.0.2.1:4", 2) // takes its own over: none more
		denied("192.0.2.1:5", 4)
		cut(first)
		synctest.Wait()
		welcome("192.0.2.1:5", 4)
		welcome("192.0.2.3:1", 4) // from elsewhere: its old place is free
		welcome("192.0.2.1:6", 5)
		denied("192.0.2.1:7", 4) // and can't come back while it is full

		welcome("[2001:db8::1]:1", 11)
		welcome("[2001:db8::2]:1", 12)
		denied("[2001:db8::3:4]:1", 13)
		denied("2001:db8::5", 13)
		denied("[2001:db8::5]", 13)
		welcome("[2001:db8:0:2::1]", 13)
		welcome("[2001:db8:0:1::1]:1", 14)

		welcome("nonsense", 21)
		welcome("more nonsense", 22)
		denied("whatever", 23)
		require.NoError(t, server.Shutdown(t.Context()))
	})
}

func TestFullDeniesClients(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var full atomic.Bool
		_, l, _ := serve(t, cryo.ServerOptions{Full: full.Load})
		query := "x-cryo-sid=1&authorization=" + url.QueryEscape("Bearer "+token)
		full.Store(true)
		status, _, body := knock(t, l, query, upgrade())
		require.Equal(t, 503, status)
		require.Equal(t, "Overloaded: closed sessions are still draining.", body)
		status, _, _ = knock(t, l, "x-cryo-sid=1&authorization=Bearer+wrong", upgrade())
		require.Equal(t, 401, status, "the token is judged first")
		full.Store(false)
		join(t, l, sid).ClientHandshake()
	})
}

func TestSuppressedDenialsAreCounted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		lines := &logged{}
		_, l, _ := serve(t, cryo.ServerOptions{SessionOptions: cryo.SessionOptions{Logger: slog.New(lines.handler())}})
		for range 100 {
			knock(t, l, "x-cryo-sid=1&authorization=Bearer+wrong", upgrade())
		}
		require.Equal(t, 1, strings.Count(lines.text(), "Denied a client"))
		require.Equal(t, 1, strings.Count(lines.text(), "suppressed=0"))
		time.Sleep(time.Second)
		knock(t, l, "x-cryo-sid=1&authorization=Bearer+wrong", upgrade())
		require.Equal(t, 2, strings.Count(lines.text(), "Denied a client"))
		require.Equal(t, 1, strings.Count(lines.text(), "suppressed=99"))
	})
}

// A stranger may send a token of a megabyte. What is made of it so that the log
// doesn't repeat it costs hundreds of times as much.
func TestDenyingALongTokenIsCheap(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server := newServer(t, cryo.ServerOptions{Authorize: cryo.Tokens(token)})
		r := httptest.NewRequest(http.MethodGet, "/?authorization=Bearer+"+strings.Repeat("word+", 100_000), http.NoBody)
		r.Header = upgrade()
		deny := func() {
			w := httptest.NewRecorder()
			server.ServeHTTP(w, r)
			require.Equal(t, 401, w.Code)
		}
		deny() // it is logged
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		deny()
		runtime.ReadMemStats(&after)
		require.Less(t, after.TotalAlloc-before.TotalAlloc, uint64(5<<20))
	})
}

func TestBlockedLogHandlerDoesNotDelayOtherDenials(t *testing.T) {
	logging, release := make(chan struct{}, 2), make(chan struct{})
	log := slog.New(onLog{slog.DiscardHandler, func() {
		logging <- struct{}{}
		<-release
	}})
	server := newServer(t, cryo.ServerOptions{SessionOptions: cryo.SessionOptions{Logger: log}})
	deny := func() error {
		w := httptest.NewRecorder()
		r := httptest.NewRequest(http.MethodGet, "/", http.NoBody)
		r.Header = upgrade()
		server.ServeHTTP(w, r)
		if w.Code != http.StatusUnauthorized {
			return fmt.Errorf("denied with %d", w.Code)
		}
		return nil
	}
	logged := start(deny)
	next(t, logging)
	other := start(deny)
	select {
	case err := <-other.done:
		require.NoError(t, err)
	case <-time.After(time.Second):
		t.Error("it waits for the log")
		defer other.wantSuccess(t)
	}
	close(release)
	logged.wantSuccess(t)
}

// A proxy that does not pass on the headers of an upgrade makes a plain request of it.
func TestRequestWithoutAnUpgradeIsReportedOnlyForCryoClients(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log logged
		statuses := make(chan int, 9)
		_, l, _ := serve(t, cryo.ServerOptions{SessionOptions: cryo.SessionOptions{Logger: slog.New(log.handler())}, OnDeny: func(status int) { statuses <- status }})
		for _, query := range []string{"", "room=5", "x-cryo-sid=1"} {
			status, _, _ := knock(t, l, query, http.Header{})
			require.Equal(t, 426, status)
		}
		synctest.Wait()
		require.Empty(t, statuses)
		require.Empty(t, log.text())

		for range 3 {
			status, _, _ := knock(t, l, queryOf(1, token), http.Header{})
			require.Equal(t, 426, status)
			require.Equal(t, 426, next(t, statuses))
		}
		require.Equal(t, 1, strings.Count(log.text(), "\n"), "once a second")
		require.Contains(t, log.text(), "forward the Upgrade and Connection headers")
		require.NotContains(t, log.text(), token)
	})
}

func TestDenialsAreLoggedOncePerSecondForEachStatus(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log logged
		_, l, _ := serve(t, cryo.ServerOptions{SessionOptions: cryo.SessionOptions{Logger: slog.New(log.handler())}})
		for range 5 {
			knock(t, l, queryOf(1, "wrong"), upgrade())
		}
		knock(t, l, queryOf(1, token), http.Header{})
		require.Equal(t, 2, strings.Count(log.text(), "\n"), "a flood of one kind does not hide another")
	})
}
