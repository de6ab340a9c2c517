package testkit

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// Lines collects what a process or a logger writes, line by line. Each wait takes the
// line that it waited for, so that a second wait for the same words needs a second
// line. Its methods may be called from any goroutine.
type Lines struct {
	tb    testing.TB
	name  string        // name of the writer, for failures
	ended chan struct{} // closed after the last line; nil if there is none

	mu      sync.Mutex
	all     []string
	waiting []string      // lines that no wait has taken yet
	changed chan struct{} // closed and replaced with each line
}

// NewLines collects the lines that are written to it. The name is that of the writer.
func NewLines(tb testing.TB, name string) *Lines {
	return &Lines{tb: tb, name: name, changed: make(chan struct{})}
}

// Write adds lines, with or without the newline at the end.
func (l *Lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for line := range strings.SplitSeq(strings.TrimSuffix(string(p), "\n"), "\n") {
		l.all = append(l.all, line)
		l.waiting = append(l.waiting, line)
	}
	close(l.changed)
	l.changed = make(chan struct{})
	return len(p), nil
}

// All returns all lines up to now, taken or not.
func (l *Lines) All() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.all)
}

// Take waits for a line that suits, and takes it. what describes it for the failure.
func (l *Lines) Take(what string, suits func(line string) bool) string {
	l.tb.Helper()
	deadline := time.After(Patience)
	ended := false
	for {
		l.mu.Lock()
		if i := slices.IndexFunc(l.waiting, suits); i >= 0 {
			line := l.waiting[i]
			l.waiting = slices.Delete(l.waiting, i, i+1)
			l.mu.Unlock()
			return line
		}
		changed := l.changed
		l.mu.Unlock()
		require.False(l.tb, ended, "%s ended without %s", l.name, what)
		select {
		case <-changed:
		case <-l.ended:
			ended = true // and look once more
		case <-deadline:
			require.FailNow(l.tb, "timed out", "waiting for %s from %s", what, l.name)
		}
	}
}

// WantLog waits for a line that contains all of the words, takes it and returns it.
func (l *Lines) WantLog(words ...string) string {
	l.tb.Helper()
	return l.Take(fmt.Sprintf("a line with %q", words), func(line string) bool {
		return !slices.ContainsFunc(words, func(w string) bool { return !strings.Contains(line, w) })
	})
}

// Listening waits until a listener of the components cryo_server is open, and returns
// its address.
func (l *Lines) Listening() string {
	l.tb.Helper()
	_, address, _ := strings.Cut(l.WantLog("Listening for Cryo clients"), "address=")
	address = strings.TrimPrefix(address, `"`)
	return address[:strings.IndexAny(address+" ", "\" ")]
}

// Count returns how many lines suit that nobody has taken.
func (l *Lines) Count(suits func(line string) bool) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	n := 0
	for _, line := range l.waiting {
		if suits(line) {
			n++
		}
	}
	return n
}

// Drop takes all lines that suit.
func (l *Lines) Drop(suits func(line string) bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.waiting = slices.DeleteFunc(l.waiting, suits)
}
