package plugin

import (
	"sync"

	"github.com/redpanda-data/benthos/v4/public/service"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// Sessions as events: that a session has connected and that it has ended are messages too.
// Each waits with its session's own goroutine until the pipeline accepts it, so none is
// dropped, and there are no more of them than sessions; those that wait count against
// max_buffer_bytes. A pipeline that is stalled while clients come and go would still gather
// sessions that have ended: from a number on, see listener.full, no new ones are accepted.

const (
	messageTypeSession = "session"

	metaSessionEvent = "cryo_session_event"
	metaSessionCause = "cryo_session_cause"

	sessionConnected    = "connected"
	sessionDisconnected = "disconnected"

	eventOverhead = 256 // bytes, as for any message
)

const sessionMetadataText = `
With ` + "`session` in `message_types`" + ` there are messages about sessions too. They have no content and no ` + "`cryo_ack_id`" + `, their ` + "`cryo_message_type` is `session`" + `, and they carry in addition:

- ` + "`cryo_session_event`" + `: ` + "`connected` or `disconnected`" + `
- ` + "`cryo_session_cause`" + `: why a session has ended, in words; of ` + "`disconnected`" + ` only
`

const sessionsText = `
== Sessions as messages

With ` + "`session` in `message_types`" + `, a client that connects and one that has left are messages too, so that a pipeline can keep track of who is there. A session's ` + "`connected`" + ` is delivered before the pipeline gets its first message, and its ` + "`disconnected`" + ` comes when all its messages have been through the pipeline; those that failed there may be redelivered later. For a client that reconnects with the same session id, whether its old connection is known to be lost or not, ` + "`disconnected`" + ` comes first, and ` + "`connected`" + ` again when that is delivered.

They are delivered at least once, as other messages are: when an input stops and another one of the same listener gets its sessions, ` + "`connected`" + ` comes again for each of them. When the last input stops, or the process ends in any way, there is no ` + "`disconnected`" + ` for sessions that are connected then. So presence that is kept outside of the process must be cleared at the start, or expire.

None is dropped, but with ` + "`auto_replay_nacks: false`" + ` those that the outputs reject. They count as messages in the pipeline, but never wait for ` + "`max_in_flight`" + `: there is at most one for each session. While the pipeline accepts none, those that wait count against ` + "`max_buffer_bytes`" + `, and once as many sessions have left so as ` + "`max_sessions`" + ` allows, new clients are denied with status 503.
`

// sessionEvent is a message about a session, until it is settled.
type sessionEvent struct {
	release func() // of what is reserved in the session's receive buffer
	once    sync.Once
	settled chan struct{}
}

func (e *sessionEvent) done(int, error) {
	e.once.Do(func() {
		e.release()
		close(e.settled)
	})
}

func (e *sessionEvent) stream() *cryo.IncomingStream { return nil }

// movable is false: the next input has events of its own.
func (e *sessionEvent) movable() bool { return false }

// emit hands an event over and waits until it is settled, which may take redeliveries. It
// returns false if the input ends first.
func (f *sessionFeed) emit(event, cause string) bool {
	m := service.NewMessage([]byte{})
	m.MetaSetMut(metaMessageType, messageTypeSession)
	m.MetaSetMut(metaSessionEvent, event)
	if cause != "" {
		m.MetaSetMut(metaSessionCause, cause)
	}
	f.describe(m)
	e := &sessionEvent{release: f.session.Reserve(eventOverhead + f.bytes), settled: make(chan struct{})}
	if !f.queue.deliverEvent(item{source: &f.source, part: m, of: e}) {
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

// emitConnected emits that a session has connected, after all events of the last one with
// the same id.
func (f *sessionFeed) emitConnected() bool {
	if !f.emits {
		return true
	}
	return (f.previous == nil || f.await(f.previous)) && f.emit(sessionConnected, "")
}

// emitDisconnected emits that a session has ended, after all its messages.
func (f *sessionFeed) emitDisconnected() bool {
	if !f.emits {
		return true
	}
	return f.firstPass.wait(f.stopped) && f.emit(sessionDisconnected, f.session.Err().Error())
}
