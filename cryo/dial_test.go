package cryo_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/base64"
	"errors"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/cryotest"
)

func TestCheckURL(t *testing.T) {
	const badQuery = "the URL's query is invalid: escape each semicolon as %3B and each percent sign as %25"
	for rawURL, problem := range map[string]string{
		"ws://example.com":                "",
		"wss://example.com:8443/path?a=b": "",
		"ws://[::1]:8080":                 "",
		"":                                `the scheme is "": it must be ws or wss`,
		"example.com":                     `the scheme is "": it must be ws or wss`,
		"http://example.com":              `the scheme is "http": it must be ws or wss`,
		"ws:example.com":                  "the URL has no host",
		"ws://":                           "the URL has no host",
		"ws://:8080":                      "the URL has no host",
		"ws://user:pass@example.com":      "the URL must not contain a user or password: set the token instead",
		"ws://example.com?authorization=Bearer+x": "the query parameter authorization is set from the token: remove it from the query",
		"ws://example.com?x-cryo-sid=1":           "the query parameter x-cryo-sid is set from the session id: remove it from the query",
		"ws://example.com:port?key=s3cret":        `not a URL: invalid port ":port" after host`,
		"ws://example.com:65535":                  "",
		"ws://example.com:65536":                  "the URL's port must be from 1 to 65535",
		"ws://example.com:0":                      "the URL's port must be from 1 to 65535",
		"ws://example.com:/path":                  "the URL's port must be from 1 to 65535",
		"ws://user:s3cret/x@example.com":          "not a URL",
		"ws://user:%zz3cret@example.com":          "not a URL",
		"ws://exa mple.com?key=s3cret":            `not a URL: invalid character " " in host name`,
		"ws://example.com/\x7f?key=s3cret":        "not a URL: net/url: invalid control character in URL",
		"ws://example.com?a=b&tenant=s3;cret":     badQuery,
		"ws://example.com?a=b&key=s3cret%zz":      badQuery,
		"ws://example.com?key=s3cret%":            badQuery,
		"ws://example.com?s3%4":                   badQuery,
		"ws://example.com?;authorization=x":       badQuery,
		"ws://example.com?a=%3B%25&&b&=":          "",
	} {
		t.Run(rawURL, func(t *testing.T) {
			err := cryo.CheckURL(rawURL)
			if problem == "" {
				require.NoError(t, err)
				return
			}
			require.EqualError(t, err, problem)
			_, err = cryo.Dial(t.Context(), rawURL, nil)
			require.EqualError(t, err, "dialling: "+problem)
		})
	}
}

func TestDialSendsTheUpgradeRequestOfTheProtocol(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server := cryotest.NewServer(t)
		var (
			s       *cryo.Session
			address string
		)
		dial := start(func() (err error) {
			s, err = cryo.Dial(t.Context(), "ws://example.com/some/path?x=1&y=#part", &cryo.DialOptions{
				SessionID: sid,
				Token:     token,
				Query:     url.Values{"tenant": {"a b", "c&d"}},
				Header:    http.Header{"X-Tenant": {"acme"}, "Host": {"other.example.com"}},
				NetDial: func(ctx context.Context, network, addr string) (net.Conn, error) {
					address = network + " " + addr
					return server.Dial(ctx, network, addr)
				},
			})
			return err
		})
		peer := server.NextPeer()
		peer.ServerHandshake()
		dial.wantSuccess(t)
		defer cut(s)
		require.Equal(t, "tcp example.com:80", address)
		r := peer.Request
		require.Equal(t, "/some/path", r.URL.Path)
		require.Equal(t, url.Values{
			"x": {"1"}, "y": {""}, "tenant": {"a b", "c&d"},
			"authorization": {"Bearer " + token},
			"x-cryo-sid":    {"18446744073709551574"},
		}, r.URL.Query())
		require.Equal(t, "acme", r.Header.Get("X-Tenant"))
		require.Equal(t, "other.example.com", r.Host)
		require.Empty(t, r.Header.Get("Sec-Websocket-Extensions"))
		require.Empty(t, r.Header.Get("Sec-Websocket-Protocol"))
	})
}

func TestParametersThatDialSetsCannotBeSetByQuery(t *testing.T) {
	for name, problem := range map[string]string{
		"authorization": "dialling: the query parameter authorization is set from the token: remove it from the query",
		"x-cryo-sid":    "dialling: the query parameter x-cryo-sid is set from the session id: remove it from the query",
	} {
		for _, values := range [][]string{{"s3cret"}, {}} {
			_, err := cryo.Dial(t.Context(), memoryURL, &cryo.DialOptions{
				Query: url.Values{name: values},
				NetDial: func(context.Context, string, string) (net.Conn, error) {
					return nil, errors.New("dialled")
				},
			})
			require.EqualError(t, err, problem)
		}
	}
}

func TestDialChoosesASessionID(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, l, sessions := serve(t, cryo.ServerOptions{})
		ids := map[uint64]bool{0: true}
		for range 10 {
			s, err := cryo.Dial(t.Context(), memoryURL, &cryo.DialOptions{NetDial: l.Dial, Token: token})
			require.NoError(t, err)
			require.Equal(t, s.ID(), next(t, sessions).ID())
			require.False(t, ids[s.ID()])
			ids[s.ID()] = true
			cut(s)
		}
		require.False(t, ids[cryo.NewSessionID()])
	})
}

// answer serves one answer, word for word, to every upgrade in memory.
func answer(t *testing.T, answer func(*http.Request) string) *cryotest.Listener {
	t.Helper()
	return cryotest.Serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		_, _ = io.WriteString(c, answer(r))
		_ = c.Close()
	}))
}

func dialAnswer(t *testing.T, reply string) error {
	t.Helper()
	l := answer(t, func(*http.Request) string { return reply })
	_, err := cryo.Dial(t.Context(), memoryURL, &cryo.DialOptions{NetDial: l.Dial, Token: token})
	require.Error(t, err)
	return err
}

func TestHandshakeErrorDistinguishesTheTwoKindsOf401(t *testing.T) {
	const refused = "HTTP/1.1 401 Unauthorized\r\nContent-Type: text/html\r\n\r\n<html><body><h1>401 Unauthorized</h1><p>Upgrade request for 127.0.0.1:5000 was refused. "
	synctest.Test(t, func(t *testing.T) {
		err := dialAnswer(t, refused+"The session already exists.</p></body></html>")
		require.EqualError(t, err, "dialling ws://cryo.test: the server responded to the upgrade with 401 Unauthorized: "+
			"Upgrade request for 127.0.0.1:5000 was refused. The session already exists.")
		require.ErrorIs(t, err, cryo.ErrSessionExists)
		require.NotErrorIs(t, err, cryo.ErrUnauthorized)

		err = dialAnswer(t, refused+"The token is invalid.</p></body></html>")
		require.ErrorIs(t, err, cryo.ErrUnauthorized)
		require.NotErrorIs(t, err, cryo.ErrSessionExists)

		err = dialAnswer(t, "HTTP/1.1 401 Unauthorized\r\n\r\n")
		require.EqualError(t, err, "dialling ws://cryo.test: the server responded to the upgrade with 401 Unauthorized")
		require.ErrorIs(t, err, cryo.ErrUnauthorized)

		err = dialAnswer(t, "HTTP/1.1 503 Service Unavailable\r\n\r\nThe session already exists, says who?")
		require.NotErrorIs(t, err, cryo.ErrUnauthorized)
		require.NotErrorIs(t, err, cryo.ErrSessionExists)
		denial, ok := errors.AsType[*cryo.HandshakeError](err)
		require.True(t, ok)
		require.Equal(t, &cryo.HandshakeError{StatusCode: 503, Message: "The session already exists, says who?"}, denial)
	})
}

func TestDenialIsReportedEvenIfItsBodyIsTruncated(t *testing.T) {
	for name, c := range map[string]struct {
		head string
		end  func(c *cryotest.Conn, cancel func()) // of the body; nil: it stalls
		took time.Duration
	}{
		"it stalls":                {"", nil, cryo.DefaultConnectTimeout},
		"it stalls before its end": {"Content-Length: 1000\r\n", nil, cryo.DefaultConnectTimeout},
		"the context ends":         {"", func(_ *cryotest.Conn, cancel func()) { cancel() }, time.Second},
		"the connection is lost":   {"Content-Length: 1000\r\n", func(c *cryotest.Conn, _ func()) { c.Cut() }, time.Second},
		"the connection ends":      {"Content-Length: 1000\r\n", func(c *cryotest.Conn, _ func()) { _ = c.Close() }, time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			for sentence, want := range map[string]error{
				"The session already exists": cryo.ErrSessionExists,
				"The token was ref":          cryo.ErrUnauthorized,
				"":                           cryo.ErrUnauthorized,
			} {
				synctest.Test(t, func(t *testing.T) {
					begin := time.Now()
					ctx, cancel := context.WithCancel(t.Context())
					defer cancel()
					_, err := cryo.Dial(ctx, memoryURL, &cryo.DialOptions{
						Token: token,
						NetDial: func(context.Context, string, string) (net.Conn, error) {
							client, server := cryotest.Pipe()
							_, err := io.WriteString(server, "HTTP/1.1 401 Unauthorized\r\n"+c.head+"\r\n"+sentence)
							if c.end != nil {
								time.AfterFunc(time.Second, func() { c.end(server, cancel) })
							}
							return client, err
						},
					})
					problem := "dialling ws://cryo.test: the server responded to the upgrade with 401 Unauthorized"
					if sentence != "" {
						problem += ": " + sentence
					}
					require.EqualError(t, err, problem)
					require.ErrorIs(t, err, want)
					require.Equal(t, c.took, time.Since(begin))
				})
			}
		})
	}
}

func TestDenialMessagesAreTruncated(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, err := cryo.Dial(t.Context(), memoryURL, &cryo.DialOptions{NetDial: answer(t, func(*http.Request) string {
			return "HTTP/1.1 403 Forbidden\r\n\r\n" + strings.Repeat("€", 1000)
		}).Dial})
		require.EqualError(t, err, "dialling ws://cryo.test: the server responded to the upgrade with 403 Forbidden: "+strings.Repeat("€", 66))
	})
}

// upgraded is a server's 101 to a request, with further lines.
func upgraded(r *http.Request, upgrade, more string) string {
	return "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: " + upgrade + "\r\n" +
		"Sec-WebSocket-Accept: " + acceptKey(r.Header.Get("Sec-Websocket-Key")) + "\r\n" + more + "\r\n"
}

func TestUnrequestedUpgradeIsNotAccepted(t *testing.T) {
	const (
		extension   = "the server uses a WebSocket extension that was not requested"
		subprotocol = "the server uses a subprotocol that was not requested"
		protocol    = "the server upgrades to something other than WebSocket alone"
		accept      = "the server sent more than one Sec-WebSocket-Accept"
	)
	for name, c := range map[string]struct {
		asked, upgrade, more string
		problem              string // empty: accepted
	}{
		"compression":                           {"", "websocket", "Sec-WebSocket-Extensions: permessage-deflate; server_no_context_takeover; client_no_context_takeover\r\n", extension},
		"any extension":                         {"", "websocket", "Sec-WebSocket-Extensions: x\r\n", extension},
		"an extension in a second line":         {"", "websocket", "Sec-WebSocket-Extensions:\r\nSec-WebSocket-Extensions: x\r\n", extension},
		"an empty list of extensions":           {"", "WebSocket", "Sec-WebSocket-Extensions:\r\n", ""},
		"a subprotocol":                         {"", "websocket", "Sec-WebSocket-Protocol: chat\r\n", subprotocol},
		"another subprotocol":                   {"cryo, mqtt", "websocket", "Sec-WebSocket-Protocol: chat\r\n", subprotocol},
		"a subprotocol in another case":         {"cryo", "websocket", "Sec-WebSocket-Protocol: Cryo\r\n", subprotocol},
		"two subprotocols":                      {"cryo, mqtt", "websocket", "Sec-WebSocket-Protocol: cryo, mqtt\r\n", subprotocol},
		"a second subprotocol in a second line": {"cryo", "websocket", "Sec-WebSocket-Protocol: cryo\r\nSec-WebSocket-Protocol: chat\r\n", subprotocol},
		"the subprotocol that was asked for":    {"cryo, mqtt", "websocket", "Sec-WebSocket-Protocol: mqtt\r\n", ""},
		"no subprotocol, asked for one":         {"cryo", "websocket", "", ""},
		"two protocols":                         {"", "websocket, h2c", "", protocol},
		"two protocols in two lines":            {"", "websocket\r\nUpgrade: h2c", "", protocol},
		"two values of Sec-WebSocket-Accept":    {"", "websocket", "Sec-WebSocket-Accept: x\r\n", accept},
	} {
		t.Run(name, func(t *testing.T) {
			for _, header := range []string{"Sec-Websocket-Protocol", "sec-websocket-protocol"} {
				synctest.Test(t, func(t *testing.T) {
					opts := &cryo.DialOptions{Token: token}
					if c.asked != "" {
						opts.Header = http.Header{header: {c.asked}}
					}
					opts.NetDial = answer(t, func(r *http.Request) string {
						if got := r.Header.Get("Sec-Websocket-Protocol"); got != c.asked {
							t.Errorf("asked for the subprotocol %q", got)
						}
						return upgraded(r, c.upgrade, c.more)
					}).Dial
					_, err := cryo.Dial(t.Context(), memoryURL, opts)
					if c.problem == "" {
						require.ErrorContains(t, err, "dialling ws://cryo.test: protocol handshake: ")
						return
					}
					require.EqualError(t, err, "dialling ws://cryo.test: upgrade: "+c.problem)
				})
			}
		})
	}
}

func TestInformationalResponsesBeforeTheAnswerAreSkipped(t *testing.T) {
	const informational = "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 102 Processing\r\nX: y\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </x>\r\nLink: </y>\r\n\r\n"
	synctest.Test(t, func(t *testing.T) {
		l := answer(t, func(r *http.Request) string { return informational + upgraded(r, "websocket", "") })
		_, err := cryo.Dial(t.Context(), memoryURL, &cryo.DialOptions{NetDial: l.Dial, Token: token})
		require.ErrorContains(t, err, "dialling ws://cryo.test: protocol handshake: ")

		err = dialAnswer(t, informational+"HTTP/1.1 401 Unauthorized\r\n\r\nSession already exists")
		require.ErrorIs(t, err, cryo.ErrSessionExists)
		for reply, problem := range map[string]string{
			informational:                        "unexpected EOF",
			"HTTP/1.1 103 Early Hints\r\nLink: ": "unexpected EOF",
			"":                                   "unexpected EOF",
			"HTTP/1.1 1":                         "malformed HTTP status code",
		} {
			require.EqualError(t, dialAnswer(t, reply), "dialling ws://cryo.test: "+problem, "%q", reply)
		}

		begin := time.Now()
		err = dialAnswer(t, strings.Repeat(informational, 20_000))
		require.ErrorContains(t, err, "the response to the upgrade is longer than 1048576 bytes")
		require.Zero(t, time.Since(begin))
	})
}

func TestDialFailsWithoutAServer(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	require.NoError(t, l.Close())
	_, err = cryo.Dial(t.Context(), "ws://"+l.Addr().String(), &cryo.DialOptions{Token: token})
	require.ErrorIs(t, err, syscall.ECONNREFUSED)
	require.NotContains(t, err.Error(), "authorization")
}

func TestDialTimesOutInEachPhase(t *testing.T) {
	hangs := map[string]func(ctx context.Context, network, address string) (net.Conn, error){
		"connecting": func(ctx context.Context, _, _ string) (net.Conn, error) {
			<-ctx.Done()
			return nil, ctx.Err()
		},
		"in the upgrade": func(context.Context, string, string) (net.Conn, error) {
			c, _ := cryotest.Pipe()
			return c, nil
		},
	}
	for name, netDial := range hangs {
		for _, scheme := range []string{"ws", "wss"} {
			t.Run(scheme+" "+name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					begin := time.Now()
					opts := &cryo.DialOptions{NetDial: netDial, Token: token}
					_, err := cryo.Dial(t.Context(), scheme+"://cryo.test", opts)
					require.EqualError(t, err, "dialling "+scheme+"://cryo.test: timed out after 5s: context deadline exceeded")
					require.Equal(t, cryo.DefaultConnectTimeout, time.Since(begin))

					ctx, cancel := context.WithCancel(t.Context())
					time.AfterFunc(time.Second, cancel)
					_, err = cryo.Dial(ctx, scheme+"://cryo.test", opts)
					require.ErrorIs(t, err, context.Canceled)
					require.Equal(t, cryo.DefaultConnectTimeout+time.Second, time.Since(begin))
				})
			})
		}
	}
}

func TestDialWithTLS(t *testing.T) {
	target, sessions, roots := serveTLS(t)
	_, err := cryo.Dial(t.Context(), target, &cryo.DialOptions{Token: token})
	require.ErrorAs(t, err, new(*tls.CertificateVerificationError))

	s, err := cryo.Dial(t.Context(), target, &cryo.DialOptions{Token: token, TLS: &tls.Config{RootCAs: roots}})
	require.NoError(t, err)
	wantConversation(t, s, next(t, sessions))
}

func TestDialThroughProxies(t *testing.T) {
	for name, proxy := range map[string]func(t *testing.T) *url.URL{
		"http":   func(t *testing.T) *url.URL { return connectProxy(t, "HTTP/1.1 200 OK\r\n\r\n") },
		"socks5": socksProxy,
		"none":   func(*testing.T) *url.URL { return nil },
	} {
		t.Run(name, func(t *testing.T) {
			via := proxy(t)
			choose := func(r *http.Request) (*url.URL, error) {
				if r.URL.RawQuery != "" {
					t.Errorf("the proxy's chooser sees %s", r.URL.RawQuery)
				}
				return via, nil
			}
			t.Run("ws", func(t *testing.T) {
				target, sessions := serveTCP(t)
				s, err := cryo.Dial(t.Context(), target, &cryo.DialOptions{Token: token, Proxy: choose})
				require.NoError(t, err)
				wantConversation(t, s, next(t, sessions))
			})
			t.Run("wss", func(t *testing.T) {
				target, sessions, roots := serveTLS(t)
				s, err := cryo.Dial(t.Context(), target, &cryo.DialOptions{Token: token, Proxy: choose, TLS: &tls.Config{RootCAs: roots}})
				require.NoError(t, err)
				wantConversation(t, s, next(t, sessions))
			})
		})
	}
}

func TestProxyMayDenyTheTunnel(t *testing.T) {
	for reply, problem := range map[string]string{
		"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n": "status 407 Proxy Authentication Required",
		"HTTP/1.1 502\r\n\r\n":                               "status 502 Bad Gateway",
		"nonsense\r\n\r\n":                                   "malformed HTTP response",
	} {
		via := connectProxy(t, reply)
		_, err := cryo.Dial(t.Context(), "ws://cryo.test", &cryo.DialOptions{Token: token, Proxy: http.ProxyURL(via)})
		require.EqualError(t, err, "dialling ws://cryo.test: through the proxy "+via.Host+": "+problem)
	}
	noIdea := errors.New("no proxy at http://user:pr0xy-pass@h")
	_, err := cryo.Dial(t.Context(), "ws://cryo.test", &cryo.DialOptions{Token: token, Proxy: func(*http.Request) (*url.URL, error) {
		return nil, noIdea
	}})
	require.EqualError(t, err, "dialling ws://cryo.test: choosing a proxy failed (the reason may contain the proxy's password; check HTTPS_PROXY and HTTP_PROXY)")
	require.ErrorIs(t, err, noIdea)
}

func TestProxyUserNeedsNoPassword(t *testing.T) {
	for _, user := range []*url.Userinfo{url.User("someone"), url.UserPassword("someone", "pass:word")} {
		asked := make(chan string, 1)
		proxy := cryotest.Serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			asked <- r.Header.Get("Proxy-Authorization")
			w.WriteHeader(http.StatusProxyAuthRequired)
		}))
		via := &url.URL{Scheme: "http", User: user, Host: "proxy.test"}
		_, err := cryo.Dial(t.Context(), memoryURL, &cryo.DialOptions{NetDial: proxy.Dial, Proxy: http.ProxyURL(via)})
		require.EqualError(t, err, "dialling ws://cryo.test: through the proxy proxy.test: status 407 Proxy Authentication Required")
		password, _ := user.Password()
		require.Equal(t, "Basic "+base64.StdEncoding.EncodeToString([]byte("someone:"+password)), next(t, asked))
	}
}

// A body behind a proxy's answer may be slow, or be none: after 200 a length means
// nothing.
func TestProxyResponseEndsWithItsHeader(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		begin := time.Now()
		_, err := cryo.Dial(t.Context(), memoryURL, &cryo.DialOptions{
			Proxy: http.ProxyURL(&url.URL{Scheme: "http", Host: "proxy.test"}),
			NetDial: func(context.Context, string, string) (net.Conn, error) {
				c, proxy := cryotest.Pipe()
				_, err := io.WriteString(proxy, "HTTP/1.1 403 No\r\nContent-Length: 10\r\n\r\nsl")
				return c, err
			},
		})
		require.EqualError(t, err, "dialling ws://cryo.test: through the proxy proxy.test: status 403 Forbidden")
		require.Zero(t, time.Since(begin))
	})
	via := connectProxy(t, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
	target, sessions := serveTCP(t)
	s, err := cryo.Dial(t.Context(), target, &cryo.DialOptions{Token: token, Proxy: http.ProxyURL(via)})
	require.NoError(t, err)
	wantConversation(t, s, next(t, sessions))
}

func TestEndlessResponseIsNotRead(t *testing.T) {
	for _, via := range []*url.URL{nil, {Scheme: "http", Host: "proxy.test"}} {
		synctest.Test(t, func(t *testing.T) {
			begin := time.Now()
			_, err := cryo.Dial(t.Context(), memoryURL, &cryo.DialOptions{
				Proxy: http.ProxyURL(via),
				NetDial: func(context.Context, string, string) (net.Conn, error) {
					c, other := cryotest.Pipe()
					go func() {
						_, err := io.WriteString(other, "HTTP/1.1 200 OK\r\nX: ")
						for err == nil {
							_, err = other.Write(bytes.Repeat([]byte("x"), 1000))
						}
					}()
					return c, nil
				},
			})
			require.Error(t, err)
			require.Zero(t, time.Since(begin))
		})
	}
}

// endingConn ends a context in the moment in which somebody sets a deadline.
type endingConn struct {
	net.Conn
	end func()
}

func (c *endingConn) SetDeadline(at time.Time) error {
	if time.Until(at) > 0 {
		c.end()
		synctest.Wait() // whoever watches the context has acted
	}
	return c.Conn.SetDeadline(at)
}

func TestDialEndsWithItsContextWhenDeadlinesAreSet(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		begin := time.Now()
		ctx, cancel := context.WithCancel(t.Context())
		_, err := cryo.Dial(ctx, memoryURL, &cryo.DialOptions{
			NetDial: func(context.Context, string, string) (net.Conn, error) {
				c, _ := cryotest.Pipe()
				return &endingConn{c, cancel}, nil
			},
		})
		require.ErrorIs(t, err, context.Canceled)
		require.Zero(t, time.Since(begin))
	})
}
