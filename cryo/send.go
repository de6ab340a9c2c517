package cryo

import (
	"context"
	"fmt"
	"slices"
	"unicode/utf8"

	"github.com/cryo-connect/cryo-connect/internal/wire"
)

// OutMessage is a message to be sent. [Text] and [Binary] make one.
type OutMessage struct {
	Kind Kind // KindText or KindBinary
	// Payload has at most 16 MiB, and is valid UTF-8 for KindText. It is not copied: its
	// memory must not be changed until the send returns or, if its context has ended or
	// Queue is used, until [Pending.Done] is closed.
	Payload []byte
}

// Text returns a message of KindText.
func Text(text string) OutMessage { return OutMessage{Kind: KindText, Payload: []byte(text)} }

// Binary returns a message of KindBinary. It does not copy data.
func Binary(data []byte) OutMessage { return OutMessage{Kind: KindBinary, Payload: data} }

func (m *OutMessage) frameType() wire.Type {
	if m.Kind == KindText {
		return wire.UTF8
	}
	return wire.Binary
}

func (m *OutMessage) check() error {
	switch {
	case m.Kind != KindText && m.Kind != KindBinary:
		return errNotAMessage
	case len(m.Payload) > MaxPayload:
		return fmt.Errorf("message of %d bytes is %w: one frame carries at most 16 MiB, send larger data as a stream", len(m.Payload), ErrTooLarge)
	case m.Kind == KindText && !utf8.Valid(m.Payload):
		return fmt.Errorf("text of %d bytes is %w: send it as binary", len(m.Payload), ErrInvalidUTF8)
	default:
		return nil
	}
}

// SendText sends a text and waits for its acknowledgement. It returns the error that SendBatch
// has for a message.
func (s *Session) SendText(ctx context.Context, text string) error {
	return s.sendOne(ctx, Text(text))
}

// SendBinary sends bytes and waits for their acknowledgement. It returns the error that
// SendBatch has for a message.
func (s *Session) SendBinary(ctx context.Context, data []byte) error {
	return s.sendOne(ctx, Binary(data))
}

func (s *Session) sendOne(ctx context.Context, m OutMessage) error {
	err := s.SendBatch(ctx, []OutMessage{m})
	if batch, ok := err.(*BatchError); ok { //nolint:errorlint // SendBatch returns it unwrapped
		return batch.Errs[0]
	}
	return err
}

// SendBatch sends messages in order, gathered into few writes, and waits until the peer has
// acknowledged each. If the context is done already, nothing is sent.
//
// A [*BatchError] has the errors of the messages that were not acknowledged, by index: a
// [*RejectedError], the context's error and its cause (a deadline bounds the wait for the
// acknowledgement), the session's end, or [ErrTooLarge] or [ErrInvalidUTF8] for a message
// that can't be sent. Such a message fails alone: the others are sent. Of the others, those
// that were not rejected may have been delivered; send them again for at-least-once
// delivery.
func (s *Session) SendBatch(ctx context.Context, messages []OutMessage) error {
	if len(messages) > 0 && ctx.Err() != nil {
		return &BatchError{Errs: slices.Repeat([]error{contextError(ctx)}, len(messages))}
	}
	return s.Queue(messages).Wait(ctx)
}

// Queue queues messages in order and returns without waiting, so that one goroutine can send
// to many sessions, or keep batches in order whose acknowledgements other goroutines await.
// Messages that can't be sent are left out; Wait returns their errors. Queued messages stay in
// memory until they are written, without a bound: the caller must bound them by waiting.
//
// Wait or Cancel must be called: a send that is not done counts as waiting for its
// acknowledgement, with the effect described at MaxBufferBytes in [SessionOptions].
func (s *Session) Queue(messages []OutMessage) *Pending {
	p := &Pending{s: s}
	errs, size := checkAll(messages)
	p.call.init(size)
	p.call.errs = errs
	n := 0
	for i := range messages {
		if errs != nil && errs[i] != nil {
			continue
		}
		f := &p.call.frames[n]
		f.Frame = wire.Frame{SID: s.id, Type: messages[i].frameType(), Payload: messages[i].Payload}
		f.index = i
		n++
	}
	if size > 0 {
		s.start(&p.call)
	}
	return p
}

// checkAll returns the errors of the messages that can't be sent, by index, nil if there are
// none; and the number of the others.
func checkAll(messages []OutMessage) (errs []error, valid int) {
	valid = len(messages)
	for i := range messages {
		if err := messages[i].check(); err != nil {
			if errs == nil {
				errs = make([]error, len(messages))
			}
			errs[i] = err
			valid--
		}
	}
	return errs, valid
}

// Pending is a batch that was queued. Its methods may be called from any goroutine.
type Pending struct {
	s    *Session
	call call
}

// Done returns a channel that is closed when each message is acknowledged, rejected or
// withdrawn, and the memory of the payloads is no longer in use: they may be changed, and sent
// again.
func (p *Pending) Done() <-chan struct{} { return p.call.done }

// Wait waits for Done, and returns what [Session.SendBatch] returns. If the context is done
// before that, Wait withdraws the batch, like Cancel, and returns immediately, with the context's
// error for each message that was not acknowledged or rejected. A later Wait returns the same.
func (p *Pending) Wait(ctx context.Context) error {
	if errs := p.s.await(ctx, &p.call); errs != nil {
		return &BatchError{Errs: errs}
	}
	return nil
}

// Cancel withdraws the messages that are neither acknowledged nor rejected: unwritten ones are
// not sent, and written ones may still be delivered. It does not wait: a payload that is being
// written is in use until Done is closed. Wait returns an error that matches
// [context.Canceled] for each withdrawn message. After Done, Cancel does nothing.
func (p *Pending) Cancel() { p.s.withdraw(&p.call, context.Canceled) }

// sendFrame sends a frame and waits for its answer.
func (s *Session) sendFrame(ctx context.Context, f wire.Frame) error {
	if ctx.Err() != nil {
		return contextError(ctx)
	}
	c := newCall(f)
	s.start(c)
	if errs := s.await(ctx, c); errs != nil {
		return errs[0]
	}
	return nil
}

// start numbers the frames of a call, and queues them. The order matters: no answer can arrive
// for a number that is not registered. If the session ends in between, the writer drops the
// frames, and the end of the ackTable or cancel completes them, whichever is first.
func (s *Session) start(c *call) {
	s.acks.register(c)
	if !s.writer.send(c.frames) {
		s.writer.cancel(c, s.Err())
	}
}

// await waits for a call, and cancels it when the context is done. It returns the errors by
// index, nil if there are none.
func (s *Session) await(ctx context.Context, c *call) []error {
	select {
	case <-c.done:
	case <-ctx.Done():
		s.withdraw(c, contextError(ctx))
	}
	return s.acks.errors(c)
}

func (s *Session) withdraw(c *call, cause error) {
	s.writer.cancel(c, fmt.Errorf("waiting for the acknowledgement: %w", cause))
}
