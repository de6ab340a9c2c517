package plugin

import (
	"fmt"
	"runtime"
	"strings"

	"github.com/redpanda-data/benthos/v4/public/service"
)

// The configured mappings and scanners run code of the engine and its dependencies on data from
// clients. A panic in that code must not crash the process: only the message or stream fails, or
// the client is denied.

// panicError is a recovered panic.
type panicError struct {
	value any
	where string // name of the function that panicked
}

func (e *panicError) Error() string {
	return fmt.Sprintf("panic in %s: %.200v", e.where, e.value) // truncated, because the value may contain a whole message
}

// catchPanic recovers a panic and assigns it to err. Call it only in a defer statement.
func catchPanic(err *error) {
	if value := recover(); value != nil {
		*err = &panicError{value: value, where: panicOrigin()}
	}
}

// panicOrigin returns the name of the function that panicked.
func panicOrigin() string {
	callers := make([]uintptr, 64)
	frames := runtime.CallersFrames(callers[:runtime.Callers(0, callers)])
	panicked := false
	for {
		frame, more := frames.Next()
		switch {
		case frame.Function == "runtime.gopanic":
			panicked = true
		case panicked && !strings.HasPrefix(frame.Function, "runtime."):
			return frame.Function
		}
		if !more {
			return "an unknown function"
		}
	}
}

// interpolate resolves an interpolated field for one message of a batch. message is its index.
func interpolate(field *service.MessageBatchInterpolationExecutor, message int) (text string, err error) {
	defer catchPanic(&err)
	return field.TryString(message)
}
