package cryo

import (
	"context"
	"fmt"
	"unicode/utf8"

	"github.com/cryo-connect/cryo-connect/internal/wire"
)

// Outgoing is a message to be sent.
type Outgoing struct {
	Kind Kind // KindText or KindBinary
	// Payload is at most 16 MiB, and valid UTF-8 for KindText. It must not be
	// changed before the send is over; after one that was cancelled it may still
	// be being written, so don't use its memory again.
	Payload []byte
}

func (m *Outgoing) frameType() wire.Type {
	if m.Kind == KindText {
		return wire.UTF8
	}
	return wire.Binary
}

func (m *Outgoing) check() error {
	switch {
	case m.Kind != KindText && m.Kind != KindBinary:
		return errNotAMessage
	case len(m.Payload) > MaxPayload:
		return fmt.Errorf("message of %d bytes: one frame carries at most 16 MiB, larger data travels as a stream", len(m.Payload))
	case m.Kind == KindText && !utf8.Valid(m.Payload):
		return fmt.Errorf("text of %d bytes is not valid UTF-8: send it as binary", len(m.Payload))
	default:
		return nil
	}
}

// SendUTF8 sends a text and waits for its acknowledgement; see SendBatch.
func (s *Session) SendUTF8(ctx context.Context, text string) error {
	return s.sendOne(ctx, Outgoing{Kind: KindText, Payload: []byte(text)})
}

// SendBinary sends bytes and waits for their acknowledgement; see SendBatch.
func (s *Session) SendBinary(ctx context.Context, data []byte) error {
	return s.sendOne(ctx, Outgoing{Kind: KindBinary, Payload: data})
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
// and why: a [*RejectedError], the context's error and its cause (with a deadline
// that is the time to wait), the session's end, or a message that can't be sent. These
// may or may not have arrived; sending them again makes delivery at least once.
//
// A message that can't be sent fails alone; the others are sent.
func (s *Session) SendBatch(ctx context.Context, messages []Outgoing) error {
	if ctx.Err() != nil {
		return allFailed(len(messages), contextError(ctx))
	}
	g := s.start(checkBatch(messages))
	return g.Wait(ctx)
}

// StartBatch is SendBatch without the wait: it queues the messages and returns
// at once, so that one goroutine can send to many sessions, or keep an order
// among batches that it waits for elsewhere. What is queued is in memory until
// it is written; the caller bounds that by waiting.
func (s *Session) StartBatch(messages []Outgoing) *Sending {
	g := s.start(checkBatch(messages))
	return &g
}

// Sending is a batch on its way to a peer.
type Sending struct {
	s     *Session
	batch checkedBatch
	wait  *sendBatch // of the messages that could be sent; nil if none was
	err   error      // why none was
}

// Wait waits until the peer has acknowledged each message, and returns what
// [Session.SendBatch] does. When the context is done, what is not written yet is
// taken back. It has to be called.
func (g *Sending) Wait(ctx context.Context) error {
	if g.wait == nil {
		return g.batch.errors(nil, g.err)
	}
	return g.batch.errors(g.s.await(ctx, g.wait), nil)
}

// checkedBatch is what can be sent of a batch of messages.
type checkedBatch struct {
	size   int
	frames []wire.Frame // without session id and number
	failed *BatchError  // names the messages that are no frames; nil if there are none
}

func checkBatch(messages []Outgoing) checkedBatch {
	b := checkedBatch{size: len(messages), frames: make([]wire.Frame, 0, len(messages))}
	for i := range messages {
		m := &messages[i]
		if err := m.check(); err != nil {
			b.failed = b.failed.with(i, b.size, err)
			continue
		}
		b.frames = append(b.frames, wire.Frame{Type: m.frameType(), Payload: m.Payload})
	}
	return b
}

// errors gets back from the frames that were sent to the messages. errs are the
// frames' errors, nil if there are none; err that of all of them.
func (b *checkedBatch) errors(errs []error, err error) error {
	if err == nil && errs == nil {
		return b.failed.orNil()
	}
	result := &BatchError{Errs: make([]error, b.size)}
	sent := 0
	for i := range result.Errs {
		switch {
		case b.failed != nil && b.failed.Errs[i] != nil:
			result.Errs[i] = b.failed.Errs[i]
			continue
		case err != nil:
			result.Errs[i] = err
		default:
			result.Errs[i] = errs[sent]
		}
		sent++
	}
	return result
}

func allFailed(size int, err error) error {
	var failed *BatchError
	for i := range size {
		failed = failed.with(i, size, err)
	}
	return failed.orNil()
}

func (s *Session) start(b checkedBatch) Sending {
	g := Sending{s: s, batch: b}
	if len(b.frames) == 0 {
		return g
	}
	frames := make([]outgoing, len(b.frames))
	for i := range frames {
		frames[i].Frame = b.frames[i]
		frames[i].SID = s.id
	}
	g.wait, g.err = s.queue(frames)
	return g
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
	if ctx.Err() != nil {
		return nil, contextError(ctx)
	}
	batch, err := s.queue(frames)
	if err != nil {
		return nil, err
	}
	return s.await(ctx, batch), nil
}

// queue numbers the frames and queues them; the error says that the session has
// ended.
func (s *Session) queue(frames []outgoing) (*sendBatch, error) {
	batch, err := s.pend.register(len(frames), func(i int, number uint32) { frames[i].Ack = number })
	if err != nil {
		return nil, err
	}
	for i := range frames {
		frames[i].batch, frames[i].index = batch, i
	}
	if !s.out.send(frames) {
		s.pend.abandon(batch, s.Err())
	}
	return batch, nil
}

// await gives the errors by frame, nil when all were acknowledged.
func (s *Session) await(ctx context.Context, batch *sendBatch) []error {
	select {
	case <-batch.done:
	case <-ctx.Done():
		// In this order: as long as a number is awaited, its frame is written or queued.
		s.pend.abandon(batch, fmt.Errorf("waiting for the acknowledgement: %w", contextError(ctx)))
		s.out.withdraw(&batch.backlog)
	}
	return batch.errs
}
