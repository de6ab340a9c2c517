package plugin

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/cryotest"
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

func TestClientsCanNotFloodTheLog(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(with(listenInput, "streams: { max_bytes: 1 }"), toProbe)
		client, peer := e.dial(), e.rawClient()
		peer.Read()
		flood := func() {
			for i := range uint32(100) {
				require.Error(t, client.SendStream(t.Context(), strings.NewReader("too long"), &cryo.StreamOptions{Name: "long"}))
				peer.WriteFrames(cryotest.Error(i, "fire"))
			}
			synctest.Wait()
		}
		for seconds := range 3 {
			flood()
			require.Equal(t, 1+seconds, e.log.count("Stream failed"))
			require.Equal(t, 1+seconds, e.log.count("reports an error"))
			require.Equal(t, 2*seconds, e.log.count("suppressed=99"))
			time.Sleep(time.Second)
		}
	})
}

func TestRejectionsDoNotFloodTheLog(t *testing.T) {
	for name, c := range map[string]struct{ fields, line string }{
		"acknowledged when delivered": {"auto_replay_nacks: false", "ERROR Rejected messages that were not delivered"},
		"acknowledged when received":  {"acknowledge: received, auto_replay_nacks: false", "ERROR Lost messages that were acknowledged on receipt"},
	} {
		t.Run(name, func(t *testing.T) {
			atBothInputs(t, c.fields, func(t *testing.T, e *engine, _ *pipeline, peer *cryo.Session) {
				for seconds := range 3 {
					for range 100 {
						send(peer, "poison")
						e.arrival().fail(errOutput)
						synctest.Wait()
					}
					require.Equal(t, 1+seconds, e.log.count(c.line))
					require.Equal(t, seconds, e.log.count("suppressed=99"))
					time.Sleep(time.Second)
				}
			})
		})
	}
}

func TestClosingLateClientsDoesNotFloodTheLog(t *testing.T) {
	toAll(t, "ack_timeout: 1s", 10, func(t *testing.T, e *engine, clients []*cryo.Session) {
		require.ErrorContains(t, next(t, e.give("m").verdict), "not acknowledged by any of 10 sessions: ")
		synctest.Wait()
		for _, c := range clients {
			require.Error(t, c.Err())
		}
		require.Equal(t, 1, e.log.count("WARN Closing session: "))

		e.dial()
		require.Error(t, next(t, e.give("m").verdict))
		require.Equal(t, 2, e.log.count("WARN Closing session: "))
		e.log.want(t, "suppressed=9")
	})
}
