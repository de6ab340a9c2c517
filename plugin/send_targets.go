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
		return newNamedSessions(batch, c.sessionID, messages)
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

// namedSessions are the targets of send_to: session: the session id for each message.
type namedSessions []uint64

func newNamedSessions(batch service.MessageBatch, field *service.InterpolatedString, messages []*outMessage) namedSessions {
	ids := make(namedSessions, len(batch))
	texts := batch.InterpolationExecutor(field)
	for i, m := range messages {
		if m.err != nil {
			continue
		}
		text, err := interpolate(texts, i)
		if err != nil {
			m.err = fmt.Errorf("field %s: %w", fieldSessionID, err)
			continue
		}
		if ids[i], err = strconv.ParseUint(text, 10, 64); err != nil {
			m.err = fmt.Errorf("field %s: %q is not a session id", fieldSessionID, text)
		}
	}
	return ids
}

func (n namedSessions) find(ln *listener, messages []int) (found []group, missing []int) {
	groups := make(map[uint64]int) // for each session id, the index of its group in found, or -1 if the session is not connected
	for _, i := range messages {
		at, known := groups[n[i]]
		if !known {
			at = -1
			if s, ok := ln.session(n[i]); ok {
				at = len(found)
				found = append(found, group{sessions: []*cryo.Session{s}})
			}
			groups[n[i]] = at
		}
		if at < 0 {
			missing = append(missing, i)
		} else {
			found[at].messages = append(found[at].messages, i)
		}
	}
	return found, missing
}

func (n namedSessions) missing(i int) error { return fmt.Errorf("session %d is not connected", n[i]) }
