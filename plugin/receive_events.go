package plugin

import (
	"sync"
	"sync/atomic"

	"github.com/redpanda-data/benthos/v4/public/service"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// Sessions as events: that a session connects and that it has left are messages
// too. Each waits with its session's own goroutine until the pipeline takes it,
// so none is dropped, and there are no more of them than sessions; those that
// wait count against max_buffer_bytes. A pipeline that is stalled while clients
// come and go would still gather sessions that have left: from a number on, see
// listener.full, no new ones are let in.

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

With ` + "`session` in `message_types`" + `, a client that connects and one that has left are messages too, so that a pipeline can keep track of who is there. A session's ` + "`connected`" + ` is delivered before the pipeline gets its first message, and its ` + "`disconnected`" + ` comes when all its messages have been through the pipeline; those that failed there may be tried again later. A client that comes back with the same session id, its old connection known to be dead or not, is told as disconnected, and when that is delivered as connected again.

They are delivered at least once, as other messages are: when an input stops and another one of the same listener takes its sessions over, that one tells of them as connected again. When the last input stops, or the process ends in any way, sessions that are connected then are not told as disconnected. So presence that is kept outside of the process has to be cleared at the start, or expire.

None is dropped, but with ` + "`auto_replay_nacks: false`" + ` those that the outputs reject. When the pipeline doesn't take them, those that wait count against ` + "`max_buffer_bytes`" + `, and once as many sessions have left so as ` + "`max_sessions`" + ` allows, new clients are refused with status 503.
`

// sessionEvent is a message about a session, until it is settled.
type sessionEvent struct {
	release func() // of what is counted against the session's bound until it is settled
	once    sync.Once
	settled chan struct{}
}

// done settles it; only the first verdict counts.
func (e *sessionEvent) done(int, error) {
	e.once.Do(func() {
		e.release()
		close(e.settled)
	})
}

// tell hands an event over and waits until it is settled, which may take
// replays. It reports false when the input ends first.
func (r *receiver) tell(src *source, event, cause string) bool {
	m := service.NewMessage([]byte{})
	m.MetaSetMut(metaMessageType, messageTypeSession)
	m.MetaSetMut(metaSessionEvent, event)
	if cause != "" {
		m.MetaSetMut(metaSessionCause, cause)
	}
	src.describe(m)
	e := &sessionEvent{release: src.session.Reserve(eventOverhead + src.bytes), settled: make(chan struct{})}
	r.shares.take(src.id)
	return r.offer([]item{{source: src, part: m, of: e}}) && r.await(e.settled)
}

func (r *receiver) await(done <-chan struct{}) bool {
	select {
	case <-done:
		return true
	case <-r.stopped.Done():
		return false
	}
}

// tellArrival tells that a session is there, behind all there was to tell of one
// with the same id.
func (r *receiver) tellArrival(src *source) bool {
	if !r.conf.sessions || src.noEvents {
		return true
	}
	return (src.before == nil || r.await(src.before.ended)) && r.tell(src, sessionConnected, "")
}

// tellDeparture tells that a session has left, behind all its messages.
func (r *receiver) tellDeparture(src *source) bool {
	if !r.conf.sessions || src.noEvents {
		return true
	}
	return src.underway.wait(r.stopped.Done()) && r.tell(src, sessionDisconnected, src.session.Err().Error())
}

// keeps is how many sessions the input has, those included that have left and of
// which it has yet to hand over messages, or to tell.
func (r *receiver) keeps() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.sources)
}

// has reports whether the input receives from a session.
func (r *receiver) has(s *cryo.Session) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.sources[s] != nil
}

// follows tells whether the input has to tell of a session with this id before
// it tells of another one.
func (r *receiver) follows(id string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.conf.sessions && r.byID[id] != nil
}

// setsOut numbers items in the order in which the input has received them. It and
// cameThrough count messages that the pipeline gets, and that have had their first
// verdict of their own.
func (r *receiver) setsOut(src *source, items []item) {
	last := r.received.Add(uint64(len(items)))
	for i := range items {
		items[i].order = last - uint64(len(items)-1-i)
	}
	if r.conf.sessions {
		n := 0
		for i := range items {
			if items[i].failures == 0 {
				n++
			}
		}
		src.underway.add(n)
	}
}

func (r *receiver) cameThrough(items []item) {
	if !r.conf.sessions {
		return
	}
	for i := range items {
		if _, isEvent := items[i].of.(*sessionEvent); !isEvent && items[i].failures == 0 {
			items[i].source.underway.add(-1)
		}
	}
}

// underway counts a session's messages that are on their way through the
// pipeline for the first time. Replays don't count: a message that never gets
// through must not keep a session from leaving.
type underway struct {
	count atomic.Int64
	none  chan struct{} // holds a token when the count has come to 0
}

func (u *underway) add(n int) {
	if u.count.Add(int64(n)) == 0 {
		select {
		case u.none <- struct{}{}:
		default:
		}
	}
}

// wait waits for a count of 0, when nothing is added any more.
func (u *underway) wait(stopped <-chan struct{}) bool {
	for u.count.Load() > 0 {
		select {
		case <-u.none:
		case <-stopped:
			return false
		}
	}
	return true
}
