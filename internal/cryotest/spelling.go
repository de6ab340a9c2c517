package cryotest

import (
	"encoding/base32"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"html"
	"math/rand/v2"
	"net/url"
	"regexp"
	"slices"
	"strings"
)

// How servers, frameworks and proxies repeat a request, and a search for what of it is left in a log
// line.

var percent = regexp.MustCompile(`%[0-9A-F]{2}`)

var encodings = []func(string) string{
	func(s string) string { return s },
	url.QueryEscape,
	url.PathEscape,
	func(s string) string { return strings.ReplaceAll(url.QueryEscape(s), "+", "%20") },
	func(s string) string { return percent.ReplaceAllStringFunc(url.QueryEscape(s), strings.ToLower) },
	func(s string) string { return eachByte(s, "%%%02X") },
	func(s string) string { b, _ := json.Marshal(s); return string(b[1 : len(b)-1]) },
	func(s string) string { return strings.ReplaceAll(s, "/", `\/`) },
	func(s string) string { return eachByte(s, `\u%04X`) },
	html.EscapeString,
	func(s string) string { return eachByte(s, "&#%d;") },
	func(s string) string { return eachByte(s, "&#x%X;") },
	func(s string) string { return base64.StdEncoding.EncodeToString([]byte(s)) },
	func(s string) string { return base64.RawURLEncoding.EncodeToString([]byte("GET /" + s)) },
	func(s string) string {
		return base32.StdEncoding.WithPadding(base32.NoPadding).EncodeToString([]byte(s))
	},
	func(s string) string { return hex.EncodeToString([]byte(s)) },
	func(s string) string { return fmt.Sprintf("%+q", s) },
	strings.ToUpper,
}

func eachByte(s, format string) string {
	var b strings.Builder
	for _, c := range []byte(s) {
		fmt.Fprintf(&b, format, c)
	}
	return b.String()
}

// alphabets are those of random tokens.
var alphabets = []string{
	"abcdefghijklmnopqrstuvwxyz", "0123456789", "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/", "abcdef0123456789",
	"abcdefghijklmnopqrstuvwxyz0123456789-_.", "pqrstuvwxy", `ab12 !"#$%&'()*+,-./:;<=>?@[\]^_{|}~`,
}

// RandomToken returns a token of 6 to 45 characters that begins and ends with none that is removed
// from tokens.
func RandomToken(rng *rand.Rand) string {
	alphabet := alphabets[rng.IntN(len(alphabets))]
	b := make([]byte, 6+rng.IntN(40))
	for i := range b {
		b[i] = alphabet[rng.IntN(len(alphabet))]
	}
	return strings.ReplaceAll("t"+string(b[1:len(b)-1])+"t", "$", "S") // no interpolation
}

// Repeat returns a text that contains a secret in a random spelling, which may be truncated at both
// ends and broken into lines.
func Repeat(rng *rand.Rand, secret string) string {
	text := secret
	for range 1 + rng.IntN(3) {
		text = encodings[rng.IntN(len(encodings))](text)
	}
	if rng.IntN(2) == 0 {
		from := rng.IntN(len(text)/2 + 1)
		text = text[from : from+rng.IntN(len(text)-from+1)]
	}
	if rng.IntN(2) == 0 {
		separator := []string{" ", "\n", "\r\n ", ", ", "-", "<br>"}[rng.IntN(6)]
		var lines []string
		for line := range slices.Chunk([]byte(text), 1+rng.IntN(40)) {
			lines = append(lines, string(line))
		}
		text = strings.Join(lines, separator)
	}
	return []string{"", "not found ", "The token is wrong: ", "/?authorization=Bearer+"}[rng.IntN(4)] + text
}

// PartOf returns a part of a secret, of six bytes, that is in a line or in what the line decodes to,
// or "".
func PartOf(secret, line string) string {
	const part = 6
	for _, text := range decodings(line) {
		for i := range len(secret) - part + 1 {
			if strings.Contains(text, secret[i:i+part]) {
				return secret[i : i+part]
			}
		}
	}
	return ""
}

// decodings returns a line, with its spaces and without, and what its words decode to.
func decodings(line string) []string {
	texts := []string{line, strings.Join(strings.Fields(line), "")}
	for _, text := range texts {
		for _, word := range append(strings.Fields(text), text) {
			for from := range min(len(word), 4) {
				for to := len(word); to > max(from, len(word)-4); to-- {
					for _, decode := range []func(string) ([]byte, error){hex.DecodeString, base32.StdEncoding.WithPadding(base32.NoPadding).DecodeString, base64.RawStdEncoding.DecodeString, base64.RawURLEncoding.DecodeString} {
						if b, err := decode(word[from:to]); err == nil {
							texts = append(texts, string(b))
						}
					}
				}
			}
		}
		if decoded, err := url.QueryUnescape(text); err == nil {
			texts = append(texts, decoded)
		}
		texts = append(texts, html.UnescapeString(text))
	}
	return texts
}
