package redact

import (
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"html"
	"net/url"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"
)

const secret = "Zm9v+YmFyYmF6/cXV4Cg=="

func TestPlainTextIsRepeated(t *testing.T) {
	s := New(secret, "5")
	for _, text := range []string{
		"", "Session already exists", "The session already exists.", "The token was rejected.", "The parameter authorization with a Bearer token is missing.",
		"The parameter x-cryo-sid must be an unsigned decimal number of 64 bits.", "Too much session metadata: 61 fields (limit 64), 900 bytes (limit 8192).",
		"Client sent an HTTP request to an HTTPS server.", "Overloaded: closed sessions are still draining.", "taken over by a newer connection of the same client",
		"upstream connect error or disconnect/reset before headers. reset reason: connection termination", "no healthy upstream", "404 page not found",
		"order 17 of 2026-11-30 has no customer", "could not be delivered", "timed out after 30s", "Das Konto ist gelöscht",
	} {
		require.True(t, s.Plain(text), text)
		require.Equal(t, text, s.Text(text))
	}
}

func TestNeverPlain(t *testing.T) {
	s := New(secret, "correct horse", "s3c", "4815162342")
	for _, text := range []string{
		"nothing at /?authorization=Bearer+x", "a=b", "100%", "back\\slash", "Tom & Jerry", "Q29ycmVjdA", "deadbeef42cafe", "it is correct, horse", "s3c",
		"48151 62342", "correct-horse", "CORRECT HORSE", "reehorse", "a word of aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "1 2 3 4 5 6 7 8 9 10 11", "cXV4Cg", "0123456",
	} {
		if text == "reehorse" {
			require.True(t, s.Plain(text), "five letters of a secret")
			continue
		}
		require.False(t, s.Plain(text), text)
		require.Equal(t, fmt.Sprintf("(redacted: %d bytes)", len(text)), s.Text(text))
	}
}

func TestWithoutSecretsEveryTextIsPlain(t *testing.T) {
	for _, s := range []*Secrets{nil, {}, New(), New("", "")} {
		require.True(t, s.Plain("a=b&c=%2B"))
		require.False(t, s.In("a=b&c=%2B"))
	}
}

// encodings are what servers, frameworks and proxies do to a text that they repeat.
var encodings = map[string]func(string) string{
	"query":       url.QueryEscape,
	"path":        url.PathEscape,
	"percent":     func(s string) string { return strings.ReplaceAll(url.QueryEscape(s), "+", "%20") },
	"lower hex":   func(s string) string { return percent.ReplaceAllStringFunc(url.QueryEscape(s), strings.ToLower) },
	"all percent": func(s string) string { return hexOf(s, "%%%02X") },
	"json": func(s string) string {
		b, _ := json.Marshal(s)
		return string(b[1 : len(b)-1])
	},
	"php":          func(s string) string { return strings.ReplaceAll(s, "/", `\/`) },
	"unicode":      func(s string) string { return hexOf(s, `\u%04X`) },
	"html":         html.EscapeString,
	"html decimal": func(s string) string { return hexOf(s, "&#%d;") },
	"html hex":     func(s string) string { return hexOf(s, "&#x%X;") },
	"base64":       func(s string) string { return base64.StdEncoding.EncodeToString([]byte(s)) },
	"base64url":    func(s string) string { return base64.RawURLEncoding.EncodeToString([]byte("x" + s)) },
	"hex":          func(s string) string { return hex.EncodeToString([]byte(s)) },
	"quoted":       func(s string) string { return fmt.Sprintf("%+q", s) },
	"upper":        strings.ToUpper,
	"as it is":     func(s string) string { return s },
}

var percent = regexp.MustCompile(`%[0-9A-F]{2}`)

func hexOf(s, format string) string {
	var b strings.Builder
	for _, c := range []byte(s) {
		fmt.Fprintf(&b, format, c)
	}
	return b.String()
}

// decodings are all texts that a log line decodes to, with its white space and without.
func decodings(line string) []string {
	texts := []string{line, strings.Join(strings.Fields(line), "")}
	for _, text := range texts {
		for _, word := range append(strings.Fields(text), text) {
			for _, decode := range []func(string) ([]byte, error){
				hex.DecodeString, base64.RawStdEncoding.DecodeString, base64.RawURLEncoding.DecodeString,
			} {
				for from := range min(len(word), 4) {
					for to := len(word); to > len(word)-4 && to > from; to-- {
						if b, err := decode(word[from:to]); err == nil {
							texts = append(texts, string(b))
						}
					}
				}
			}
		}
		if s, err := url.QueryUnescape(text); err == nil {
			texts = append(texts, s)
		}
		texts = append(texts, html.UnescapeString(text))
	}
	return texts
}

// wantNoPart wants no part of a token in a line, or in what the line decodes to.
func wantNoPart(t *rapid.T, token, line string) {
	for _, text := range decodings(line) {
		for i := range len(token) - minPart + 1 {
			if part := token[i : i+minPart]; strings.Contains(text, part) {
				t.Fatalf("%q is in %q, of the line %q", part, text, line)
			}
		}
	}
}

// repeated draws a text in which a server repeats a token in any encoding, truncated, in lines.
func repeated(t *rapid.T, token string) string {
	text := token
	names := rapid.SliceOfN(rapid.SampledFrom([]string{
		"query", "path", "percent", "lower hex", "all percent", "json", "php", "unicode", "html", "html decimal", "html hex", "base64", "base64url", "hex", "quoted", "as it is",
	}), 1, 3).Draw(t, "encodings")
	for _, name := range names {
		text = encodings[name](text)
	}
	from := rapid.IntRange(0, len(text)/2).Draw(t, "from")
	text = text[from : from+rapid.IntRange(0, len(text)-from).Draw(t, "length")]
	if width := rapid.IntRange(0, 40).Draw(t, "width"); width > 0 {
		var lines []string
		for ; len(text) > width; text = text[width:] {
			lines = append(lines, text[:width])
		}
		text = strings.Join(append(lines, text), rapid.SampledFrom([]string{" ", "\n", "\r\n ", ", ", "-"}).Draw(t, "separator"))
	}
	return rapid.SampledFrom([]string{"", "not found ", "The token is wrong. "}).Draw(t, "before") + text
}

var tokens = rapid.OneOf(
	rapid.StringMatching(`[a-z]{6,40}`), rapid.StringMatching(`[0-9]{6,30}`), rapid.StringMatching(`[A-Za-z0-9+/]{6,60}={0,2}`),
	rapid.StringMatching(`[A-Za-z0-9_-]{4,12}\.[A-Za-z0-9_-]{4,12}\.[A-Za-z0-9_-]{4,12}`), rapid.StringMatching(`[ -~]{6,40}`), rapid.StringMatching(`[p-y]{6,12}`),
	rapid.StringMatching(`[a-zäöü]{6,20}`),
)

func TestNoTextThatIsRepeatedHoldsAToken(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		token := tokens.Draw(t, "token")
		wantNoPart(t, token, New(token).Text(repeated(t, token)))
	})
}

func TestSpellingsOfFrameworksAreRedacted(t *testing.T) {
	for _, text := range []string{
		`/?authorization=Bearer Zm9v+YmFyYmF6\/cXV4Cg==&x-cryo-sid=1`, `Bearer Zm9v\u002BYmFyYmF6/cXV4Cg==`, `Bearer Zm9v+YmFyYmF6/cXV4Cg\u003d\u003d`,
		"?rd=%2F%3Fauthorization%3DBearer%2520Zm9v%252BYmFyYmF6%252FcXV4Cg%253D%253D", "Zm9v%2bYmFyYmF6%2fcXV4Cg%3d%3d", "Zm9v&#43;YmFyYmF6&#x2F;cXV4Cg&#x3D;&#x3D;",
		base64.StdEncoding.EncodeToString([]byte("GET /?authorization=Bearer+" + secret)),
	} {
		require.Equal(t, fmt.Sprintf("(redacted: %d bytes)", len(text)), New(secret).Text(text))
	}
}
