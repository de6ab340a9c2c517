package plugin

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"
	"unicode/utf8"

	"github.com/redpanda-data/benthos/v4/public/service"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// The sending half of the outputs: it sends batches on sessions, and returns one result per
// batch.

// sender is the sending half of an output. It also sends the responses of an input.
type sender struct {
	messageType *service.InterpolatedString
	streamName  *service.InterpolatedString
	chunkBytes  int
	ackTimeout  time.Duration
	// exact is whether to return an error for each failed message. Only the output's own batcher,
	// without processors, attributes such errors reliably.
	exact   bool
	metrics sendMetrics
	late    *lateSessions // nil for the output cryo and for responses
}

// outMessage is a message of a batch. A message of KindStream is sent as a stream.
type outMessage struct {
	cryo.OutMessage
	streamName string
	err        error // the error of the last attempt; nil before the first one, and after the acknowledgement
}

// prepare returns the Cryo messages of a batch. It sets the error of each message that cannot
// be sent.
func (s *sender) prepare(batch service.MessageBatch) []*outMessage {
	memory, messages := make([]outMessage, len(batch)), make([]*outMessage, len(batch))
	types, names := batch.InterpolationExecutor(s.messageType), batch.InterpolationExecutor(s.streamName)
	static, isStatic := s.messageType.Static() // avoids an allocation per message
	for i, in := range batch {
		m := &memory[i]
		messages[i] = m
		if m.Payload, m.err = contentOf(in); m.err != nil {
			continue
		}
		name, err := static, error(nil)
		if !isStatic {
			name, err = interpolate(types, i)
		}
		if err != nil {
			m.err = fmt.Errorf("field %s: %w", fieldMessageType, err)
			continue
		}
		if name == messageTypeAuto {
			name = typeWhenReceived(in)
		}
		if name != messageTypeStream {
			m.Kind, m.err = typeOf(m.Payload, name)
			continue
		}
		m.Kind = cryo.KindStream
		if m.streamName, err = interpolate(names, i); err != nil {
			m.err = fmt.Errorf("field %s.%s: %w", fieldStream, fieldName, err)
		}
	}
	return messages
}

// typeWhenReceived returns binary or stream for a message that was received from Cryo with that
// type, and auto for all others: a message that was received as text may have become bytes that
// are not valid UTF-8.
func typeWhenReceived(m *service.Message) string {
	switch name, _ := m.MetaGet(metaMessageType); name {
	case "binary", messageTypeStream:
		return name
	default:
		return messageTypeAuto
	}
}

func typeOf(payload []byte, name string) (cryo.Kind, error) {
	switch name {
	case "utf8":
		return cryo.KindText, nil
	case "binary":
		return cryo.KindBinary, nil
	case messageTypeAuto:
		if utf8.Valid(payload) {
			return cryo.KindText, nil
		}
		return cryo.KindBinary, nil
	default:
		return 0, fmt.Errorf("field %s: unknown message type %q: it must be auto, utf8, binary or stream", fieldMessageType, name)
	}
}

// contentOf returns the bytes of a message. It returns errNoJSON for a value that JSON cannot
// represent, such as NaN, for which the engine returns neither bytes nor an error.
func contentOf(m *service.Message) ([]byte, error) {
	content, err := m.AsBytes()
	if err == nil && len(content) == 0 && m.HasStructured() {
		err = errNoJSON
	}
	return content, err
}

var errNoJSON = errors.New("the content has a value that JSON cannot represent, such as NaN")

// A route selects the sessions on which the messages of a batch are sent.
type route interface {
	// next waits for a session. n is the number of messages that are still to be sent; next
	// returns how many of them to send on the session. lost is the number of consecutive
	// sessions with which these messages were lost, initially 0.
	next(ctx context.Context, n, lost int) (session *cryo.Session, messages int, err error)
	// finished is called when the messages that were sent on a session have results. It returns
	// those to send on another session.
	finished(ctx context.Context, session *cryo.Session, messages []*outMessage) (lost []*outMessage)
}

// errDropped is returned by a route if the messages are dropped, and count as delivered.
var errDropped = errors.New("dropped: no session is connected")

// maxLostSessions limits the number of consecutive sessions that end before they have
// acknowledged a message, because the message itself may be what ends them.
const maxLostSessions = 10

// deliver sends messages on the sessions of a route, and waits until each has been acknowledged
// or has failed. A message that is lost with its session is sent on another one. lost is the
// number of consecutive sessions with which the messages were lost, initially 0.
func (s *sender) deliver(ctx context.Context, r route, messages []*outMessage, lost int) {
	var sending sync.WaitGroup
	defer sending.Wait()
	for len(messages) > 0 {
		session, n, err := r.next(ctx, len(messages), lost)
		if err != nil {
			failUnsent(messages, err)
			return
		}
		part := messages[:n]
		messages = messages[n:]
		wait := s.begin(ctx, session, part) // not in the goroutine, so that messages are sent in order
		if len(messages) == 0 {
			s.finish(ctx, r, session, part, wait, lost)
		} else {
			sending.Go(func() { s.finish(ctx, r, session, part, wait, lost) })
		}
	}
}

// finish waits for the acknowledgements of messages, and delivers those that were lost with
// their session on another one. wait is the function that begin has returned for them.
func (s *sender) finish(ctx context.Context, r route, session *cryo.Session, messages []*outMessage, wait func(), lost int) {
	wait()
	unacknowledged := r.finished(ctx, session, messages)
	if lost++; len(unacknowledged) < len(messages) {
		lost = 1
	}
	if lost < maxLostSessions {
		s.deliver(ctx, r, unacknowledged, lost)
		return
	}
	for _, m := range unacknowledged {
		m.err = fmt.Errorf("not acknowledged by %d sessions in a row; last error: %w", lost, m.err)
	}
}

// failUnsent sets the errors of messages for which there is no session.
func failUnsent(messages []*outMessage, err error) {
	for _, m := range messages {
		switch {
		case errors.Is(err, errDropped):
			m.err = nil
		case m.err != nil:
			m.err = fmt.Errorf("%w, and %w", m.err, err)
		default:
			m.err = err
		}
	}
}

// verdict returns the error of a batch for the engine.
//
// The engine identifies the message of an error by its context, but its processors move
// contexts to other messages: after one that filters or splits, an error of a message would be
// attributed to another, and the failed message would count as delivered. So a batch fails as
// a whole. Only the output's own batcher attributes errors reliably, because it marks messages
// after all processors except its own.
//
// The error wraps none of the messages' errors: an ErrNotConnected, for example, would make the
// engine send the whole batch again.
func (s *sender) verdict(ctx context.Context, batch service.MessageBatch, messages []*outMessage) error {
	failed, first := 0, error(nil)
	for _, m := range messages {
		if m.err == nil {
			continue
		}
		if failed++; first == nil {
			first = m.err
		}
	}
	switch {
	case failed == 0:
		return nil
	case ctx.Err() != nil: // a hard stop: the result is unknown
		return context.Cause(ctx)
	case len(batch) == 1:
		return first
	}
	err := fmt.Errorf("%d of %d messages were not acknowledged, first error: %v", failed, len(batch), first) //nolint:errorlint // see above
	if !s.exact {
		return err
	}
	batchErr := service.NewBatchError(batch, err)
	for i, m := range messages {
		if m.err != nil {
			_ = batchErr.Failed(i, m.err)
		}
	}
	return batchErr
}

func isNil(err error) bool { return err == nil }

// withError returns the messages whose error, which may be nil, matches. If all match, it
// returns the slice itself.
func withError(messages []*outMessage, match func(error) bool) []*outMessage {
	other := func(m *outMessage) bool { return !match(m.err) }
	if !slices.ContainsFunc(messages, other) {
		return messages
	}
	return slices.DeleteFunc(slices.Clone(messages), other)
}
