package plugin

import (
	"context"
	"log/slog"
	"slices"

	"github.com/redpanda-data/benthos/v4/public/service"
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
