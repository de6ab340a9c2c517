package plugin

import (
	"bytes"
	"context"
	stdlog "log"
	"log/slog"
	"slices"
	"sync/atomic"
	"time"

	"github.com/redpanda-data/benthos/v4/public/service"
	"golang.org/x/time/rate"
)

// libraryLogger lets the library's few log lines go to the engine's logger.
func libraryLogger(log *service.Logger) *slog.Logger {
	return slog.New(&logHandler{log: log})
}

type logHandler struct {
	log   *service.Logger
	attrs []slog.Attr
}

func (h *logHandler) Enabled(context.Context, slog.Level) bool { return true } // the engine filters

func (h *logHandler) Handle(_ context.Context, r slog.Record) error {
	log := h.log
	add := func(a slog.Attr) bool {
		log = log.With(a.Key, a.Value.String())
		return true
	}
	for _, a := range h.attrs {
		add(a)
	}
	r.Attrs(add)
	switch {
	case r.Level >= slog.LevelError:
		log.Error(r.Message)
	case r.Level >= slog.LevelWarn:
		log.Warn(r.Message)
	case r.Level >= slog.LevelInfo:
		log.Info(r.Message)
	default:
		log.Debug(r.Message)
	}
	return nil
}

func (h *logHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	return &logHandler{log: h.log, attrs: append(slices.Clip(h.attrs), attrs...)}
}

// WithGroup ignores groups: the library has none.
func (h *logHandler) WithGroup(string) slog.Handler { return h }

// sparing is for log lines of which a client can cause as many as it likes: at
// most one a second gets through, with a count of those that don't.
type sparing struct {
	often   rate.Sometimes
	leftOut atomic.Int64 // since the last line
}

func newSparing() *sparing { return &sparing{often: rate.Sometimes{First: 1, Interval: time.Second}} }

// do calls report with the logger for a line that gets through.
func (s *sparing) do(log *service.Logger, report func(log *service.Logger)) {
	s.leftOut.Add(1)
	s.often.Do(func() {
		if n := s.leftOut.Swap(0) - 1; n > 0 {
			log = log.With("left_out", n)
		}
		report(log)
	})
}

// serverLog is the log of an HTTP server, which has a line for each client that
// speaks no HTTP or breaks TLS off.
func serverLog(log *service.Logger) *stdlog.Logger {
	lines := newSparing()
	return stdlog.New(writerFunc(func(line []byte) (int, error) {
		lines.do(log, func(log *service.Logger) {
			log.Debugf("A client is not understood (at most one such line a second): %s", bytes.TrimSpace(line))
		})
		return len(line), nil
	}), "", 0)
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }
