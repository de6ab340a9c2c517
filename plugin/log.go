package plugin

import (
	"bytes"
	"context"
	stdlog "log"
	"log/slog"
	"slices"

	"github.com/redpanda-data/benthos/v4/public/service"

	"github.com/cryo-connect/cryo-connect/internal/loglimit"
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

// limitedLog is a logger for lines of which a client can cause any number: at most one a
// second is written.
type limitedLog struct {
	log   *service.Logger
	limit *loglimit.Limit
}

func newLimitedLog(log *service.Logger) limitedLog { return limitedLog{log, loglimit.New()} }

// allow returns the logger if a line may be written now. The field suppressed of the line is
// the number of lines that were not written since the last one.
func (l limitedLog) allow() (*service.Logger, bool) {
	suppressed, ok := l.limit.Allow()
	if !ok {
		return nil, false
	}
	return l.log.With("suppressed", suppressed), true
}

// serverLog is the log of an HTTP server, which has a line for each client that
// speaks no HTTP or breaks TLS off.
func serverLog(log *service.Logger) *stdlog.Logger {
	limited := newLimitedLog(log)
	return stdlog.New(writerFunc(func(line []byte) (int, error) {
		if log, ok := limited.allow(); ok {
			log.Debugf("Malformed HTTP request or TLS handshake: %s", bytes.TrimSpace(line))
		}
		return len(line), nil
	}), "", 0)
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }
