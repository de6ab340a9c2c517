package plugin

import (
	"bufio"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// get sends a listener a plain HTTP request, and returns the status and text of the response.
func (e *engine) get(t *testing.T, path string, headers ...string) (status int, text string) {
	t.Helper()
	c, err := e.net.Dial(t.Context(), "tcp", somewhere)
	require.NoError(t, err)
	defer c.Close()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+somewhere+path, http.NoBody)
	require.NoError(t, err)
	for _, h := range headers {
		name, value, _ := strings.Cut(h, ": ")
		req.Header.Set(name, value)
	}
	require.NoError(t, req.Write(c))
	resp, err := http.ReadResponse(bufio.NewReader(c), req)
	require.NoError(t, err)
	body, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	require.NoError(t, resp.Body.Close())
	return resp.StatusCode, strings.TrimSpace(string(body))
}

func TestOnlyTheConfiguredPathIsServed(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(with(listenInput, "path: /feed"), toProbe)
		for path, want := range map[string]int{"/": 404, "/feed/more": 404, "/feed/": 404, "/feed": 426, "/feed?room=5": 426} {
			status, _ := e.get(t, path)
			require.Equal(t, want, status, path)
		}
		_, text := e.get(t, "/feed")
		require.Equal(t, "This is a Cryo server: connect with a Cryo client, over WebSocket.", text)

		require.Zero(t, e.metrics.value("cryo_sessions_denied{status=404}"), "strangers and health checks are not counted")
		for range 3 {
			e.wantDenied(cryo.DialOptions{Token: token}, http.StatusNotFound)
		}
		require.Equal(t, int64(3), e.metrics.value("cryo_sessions_denied{status=404}"))
		require.Equal(t, 1, e.log.count("WARN Denied a client: the path of its URL differs from the path field", "expected_path=/feed", "status=404"), "once a second")
		s, err := cryo.Dial(t.Context(), "ws://"+somewhere+"/feed", &cryo.DialOptions{Token: token, NetDial: e.net.Dial})
		require.NoError(t, err)
		require.NoError(t, s.Close(t.Context(), ""))
	})
}

func TestClientsOverALimitAreDenied(t *testing.T) {
	for _, tt := range []struct {
		limit  string
		status int
	}{
		{"max_sessions: 2", http.StatusServiceUnavailable},
		{"max_sessions_per_address: 2", http.StatusTooManyRequests},
	} {
		t.Run(tt.limit, func(t *testing.T) {
			inEngine(t, func(t *testing.T, e *engine) {
				e.run(with(listenInput, tt.limit), toProbe)
				first := e.dial()
				e.dial()
				e.wantDenied(cryo.DialOptions{Token: token}, tt.status)
				end(first)
				synctest.Wait()
				e.dial()
			})
		})
	}
}

func TestOversizedHeadersAreRejected(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(with(listenInput, "max_header_bytes: 10000"), toProbe)
		status, _ := e.get(t, "/", "X-Long: "+strings.Repeat("x", 9000))
		require.Equal(t, http.StatusUpgradeRequired, status)
		status, _ = e.get(t, "/", "X-Long: "+strings.Repeat("x", 20_000)) // the HTTP server is generous by 4 KiB
		require.Equal(t, http.StatusRequestHeaderFieldsTooLarge, status)
		time.Sleep(time.Second) // the HTTP server takes its time to close
	})
}

func TestOnlyPagesFromAllowedOriginsMayConnect(t *testing.T) {
	for settings, want := range map[string]map[string]bool{
		"":                       {"": true, "https://app.example.com": true, "https://evil.test": true, "null": true},
		"allowed_origins: ['*']": {"": true, "https://app.example.com": true, "https://evil.test": true, "null": true},
		"allowed_origins: []":    {"": true, "https://app.example.com": false, "https://evil.test": false, "null": false},
		"allowed_origins: [ 'https://app.example.com', 'http://localhost:3000' ]": {
			"": true, "https://app.example.com": true, "http://localhost:3000": true, "http://app.example.com": false,
			"https://app.example.com:8443": false, "https://app.example.com.evil.test": false, "https://evil.test": false, "null": false,
		},
		"allowed_origins: [ 'null' ]": {"": true, "https://app.example.com": false, "null": true},
	} {
		inEngine(t, func(t *testing.T, e *engine) {
			e.run(with(listenInput, settings), toProbe)
			for origin, welcome := range want {
				header := http.Header{}
				if origin != "" {
					header.Set("Origin", origin)
				}
				if welcome {
					_, err := e.tryDial(cryo.DialOptions{Token: token, Header: header})
					require.NoError(t, err, "%s: %s", settings, origin)
					continue
				}
				e.wantDenied(cryo.DialOptions{Token: token, Header: header}, http.StatusForbidden)
				e.wantDenied(cryo.DialOptions{Token: "wrong", Header: header}, http.StatusForbidden)
			}
		})
	}
}

func TestIdleConnectionIsClosedAfterHandshakeTimeout(t *testing.T) {
	for name, tt := range map[string]struct {
		request string
		after   time.Duration
	}{
		"before its request":               {"", 2 * time.Second},
		"in its request":                   {"GET / HTTP/1.1\r\n", 2 * time.Second},
		"after a request for another path": {"GET /else HTTP/1.1\r\nHost: x\r\n\r\n", 0},
	} {
		t.Run(name, func(t *testing.T) {
			inEngine(t, func(t *testing.T, e *engine) {
				e.run(with(listenInput, "handshake_timeout: 2s"), toProbe)
				c, err := e.net.Dial(t.Context(), "tcp", somewhere)
				require.NoError(t, err)
				_, err = c.Write([]byte(tt.request))
				require.NoError(t, err)
				begin := time.Now()
				_, _ = io.Copy(io.Discard, c)
				require.Equal(t, tt.after, time.Since(begin))
				require.NoError(t, c.Close())
			})
		})
	}
}

func TestSessionOutlivesTheHandshakeTimeout(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(with(listenInput, "handshake_timeout: 2s"), toProbe)
		client := e.dial()
		time.Sleep(time.Hour)
		e.wantReceives(t, client, "delivered")
	})
}

func TestAnyConfiguredTokenAuthorizesAClient(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run("cryo_server: { address: '"+somewhere+"', tokens: [ first, second ] }", toProbe)
		for token, welcome := range map[string]bool{"first": true, "second": true, "third": false, "": false, "firstsecond": false} {
			_, err := e.tryDial(cryo.DialOptions{Token: token})
			if welcome {
				require.NoError(t, err)
			} else {
				require.ErrorIs(t, err, cryo.ErrUnauthorized)
			}
		}
	})
}

func TestAuthorizeMappingAllowsOrDeniesClients(t *testing.T) {
	for _, tt := range []struct {
		name, mapping string
		welcome       bool
		log           string
	}{
		{"everybody", `root = true`, true, ""},
		{"nobody", `root = false`, false, "authorizing: denied by the field authorize"},
		{"by token", `root = this.token == "sesame & more"`, true, ""},
		{"by session id, without loss", `root = this.session_id == "18446744073709551615"`, true, ""},
		{"by address", `root = this.remote_address == "192.0.2.1:50000"`, true, ""},
		{"by parameter", `root = this.query.room == "5"`, true, ""},
		{"by header", `root = this.headers."x-room" == "6"`, true, ""},
		{"by a missing query parameter", `root = this.query.building == "7"`, false, "denied by the field authorize"},
		{"a mapping that fails", `root = this.token.parse_json().admin`, false, "authorizing: authorize failed in line 1: the error is redacted"},
		{"an object", `root.a = 5`, true, ""},
		{"an object with a null field", `root = { "a": null, "b": false }`, true, ""},
		{"an object whose only field is null", `root.a = null`, false, "authorizing: authorize returned an object whose fields are all null"},
		{"nested objects whose fields are all null", `root = { "a": { "b": null }, "c": {} }`, false, "an object whose fields are all null"},
		{"claims of an unreadable token", `root.user = this.token.parse_json().catch({}).sub`, false, "an object whose fields are all null"},
		{"an empty object", `root = {}`, false, "an object whose fields are all null"},
		{"the whole input of the mapping", `root = this`, false, "authorizing: authorize returned an object with the field token, which must not become metadata"},
		{"all but the token", `root = this.without("token")`, false, "authorizing: authorize returned an object with the whole query or all headers"},
		{"the query", `root = this.query`, false, "with the whole query"},
		{"the headers", `root = this.headers`, false, "or all headers"},
		{"the headers in a field", `root = { "user": "ann", "all": this.headers }`, false, "or all headers"},
		{"some of the query", `root = this.query.without("x-cryo-sid")`, true, ""},
		{"a mapping that assigns nothing", `let a = 5`, false, "authorizing: authorize returned neither a boolean nor an object"},
		{"a mapping that assigns nothing for some clients", `root = if this.token == "x" { true }`, false, "authorizing: authorize returned neither a boolean nor an object"},
		{"a field that is not assigned for some clients", `root.a = if this.token == "x" { true }`, false, "authorizing: authorize returned neither a boolean nor an object"},
		{"null", `root = null`, false, "authorizing: authorize returned neither a boolean nor an object"},
		{"a mapping that deletes", `root = deleted()`, false, "authorizing: authorize"},
		{"the text true", `root = "true"`, false, "authorize returned neither a boolean nor an object, but string"},
		{"a list", `root = [ true ]`, false, "authorize returned neither a boolean nor an object, but []interface {}"},
		{"a field that just fits", `root.a = range(0, 8181).map_each(i -> "x").join("")`, true, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			inEngine(t, func(t *testing.T, e *engine) {
				e.run("cryo_server:\n  address: '"+somewhere+"'\n  authorize: '"+tt.mapping+"'", toProbe)
				_, err := e.tryDial(cryo.DialOptions{
					Token: "sesame & more", SessionID: 1<<64 - 1,
					Query: url.Values{"room": {"5", "8"}}, Header: http.Header{"X-Room": {"6"}},
				})
				if tt.welcome {
					require.NoError(t, err)
					return
				}
				require.ErrorIs(t, err, cryo.ErrUnauthorized)
				e.log.want(t, tt.log)
				for _, line := range e.log.all() {
					require.NotContains(t, line, "sesame")
				}
			})
		})
	}
}

func TestOversizedMetadataIsDeniedWithStatus431(t *testing.T) {
	for _, tt := range []struct{ name, mapping, sentence string }{
		{
			"too many fields", `root = range(0, 65).map_each(i -> { "key": "f%v".format(i), "value": 1 }).map_each(f -> { (f.key): f.value }).merge({}).squash()`,
			"Too much session metadata: 65 fields (limit 64), 900 bytes (limit 8192).",
		},
		{
			"fields that are too long", `root.a = range(0, 8192).map_each(i -> "x").join("")`,
			"Too much session metadata: 1 fields (limit 64), 8203 bytes (limit 8192).",
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			inEngine(t, func(t *testing.T, e *engine) {
				e.run("cryo_server:\n  address: '"+somewhere+"'\n  authorize: '"+tt.mapping+"'", toProbe)
				denied := e.wantDenied(cryo.DialOptions{Token: token}, http.StatusRequestHeaderFieldsTooLarge)
				require.Equal(t, tt.sentence, denied.Message)
				require.NotErrorIs(t, denied, cryo.ErrUnauthorized)
				e.log.want(t, "authorizing: "+tt.sentence)
			})
		})
	}
}

func TestServerInputReceivesOverRealSockets(t *testing.T) {
	defer checkLeaks(t)
	e := newEngine(t)
	e.shared.listen = net.Listen
	in := e.start("cryo_server: { address: '127.0.0.1:0', tokens: [ a ] }", toProbe)
	defer in.stop()
	var address string
	require.Eventually(t, func() bool {
		_, line, found := strings.Cut(strings.Join(e.log.all(), "\n"), " address=")
		address, _, _ = strings.Cut(strings.ReplaceAll(line, "\n", " "), " ")
		return found
	}, 10*time.Second, time.Millisecond)
	s, err := cryo.Dial(t.Context(), "ws://"+address, &cryo.DialOptions{Token: "a"})
	require.NoError(t, err)
	m := send(s, "hello")
	a := e.arrival()
	remote, _ := a.batch[0].MetaGet("cryo_remote_address")
	require.Contains(t, remote, "127.0.0.1:")
	a.deliver()
	m.wantAcked(t, "delivered")
	require.NoError(t, s.Close(t.Context(), ""))
}

func TestListenerLogsItsAddressAndSessions(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.shared.listen = func(network, _ string) (net.Listener, error) { return e.net.Listen(network, somewhere) }
		p := e.run(strings.Replace(listenInput, somewhere, "192.0.2.2:0", 1), toProbe)
		s, err := e.tryDial(cryo.DialOptions{Token: token, SessionID: 7})
		require.NoError(t, err)
		require.NoError(t, s.Close(t.Context(), "enough"))
		synctest.Wait()
		e.log.want(t, "DEBUG Session connected", "session=7", "remote=")
		e.log.want(t, "DEBUG Session disconnected", "session=7", `error=session ended: closed by the peer: "enough"`)
		p.stop()
		e.log.want(t, "INFO Listening for Cryo clients", "address="+somewhere)
		e.log.want(t, "INFO Listener closed", "address="+somewhere)
	})
}
