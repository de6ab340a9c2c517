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

// sender sends the messages of a pipeline.
type sender struct {
	messageType *service.InterpolatedString
	streamName  *service.InterpolatedString
	chunkBytes  int
	ackTimeout  time.Duration
	exact       bool // return errors per message: only the output's own batcher, without processors, receives them
	metrics     sendMetrics
	lateLog     limitedLog // for sessions closed by closeLate; the output cryo and responses do not use it
}

// outMessage is a message of a batch. A message of KindStream is sent as a stream.
type outMessage struct {
	cryo.OutMessage
	streamName string
	err        error // error of the last attempt; nil before the first one, and after the acknowledgement
}

// prepare returns the Cryo messages of a batch. A message that cannot be sent has an error.
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

// typeWhenReceived returns binary or stream for a message that was received from Cryo with
// that type, and auto for all others: processors may have changed a text into other bytes.
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

// contentOf returns the bytes of a message. For a value that JSON cannot represent, such as
// NaN, the engine returns neither bytes nor an error.
func contentOf(m *service.Message) ([]byte, error) {
	content, err := m.AsBytes()
	if err == nil && len(content) == 0 && m.HasStructured() {
		err = errNoJSON
	}
	return content, err
}

var errNoJSON = errors.New("the content has a value that JSON cannot represent, such as NaN")

// A route selects the sessions for the messages of a batch.
type route interface {
	// next waits for a session. It returns the number of messages, at most n, to send on it.
	// lost is the number of consecutive sessions that the messages were lost with, initially 0.
	next(ctx context.Context, n, lost int) (session *cryo.Session, messages int, err error)
	// finished ends the use of a session that next has returned. It returns the messages to
	// send on another session.
	finished(ctx context.Context, session *cryo.Session, messages []*outMessage) (lost []*outMessage)
}

// errDropped is the error of a route whose messages count as delivered.
var errDropped = errors.New("dropped: no session is connected")

// maxLostSessions limits the consecutive sessions on which a message is sent without an
// acknowledgement: the message itself may be the cause of their end.
const maxLostSessions = 10

// deliver sends messages on the sessions of a route, and waits until each is acknowledged or
// has failed. A message that is lost with its session is sent on another one. lost is the
// number of consecutive sessions that the messages were lost with, initially 0.
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
		wait := s.begin(ctx, session, part) // outside of the goroutine, so that messages are sent in order
		if len(messages) == 0 {
			s.finish(ctx, r, session, part, wait, lost)
		} else {
			sending.Go(func() { s.finish(ctx, r, session, part, wait, lost) })
		}
	}
}

// finish waits for the acknowledgements of messages, and delivers lost ones on another session.
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
		m.err = fmt.Errorf("not acknowledged by %d sessions in a row, last error: %w", lost, m.err)
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

// withError returns the messages whose error matches. If all match, it returns the slice itself.
func withError(messages []*outMessage, match func(error) bool) []*outMessage {
	other := func(m *outMessage) bool { return !match(m.err) }
	if !slices.ContainsFunc(messages, other) {
		return messages
	}
	return slices.DeleteFunc(slices.Clone(messages), other)
}
