package plugin

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/assert"
)

// logBook keeps what is logged, at any level.
type logBook struct {
	deaf bool // set before use: nothing is kept

	mu    sync.Mutex
	lines []string // "LEVEL message attributes"
}

func (b *logBook) logger() *slog.Logger { return slog.New(&bookHandler{book: b}) }

// all gives what was logged so far.
func (b *logBook) all() []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return append([]string(nil), b.lines...)
}

// count returns the number of lines that contain all of the words, such as a message and
// fields ("session=77").
func (b *logBook) count(words ...string) int {
	n := 0
	for _, line := range b.all() {
		if !slices.ContainsFunc(words, func(word string) bool { return !strings.Contains(line, word) }) {
			n++
		}
	}
	return n
}

func (b *logBook) want(t *testing.T, words ...string) {
	t.Helper()
	assert.Positive(t, b.count(words...), "no log line with %q in:\n%s", words, strings.Join(b.all(), "\n"))
}

type bookHandler struct {
	book  *logBook
	attrs []slog.Attr
}

func (h *bookHandler) Enabled(context.Context, slog.Level) bool { return !h.book.deaf }

func (h *bookHandler) Handle(_ context.Context, r slog.Record) error {
	line := fmt.Sprintf("%v %s", r.Level, r.Message)
	add := func(a slog.Attr) bool { line += " " + a.String(); return true }
	for _, a := range h.attrs {
		add(a)
	}
	r.Attrs(add)
	h.book.mu.Lock()
	defer h.book.mu.Unlock()
	h.book.lines = append(h.book.lines, line)
	return nil
}

func (h *bookHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	return &bookHandler{h.book, append(append([]slog.Attr(nil), h.attrs...), attrs...)}
}

func (h *bookHandler) WithGroup(string) slog.Handler { return h }

// hook is a log handler that does something at a line.
type hook struct {
	word string
	do   func()
}

func (h *hook) Enabled(context.Context, slog.Level) bool { return true }

func (h *hook) Handle(_ context.Context, r slog.Record) error {
	if strings.Contains(r.Message, h.word) {
		h.do()
	}
	return nil
}

func (h *hook) WithAttrs([]slog.Attr) slog.Handler { return h }
func (h *hook) WithGroup(string) slog.Handler      { return h }
