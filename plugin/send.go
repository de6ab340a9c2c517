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

// The sending half of the outputs: batches → sessions → one result for each batch.

// sender sends the pipeline's messages.
type sender struct {
	messageType *service.InterpolatedString
	streamName  *service.InterpolatedString
	chunkBytes  int
	ackTimeout  time.Duration
	exact       bool // errors go to the output's own batcher, which has no processors, and to nothing else
	metrics     sendMetrics
	lateLog     limitedLog // for sessions that are closed; unused by the output cryo and by responses
}

// outMessage is a message of a batch. One of KindStream is sent as a stream.
type outMessage struct {
	cryo.OutMessage
	streamName string
	err        error // of the last attempt to send it; nil before the first, and once it is acknowledged
}

// prepare returns Cryo's messages of a batch. One that can't be sent has its error.
func (s *sender) prepare(batch service.MessageBatch) []*outMessage {
	memory, messages := make([]outMessage, len(batch)), make([]*outMessage, len(batch))
	types, names := batch.InterpolationExecutor(s.messageType), batch.InterpolationExecutor(s.streamName)
	static, isStatic := s.messageType.Static() // the executor would allocate for each message
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

// typeWhenReceived returns binary or stream for a message that was received from Cryo as
// that, and auto for any other: processors may have made a text something else.
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
		return 0, fmt.Errorf("field %s: unknown message type %s, it has to be auto, utf8, binary or stream", fieldMessageType, name)
	}
}

// contentOf returns the bytes of a message. For what JSON cannot express, such as the
// NaN that a mapping makes of the text "NaN", the engine returns neither bytes nor an error.
func contentOf(m *service.Message) ([]byte, error) {
	content, err := m.AsBytes()
	if err == nil && len(content) == 0 && m.HasStructured() {
		err = errNoJSON
	}
	return content, err
}

var errNoJSON = errors.New("the content has a value that JSON cannot express, such as NaN")

// A route chooses the sessions for the messages of a batch.
type route interface {
	// next waits for a session. It returns the number of messages, out of n, to be sent on it.
	// lost is the number of sessions in a row on which they were lost, 0 at first.
	next(ctx context.Context, n, lost int) (session *cryo.Session, messages int, err error)
	// finished ends the use of a session that next has returned, and returns those of its
	// messages that are to be sent on another.
	finished(ctx context.Context, session *cryo.Session, messages []*outMessage) (lost []*outMessage)
}

// errDropped is the error of a route that counts the messages as delivered.
var errDropped = errors.New("dropped: no session is connected")

// maxLostSessions bounds the sessions in a row that acknowledge none of the messages that
// were sent on each. One of the messages may be what ends them.
const maxLostSessions = 10

// deliver sends messages on the sessions of a route, and waits until each is acknowledged or
// has failed. A message that is lost with its session is sent on another. lost is the number
// of sessions in a row on which they were lost: 0 at first.
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

// finish waits for the acknowledgements of messages, and delivers those that are lost.
func (s *sender) finish(ctx context.Context, r route, session *cryo.Session, messages []*outMessage, wait func(), lost int) {
	wait()
	again := r.finished(ctx, session, messages)
	if lost++; len(again) < len(messages) {
		lost = 1
	}
	if lost < maxLostSessions {
		s.deliver(ctx, r, again, lost)
		return
	}
	for _, m := range again {
		m.err = fmt.Errorf("%d sessions in a row did not acknowledge it, the last: %w", lost, m.err)
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

// verdict returns the result of a batch for the engine.
//
// The engine finds the message of an error by its context, and its processors put
// contexts onto other messages: behind one that filters or splits, an error for a
// message is taken for another's, and the message counts as delivered. So a batch
// fails as a whole. Only the output's own batcher finds the right messages, because
// it marks them behind all processors but its own.
//
// The error wraps none of the messages' errors, so that the engine finds nothing in
// it, such as an ErrNotConnected, that would make it send the batch again by itself.
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
	case ctx.Err() != nil: // a hard stop: nothing is known
		return context.Cause(ctx)
	case len(batch) == 1:
		return first
	}
	err := fmt.Errorf("%d of %d messages were not acknowledged, the first: %v", failed, len(batch), first) //nolint:errorlint // see above
	if !s.exact {
		return err
	}
	exact := service.NewBatchError(batch, err)
	for i, m := range messages {
		if m.err != nil {
			_ = exact.Failed(i, m.err)
		}
	}
	return exact
}

func isNil(err error) bool { return err == nil }

// withError returns the messages whose error matches: the slice itself, if all do.
func withError(messages []*outMessage, match func(error) bool) []*outMessage {
	other := func(m *outMessage) bool { return !match(m.err) }
	if !slices.ContainsFunc(messages, other) {
		return messages
	}
	return slices.DeleteFunc(slices.Clone(messages), other)
}
