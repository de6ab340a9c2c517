package plugin

import (
	"bufio"
	"io"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/cryotest"
	"github.com/cryo-connect/cryo-connect/internal/wire"
)

// Clients that violate the protocol before they have a session, and servers that respond with errors:
// the rows of "Clients without a session" and "Servers that are dialled" in
// docs/development/fault-matrix.md. Peers with a session are in cryo's TestMisbehaviour.

func TestInvalidClientsGetNoSession(t *testing.T) {
	authorized := "authorization=" + url.QueryEscape("Bearer "+token)
	upgrading := func(query string, headers ...string) func(t *testing.T, e *engine) string {
		return func(t *testing.T, e *engine) string {
			return e.rawRequest(t, "GET /?"+query+" HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"+
				"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"+strings.Join(headers, "")+"\r\n")
		}
	}
	for _, m := range []struct {
		does   string
		how    func(t *testing.T, e *engine) string
		answer string // the first line; empty: none, the connection is closed
		log    string
		after  time.Duration
	}{
		{
			does: "asks for no upgrade", answer: "426 Upgrade Required",
			how: func(t *testing.T, e *engine) string { return e.rawRequest(t, "GET / HTTP/1.1\r\nHost: x\r\n\r\n") },
		},
		{
			does: "speaks no HTTP", answer: "400 Bad Request",
			how: func(t *testing.T, e *engine) string { return e.rawRequest(t, "\x00\x01\x02 what?\r\n\r\n") },
		},
		{
			does: "sends headers without end", answer: "431 Request Header Fields Too Large",
			how: func(t *testing.T, e *engine) string {
				return e.rawRequest(t, "GET / HTTP/1.1\r\nHost: x\r\nX: "+strings.Repeat("x", 1<<20))
			},
		},
		{does: "sends its request a byte at a time, on 300 connections", answer: "", after: 2 * time.Second, how: slowLoris},
		{does: "sends many requests on a connection", answer: "426 Upgrade Required", how: manyRequests},
		{does: "has no token", answer: "401 Unauthorized", log: "The parameter authorization with a Bearer token is missing", how: upgrading("x-cryo-sid=1")},
		{does: "has another token", answer: "401 Unauthorized", log: "unknown token", how: upgrading("authorization=Bearer+wrong&x-cryo-sid=1")},
		{does: "has no session id", answer: "401 Unauthorized", log: "x-cryo-sid", how: upgrading(authorized)},
		{does: "has a session id that is no number", answer: "401 Unauthorized", log: "x-cryo-sid", how: upgrading(authorized + "&x-cryo-sid=abc")},
		{does: "has a query that can't be read", answer: "400 Bad Request", log: "query", how: upgrading(authorized + "&x-cryo-sid=1;a=b")},
		{
			does: "wants compression", answer: "101 Switching Protocols",
			how: upgrading(authorized+"&x-cryo-sid=1", "Sec-WebSocket-Extensions: permessage-deflate\r\n"),
		},
		{
			does: "sends nothing after the upgrade", answer: "101 Switching Protocols", after: 2 * time.Second,
			how: upgrading(authorized + "&x-cryo-sid=1"),
		},
	} {
		t.Run(m.does, func(t *testing.T) {
			requireDocumented(t, m.does)
			inEngine(t, func(t *testing.T, e *engine) {
				e.run(with(listenInput, "handshake_timeout: 2s"), toProbe)
				good := e.dial()
				before := heapInUse()
				serves := func(s *cryo.Session) {
					t.Helper()
					begin := time.Now()
					e.wantReceives(t, s, "delivered")
					require.Zero(t, time.Since(begin), "others are served at once")
				}
				answer := m.how(t, e)
				line, _, _ := strings.Cut(answer, "\r\n")
				require.Equal(t, m.answer, strings.TrimPrefix(line, "HTTP/1.1 "))
				require.NotContains(t, answer, "Sec-Websocket-Extensions")
				serves(good)
				serves(e.dial())
				if m.log != "" {
					e.log.want(t, "WARN Denied a client")
					e.log.want(t, m.log)
				}
				time.Sleep(m.after + time.Second) // until everything about it is over
				synctest.Wait()
				require.Less(t, heapInUse()-before, int64(1<<20), "memory is back")
			})
		})
	}
}

// requireDocumented requires a row of docs/development/fault-matrix.md about a peer.
func requireDocumented(t *testing.T, does string) {
	t.Helper()
	page, err := os.ReadFile("../docs/development/fault-matrix.md")
	require.NoError(t, err)
	require.Contains(t, string(page), "`"+does+"`", "its table has the result")
}

// rawRequest sends bytes to a listener, and returns the head of the response.
func (e *engine) rawRequest(t *testing.T, words string) string {
	t.Helper()
	c, err := e.net.Dial(t.Context(), "tcp", somewhere)
	require.NoError(t, err)
	t.Cleanup(func() { _ = c.Close() })
	go func() { _, _ = io.WriteString(c, words) }() // it may not be read to its end
	var answer strings.Builder
	for r := bufio.NewReader(c); ; {
		line, err := r.ReadString('\n')
		answer.WriteString(line)
		if err != nil || line == "\r\n" {
			return answer.String()
		}
	}
}

// slowLoris keeps 300 requests from ever being complete.
func slowLoris(t *testing.T, e *engine) string {
	var closed atomic.Int32
	var all sync.WaitGroup
	for range 300 {
		c, err := e.net.Dial(t.Context(), "tcp", somewhere)
		require.NoError(t, err)
		all.Go(func() {
			defer c.Close()
			for _, b := range []byte("GET / HTTP/1.1\r\nHost: x\r\nX: " + strings.Repeat("x", 1000)) {
				if _, err := c.Write([]byte{b}); err != nil {
					closed.Add(1)
					return
				}
				time.Sleep(100 * time.Millisecond)
			}
		})
	}
	t.Cleanup(func() {
		all.Wait()
		require.EqualValues(t, 300, closed.Load(), "each is closed when its time is over")
	})
	return ""
}

// manyRequests returns everything that a listener sends in response to many requests on a connection.
func manyRequests(t *testing.T, e *engine) string {
	c, err := e.net.Dial(t.Context(), "tcp", somewhere)
	require.NoError(t, err)
	defer c.Close()
	go func() { _, _ = io.WriteString(c, strings.Repeat("GET / HTTP/1.1\r\nHost: x\r\n\r\n", 1000)) }()
	answers, _ := io.ReadAll(c)
	require.Equal(t, 1, strings.Count(string(answers), "HTTP/1.1 "), "the connection is closed behind the first response")
	return string(answers)
}

// A server that answers wrongly is dialled again, and served when it is right.
func TestInvalidServersAreRedialled(t *testing.T) {
	reply := func(text string) func(http.ResponseWriter, *http.Request) {
		return func(w http.ResponseWriter, _ *http.Request) {
			c, _, err := http.NewResponseController(w).Hijack()
			if err == nil {
				_, _ = io.WriteString(c, text)
				_ = c.Close()
			}
		}
	}
	upgraded := func(say func(ws *websocket.Conn, peer func(wire.Frame))) func(http.ResponseWriter, *http.Request) {
		return func(w http.ResponseWriter, r *http.Request) {
			ws, err := (&websocket.Upgrader{}).Upgrade(w, r, nil)
			if err != nil {
				return
			}
			defer ws.Close()
			sid, _ := strconv.ParseUint(r.URL.Query().Get("x-cryo-sid"), 10, 64)
			say(ws, func(f wire.Frame) {
				f.SID = sid
				b, _ := wire.Append(nil, &f)
				_ = ws.WriteMessage(websocket.BinaryMessage, b)
			})
			for {
				if _, _, err := ws.ReadMessage(); err != nil {
					return
				}
			}
		}
	}
	shaken := func(then func(ws *websocket.Conn)) func(http.ResponseWriter, *http.Request) {
		return upgraded(func(ws *websocket.Conn, say func(wire.Frame)) {
			say(cryotest.EndpointInfo(0))
			var info wire.Frame
			for range 2 { // the client's own, and its acknowledgement of ours, in any order: nothing is left to be written
				_, message, err := ws.ReadMessage()
				f, malformed := wire.Parse(message)
				if err != nil || malformed != nil {
					return
				}
				if f.Type == wire.EndpointInfo {
					info = f
				}
			}
			say(cryotest.Acked(info.Ack))
			then(ws)
		})
	}
	for _, m := range []struct {
		does string
		how  func(http.ResponseWriter, *http.Request)
		log  string
	}{
		{"speaks no HTTP", reply("what?\r\n\r\n"), "malformed HTTP"},
		{"hangs up", reply(""), "EOF"},
		{"upgrades nothing", reply("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"), "the server responded to the upgrade with 200 OK: hi"},
		{"sends nothing after the upgrade", upgraded(func(*websocket.Conn, func(wire.Frame)) {}), "timed out after 5s"},
		{"speaks another version", upgraded(func(_ *websocket.Conn, say func(wire.Frame)) {
			info := cryotest.EndpointInfo(0)
			info.Version = 2
			say(info)
		}), "unsupported protocol version 2: only 1 is supported"},
		{
			"sends half a frame", shaken(func(ws *websocket.Conn) { _ = ws.WriteMessage(websocket.BinaryMessage, []byte("half")) }),
			"error=session ended: protocol violation: malformed frame of 4 bytes",
		},
		{
			"sends text", shaken(func(ws *websocket.Conn) { _ = ws.WriteMessage(websocket.TextMessage, []byte("{}")) }),
			"error=session ended: protocol violation: text message",
		},
		{
			"disconnects without a close frame", shaken(func(ws *websocket.Conn) { _ = ws.Close() }),
			"error=session ended: connection lost",
		},
	} {
		t.Run(m.does, func(t *testing.T) {
			requireDocumented(t, m.does)
			inEngine(t, func(t *testing.T, e *engine) {
				before := heapInUse()
				var asked atomic.Int32
				right := e.serveBehind(func(server http.Handler) http.Handler {
					return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
						if asked.Add(1) == 1 {
							m.how(w, r)
							return
						}
						server.ServeHTTP(w, r)
					})
				})
				e.run(dialInput, toProbe)
				begin := time.Now()
				peer := right.session()
				require.LessOrEqual(t, time.Since(begin), 10*time.Second, "the timeout of the handshake, and a wait")
				e.wantReceives(t, peer, "delivered")
				e.log.want(t, m.log)
				require.Less(t, heapInUse()-before, int64(1<<20), "memory is back")
			})
		})
	}
}
