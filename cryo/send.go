package cryo

import (
	"context"
	"fmt"
	"slices"
	"unicode/utf8"

	"github.com/cryo-connect/cryo-connect/internal/wire"
)

// Outgoing is a message to be sent.
type Outgoing struct {
	Kind Kind // KindText or KindBinary
	// Payload is at most 16 MiB, and valid UTF-8 for KindText. Its memory must not be
	// changed until the send returns. After a send that its context has ended, it may
	// still be being written; with StartBatch, until [Sending.Done] is closed.
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
		return fmt.Errorf("message of %d bytes is %w: one frame carries at most 16 MiB, larger data travels as a stream", len(m.Payload), ErrTooLarge)
	case m.Kind == KindText && !utf8.Valid(m.Payload):
		return fmt.Errorf("text of %d bytes is %w: send it as binary", len(m.Payload), ErrInvalidUTF8)
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
// that is the time to wait), the session's end, or [ErrTooLarge] and [ErrInvalidUTF8] of a
// message that can't be sent. Others may or may not have arrived; sending them again makes delivery at least once.
//
// A message that can't be sent fails alone; the others are sent.
func (s *Session) SendBatch(ctx context.Context, messages []Outgoing) error {
	if ctx.Err() != nil {
		return allFailed(len(messages), contextError(ctx))
	}
	return s.queue(messages, checkAll(messages)).Wait(ctx)
}

// StartBatch is SendBatch without the wait: it queues the messages and returns
// at once, so that one goroutine can send to many sessions, or keep an order
// among batches that it waits for elsewhere. What is queued is in memory until
// it is written; the caller bounds that by waiting.
func (s *Session) StartBatch(messages []Outgoing) *Sending {
	return s.queue(messages, checkAll(messages))
}

// Sending is a batch on its way to a peer. Its methods may be called from any goroutine.
type Sending struct {
	s    *Session
	call call
}

// Done is closed when each message is acknowledged, rejected or given up, and the memory
// of the payloads is not in use any more.
func (g *Sending) Done() <-chan struct{} { return g.call.done }

// Wait waits for Done, and returns what [Session.SendBatch] does. When the context is
// done before that, it gives up what is not acknowledged, withdraws what is not written,
// and returns at once; a payload may be in use then until Done is closed. A later Wait
// returns the same. Wait must be called, because what is not given up is waited for until
// the session ends.
func (g *Sending) Wait(ctx context.Context) error {
	if errs := g.s.await(ctx, &g.call); errs != nil {
		return &BatchError{Errs: errs}
	}
	return nil
}

// Broadcast sends the same messages to several sessions side by side, and waits
// until each peer has acknowledged, or the context is done. The errors are by
// session: each is what [Session.SendBatch] returns. A slow session holds up
// nobody but the caller.
//
// The messages are checked once, and their payloads are not copied: until they are
// written, they are the same memory for all sessions.
func Broadcast(ctx context.Context, sessions []*Session, messages []Outgoing) []error {
	errs := make([]error, len(sessions))
	if ctx.Err() != nil {
		for i := range errs {
			errs[i] = allFailed(len(messages), contextError(ctx))
		}
		return errs
	}
	invalid := checkAll(messages)
	sendings := make([]*Sending, len(sessions))
	for i, s := range sessions {
		sendings[i] = s.queue(messages, invalid)
	}
	for i := range sendings {
		errs[i] = sendings[i].Wait(ctx)
	}
	return errs
}

// checkAll returns the errors of the messages that can't be sent, by index; nil if all can.
func checkAll(messages []Outgoing) (invalid []error) {
	for i := range messages {
		if err := messages[i].check(); err != nil {
			if invalid == nil {
				invalid = make([]error, len(messages))
			}
			invalid[i] = err
		}
	}
	return invalid
}

func allFailed(size int, err error) error {
	if size == 0 {
		return nil
	}
	return &BatchError{Errs: slices.Repeat([]error{err}, size)}
}

// queue makes frames of the messages that are not invalid, and queues them.
func (s *Session) queue(messages []Outgoing, invalid []error) *Sending {
	g := &Sending{s: s}
	size := len(messages)
	for _, err := range invalid {
		if err != nil {
			size--
		}
	}
	g.call.init(size)
	g.call.errs = slices.Clone(invalid)
	n := 0
	for i := range messages {
		if invalid != nil && invalid[i] != nil {
			continue
		}
		f := &g.call.frames[n]
		f.Frame = wire.Frame{SID: s.id, Type: messages[i].frameType(), Payload: messages[i].Payload}
		f.index = i
		n++
	}
	if size > 0 {
		s.start(&g.call)
	}
	return g
}

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

// start numbers the frames of a call, and queues them. In this order: no answer can come
// for a number that nobody waits for. If the session ends in between, the writer drops the
// frames, and either its end settles them or cancel does, whichever is first.
func (s *Session) start(c *call) {
	s.pend.register(c)
	if !s.out.send(c.frames) {
		s.out.cancel(c, s.Err())
	}
}

// await waits for a call, and cancels it when the context is done. It returns the errors by
// index, or nil if there is none.
func (s *Session) await(ctx context.Context, c *call) []error {
	select {
	case <-c.done:
	case <-ctx.Done():
		s.out.cancel(c, fmt.Errorf("waiting for the acknowledgement: %w", contextError(ctx)))
	}
	return s.pend.errors(c)
}
