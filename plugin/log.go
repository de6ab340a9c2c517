package plugin

import (
	"bytes"
	"context"
	stdlog "log"
	"log/slog"
	"slices"
	"strings"
	"syscall"

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

// limitedLog is a logger for lines of which a client can cause any number. At most one per
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

// serverLog is the log of an HTTP server. A line for a client that sends no HTTP or no TLS is
// for debugging. A socket that does not accept for now, and a panic, are for the operator.
func serverLog(log *service.Logger) *stdlog.Logger {
	clients, accepts, panics := newLimitedLog(log), newLimitedLog(log), newLimitedLog(log)
	return stdlog.New(writerFunc(func(b []byte) (int, error) {
		line := string(bytes.TrimSpace(b))
		if cause, ok := strings.CutPrefix(line, "http: Accept error: "); ok {
			if log, ok := accepts.allow(); ok {
				if strings.Contains(cause, syscall.EMFILE.Error()) { // that of ENFILE has it, too
					cause += ": " + openFilesHint
				}
				log.With("error", cause).Warn("Clients can't connect for now")
			}
		} else if cause, ok := strings.CutPrefix(line, "http: panic serving "); ok {
			if log, ok := panics.allow(); ok {
				log.With("error", cause).Warn("Panic while a client connected")
			}
		} else if log, ok := clients.allow(); ok {
			log.With("error", line).Debug("Malformed HTTP request or TLS handshake")
		}
		return len(b), nil
	}), "", 0)
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }
