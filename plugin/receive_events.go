package plugin

import (
	"sync"

	"github.com/redpanda-data/benthos/v4/public/service"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// Session events are messages that report that a session has connected or disconnected. The
// goroutine of a session waits for the result of each event, so that no event is dropped, and
// a session has at most one event at a time. Events that wait count against max_buffer_bytes.
// While a pipeline is stalled, sessions that have ended accumulate; listenInputs.full limits
// their number.

const (
	messageTypeSession = "session"

	metaSessionEvent = "cryo_session_event"
	metaSessionCause = "cryo_session_cause"

	sessionConnected    = "connected"
	sessionDisconnected = "disconnected"

	eventOverhead = 256 // bytes that a message occupies in the receive buffer in addition to its content
)

const eventsText = `
## Sessions

With ` + "`session` in `message_types`" + `, the pipeline receives a message without content when a client connects and when it disconnects. Its ` + "`cryo_message_type` is `session`, and `cryo_session_event` is `connected` or `disconnected`; `cryo_session_cause`" + ` is the cause of a disconnection.

` + "`connected` precedes the first message of its session. `disconnected`" + ` follows when all messages of the session have been processed. Events are delivered at least once, but a process that ends emits no ` + "`disconnected`" + `, so clear stored presence at startup, or let it expire. [Session events](` + deliveryPage + `#session-events) has the details.
`

// sessionEvent is the owner of an item that holds a session event.
type sessionEvent struct {
	release func() // releases the event's part of the receive buffer
	once    sync.Once
	settled chan struct{} // closed when the event has been delivered or has failed
}

func (e *sessionEvent) done(int, error) {
	e.once.Do(func() {
		e.release()
		close(e.settled)
	})
}

func (e *sessionEvent) stream() *cryo.IncomingStream { return nil }

// movable returns false, because the next input emits its own events.
func (e *sessionEvent) movable() bool { return false }

// emit delivers a session event to the pipeline and waits for its result, including redeliveries.
// cause is why the session has ended; it is empty for the connected event. emit returns false if
// the input closes first.
func (f *sessionFeed) emit(event, cause string) bool {
	m := service.NewMessage([]byte{})
	m.MetaSetMut(metaMessageType, messageTypeSession)
	m.MetaSetMut(metaSessionEvent, event)
	if cause != "" {
		m.MetaSetMut(metaSessionCause, cause)
	}
	f.describe(m)
	e := &sessionEvent{release: f.session.Reserve(eventOverhead + f.bytes), settled: make(chan struct{})}
	if !f.queue.deliverEvent(item{source: &f.source, part: m, owner: e}) {
		e.release()
		return false
	}
	return f.await(e.settled)
}

func (f *sessionFeed) await(done <-chan struct{}) bool {
	select {
	case <-done:
		return true
	case <-f.stopped.Done():
		return false
	}
}

// emitConnected emits the connected event, after the events of the previous session with the same
// id. It returns false if the input closes first.
func (f *sessionFeed) emitConnected() bool {
	if !f.emitsEvents {
		return true
	}
	return (f.previous == nil || f.await(f.previous)) && f.emit(sessionConnected, "")
}

// emitDisconnected emits the disconnected event, after each message of the session has been
// delivered or has failed. It returns false if the input closes first.
func (f *sessionFeed) emitDisconnected() bool {
	if !f.emitsEvents {
		return true
	}
	return f.firstPass.wait(f.stopped) && f.emit(sessionDisconnected, f.session.Err().Error())
}
