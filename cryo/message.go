package cryo

import (
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// messageOverhead is counted for a received message in addition to its payload, in bytes: the
// memory of the message itself, here and in the application.
const messageOverhead = 256

// Message is a received UTF8DATA, BINARYDATA or ERROR frame. Ack reports to the peer that it was
// delivered, Reject that it will not be; without either of them the peer may send it again, on
// another connection. The message counts against MaxBufferBytes until one of them is called, on a
// server even after the end of the session. The first call counts: another one does nothing and
// returns nil. All methods may be called from any goroutine. A Message must not be copied, which go
// vet checks.
type Message struct {
	// Kind is KindText, KindBinary, or KindError for a message that the peer's
	// application sent as an error.
	Kind Kind
	// Payload belongs to the receiver. That of UTF8DATA is as it was received, valid UTF-8
	// or not.
	Payload []byte

	session     *Session
	read        time.Time
	number      uint32
	reservation reservation // owned by the first caller of settle
	settled     atomic.Bool
}

// Session returns the session that the message was received on. Ack and Reject work
// on that session only, because message numbers belong to a connection.
func (m *Message) Session() *Session { return m.session }

// Time returns when the message was read from the network.
func (m *Message) Time() time.Time { return m.read }

// Number returns the peer's number of the message (protocol, "Acknowledgements").
func (m *Message) Number() uint32 { return m.number }

// Ack acknowledges the message: it was delivered. It does not wait for the network. After
// the end of the session the peer can't be reached: Ack returns the error of [Session.Err],
// and the peer must regard the message as undelivered.
func (m *Message) Ack() error {
	if !m.settle() {
		return nil
	}
	return m.session.acknowledge([]uint32{m.number}, &m.reservation)
}

// Reject rejects the message, by an ERROR with its number: it will not be delivered. The text
// is sent to the peer, truncated to 1 KiB, so it must contain no secrets. A message of KindError is
// not answered. Otherwise Reject is like Ack.
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

// AckBatch acknowledges many messages, of one session or several, in as few writes as
// possible. Messages that are acknowledged or rejected already are skipped. The error is that
// of the first session that has ended; the messages of the others are acknowledged.
func AckBatch(batch []*Message) error {
	var first error
	for len(batch) > 0 {
		var (
			session = batch[0].session
			numbers []uint32
			held    reservation
			n       int
		)
		for n < len(batch) && batch[n].session == session {
			if m := batch[n]; m.settle() {
				numbers = append(numbers, m.number)
				held.join(&m.reservation)
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

// settle marks the message as settled, and reports whether the caller is the first to do so,
// who then owns its reservation.
func (m *Message) settle() bool { return m.settled.CompareAndSwap(false, true) }

// release releases the reservation of a message that was rejected or dropped.
func (m *Message) release() {
	m.reservation.release()
	m.session.unsettled.remove(1)
}

// inbox is a session's queue of received messages. The receive buffer bounds it.
type inbox struct {
	ready chan struct{} // holds a token when pop may return something

	mu        sync.Mutex
	messages  []*Message
	start     []*Message // start of the array that messages is a part of; length 0
	ended     bool
	discarded bool // no message is queued any more
}

// maxIdleQueue bounds the capacity of an empty queue, in messages.
const maxIdleQueue = 256

func newInbox() *inbox { return &inbox{ready: make(chan struct{}, 1)} }

// push queues a message. It returns false when the queue was discarded.
func (q *inbox) push(m *Message) bool {
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

// end makes pop report the end of the session once the queue is empty.
func (q *inbox) end() {
	q.mu.Lock()
	q.ended = true
	q.mu.Unlock()
	q.signal()
}

// pop removes the first messages, at most limit, and returns them in a new slice, which does
// not keep the queue in memory.
func (q *inbox) pop(limit int) (batch []*Message, ended bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if n := min(limit, len(q.messages)); n > 0 {
		batch = slices.Clone(q.messages[:n])
		clear(q.messages[:n])
		q.messages = q.messages[n:]
	}
	if len(q.messages) > 0 || q.ended {
		q.signal() // for other callers that wait
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
