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

const eventMetadataText = `
Session events (` + "`session` in `message_types`" + `) have no content and no ` + "`cryo_ack_id`" + `. Their ` + "`cryo_message_type` is `session`" + `, and they carry in addition:

- ` + "`cryo_session_event`" + `: ` + "`connected` or `disconnected`" + `
- ` + "`cryo_session_cause`" + `: why the session has ended, as text; only with ` + "`disconnected`" + `
`

const eventsText = `
== Sessions

With ` + "`session` in `message_types`" + `, the pipeline also receives an event when a client has connected and when it has disconnected, for example to track presence. The order is:

- ` + "`connected`" + ` is delivered before the first message of the session.
- ` + "`disconnected`" + ` follows when all messages of the session have been processed; those that have failed may be redelivered after it.
- If a client reconnects with the same session id, even before the loss of its old connection is detected, ` + "`disconnected`" + ` is delivered first, and then ` + "`connected`" + `.

Events are delivered at least once. When an input stops and another one of the same listener takes over its sessions, ` + "`connected`" + ` is repeated for each of them. When the last input stops, or the process ends, there is no ` + "`disconnected`" + ` for the connected sessions. So presence that is stored outside of the process must be cleared at the start, or expire.

Events are never dropped, except those that the outputs fail to deliver with ` + "`auto_replay_nacks: false`" + `. They count as messages in flight, but do not wait for ` + "`max_in_flight`" + `; there is at most one per session. Events that wait for the pipeline count against ` + "`max_buffer_bytes`" + `. When as many sessions as ` + "`max_sessions`" + ` have ended and still wait for the pipeline, new clients are denied with status 503.
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

// movable returns false, because the next input emits events of its own.
func (e *sessionEvent) movable() bool { return false }

// emit delivers a session event to the pipeline and waits for its result, including
// redeliveries. cause is why the session has ended; it is empty for the event connected. emit
// returns false if the input closes first.
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

// emitConnected emits the event connected, after the events of the previous session with the
// same id. It returns false if the input closes first.
func (f *sessionFeed) emitConnected() bool {
	if !f.emitsEvents {
		return true
	}
	return (f.previous == nil || f.await(f.previous)) && f.emit(sessionConnected, "")
}

// emitDisconnected emits the event disconnected, after each message of the session has been
// delivered or has failed. It returns false if the input closes first.
func (f *sessionFeed) emitDisconnected() bool {
	if !f.emitsEvents {
		return true
	}
	return f.firstPass.wait(f.stopped) && f.emit(sessionDisconnected, f.session.Err().Error())
}
