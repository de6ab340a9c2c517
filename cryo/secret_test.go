package cryo_test

import (
	"bufio"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"html"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/cryotest"
	"github.com/cryo-connect/cryo-connect/internal/wire"
)

var secrets = []string{
	"s3cret-0123456789",
	`every "thing" that/needs+quoting & escaping: <b>%\ü</b>`,
	"white   space",
}

// spellings are the ways in which a token is echoed.
func spellings(secret string) []string {
	return []string{
		secret, url.QueryEscape(secret), url.PathEscape(secret), html.EscapeString(secret),
		strings.Trim(fmt.Sprintf("%q", secret), `"`), strings.Trim(fmt.Sprintf("%+q", secret), `"`),
	}
}

// wantNoSecret wants no part of a token in an error, however the server wrote it.
func wantNoSecret(t *testing.T, err error, secret string) {
	t.Helper()
	require.Error(t, err)
	for _, spelling := range spellings(secret) {
		require.NotContains(t, err.Error(), spelling)
		require.NotContains(t, err.Error(), spelling[:len(spelling)-2], "not even most of it")
	}
	for _, part := range []string{"s3cret", "quoting", "escaping", "white"} {
		require.NotContains(t, err.Error(), part)
	}
}

func TestErrorsDoNotContainTheToken(t *testing.T) {
	const upgraded = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
	answers := map[string]string{
		"in a denial":            "HTTP/1.1 401 Unauthorized\r\n\r\n<p>The token «%s» is wrong.</p>",
		"twice in a denial":      "HTTP/1.1 403 Forbidden\r\n\r\n%[1]s and %[1]s",
		"in the status":          "HTTP/1.1 401 %s\r\n\r\n",
		"for the status":         "HTTP/1.1 %s\r\n\r\n",
		"for the answer":         "%s\r\n\r\n",
		"in a header":            "HTTP/1.1 200 OK\r\n%s\r\n\r\n",
		"for a length":           "HTTP/1.1 200 OK\r\nContent-Length: %s\r\n\r\n",
		"for an encoding":        "HTTP/1.1 200 OK\r\nTransfer-Encoding: %s\r\n\r\n",
		"for the accepted key":   upgraded + "Sec-WebSocket-Accept: %s\r\n\r\n",
		"for an extension":       upgraded + "Sec-WebSocket-Extensions: %s\r\n\r\n",
		"in an HTML page":        "HTTP/1.1 401 Unauthorized\r\n\r\n" + strings.Repeat("<br>", 200) + "you sent %s",
		"at the end of the page": "HTTP/1.1 401 Unauthorized\r\n\r\n" + strings.Repeat("<br>", 254) + "%s",
		"cut off at the end":     "HTTP/1.1 401 Unauthorized\r\n\r\n" + strings.Repeat("<br>", 253) + "%s%[1]s",
		"with markup in between": "HTTP/1.1 401 Unauthorized\r\n\r\n<!-- %s -->%[1]s<br>",
	}
	for name, format := range answers {
		t.Run(name, func(t *testing.T) {
			for _, secret := range secrets {
				for _, spelling := range spellings(secret) {
					if strings.ContainsAny(spelling, "\r\n") {
						continue
					}
					synctest.Test(t, func(t *testing.T) {
						l := answer(t, func(*http.Request) string { return fmt.Sprintf(format, spelling) })
						_, err := cryo.Dial(t.Context(), memoryURL, &cryo.DialOptions{NetDial: l.Dial, Token: secret})
						wantNoSecret(t, err, secret)
					})
				}
			}
		})
	}
}

func TestErrorsDoNotContainTheRequest(t *testing.T) {
	for _, secret := range secrets {
		synctest.Test(t, func(t *testing.T) {
			l := answer(t, func(r *http.Request) string { return "HTTP/1.1 404 Not Found\r\n\r\nnothing at " + r.RequestURI })
			_, err := cryo.Dial(t.Context(), memoryURL, &cryo.DialOptions{NetDial: l.Dial, Token: secret})
			wantNoSecret(t, err, secret)
			require.ErrorContains(t, err, "404 Not Found: (redacted: a body of ")

			_, err = cryo.Dial(t.Context(), memoryURL, &cryo.DialOptions{
				NetDial: l.Dial, Token: secret, Header: http.Header{"Upgrade": {secret}},
			})
			wantNoSecret(t, err, secret)
		})
	}
}

func TestErrorsDoNotContainATokenSplitAcrossLines(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := answer(t, func(*http.Request) string { return "HTTP/1.1 401 Unauthorized\r\n\r\nnot abc\n  def ghi" })
		_, err := cryo.Dial(t.Context(), memoryURL, &cryo.DialOptions{NetDial: l.Dial, Token: "abc def"})
		require.EqualError(t, err, "dialling ws://cryo.test: the server responded to the upgrade with 401 Unauthorized: (redacted: a body of 17 bytes)")
	})
}

func TestProxyErrorsDoNotContainTheToken(t *testing.T) {
	for _, secret := range secrets {
		via := connectProxy(t, "HTTP/1.1 403 no "+secret+" here\r\n\r\n")
		_, err := cryo.Dial(t.Context(), "ws://cryo.test", &cryo.DialOptions{Token: secret, Proxy: http.ProxyURL(via)})
		wantNoSecret(t, err, secret)
	}
}

func TestErrorWithoutTheTokenIsUnchanged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := cryotest.Listen()
		require.NoError(t, l.Close())
		_, err := cryo.Dial(t.Context(), memoryURL, &cryo.DialOptions{NetDial: l.Dial, Token: token})
		require.ErrorAs(t, err, new(*net.OpError))

		// Without a token there is nothing to hide.
		_, err = cryo.Dial(t.Context(), memoryURL, &cryo.DialOptions{NetDial: l.Dial})
		require.ErrorAs(t, err, new(*net.OpError))
	})
}

func TestDenialTruncatedWithinTheTokenIsRedacted(t *testing.T) {
	secret := hex.EncodeToString([]byte("forty characters are to be cut"))
	synctest.Test(t, func(t *testing.T) {
		for kept := range len(secret) + 1 {
			page := strings.Repeat("<", 1024-kept) + ">"
			page = page[:1024-kept-1] + ">" + secret + "and more"
			l := answer(t, func(*http.Request) string { return "HTTP/1.1 401 Unauthorized\r\n\r\n" + page })
			_, err := cryo.Dial(t.Context(), memoryURL, &cryo.DialOptions{NetDial: l.Dial, Token: secret})
			if kept > 0 {
				require.EqualError(t, err, "dialling ws://cryo.test: the server responded to the upgrade with 401 Unauthorized: (redacted: a body of 1024 bytes)", "%d", kept)
			}
		}
	})
}

func TestTextFromTheServerDoesNotExposeTheToken(t *testing.T) {
	words := "you said " + url.QueryEscape(token) + ", that is " + token
	redacted := fmt.Sprintf("(redacted: %d bytes)", len(words))
	for name, end := range map[string]func(*cryotest.Peer){
		"BYE":   func(peer *cryotest.Peer) { peer.WriteFrames(cryotest.Bye(9, words)) },
		"close": func(peer *cryotest.Peer) { peer.WriteClose(4001, words) },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s, peer := dialled(t, cryo.DialOptions{})
				send := start(func() error { return s.SendText(t.Context(), "hello") })
				peer.WriteFrames(cryotest.Error(peer.WantType("the text", wire.UTF8).Ack, words))
				require.Equal(t, &cryo.RejectedError{Text: redacted}, send.result(t))

				peer.WriteFrames(cryotest.Error(5, words))
				m := receive(t, s)
				require.Equal(t, redacted, s.Redact(string(m.Payload)))
				require.Equal(t, words, string(m.Payload), "which is the application's")

				end(peer)
				<-s.Context().Done()
				wantNoSecret(t, s.Err(), token)
				require.ErrorContains(t, s.Err(), redacted)
			})
		})
	}
}

func TestTextWithAShortTokenIsOmitted(t *testing.T) {
	const leftOut = "(redacted: a body of %d bytes)"
	for _, tt := range []struct{ token, page, want string }{
		{"t", "The message is too late", leftOut},
		{"e", "no such user", leftOut},
		{"x", "no such user", "no such user"},
		{"abcde", "abcd of abc", "abcd of abc"},
		{"abcde", "what is abcde?", leftOut},
		{"abcdef", "what is abcdef?", leftOut},
		{"&", "black &amp; white", leftOut},
		{"a c", "a<br>c", leftOut},
		{"abc", strings.Repeat("<br>", 255) + "? ab and more", leftOut},
	} {
		t.Run(fmt.Sprintf("%s in %.30s", tt.token, tt.page), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l := answer(t, func(*http.Request) string { return "HTTP/1.1 401 Unauthorized\r\n\r\n" + tt.page })
				_, err := cryo.Dial(t.Context(), memoryURL, &cryo.DialOptions{NetDial: l.Dial, Token: tt.token})
				require.EqualError(t, err, "dialling ws://cryo.test: the server responded to the upgrade with 401 Unauthorized: "+strings.ReplaceAll(tt.want, "%d", fmt.Sprint(min(len(tt.page), 1024))))
			})
		})
	}
}

func TestExistingSessionIsDetectedIfTheTokenIsPartOfTheMessage(t *testing.T) {
	for _, token := range []string{"s", "session", "already exists"} {
		synctest.Test(t, func(t *testing.T) {
			l := answer(t, func(*http.Request) string { return "HTTP/1.1 401 Unauthorized\r\n\r\n<p>Session already\nexists</p>" })
			_, err := cryo.Dial(t.Context(), memoryURL, &cryo.DialOptions{NetDial: l.Dial, Token: token})
			require.ErrorIs(t, err, cryo.ErrSessionExists)
			require.NotErrorIs(t, err, cryo.ErrUnauthorized)
		})
	}
}

func TestWordTruncatedWithinTheTokenIsRedacted(t *testing.T) {
	cut := func(size, kept int) string { return strings.Repeat(".", size-kept) + token[:kept] }
	for name, end := range map[string]func(*cryotest.Peer){
		"BYE":   func(peer *cryotest.Peer) { peer.WriteFrames(cryotest.Bye(9, cut(123, 16))) },
		"close": func(peer *cryotest.Peer) { peer.WriteClose(4001, cut(123, 16)) },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s, peer := dialled(t, cryo.DialOptions{})
				send := start(func() error { return s.SendText(t.Context(), "hello") })
				peer.WriteFrames(cryotest.Error(peer.WantType("the text", wire.UTF8).Ack, cut(1000, len(token)-1)))
				require.Equal(t, &cryo.RejectedError{Text: "(redacted: 1000 bytes)"}, send.result(t))
				require.Equal(t, "(redacted: 9 bytes)", s.Redact(cut(9, 6)))
				require.Equal(t, "....corre", s.Redact(cut(9, 5)), "which may be there by chance")

				end(peer)
				<-s.Context().Done()
				require.ErrorContains(t, s.Err(), `"(redacted: 123 bytes)"`)
			})
		})
	}
}

func TestRedirectNamesItsTargetWithoutTheQuery(t *testing.T) {
	for location, want := range map[string]string{
		"https://login.example.com/start?rd=%2Fs3cret": "redirect to https://login.example.com/start",
		"/login?next=1":                     "redirect to /login",
		"https://u:p@login.example.com/":    "",
		"https://h/s3cret-0123456789":       "",
		"https://h/czNjcmV0LTAxMjM0NTY3ODk": "",
	} {
		synctest.Test(t, func(t *testing.T) {
			l := answer(t, func(*http.Request) string { return "HTTP/1.1 302 Found\r\nLocation: " + location + "\r\n\r\n" })
			_, err := cryo.Dial(t.Context(), memoryURL, &cryo.DialOptions{NetDial: l.Dial, Token: secrets[0]})
			denied, ok := errors.AsType[*cryo.HandshakeError](err)
			require.True(t, ok)
			require.Equal(t, want, denied.Message)
		})
	}
}

func TestValuesOfTheQueryAndOfHeadersAreNotRepeated(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, text := range []string{"the key abcdefgh is wrong", "no tenant called acme-corporation", "basic mnopqrstuv"} {
			l := answer(t, func(*http.Request) string { return "HTTP/1.1 403 Forbidden\r\n\r\n" + text })
			_, err := cryo.Dial(t.Context(), memoryURL+"/?tenant=acme-corporation", &cryo.DialOptions{
				NetDial: l.Dial, Query: url.Values{"key": {"abcdefgh"}}, Header: http.Header{"Authorization": {"Basic mnopqrstuv"}},
			})
			require.EqualError(t, err, fmt.Sprintf("dialling ws://cryo.test/: the server responded to the upgrade with 403 Forbidden: (redacted: a body of %d bytes)", len(text)))
		}
	})
}

// A server decodes the password of an Authorization header, and a proxy that can pretend to be the
// server knows its own.
func TestPasswordsAreNotRepeated(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const text = "no access for operator with the password swordfish"
		basic := http.Header{"Authorization": {"Basic " + base64.StdEncoding.EncodeToString([]byte("operator:swordfish"))}}
		via := &url.URL{Scheme: "http", User: url.UserPassword("operator", "swordfish"), Host: "proxy.test"}
		for _, options := range []cryo.DialOptions{{Header: basic}, {Proxy: http.ProxyURL(via)}, {Token: token, Proxy: http.ProxyURL(via)}} {
			for _, end := range []string{"HTTP/1.1 403 Forbidden\r\n\r\n" + text, "HTTP/1.1 302 Found\r\nLocation: /swordfish\r\n\r\n"} {
				server := answer(t, func(*http.Request) string { return end })
				options.NetDial = server.Dial
				if options.Proxy != nil {
					proxy := cryotest.Serve(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
						c, _, err := http.NewResponseController(w).Hijack()
						if err != nil {
							t.Error(err)
							return
						}
						defer c.Close()
						_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\n\r\n")
						_, _ = http.ReadRequest(bufio.NewReader(c))
						_, _ = io.WriteString(c, end)
					}))
					options.NetDial = proxy.Dial
				}
				_, err := cryo.Dial(t.Context(), memoryURL, &options)
				require.ErrorContains(t, err, "the server responded to the upgrade with ")
				require.NotContains(t, err.Error(), "swordfish")
			}
		}
	})
}
