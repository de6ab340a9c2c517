// Package redact keeps secrets out of errors and log lines that repeat texts of a peer.
package redact

import (
	"encoding/base32"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"regexp"
	"strings"
	"unicode"
	"unicode/utf8"
)

// Secrets are texts that were sent to a peer, such as a token, and which the peer may repeat in
// any encoding: percent, JSON, HTML, base64, base32, hexadecimal, truncated, or in several lines. So
// a text of the peer is repeated only if it is plain, which means that it consists of words, of a
// few numbers, of one timestamp and of punctuation, and that it contains no part of a secret.
// Otherwise only its length is reported. Nil, and the zero value, have no secrets: every text is
// plain.
type Secrets struct {
	values []string
	forms  []form
}

// form is a spelling of a secret that words and numbers can have. It consists of lower-case letters
// and digits.
type form struct {
	text string
	part int // length of the parts that a plain text does not contain, in bytes
}

// minPart is the length from which a part of a secret is not expected in a text by chance, in bytes.
const minPart = 6

// New returns the secrets of a session; empty ones are ignored.
func New(values ...string) *Secrets {
	s := &Secrets{}
	for _, value := range values {
		if value == "" {
			continue
		}
		s.values = append(s.values, value)
		if len(value) < minPart {
			continue // its parts and its codes are in texts by chance
		}
		s.add(value, minPart)
		s.add(hex.EncodeToString([]byte(value)), 2*minPart)
		for before := range 3 { // base64 has groups of three bytes, in which a secret may begin anywhere
			s.add(base64.StdEncoding.EncodeToString([]byte("  "[:before]+value)), minPart)
		}
		for before := range 5 { // base32 has groups of five
			s.add(base32.StdEncoding.EncodeToString([]byte("    "[:before]+value)), minPart)
		}
	}
	return s
}

func (s *Secrets) add(spelling string, part int) {
	if text := lettersAndDigits(spelling); text != "" {
		s.forms = append(s.forms, form{text, min(part, len(text))})
	}
}

var (
	// A word is lower-case, capitalised, upper-case, or several of these at once, as in WebSocket.
	word   = regexp.MustCompile(`^(\p{Lu}?\p{Ll}{0,23}[0-9]{0,3}|\p{Lu}{0,5}\p{Ll}{2,15}(\p{Lu}\p{Ll}{2,15}){0,4}(ID|I[ds])?|[A-Z]{2,24})$`)
	number = regexp.MustCompile(`^([0-9]{1,5}|[1-9][0-9]{5,8})(ms|s|m|h|kB|MB|GB|KiB|MiB|GiB)?$`)

	timestamp = regexp.MustCompile(`\b20[0-9]{2}-[01][0-9]-[0-3][0-9][T ][0-2][0-9]:[0-5][0-9]:[0-5][0-9](\.[0-9]{1,6})?(Z|[+-][0-9]{2}:?[0-9]{2})?\b`)
)

// maxDigits is the maximum number of digits in a plain text: a date with a number, but not the
// codes of six characters.
const maxDigits = 11

// Plain reports whether a text may be repeated.
func (s *Secrets) Plain(text string) bool {
	if s == nil || len(s.values) == 0 {
		return true
	}
	words := text
	if at := timestamp.FindStringIndex(text); at != nil {
		words = text[:at[0]] + " " + text[at[1]:]
	}
	digits := 0
	for _, c := range words {
		if unicode.IsDigit(c) {
			digits++
		}
	}
	if digits > maxDigits {
		return false
	}
	for piece := range strings.FieldsFuncSeq(words, isPunctuation) {
		if !word.MatchString(piece) && !number.MatchString(piece) {
			return false
		}
	}
	return !s.In(text)
}

// In reports whether a text contains a part of a secret. Spaces and punctuation are ignored,
// because they may be where the peer has broken the secret into lines.
func (s *Secrets) In(text string) bool {
	if s == nil {
		return false
	}
	joined := strings.Join(strings.Fields(text), "")
	for _, value := range s.values {
		if n := min(minPart, len(value)); share(text, value, n) || share(joined, value, n) {
			return true
		}
	}
	text = lettersAndDigits(text)
	for _, f := range s.forms {
		if share(text, f.text, f.part) {
			return true
		}
	}
	return false
}

// share reports whether two texts have a part of n bytes in common.
func share(a, b string, n int) bool {
	for i := range len(a) - n + 1 {
		if strings.Contains(b, a[i:i+n]) {
			return true
		}
	}
	return false
}

func isPunctuation(r rune) bool {
	return unicode.IsSpace(r) || strings.ContainsRune(".,:;!?'\"`()[]{}<>-_/|*…\uFFFD", r)
}

func lettersAndDigits(text string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsLetter(r) || unicode.IsDigit(r) {
			return unicode.ToLower(r)
		}
		return -1
	}, text)
}

// Text returns a plain text unchanged, and the length of another one.
func (s *Secrets) Text(text string) string {
	if s.Plain(text) {
		return text
	}
	return fmt.Sprintf("(redacted: %d bytes)", len(text))
}

// Cut truncates a text to at most limit bytes, at a rune boundary. The result does not keep the
// whole text in memory.
func Cut(text string, limit int) string {
	if len(text) <= limit {
		return text
	}
	for limit > 0 && !utf8.RuneStart(text[limit]) {
		limit--
	}
	return strings.Clone(text[:limit])
}
