// Package redact keeps a token out of errors and log lines.
package redact

import (
	"encoding/json"
	"errors"
	"html"
	"net/url"
	"strconv"
	"strings"
	"unicode/utf8"
)

// Secret is a token that must not appear in errors and log lines, in any of the encodings
// in which a server or a library may repeat it. The zero value and nil redact nothing.
type Secret struct {
	spellings []string
	replacer  *strings.Replacer
	short     bool
}

// redacted replaces the token; leftOut replaces a whole text that contains a short token,
// which [token] within a word would reveal.
const (
	redacted = "[token]"
	leftOut  = "(left out: the token may be in it)"
)

// MinToken is the length from which a token, or a part of it, is not expected in a text by
// chance, in bytes.
const MinToken = 6

// minWord is the length from which a word of a token is redacted alone, in bytes.
const minWord = 4

// New returns the Secret of a token. That of an empty token redacts nothing.
func New(token string) *Secret {
	if token == "" {
		return &Secret{}
	}
	plain := []string{token, url.QueryEscape(token), url.PathEscape(token), html.EscapeString(token)}
	for word := range strings.FieldsSeq(token) { // an HTTP library splits lines at spaces
		if len(word) >= minWord {
			plain = append(plain, word)
		}
	}
	// The longest spellings come first: the replacer uses the first match.
	s := &Secret{short: len(token) < MinToken}
	var pairs []string
	for _, spelling := range plain {
		inJSON, _ := json.Marshal(spelling) // a string never fails
		for _, quoted := range []string{strconv.Quote(spelling), strconv.QuoteToASCII(spelling), string(inJSON)} {
			spelling := quoted[1 : len(quoted)-1]
			s.spellings = append(s.spellings, spelling)
			pairs = append(pairs, spelling, redacted)
		}
		s.spellings = append(s.spellings, spelling)
		pairs = append(pairs, spelling, redacted)
	}
	s.replacer = strings.NewReplacer(pairs...)
	return s
}

// Error returns an error with the token redacted; the same error if it has no token.
func (s *Secret) Error(err error) error {
	if text := s.Text(err.Error()); text != err.Error() {
		return errors.New(text)
	}
	return err
}

// Text returns a text with the token redacted.
func (s *Secret) Text(text string) string {
	if s == nil || s.replacer == nil {
		return text
	}
	without := s.replacer.Replace(text)
	if s.short && without != text {
		return leftOut
	}
	return without
}

// End redacts a prefix of the token, of at least so many bytes, at the end of a text that is, or
// may be, truncated.
func (s *Secret) End(text string, least int) string {
	if s == nil {
		return text
	}
	for _, spelling := range s.spellings {
		for n := min(len(spelling)-1, len(text)); n >= least; n-- {
			switch before, ok := strings.CutSuffix(text, spelling[:n]); {
			case ok && s.short:
				return leftOut
			case ok:
				return before + redacted
			}
		}
	}
	return text
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
