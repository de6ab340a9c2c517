package cryo

import (
	"context"
	"errors"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cryo-connect/cryo-connect/internal/redact"
	"github.com/cryo-connect/cryo-connect/internal/wire"
	"github.com/cryo-connect/cryo-connect/internal/ws"
)

// messageOverhead is what a received message counts beside its payload, for
// the memory of the message itself here and in the pipeline behind.
const messageOverhead = 256

// maxErrorText bounds the text of an ERROR that we send, and what is repeated of
// the peer's words in errors and log lines.
const maxErrorText = 1024

// Message is a received UTF8DATA, BINARYDATA or ERROR frame. The peer learns
// of its delivery by Ack, of its refusal by Reject, and nothing by neither. It
// counts against MaxBufferBytes until one of them is called, on a server after
// the session's end too; a second Ack or Reject does nothing, be it on a copy. Its
// methods may be called from any goroutine.
type Message struct {
	// Kind is KindText, KindBinary, or KindError for a message that the peer's
	// application sent as an error.
	Kind Kind
	// Payload is the receiver's to keep. UTF8DATA is passed on as it came,
	// valid UTF-8 or not.
	Payload []byte

	session *Session
	read    time.Time
	number  uint32
	size    int64        // of the payload as it came: that is the receiver's to change
	settled *atomic.Bool // of all copies of the message; nil in the queue
}

// Session is the session that the message came from. Its acknowledgement goes
// there or nowhere: a number belongs to its connection.
func (m *Message) Session() *Session { return m.session }

// Time is when the message was read from the network.
func (m *Message) Time() time.Time { return m.read }

// Number is the peer's number for this message (protocol, "Acknowledgements").
func (m *Message) Number() uint32 { return m.number }

// LogText is the payload as it may be logged: cut to 1 KiB, and without the token
// that the session was dialled with.
func (m *Message) LogText() string { return m.session.words(string(m.Payload)) }

// Ack tells the peer that the message has been delivered. It does not wait for
// the network. After the end of the session it does nothing, and says so with
// the cause: the peer has to take the message for undelivered.
func (m *Message) Ack() error {
	if !m.settle() {
		return nil
	}
	return m.session.acknowledge([]uint32{m.number}, m.weight())
}

// Reject tells the peer, by an ERROR with the message's number, that the
// message will not be delivered. The text travels to the peer, cut to 1 KiB;
// keep one's own secrets out of it. Otherwise like Ack.
func (m *Message) Reject(text string) error {
	if !m.settle() {
		return nil
	}
	return m.reject(text)
}

func (m *Message) reject(text string) error {
	defer m.session.release(m.weight())
	if m.Kind == KindError {
		return nil // an ERROR is not answered with an ERROR
	}
	return m.session.reject(m.number, text)
}

// AckBatch acknowledges many messages, of one session or several, in as few
// writes as it can. The error is that of the first session that has ended.
func AckBatch(batch []*Message) error {
	var first error
	for len(batch) > 0 {
		var (
			session = batch[0].session
			numbers []uint32
			weight  int64
			n       int
		)
		for n < len(batch) && batch[n].session == session {
			if m := batch[n]; m.settle() {
				numbers = append(numbers, m.number)
				weight += m.weight()
			}
			n++
		}
		batch = batch[n:]
		if len(numbers) == 0 {
			continue
		}
		if err := session.acknowledge(numbers, weight); err != nil && first == nil {
			first = err
		}
	}
	return first
}

func (m *Message) settle() bool { return m.settled.CompareAndSwap(false, true) }

func (m *Message) weight() int64 { return m.size + messageOverhead }

// Receive waits for the next message. Messages that came before the end of the
// session are still handed out after it; then the session's cause is returned.
// Whoever doesn't want these calls Refuse before, or Discard afterwards.
func (s *Session) Receive(ctx context.Context) (*Message, error) {
	batch, err := s.ReceiveBatch(ctx, 1)
	if err != nil {
		return nil, err
	}
	return &batch[0], nil
}

// ReceiveBatch waits until a message is there, and takes all that wait, up to
// limit, which is at least 1. Otherwise like Receive. The slice is the caller's.
func (s *Session) ReceiveBatch(ctx context.Context, limit int) ([]Message, error) {
	limit = max(limit, 1)
	for {
		batch, ended := s.inbox.take(limit)
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

// Refuse makes a session one that only sends, or one that receives again. While
// it refuses, what waits in its queue and what comes is refused with an ERROR.
func (s *Session) Refuse(on bool) {
	s.refusing.Store(on)
	if on {
		s.refuseWaiting()
		s.incoming.refuse()
		s.budget.wake() // for what is refused, there is room
	}
}

// Discard drops the received messages that nobody has taken, and those that still
// come, unanswered, and releases their memory, which on a server counts against
// MaxBufferBytes of all its sessions. Call it after Close, or when the session has
// ended, if nobody will receive what is left; a [Server] without OnSession calls it for
// its sessions when they have ended. It can't be undone, and is no way to refuse: a
// peer that is still connected waits for answers; see [Session.Refuse].
func (s *Session) Discard() {
	if weight := s.inbox.discard(); weight > 0 {
		s.release(weight)
	}
}

func (s *Session) refuseWaiting() {
	for {
		batch, _ := s.inbox.take(64)
		if len(batch) == 0 {
			return
		}
		for i := range batch {
			s.refuse(&batch[i])
		}
	}
}

// deliver puts a received message into the queue. Reading goroutine.
func (s *Session) deliver(f *wire.Frame) {
	m := Message{Kind: kindOf(f.Type), Payload: f.Payload, session: s, number: f.Ack, read: s.conn.LastRead()}
	if f.Type == wire.Error {
		m.Payload = []byte(f.Text())
	}
	m.size = int64(len(m.Payload))
	s.budget.take(&s.held, m.weight())
	switch {
	case s.refusing.Load():
		s.refuse(&m)
		return
	case s.noRoom:
		s.overflow(&m)
		return
	}
	s.keepPayload()
	if !s.inbox.put(m) {
		s.release(m.weight())
		return
	}
	if m.size < ws.ReadDirect && s.conn.Drained() {
		// Whoever takes it goes first: our next read would only find that there is
		// nothing. Round trips of one message at a time became 1.05 times as many.
		// Behind a larger one nothing was read ahead, whatever has come.
		runtime.Gosched()
	}
	if s.refusing.Load() { // Refuse came between the check and the put
		s.refuseWaiting()
	}
}

// words are the peer's, as they may be repeated in errors and log lines.
func (s *Session) words(text string) string {
	return redact.Cut(s.opts.token.Text(text), maxErrorText)
}

func (s *Session) refuse(m *Message) {
	s.opts.OnRefused(m.Kind)
	_ = m.reject("this session receives no messages") // after the end nobody hears it
	if m.Kind == KindError {
		s.report("The peer reports an error (at most one such line a second)", "text", m.LogText())
	}
}

// overflow refuses a message for which there is no room.
func (s *Session) overflow(m *Message) {
	s.reportNoRoom()
	if m.Kind == KindError {
		s.refuse(m)
		return
	}
	s.opts.OnRefused(m.Kind)
	_ = m.reject("no room: too much of this session is not acknowledged yet") // after the end nobody hears it
}

func (s *Session) reportNoRoom() {
	s.report("Refusing what a session sends: too much of it is not acknowledged yet, and acknowledgements that we wait for are behind it (at most one such line a second)",
		"max_buffer_bytes", s.opts.MaxBufferBytes)
}

// report logs a warning, at most one a second. Logging is outside of the limit's lock:
// a handler may call the session.
func (s *Session) report(message string, attrs ...any) {
	due := false
	s.reports.Do(func() { due = true })
	if due {
		s.log.Warn(message, append([]any{"session", s.id}, attrs...)...)
	}
}

// acknowledge queues acknowledgements before it gives their room back: what is
// then read, and answered, comes behind them.
func (s *Session) acknowledge(numbers []uint32, weight int64) error {
	defer s.release(weight)
	if !s.out.acknowledge(numbers) {
		return s.Err()
	}
	return nil
}

func (s *Session) reject(number uint32, text string) error {
	if !s.out.control(wire.Frame{SID: s.id, Type: wire.Error, Ack: number, Payload: []byte(redact.Cut(strings.ToValidUTF8(text, "\uFFFD"), maxErrorText))}) {
		return s.Err()
	}
	return nil
}

// Hold counts bytes that the caller keeps of what it received, such as what it
// made of a stream, as received and not settled: see MaxBufferBytes. Release
// takes them back.
func (s *Session) Hold(n int) {
	for {
		kept := s.kept.Load()
		add := min(max(int64(n), 0), maxKept-kept)
		if s.kept.CompareAndSwap(kept, kept+add) {
			s.budget.take(&s.held, add)
			return
		}
	}
}

// maxKept is where Hold stops to count, far beyond any memory.
const maxKept = 1 << 60

// Release takes back what Hold has counted, and never more.
func (s *Session) Release(n int) {
	for {
		kept := s.kept.Load()
		less := min(max(int64(n), 0), kept)
		if s.kept.CompareAndSwap(kept, kept-less) {
			s.release(less)
			return
		}
	}
}

func (s *Session) release(weight int64) { s.budget.give(&s.held, weight) }

// inbox is a session's queue of received messages. Its bound is the budget's.
type inbox struct {
	ready chan struct{} // holds a token when there may be something to take

	mu        sync.Mutex
	messages  []Message
	start     []Message // where the room of messages starts
	ended     bool
	discarded bool // nothing is queued any more
}

// maxIdleQueue bounds the room for messages that an empty queue keeps.
const maxIdleQueue = 256

func newInbox() *inbox { return &inbox{ready: make(chan struct{}, 1)} }

// put queues a message. It reports false when the queue was discarded.
func (q *inbox) put(m Message) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.discarded {
		return false
	}
	moves := len(q.messages) == cap(q.messages)
	q.messages = append(q.messages, m)
	if moves {
		q.start = q.messages[:0]
	}
	q.signal()
	return true
}

// discard empties the queue for good, and returns the weight of what was in it.
func (q *inbox) discard() (weight int64) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for i := range q.messages {
		weight += q.messages[i].weight()
	}
	q.messages, q.start, q.discarded = nil, nil, true
	return weight
}

// end lets take report the end once the queue is empty.
func (q *inbox) end() {
	q.mu.Lock()
	q.ended = true
	q.mu.Unlock()
	q.signal()
}

// take hands out a copy of what waits first: a message that is kept long then
// keeps its batch, but not the queue, with payloads that are settled by then.
func (q *inbox) take(limit int) (batch []Message, ended bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if n := min(limit, len(q.messages)); n > 0 {
		batch = handOut(q.messages[:n])
		clear(q.messages[:n])
		q.messages = q.messages[n:]
	}
	if len(q.messages) > 0 || q.ended {
		q.signal() // for whoever else waits
	}
	if len(q.messages) == 0 {
		if cap(q.start) > maxIdleQueue {
			q.start = nil
		}
		q.messages = q.start
	}
	return batch, q.ended
}

// handOut copies messages for their receiver, so that each can be settled once, however
// often it is copied again.
func handOut(messages []Message) []Message {
	if len(messages) == 1 { // in one piece of memory
		one := &struct {
			batch   [1]Message
			settled atomic.Bool
		}{batch: [1]Message{messages[0]}}
		one.batch[0].settled = &one.settled
		return one.batch[:]
	}
	batch := slices.Clone(messages)
	settled := make([]atomic.Bool, len(batch))
	for i := range batch {
		batch[i].settled = &settled[i]
	}
	return batch
}

func (q *inbox) signal() {
	select {
	case q.ready <- struct{}{}:
	default:
	}
}

var errNotAMessage = errors.New("only text and binary can be sent as messages")
