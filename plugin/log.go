package plugin

import (
	"bytes"
	"context"
	stdlog "log"
	"log/slog"
	"slices"
	"strings"

	"github.com/redpanda-data/benthos/v4/public/service"

	"github.com/cryo-connect/cryo-connect/internal/loglimit"
)

// libraryLogger returns a logger for the package cryo that writes to the engine's logger.
func libraryLogger(log *service.Logger) *slog.Logger {
	return slog.New(&logHandler{log: log})
}

type logHandler struct {
	log   *service.Logger
	attrs []slog.Attr
}

func (h *logHandler) Enabled(context.Context, slog.Level) bool { return true } // the engine filters by level

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

// WithGroup ignores groups, because the library uses none.
func (h *logHandler) WithGroup(string) slog.Handler { return h }

// limitedLog is a logger for lines that a client can cause. It is limited to one line per
// second.
type limitedLog struct {
	log   *service.Logger
	limit *loglimit.Limit
}

func newLimitedLog(log *service.Logger) limitedLog { return limitedLog{log, loglimit.New()} }

// allow returns the logger if a line may be written now. Its field suppressed is the number of
// lines that have been suppressed since the last one.
func (l limitedLog) allow() (*service.Logger, bool) {
	suppressed, ok := l.limit.Allow()
	if !ok {
		return nil, false
	}
	return l.log.With("suppressed", suppressed), true
}

// serverLog returns the error log of an HTTP server. Panics of handlers are logged as errors and
// counted, and malformed data from clients is logged at DEBUG.
func serverLog(log *service.Logger, panicked func()) *stdlog.Logger {
	clients, panics := newLimitedLog(log), newLimitedLog(log)
	return stdlog.New(writerFunc(func(b []byte) (int, error) {
		line := string(bytes.TrimSpace(b))
		if cause, ok := strings.CutPrefix(line, "http: panic serving "); ok {
			panicked()
			if log, ok := panics.allow(); ok {
				log.With("error", cause).Error("Panic in the handshake with a client: please report it as a bug")
			}
		} else if log, ok := clients.allow(); ok {
			log.With("error", line).Debug("Malformed HTTP request or TLS handshake")
		}
		return len(b), nil
	}), "", 0)
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }
