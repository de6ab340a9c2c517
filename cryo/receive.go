package cryo

import (
	"bytes"
	"context"
	"errors"
	"iter"
	"runtime"
	"strings"
	"sync"
	"unicode/utf8"

	"github.com/cryo-connect/cryo-connect/internal/redact"
	"github.com/cryo-connect/cryo-connect/internal/wire"
	"github.com/cryo-connect/cryo-connect/internal/ws"
)

// maxErrorText bounds the text of an ERROR that this end sends, and the peer's texts in errors
// and log lines, in bytes.
const maxErrorText = 1024

// Receive waits for the next message. Messages that were received before the end of the
// session are still returned after it; then the error is that of [Session.Err]. An
// application that does not receive them calls SetSendOnly before, or Discard afterwards. When the
// context is done first, the error matches the context's error and its cause.
func (s *Session) Receive(ctx context.Context) (*Message, error) {
	batch, err := s.ReceiveBatch(ctx, 1)
	if err != nil {
		return nil, err
	}
	return batch[0], nil
}

// Messages returns an iterator over the messages that Receive returns, one at a time. It
// ends after its only error, which it yields with a nil message: the session's after its
// end, or the context's. A loop may stop at any message: the remaining messages are left for
// the next call.
func (s *Session) Messages(ctx context.Context) iter.Seq2[*Message, error] {
	return each(func() (*Message, error) { return s.Receive(ctx) })
}

// each yields what next returns, up to its first error.
func each[T any](next func() (T, error)) iter.Seq2[T, error] {
	return func(yield func(T, error) bool) {
		for {
			value, err := next()
			if !yield(value, err) || err != nil {
				return
			}
		}
	}
}

// ReceiveBatch waits until there is a message, and returns all that have been received, up
// to limit, which is at least 1. Otherwise it is like Receive. The slice is the caller's.
func (s *Session) ReceiveBatch(ctx context.Context, limit int) ([]*Message, error) {
	limit = max(limit, 1)
	for {
		batch, ended := s.inbox.pop(limit)
		if len(batch) > 0 {
			return batch, nil
		}
		if ended {
			return nil, s.Err()
		}
		select {
		case <-s.inbox.ready:
		case <-ctx.Done():
			return nil, contextError(ctx)
		}
	}
}

// SetSendOnly makes a session only send, or receive again. While it only sends, queued and new
// messages are rejected with an ERROR, and unaccepted and new streams with TX_CANCEL; see
// [SessionOptions.SendOnly].
func (s *Session) SetSendOnly(on bool) {
	s.sendOnly.Store(on)
	if on {
		s.rejectQueued()
		s.incoming.rejectAnnounced()
		s.limit.recheck() // rejected frames need no capacity
	}
}

// Discard drops the messages in the queue and all later ones, and releases their memory, which
// on a server counts against MaxBufferBytes of all its sessions. Call it after Close, or when the
// session has ended, if the remaining messages will not be received; a [Server] without OnSession
// calls it for its sessions when they have ended.
//
// Dropped messages are neither acknowledged nor rejected, so a peer that is still connected waits
// for them: use [Session.SetSendOnly] to reject messages instead. Messages that were received
// before can still be acknowledged. Discard can't be undone.
func (s *Session) Discard() { s.inbox.discard() }

// rejectQueued rejects the messages in the queue.
func (s *Session) rejectQueued() {
	for {
		batch, _ := s.inbox.pop(64)
		if len(batch) == 0 {
			return
		}
		for _, m := range batch {
			s.rejectUnread(m, sendOnlyText)
		}
	}
}

// deliver puts a received message into the queue. Reading goroutine.
func (s *Session) deliver(in *received) {
	m := &Message{Kind: kindOf(in.Type), session: s, number: in.Ack, read: s.conn.LastRead()}
	m.Payload, m.reservation, _ = in.detach()
	if !s.unsettled.add() {
		m.reservation.release()
		return
	}
	if m.Kind == KindError {
		m.Payload = errorText(m.Payload)
		if in.decision == admitted { // replaced invalid bytes may take more memory
			s.limit.count(&m.reservation, len(m.Payload)+messageOverhead)
		}
	}
	small := len(m.Payload) < ws.ReadDirect // asked while the message is ours
	switch {
	case in.decision == bufferFull:
		s.reportBufferFull()
		s.rejectUnread(m, ErrBufferFull.Error())
		return
	case in.decision == unwanted, s.sendOnly.Load():
		s.rejectUnread(m, sendOnlyText)
		return
	case !s.inbox.push(m):
		m.release()
		return
	}
	if small && s.conn.Drained() {
		// The receiver runs first: the next read would have to wait anyway. Behind a
		// larger message nothing is read ahead, so Drained is not conclusive there.
		runtime.Gosched()
	}
	if s.sendOnly.Load() { // SetSendOnly was called between the check and the push
		s.rejectQueued()
	}
}

// errorText returns an ERROR's payload as readable text, as [wire.Frame.Text] does. The
// replacement of invalid bytes may take more memory; a large text is truncated to the size
// that was reserved.
func errorText(payload []byte) []byte {
	size := max(len(payload), smallPayload)
	payload = bytes.TrimRight(payload, "\x00")
	if utf8.Valid(payload) {
		return payload
	}
	text := wire.Frame{Payload: payload}
	return []byte(redact.Cut(text.Text(), size))
}

// Redact returns a text from the peer, such as a payload or a stream's name, in a form that may be
// logged: truncated to 1 KiB. In a session that was dialled with a token, headers or a query, the
// peer may repeat them in any encoding. There a text that is not made of words and a few numbers,
// or that contains a part of them, is replaced by its length.
func (s *Session) Redact(text string) string {
	return s.opts.secrets.Text(redact.Cut(text, maxErrorText))
}

// sendOnlyText is the text of the ERROR with which a send-only session rejects messages.
const sendOnlyText = "this session receives no messages"

// rejectUnread rejects a message that the application does not receive.
func (s *Session) rejectUnread(m *Message, text string) {
	s.opts.OnReject(s, m.Kind)
	_ = m.reject(text) // fails after the end of the session only
	if m.Kind == KindError {
		s.report("The peer reports an error", "text", s.Redact(string(m.Payload)))
	}
}

func (s *Session) reportBufferFull() {
	s.report("Receive buffer full: rejecting messages and streams, because a send is waiting for an acknowledgement queued behind them",
		"max_buffer_bytes", s.opts.MaxBufferBytes)
}

// reportThrottled is called once per session, when it first exceeds a rate.
func (s *Session) reportThrottled() {
	s.report("Reads are paused: the peer sends faster than its limit",
		"max_messages_per_second", s.opts.MaxMessagesPerSecond, "max_bytes_per_second", s.opts.MaxBytesPerSecond)
}

// report logs a warning, at most one per second for all sessions of a server. It logs without a
// lock held, because a log handler may call the session.
func (s *Session) report(message string, attrs ...any) {
	if suppressed, ok := s.logLimit.Allow(); ok {
		s.log.Warn(message, append([]any{"session", s.id, "suppressed", suppressed}, attrs...)...)
	}
}

// acknowledge queues acknowledgements before it releases the reservation: the answers to
// frames that are read as a result are queued behind them.
func (s *Session) acknowledge(numbers []uint32, held *reservation) error {
	defer runtime.KeepAlive(s) // or releaseAll might release it as well
	defer s.unsettled.remove(len(numbers))
	defer held.release()
	if !s.writer.acknowledge(numbers) {
		return s.Err()
	}
	return nil
}

func (s *Session) reject(number uint32, text string) error {
	if !s.writer.control(wire.Frame{SID: s.id, Type: wire.Error, Ack: number, Payload: []byte(redact.Cut(strings.ToValidUTF8(text, "\uFFFD"), maxErrorText))}) {
		return s.Err()
	}
	return nil
}

// Reserve counts n bytes against MaxBufferBytes until release is called, for received data that
// the caller keeps, such as messages made of a stream. It never waits, and may exceed the
// bound. A second release does nothing.
func (s *Session) Reserve(n int) (release func()) {
	reserved := min(max(int64(n), 0), maxReserved)
	s.limit.bytes.Force(reserved)
	var once sync.Once
	return func() {
		defer runtime.KeepAlive(s) // or releaseAll might release it as well
		once.Do(func() { s.limit.bytes.Release(reserved) })
	}
}

// maxReserved bounds the argument of Reserve, far beyond any memory, so that sums do not
// overflow.
const maxReserved = 1 << 48

var errNotAMessage = errors.New("a message to send must be of KindText or KindBinary")
