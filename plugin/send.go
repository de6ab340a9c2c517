package plugin

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"sync"
	"time"
	"unicode/utf8"

	"github.com/redpanda-data/benthos/v4/public/service"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// The sending half of the outputs: batches → a session → one verdict for each
// batch.

// sender turns the pipeline's messages into Cryo's.
type sender struct {
	messageType *service.InterpolatedString
	streamName  *service.InterpolatedString
	chunkBytes  int
	ackTimeout  time.Duration
	exact       bool // verdicts go to the output's own batcher, which has no processors, and to nothing else
	metrics     sendMetrics
}

// parcel is a message as it travels: a frame, or a stream.
type parcel struct {
	cryo.OutMessage
	isStream bool
	name     string // of the stream
}

// prepare makes Cryo's messages of a batch. A message that can't be one has its
// error in errs, by index, and a type that the session refuses to send.
func (s *sender) prepare(batch service.MessageBatch) (messages []parcel, errs []error) {
	messages = make([]parcel, len(batch))
	errs = make([]error, len(batch))
	types, names := batch.InterpolationExecutor(s.messageType), batch.InterpolationExecutor(s.streamName)
	fixed, isFixed := s.messageType.Static() // the executor would allocate for each message
	for i, m := range batch {
		if messages[i].Payload, errs[i] = contentOf(m); errs[i] != nil {
			continue
		}
		name, err := fixed, error(nil)
		if !isFixed {
			name, err = interpolate(types, i)
		}
		if err != nil {
			errs[i] = fmt.Errorf("field %s: %w", fieldMessageType, err)
			continue
		}
		if name == messageTypeAuto {
			name = asReceived(m)
		}
		if name == messageTypeStream {
			if messages[i].name, err = interpolate(names, i); err != nil {
				errs[i] = fmt.Errorf("field %s.%s: %w", fieldStream, fieldName, err)
				continue
			}
			messages[i].isStream = true
		} else {
			messages[i].Kind, errs[i] = typeOf(messages[i].Payload, name)
		}
	}
	return messages, errs
}

// asReceived is the type that a message had when it came from Cryo.
func asReceived(m *service.Message) string {
	switch name, _ := m.MetaGet(metaMessageType); name {
	case "binary", messageTypeStream:
		return name
	default:
		return messageTypeAuto // text may have become something else meanwhile
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

// maxSessions bounds how many sessions in a row may end without having acknowledged
// a message that was sent on each. The message may be what ends them.
const maxSessions = 10

func errLeft(last error) error {
	return fmt.Errorf("%d sessions have gone without acknowledging it, the last: %w", maxSessions, last)
}

// errLate is an acknowledgement that did not come in time.
var errLate = errors.New("none within")

func isLate(err error) bool { return errors.Is(err, errLate) }

// isEnd reports whether a message was not acknowledged because its session ended.
func isEnd(err error) bool { return errors.Is(err, net.ErrClosed) }

// send sends messages to one session, in order, and waits for their
// acknowledgements. Into errs, by index, go the errors of those that were not
// acknowledged; those that have one already are not sent. A stream waits for what
// is before it, and what follows waits for the stream. When something was late, the
// rest is sent side by side: each of it may be as late.
func (s *sender) send(ctx context.Context, session *cryo.Session, messages []parcel, errs []error) {
	var late bool
	var rest sync.WaitGroup
	defer rest.Wait()
	for len(messages) > 0 {
		n := 1
		if !messages[0].isStream {
			for n < len(messages) && !messages[n].isStream {
				n++
			}
		}
		wait := s.begin(ctx, session, messages[:n], errs[:n])
		if late {
			rest.Go(wait)
		} else {
			wait()
			late = slices.ContainsFunc(errs[:n], isLate)
		}
		messages, errs = messages[n:], errs[n:]
	}
}

// begin sends messages, of which none is a stream, and returns the function that
// waits for their acknowledgements. A stream comes alone, and that function sends it.
func (s *sender) begin(ctx context.Context, session *cryo.Session, messages []parcel, errs []error) (wait func()) {
	if messages[0].isStream {
		return func() {
			if errs[0] == nil {
				errs[0] = s.sendStream(ctx, session, &messages[0])
			}
		}
	}
	began := s.metrics.sending(len(messages))
	pending := session.Queue(frames(messages))
	return func() {
		result := s.awaitAcks(ctx, []*cryo.Session{session}, []*cryo.Pending{pending})
		if failed, ok := errors.AsType[*cryo.BatchError](result[0]); ok {
			for i, err := range failed.Errs {
				if errs[i] == nil {
					errs[i] = err
				}
			}
		}
		s.metrics.awaited(ctx.Err() == nil && !isLate(result[0]), len(messages), began)
		s.metrics.settled(messages, errs)
	}
}

func frames(messages []parcel) []cryo.OutMessage {
	list := make([]cryo.OutMessage, len(messages))
	for i := range messages {
		list[i] = messages[i].OutMessage
	}
	return list
}

// awaitAcks waits for the acknowledgements of what was just queued for sessions, and returns
// the errors by session. A session that is late is not waited for any longer.
func (s *sender) awaitAcks(ctx context.Context, sessions []*cryo.Session, pending []*cryo.Pending) []error {
	ticker := time.NewTicker(max(s.ackTimeout/2, 1))
	defer ticker.Stop()
	errs := make([]error, len(pending))
	clocks := make([]cryo.AckClock, 0, len(pending))
	for _, session := range sessions {
		clocks = append(clocks, session.AckClock())
	}
	for i, p := range pending {
		for waits := errs[i] == nil; waits; {
			select {
			case <-p.Done():
				waits = false
			case <-ctx.Done():
				waits = false
			case <-ticker.C:
				s.endLate(pending[i:], clocks[i:], errs[i:])
				waits = errs[i] == nil
			}
		}
		if errs[i] == nil {
			errs[i] = p.Wait(ctx)
		}
	}
	return errs
}

// endLate ends the waits that are late, with their errors.
func (s *sender) endLate(pending []*cryo.Pending, clocks []cryo.AckClock, errs []error) {
	late, cancel := context.WithDeadlineCause(context.Background(), time.Time{},
		fmt.Errorf("%w %s (%v)", errLate, fieldAckTimeout, s.ackTimeout))
	defer cancel()
	for i, p := range pending {
		select {
		case <-p.Done():
		default:
			if errs[i] == nil && clocks[i].Tick() {
				errs[i] = p.Wait(late)
			}
		}
	}
}

func (s *sender) sendStream(ctx context.Context, session *cryo.Session, m *parcel) error {
	s.metrics.streamsOpen.add(1)
	defer s.metrics.streamsOpen.add(-1)
	err := session.SendStream(ctx, bytes.NewReader(m.Payload), &cryo.StreamOptions{
		Name:        m.name,
		ChunkBytes:  s.chunkBytes,
		StepTimeout: s.ackTimeout,
	})
	if errors.Is(err, cryo.ErrStepTimeout) || errors.Is(err, context.DeadlineExceeded) && isLate(context.Cause(ctx)) {
		err = fmt.Errorf("%w: %w %s (%v)", err, errLate, fieldAckTimeout, s.ackTimeout)
	}
	s.metrics.settled([]parcel{*m}, []error{err})
	return err
}

// verdict is the result of a batch for the engine, by its messages' errors.
//
// The engine finds the message of an error by its context, and its processors put
// contexts onto other messages: behind one that filters or splits, an error for a
// message is taken for another's, and the message counts as delivered. So a batch
// fails as a whole. Only the output's own batcher finds the right messages, because
// it marks them behind all processors but its own.
//
// The error wraps none of the messages' errors, so that the engine finds nothing in
// it, such as an ErrNotConnected, that would make it send the batch again by itself.
func (s *sender) verdict(ctx context.Context, batch service.MessageBatch, errs []error) error {
	failed := indexesOf(errs, isError)
	switch {
	case len(failed) == 0:
		return nil
	case ctx.Err() != nil: // a hard stop: nothing is known
		return context.Cause(ctx)
	case len(batch) == 1:
		return errs[0]
	}
	err := fmt.Errorf("%d of %d messages were not acknowledged, the first: %v", len(failed), len(batch), errs[failed[0]]) //nolint:errorlint // see above
	if !s.exact {
		return err
	}
	exact := service.NewBatchError(batch, err)
	for _, i := range failed {
		_ = exact.Failed(i, errs[i])
	}
	return exact
}

// indexesOf returns the indexes of those errors, nil or not, that match.
func indexesOf(errs []error, match func(error) bool) []int {
	var indexes []int
	for i, err := range errs {
		if match(err) {
			indexes = append(indexes, i)
		}
	}
	return indexes
}

func isNil(err error) bool { return err == nil }

// pick returns the messages with these indexes.
func pick(messages []parcel, indexes []int) []parcel {
	picked := make([]parcel, len(indexes))
	for i, at := range indexes {
		picked[i] = messages[at]
	}
	return picked
}

// contentOf returns the bytes of a message. Of what JSON cannot express, such as the
// NaN that a mapping makes of the text "NaN", the engine makes no bytes, and no error.
func contentOf(m *service.Message) ([]byte, error) {
	content, err := m.AsBytes()
	if err == nil && len(content) == 0 && m.HasStructured() {
		err = errNoJSON
	}
	return content, err
}

var errNoJSON = errors.New("the content has a value that JSON cannot express, such as NaN")
