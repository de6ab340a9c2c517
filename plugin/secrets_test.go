package plugin

import (
	"bufio"
	"context"
	"crypto/tls"
	"fmt"
	"html"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/cryotest"
	"github.com/cryo-connect/cryo-connect/internal/wire"
)

// secrets are tokens that are easy to leak in one disguise or another.
var secrets = []string{
	"eyJhbGciOi.JIUzI1NiJ9-c2Vj_cmV0",
	`s3cr/et+&=%2F "q" 'a' <b>\é$1`,
	"two  spaces",
}

// spellings are what a token must not be found as.
func spellings(secret string) []string {
	return []string{
		secret, url.QueryEscape(secret), url.PathEscape(secret), html.EscapeString(secret),
		strings.Trim(strconv.Quote(secret), `"`), strings.Trim(strconv.QuoteToASCII(secret), `"`),
	}
}

func (e *engine) wantSecret(t *testing.T, secret string) {
	t.Helper()
	for _, text := range append(e.log.all(), e.metrics.names()...) {
		for _, spelling := range spellings(secret) {
			assert.NotContains(t, text, spelling)
		}
	}
}

// answer is a server that answers a request by hand, and hangs up.
func (e *engine) answer(reply func(req *http.Request) string) {
	socket, err := e.net.Listen("tcp", somewhere)
	require.NoError(e.t, err)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := socket.Accept()
			if err != nil {
				return
			}
			_ = c.SetDeadline(time.Now().Add(time.Minute))
			if req, err := http.ReadRequest(bufio.NewReader(c)); err == nil {
				_, _ = c.Write([]byte(reply(req)))
			}
			_ = c.Close()
		}
	}()
	e.t.Cleanup(func() { _ = socket.Close(); <-done })
}

// echo is all that a server knows of a token, in all disguises.
func echo(req *http.Request) string {
	bearer := req.URL.Query().Get("authorization")
	return strings.Join([]string{
		"Token " + bearer, req.RequestURI, html.EscapeString(bearer), strconv.Quote(bearer), url.PathEscape(bearer),
	}, " <br> ")
}

func response(status, body string) string {
	return fmt.Sprintf("HTTP/1.1 %s\r\nContent-Type: text/html\r\nContent-Length: %d\r\n\r\n%s", status, len(body), body)
}

func TestFailedDialLeaksNoTokenToLogsOrMetrics(t *testing.T) {
	ws, wss := "url: ws://"+somewhere, "url: wss://"+somewhere
	for _, tt := range []struct {
		name, fields string
		prepare      func(e *engine)
		log          string // what is said of it
	}{
		{"nobody listens", ws, func(*engine) {}, "connection refused"},
		{"the name is unknown", "url: ws://nowhere.invalid", func(e *engine) {
			e.dialer = func(_ context.Context, _, address string) (net.Conn, error) {
				return nil, &net.DNSError{Err: "no such host", Name: address, IsNotFound: true}
			}
		}, "no such host"},
		{"nobody answers", ws, func(e *engine) {
			_, err := e.net.Listen("tcp", somewhere)
			require.NoError(e.t, err)
		}, "timed out after 5s"},
		{"the token is rejected", ws, func(e *engine) {
			e.answer(func(req *http.Request) string { return response("401 Unauthorized", echo(req)) })
		}, "401 Unauthorized: (redacted: text/html of "},
		{"the token is rejected with a long text", ws, func(e *engine) {
			e.answer(func(req *http.Request) string {
				return response("401 Unauthorized", strings.Repeat("<p>", 290)+echo(req)+strings.Repeat(echo(req), 100))
			})
		}, "401 Unauthorized"},
		{"the session exists", ws, func(e *engine) {
			e.answer(func(req *http.Request) string {
				return response("401 Unauthorized", "Session already exists "+echo(req))
			})
		}, "401 Unauthorized: session already exists (redacted: text/html of "},
		{"the path is wrong", ws + "/wrong", func(e *engine) {
			e.answer(func(req *http.Request) string { return response("404 Not Found", "No "+req.RequestURI) })
		}, "404 Not Found: (redacted: text/html of "},
		{"the server redirects", ws, func(e *engine) {
			e.answer(func(req *http.Request) string {
				return "HTTP/1.1 302 Found\r\nLocation: http://" + somewhere + req.RequestURI + "\r\nContent-Length: 0\r\n\r\n"
			})
		}, "302 Found: redirect to http://" + somewhere + "/"},
		{"the response is malformed", ws, func(e *engine) { e.answer(echo) }, "malformed HTTP"},
		{"the status of the response is malformed", ws, func(e *engine) {
			e.answer(func(req *http.Request) string { return "HTTP/1.1 " + echo(req) + "\r\n\r\n" })
		}, "malformed HTTP"},
		{"the header of the response is malformed", ws, func(e *engine) {
			e.answer(func(req *http.Request) string { return "HTTP/1.1 101 Yes\r\n" + echo(req) + "\r\n\r\n" })
		}, "malformed MIME header"},
		{"the response is no upgrade", ws, func(e *engine) {
			e.answer(func(req *http.Request) string {
				return "HTTP/1.1 101 Yes\r\nUpgrade: websocket\r\nConnection: upgrade\r\nSec-Websocket-Accept: " + req.URL.RawQuery + "\r\n\r\n"
			})
		}, "bad handshake"},
		{"the server does not support TLS", wss, func(e *engine) {
			e.answer(func(req *http.Request) string { return "" })
		}, "Failed to connect to cryo"},
		{"the certificate is not trusted", wss, func(e *engine) {
			certFile, keyFile := certificate(e.t)
			cert, err := tls.LoadX509KeyPair(certFile, keyFile)
			require.NoError(e.t, err)
			socket, err := e.net.Listen("tcp", somewhere)
			require.NoError(e.t, err)
			h := &http.Server{ReadHeaderTimeout: time.Minute, ErrorLog: quiet}
			go func() {
				_ = h.Serve(tls.NewListener(socket, &tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS12}))
			}()
			e.t.Cleanup(func() { _ = h.Close() })
		}, "certificate signed by unknown authority"},
		{"the proxy refuses", wss + ", proxy_url: 'http://user:pr0xy-pass@" + somewhere + "'", func(e *engine) {
			e.answer(func(req *http.Request) string { return response("407 Proxy Authentication Required", req.RequestURI) })
		}, "through the proxy " + somewhere + ": "},
		{"the proxy is gone", ws + ", proxy_url: 'socks5://user:pr0xy-pass@" + somewhere + "'", func(*engine) {}, "through the proxy " + somewhere + ": "},
		{"the server sends BYE", ws, func(e *engine) {
			e.serveRaw(func(peer *cryotest.Peer) {
				peer.ServerHandshake()
				peer.WriteFrames(cryotest.Bye(1, "go away, "+peer.Request.URL.Query().Get("authorization")))
			})
		}, "error=session ended: closed by the peer"},
		{"the server closes", ws, func(e *engine) {
			e.serveRaw(func(peer *cryotest.Peer) {
				peer.ServerHandshake()
				peer.WriteClose(4001, "go away, "+peer.Request.URL.Query().Get("authorization"))
			})
		}, "error=session ended: closed by the peer with code 4001"},
		{"the server reports an error", ws, func(e *engine) {
			e.serveRaw(func(peer *cryotest.Peer) {
				peer.ServerHandshake()
				peer.WriteFrames(cryotest.Error(1, "bad token "+peer.Request.URL.Query().Get("authorization")))
			})
		}, "WARN The peer"},
	} {
		for _, secret := range secrets {
			for kind, ends := range map[string][2]string{"input": {"cryo", toProbe}, "output": {fromFeed, "cryo"}} {
				t.Run(fmt.Sprintf("%s, %s, %q", kind, tt.name, secret), func(t *testing.T) {
					inEngine(t, func(t *testing.T, e *engine) {
						tt.prepare(e)
						fields := fmt.Sprintf("cryo: { %s, token: '%s' }", tt.fields, strings.ReplaceAll(secret, "'", "''"))
						for i := range ends {
							if ends[i] == "cryo" {
								ends[i] = fields
							}
						}
						e.run(ends[0], ends[1])
						e.produce("an output may only notice when it writes")
						time.Sleep(6 * time.Second)
						synctest.Wait()
						e.log.want(t, tt.log)
						e.wantSecret(t, secret)
						e.wantSecret(t, "pr0xy-pass")
					})
				})
			}
		}
	}
}

func TestRejectionThatEchoesTheTokenDoesNotLeakIt(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.serveRaw(func(peer *cryotest.Peer) {
			peer.ServerHandshake()
			f := peer.WantType("the message", wire.UTF8)
			peer.WriteFrames(cryotest.Error(f.Ack, "not with "+peer.Request.URL.Query().Get("authorization")))
		})
		e.run(fromOnce, "cryo: { url: ws://"+somewhere+", token: '"+secrets[0]+"' }")
		err := next(t, e.produce("m").verdict)
		require.ErrorContains(t, err, "rejected by the peer")
		require.NotContains(t, err.Error(), secrets[0])
		e.wantSecret(t, secrets[0])
	})
}

func TestListenerLogsNoTokens(t *testing.T) {
	for _, secret := range secrets {
		t.Run(fmt.Sprintf("%q", secret), func(t *testing.T) {
			inEngine(t, func(t *testing.T, e *engine) {
				e.run("cryo_server: { address: '"+somewhere+"', tokens: [ other, '"+strings.ReplaceAll(secret, "'", "''")+"' ] }", toProbe)
				s, err := e.tryDial(cryo.DialOptions{Token: secret, SessionID: 5})
				require.NoError(t, err)
				_, err = e.tryDial(cryo.DialOptions{Token: "other", SessionID: 5})
				require.ErrorIs(t, err, cryo.ErrSessionExists)
				_, err = e.tryDial(cryo.DialOptions{Token: secret + "x"})
				require.ErrorIs(t, err, cryo.ErrUnauthorized)
				status, _ := e.get(t, "/no?authorization=Bearer+"+url.QueryEscape(secret))
				require.Equal(t, http.StatusNotFound, status)
				status, _ = e.get(t, "/?authorization=Bearer+"+url.QueryEscape(secret))
				require.Equal(t, http.StatusUpgradeRequired, status)
				e.wantReceives(t, s, "delivered")
				e.log.want(t, "Denied a client")
				e.wantSecret(t, secret)
			})
		})
	}
}

func TestFailedMappingLogsNoPartOfTheToken(t *testing.T) {
	const secret = "tenant1:s3cr3tpassword" // in base64 dGVuYW50MTpzM2NyM3RwYXNzd29yZA==
	for mapping, log := range map[string]string{
		`root = this.token.split(":").index(1).number() > 0`:                            "authorize failed in line 1: the error is redacted",
		"let a = 1\nlet b = 2\nroot = this.token.split(\":\").index(1).not_null() + $a": "authorize failed in line 3: the error is redacted",
		`root = throw(this.token)`:                                                      "authorize failed in line 1: the error is redacted",
		`root = throw("not " + this.token.slice(8))`:                                    "authorize failed in line 1: the error is redacted",
		`root = throw(this.token.encode("base64"))`:                                     "authorize failed in line 1: the error is redacted",
		`root = this.token.slice(8).ts_parse("2006")`:                                   "authorize failed in line 1: the error is redacted",
		`root = this.token.slice(8).bool()`:                                             "authorize failed in line 1: the error is redacted",
		`root = this.token.uppercase().slice(8).parse_json()`:                           "authorize failed in line 1: the error is redacted",
		`root = if this.token.slice(8) { true }`:                                        "authorize failed in line 1: the error is redacted",
		`root = deleted()`:                                                              "authorize failed: the error is redacted",
		`root = throw("token is malformed: " + this.token)`:                             "authorize failed in line 1: token is malformed",
	} {
		t.Run(mapping, func(t *testing.T) {
			inEngine(t, func(t *testing.T, e *engine) {
				e.run("cryo_server:\n  address: '"+somewhere+"'\n  authorize: |\n    "+strings.ReplaceAll(mapping, "\n", "\n    "), toProbe)
				_, err := e.tryDial(cryo.DialOptions{Token: secret})
				require.ErrorIs(t, err, cryo.ErrUnauthorized)
				e.log.want(t, "authorizing: "+log)
				for _, part := range []string{"tenant1", "s3cr3t", "password", "PASSWORD", "dGVuYW50", "[token]"} {
					require.Zero(t, e.log.count(part), "%s in %s", part, strings.Join(e.log.all(), "\n"))
				}
			})
		})
	}
}

func TestTokenInAStreamNameIsRedactedInTheLog(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		server := e.serve()
		e.run(dialInput, toProbe)
		s := server.session()
		st, err := s.OpenStream(context.Background(), &cryo.StreamOptions{Name: "hello " + token})
		require.NoError(t, err)
		_, err = st.Write([]byte("x"))
		require.NoError(t, err)
		synctest.Wait()
		end(s)
		time.Sleep(time.Second)
		for _, line := range e.log.all() {
			require.NotContains(t, line, token)
		}
	})
}

// echoes are the places in which a server may repeat what it was sent.
var echoes = map[string]func(e *engine, text string){
	"a body": func(e *engine, text string) {
		e.answer(func(*http.Request) string { return response("404 Not Found", text) })
	},
	"a long body": func(e *engine, text string) {
		e.answer(func(*http.Request) string { return response("403 Forbidden", strings.Repeat("<br>", 250)+text+text) })
	},
	"a denial": func(e *engine, text string) {
		e.answer(func(*http.Request) string { return response("401 Unauthorized", "Session already exists "+text) })
	},
	"a status": func(e *engine, text string) {
		e.answer(func(*http.Request) string { return "HTTP/1.1 400 " + text + "\r\n\r\n" })
	},
	"a malformed status": func(e *engine, text string) {
		e.answer(func(*http.Request) string { return "HTTP/1.1 " + text + "\r\n\r\n" })
	},
	"a malformed header": func(e *engine, text string) {
		e.answer(func(*http.Request) string { return "HTTP/1.1 200 OK\r\n" + text + "\r\n\r\n" })
	},
	"a content type": func(e *engine, text string) {
		e.answer(func(*http.Request) string { return "HTTP/1.1 403 Forbidden\r\nContent-Type: " + text + "\r\n\r\n" })
	},
	"a content length": func(e *engine, text string) {
		e.answer(func(*http.Request) string { return "HTTP/1.1 403 Forbidden\r\nContent-Length: " + text + "\r\n\r\n" })
	},
	"a redirect": func(e *engine, text string) {
		e.answer(func(*http.Request) string {
			return "HTTP/1.1 302 Found\r\nLocation: http://h/" + text + "\r\nContent-Length: 0\r\n\r\n"
		})
	},
	"the host of a redirect": func(e *engine, text string) {
		e.answer(func(*http.Request) string {
			return "HTTP/1.1 302 Found\r\nLocation: http://" + text + ".example\r\nContent-Length: 0\r\n\r\n"
		})
	},
	"BYE": func(e *engine, text string) {
		e.serveRaw(func(peer *cryotest.Peer) { peer.ServerHandshake(); peer.WriteFrames(cryotest.Bye(1, text)) })
	},
	"a close reason": func(e *engine, text string) {
		e.serveRaw(func(peer *cryotest.Peer) {
			peer.ServerHandshake()
			peer.WriteClose(4001, strings.ToValidUTF8(text[:min(len(text), 123)], ""))
		})
	},
	"an ERROR": func(e *engine, text string) {
		e.serveRaw(func(peer *cryotest.Peer) { peer.ServerHandshake(); peer.WriteFrames(cryotest.Error(1, text)) })
	},
	"a rejection": func(e *engine, text string) {
		e.serveRaw(func(peer *cryotest.Peer) {
			peer.ServerHandshake()
			time.Sleep(time.Second)
			for _, f := range peer.Taken() {
				if f.Type == wire.UTF8 {
					peer.WriteFrames(cryotest.Error(f.Ack, text))
				}
			}
		})
	},
	"a name of a stream": func(e *engine, text string) {
		e.serveRaw(func(peer *cryotest.Peer) {
			peer.ServerHandshake()
			peer.WriteFrames(
				wire.Frame{Type: wire.TxStart, Ack: 1, Tx: 1, Size: -1, Payload: []byte(text)},
				wire.Frame{Type: wire.TxCancel, Ack: 2, Tx: 1},
			)
		})
	},
}

var sessionID = regexp.MustCompile(`session=\d+`)

// The token, a header and a parameter are repeated by the server in random spellings.
func TestNoSpellingOfASecretReachesTheLog(t *testing.T) {
	const seeds = 12
	for place, prepare := range echoes {
		t.Run(place, func(t *testing.T) {
			for seed := range uint64(seeds) {
				rng := rand.New(rand.NewPCG(uint64(len(place)), seed))
				secrets := []string{cryotest.RandomToken(rng), cryotest.RandomToken(rng), cryotest.RandomToken(rng)}
				text := cryotest.Repeat(rng, secrets[rng.IntN(3)])
				if !strings.Contains(place, "body") && place != "a denial" && place != "a rejection" {
					text = strings.Map(func(r rune) rune {
						if r == '\r' || r == '\n' {
							return ' '
						}
						return r
					}, text)
				}
				for kind, ends := range map[string][2]string{"input": {"cryo", toProbe}, "output": {fromOnce, "cryo"}} {
					inEngine(t, func(t *testing.T, e *engine) {
						prepare(e, text)
						quoted := func(i int) string { return "'" + strings.ReplaceAll(secrets[i], "'", "''") + "'" }
						fields := "cryo: { url: 'ws://" + somewhere + "', token: " + quoted(0) + ", headers: { X-Key: " + quoted(1) + " }, query_parameters: { key: " + quoted(2) + " } }"
						for i := range ends {
							if ends[i] == "cryo" {
								ends[i] = fields
							}
						}
						e.run(ends[0], ends[1])
						if kind == "output" {
							e.produce("m")
						}
						time.Sleep(3 * time.Second)
						synctest.Wait()
						lines := e.log.all()
						require.NotEmpty(t, lines)
						for _, line := range lines {
							line = sessionID.ReplaceAllString(line, "") // its random digits may be those of a secret
							for _, secret := range secrets {
								require.Empty(t, cryotest.PartOf(secret, line), "seed %d: of %q in %s", seed, secret, line)
							}
						}
					})
				}
			}
		})
	}
}
