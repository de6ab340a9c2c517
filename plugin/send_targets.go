package plugin

import (
	"errors"
	"fmt"
	"strconv"

	"github.com/redpanda-data/benthos/v4/public/service"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// Targets are the sessions to which messages are sent.

var errNoClient = errors.New("no client is connected")

// targets finds the sessions for the messages of a batch.
type targets interface {
	// find groups messages, given as indexes in the batch, by the connected sessions to send
	// them to. missing are the messages for which there is no session; find may be called again
	// with these after more sessions have connected.
	find(ln *listener, messages []int) (found []group, missing []int)
	// missing returns the error of a message for which there is no session.
	missing(message int) error
}

// group contains sessions that are sent the same messages.
type group struct {
	sessions []*cryo.Session
	messages []int // their indexes in the batch, in order
}

// targets returns the targets of a batch. It sets the error of each message whose target cannot
// be determined.
func (c *targetConfig) targets(batch service.MessageBatch, messages []*outMessage) targets {
	switch c.sendTo {
	case sendToSession:
		return c.namedSessions(batch, messages)
	case sendToMatch:
		return c.match.sessionsFor(batch)
	default:
		return allSessions{}
	}
}

// allSessions are the targets of send_to: all.
type allSessions struct{}

func (allSessions) find(ln *listener, messages []int) (found []group, missing []int) {
	if sessions := ln.sessions(); len(sessions) > 0 {
		return []group{{sessions, messages}}, nil
	}
	return nil, messages
}

func (allSessions) missing(int) error { return errNoClient }

// namedSessions are the targets of send_to: session.
type namedSessions struct {
	names []sessionName // by message
	owned []bool        // by message: the session that was found last has another owner
	log   limitedLog
}

// sessionName is the target that a message names: the id of a session and, if the message has one, its owner.
// A client chooses its id, so when a session has ended, a client with another owner may have its id.
// The owner is in the metadata of all messages that are received from the session.
type sessionName struct {
	id    uint64
	owner string
}

// namedSessions returns the sessions that the messages name.
func (c *targetConfig) namedSessions(batch service.MessageBatch, messages []*outMessage) *namedSessions {
	n := &namedSessions{names: make([]sessionName, len(batch)), owned: make([]bool, len(batch)), log: c.ownerLog}
	texts := batch.InterpolationExecutor(c.sessionID)
	for i, m := range messages {
		if m.err != nil {
			continue
		}
		text, err := interpolate(texts, i)
		if err != nil {
			m.err = fmt.Errorf("field %s: %w", fieldSessionID, err)
			continue
		}
		if n.names[i].id, err = strconv.ParseUint(text, 10, 64); err != nil {
			m.err = fmt.Errorf("field %s: %q is not a session id", fieldSessionID, text)
		}
		n.names[i].owner, _ = batch[i].MetaGet(metaSessionOwner)
	}
	return n
}

func (n *namedSessions) find(ln *listener, messages []int) (found []group, missing []int) {
	groups := make(map[sessionName]int) // the index of the group in found, or one of notConnected and notOwner
	const notConnected, notOwner = -1, -2
	for _, i := range messages {
		name := n.names[i]
		if ln.settings.SessionOwner == "" {
			name.owner = "" // no session has an owner, and that of the message is of another listener
		}
		at, known := groups[name]
		if !known {
			switch s, ok := ln.session(name.id); {
			case !ok:
				at = notConnected
			case identityOf(s).owner != name.owner:
				at = notOwner
				if log, ok := n.log.allow(); ok {
					log.With("session", name.id, "field", fieldSessionOwner).Warn("Message not sent to a session: its owner differs from that of the message")
				}
			default:
				at = len(found)
				found = append(found, group{sessions: []*cryo.Session{s}})
			}
			groups[name] = at
		}
		n.owned[i] = at == notOwner
		if at < 0 {
			missing = append(missing, i)
		} else {
			found[at].messages = append(found[at].messages, i)
		}
	}
	return found, missing
}

func (n *namedSessions) missing(i int) error {
	switch name := n.names[i]; {
	case !n.owned[i]:
		return fmt.Errorf("session %d is not connected", name.id)
	case name.owner == "":
		return fmt.Errorf("session %d has an owner, and the message has no metadata %s", name.id, metaSessionOwner)
	default:
		return fmt.Errorf("session %d has a different owner than the message (metadata %s)", name.id, metaSessionOwner)
	}
}
