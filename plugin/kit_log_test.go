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

// logBook records the log lines of all components and pipelines of a test, at any level.
type logBook struct {
	deaf   bool   // set before use: nothing is recorded
	settle func() // set before use: is called before lines are read; nil: none

	mu    sync.Mutex
	lines []string          // "LEVEL message field=value …"
	hook  func(line string) // called with each line; nil: none
}

// onLine calls do, on the goroutine that logs, when a line with these words is logged. Use it to
// make something happen at an exact place in the code.
func (b *logBook) onLine(words string, do func()) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.hook = func(line string) {
		if strings.Contains(line, words) {
			do()
		}
	}
}

// logger returns a logger that writes to the book.
func (b *logBook) logger() *slog.Logger { return slog.New(&bookHandler{book: b}) }

// all returns the lines so far. It waits for what must be logged immediately: in virtual time, only the
// test's own goroutine may call it, count and want. Others use onLine.
func (b *logBook) all() []string {
	if b.settle != nil {
		b.settle()
	}
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

// want requires a line that contains all of the words. Prefer the level, the constant part of a
// message and single fields over whole lines.
func (b *logBook) want(t *testing.T, words ...string) {
	t.Helper()
	assert.Positive(t, b.count(words...), "no log line with %q in:\n%s", words, strings.Join(b.all(), "\n"))
}

// bookHandler is the [slog.Handler] of a logBook.
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
	h.book.lines = append(h.book.lines, line)
	hook := h.book.hook
	h.book.mu.Unlock()
	if hook != nil {
		hook(line)
	}
	return nil
}

func (h *bookHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	return &bookHandler{h.book, append(append([]slog.Attr(nil), h.attrs...), attrs...)}
}

func (h *bookHandler) WithGroup(string) slog.Handler { return h }
