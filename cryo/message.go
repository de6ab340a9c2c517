package cryo

import (
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// messageOverhead is what a received message counts beside its payload, for
// the memory of the message itself here and in the pipeline behind.
const messageOverhead = 256

// Message is a received UTF8DATA, BINARYDATA or ERROR frame. The peer learns
// of its delivery by Ack, of its refusal by Reject, and nothing by neither. It
// counts against MaxBufferBytes until one of them is called, on a server after
// the session's end too; a second Ack or Reject does nothing. Its methods may be called
// from any goroutine. It must not be copied.
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
	hold    hold // until it is settled; then of who has settled it
	settled atomic.Bool
}

// Session is the session that the message came from. Its acknowledgement goes
// there or nowhere: a number belongs to its connection.
func (m *Message) Session() *Session { return m.session }

// Time is when the message was read from the network.
func (m *Message) Time() time.Time { return m.read }

// Number is the peer's number for this message (protocol, "Acknowledgements").
func (m *Message) Number() uint32 { return m.number }

// Ack tells the peer that the message has been delivered. It does not wait for
// the network. After the end of the session it does nothing, and says so with
// the cause: the peer has to take the message for undelivered.
func (m *Message) Ack() error {
	if !m.settle() {
		return nil
	}
	return m.session.acknowledge([]uint32{m.number}, &m.hold)
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
	defer m.release()
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
			held    hold
			n       int
		)
		for n < len(batch) && batch[n].session == session {
			if m := batch[n]; m.settle() {
				numbers = append(numbers, m.number)
				held.join(&m.hold)
			}
			n++
		}
		batch = batch[n:]
		if len(numbers) == 0 {
			continue
		}
		if err := session.acknowledge(numbers, &held); err != nil && first == nil {
			first = err
		}
	}
	return first
}

// settle makes the caller the owner of the reservation, if nobody has settled the message.
func (m *Message) settle() bool { return m.settled.CompareAndSwap(false, true) }

// release gives up the reservation of a message that is settled, or dropped.
func (m *Message) release() {
	m.hold.release()
	m.session.unsettled.remove(1)
}

// inbox is a session's queue of received messages. What it may hold is bounded by the
// receive buffer.
type inbox struct {
	ready chan struct{} // holds a token when there may be something to take

	mu        sync.Mutex
	messages  []*Message
	start     []*Message // where the memory of messages starts
	ended     bool
	discarded bool // nothing is queued any more
}

// maxIdleQueue bounds the messages that an empty queue has memory for.
const maxIdleQueue = 256

func newInbox() *inbox { return &inbox{ready: make(chan struct{}, 1)} }

// put queues a message. It reports false when the queue was discarded.
func (q *inbox) put(m *Message) bool {
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

// discard empties the queue for good.
func (q *inbox) discard() {
	q.mu.Lock()
	messages := q.messages
	q.messages, q.start, q.discarded = nil, nil, true
	q.mu.Unlock()
	for _, m := range messages {
		m.release()
	}
}

// end lets take report the end once the queue is empty.
func (q *inbox) end() {
	q.mu.Lock()
	q.ended = true
	q.mu.Unlock()
	q.signal()
}

// take returns what waits first, in a slice of its own: one that is kept long must not
// keep the queue.
func (q *inbox) take(limit int) (batch []*Message, ended bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if n := min(limit, len(q.messages)); n > 0 {
		batch = slices.Clone(q.messages[:n])
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

func (q *inbox) signal() {
	select {
	case q.ready <- struct{}{}:
	default:
	}
}
