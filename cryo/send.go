package cryo

import (
	"context"
	"fmt"
	"unicode/utf8"
)

// Outgoing is a message to be sent.
type Outgoing struct {
	Type Type // TypeUTF8 or TypeBinary
	// Payload is at most 16 MiB, and valid UTF-8 for TypeUTF8. It must not be
	// changed before it is sent; after a send that was cancelled it may still
	// be on its way, so don't use its memory again.
	Payload []byte
}

func (m *Outgoing) check() error {
	switch {
	case m.Type != TypeUTF8 && m.Type != TypeBinary:
		return errNotAMessage
	case len(m.Payload) > MaxPayload:
		return fmt.Errorf("message of %d bytes: one frame carries at most 16 MiB, larger data travels as a stream", len(m.Payload))
	case m.Type == TypeUTF8 && !utf8.Valid(m.Payload):
		return fmt.Errorf("text of %d bytes is not valid UTF-8: send it as binary", len(m.Payload))
	default:
		return nil
	}
}

// SendUTF8 sends a text and waits for its acknowledgement; see SendBatch.
func (s *Session) SendUTF8(ctx context.Context, text string) error {
	return s.sendOne(ctx, Outgoing{Type: TypeUTF8, Payload: []byte(text)})
}

// SendBinary sends bytes and waits for their acknowledgement; see SendBatch.
func (s *Session) SendBinary(ctx context.Context, data []byte) error {
	return s.sendOne(ctx, Outgoing{Type: TypeBinary, Payload: data})
}

func (s *Session) sendOne(ctx context.Context, m Outgoing) error {
	err := s.SendBatch(ctx, []Outgoing{m})
	if batch, ok := err.(*BatchError); ok { //nolint:errorlint // it is SendBatch's own
		return batch.Errs[0]
	}
	return err
}

// SendBatch sends messages in order, gathered into few writes, and waits until
// the peer has acknowledged each. A [*BatchError] names those that it has not,
// and why: a [*RejectedError], the context's error (with a deadline that is
// the time to wait), the session's end, or a message that can't be sent. These
// may or may not have arrived; sending them again makes delivery at least once.
//
// A message that can't be sent fails alone; the others are sent.
func (s *Session) SendBatch(ctx context.Context, messages []Outgoing) error {
	frames := make([]outgoing, 0, len(messages))
	var failed *BatchError
	for i := range messages {
		m := &messages[i]
		if err := m.check(); err != nil {
			failed = failed.with(i, len(messages), err)
			continue
		}
		frames = append(frames, outgoing{Frame: Frame{SID: s.id, Type: m.Type, Payload: m.Payload}})
	}
	errs, err := s.sendFrames(ctx, frames)
	if err == nil && errs == nil {
		return failed.orNil()
	}

	// Back from the frames that were sent to the messages.
	sent := 0
	for i := range messages {
		if failed != nil && failed.Errs[i] != nil {
			continue
		}
		if frameErr := err; frameErr != nil || errs[sent] != nil {
			if frameErr == nil {
				frameErr = errs[sent]
			}
			failed = failed.with(i, len(messages), frameErr)
		}
		sent++
	}
	return failed.orNil()
}

// with notes a failure, and makes the error if there is none yet.
func (e *BatchError) with(i, size int, err error) *BatchError {
	if e == nil {
		e = &BatchError{Errs: make([]error, size)}
	}
	e.Errs[i] = err
	return e
}

func (e *BatchError) orNil() error {
	if e == nil {
		return nil
	}
	return e
}

// sendFrames numbers the frames, sends them and waits until all are settled.
// errs is by index, nil when all were acknowledged; err says that none was sent.
func (s *Session) sendFrames(ctx context.Context, frames []outgoing) (errs []error, err error) {
	if len(frames) == 0 {
		return nil, nil
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	var batch *sendBatch
	batch, err = s.pend.register(len(frames), func(i int, number uint32) { frames[i].Ack = number })
	if err != nil {
		return nil, err
	}
	for i := range frames {
		frames[i].batch = batch
	}
	if !s.out.send(frames) {
		s.pend.abandon(batch, s.Err())
		return batch.errs, nil
	}
	select {
	case <-batch.done:
	case <-ctx.Done():
		s.out.withdraw(func(f *outgoing) bool { return f.batch == batch })
		s.pend.abandon(batch, fmt.Errorf("waiting for the acknowledgement: %w", context.Cause(ctx)))
	}
	return batch.errs, nil
}
