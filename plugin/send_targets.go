package plugin

import (
	"errors"
	"fmt"
	"strconv"

	"github.com/redpanda-data/benthos/v4/public/service"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// The targets of a message: the sessions of a listener that it is sent to.

var errNobody = errors.New("no client is connected")

// targets finds the sessions that the messages of a batch are for. It may be asked again:
// sessions connect meanwhile.
type targets interface {
	// find groups messages, by their indexes, for the sessions that are connected, and
	// returns those for which there is none. Only these may be looked for again.
	find(ln *listener, messages []int) (found []group, missing []int)
	// missing returns the error of a message for which there is none.
	missing(message int) error
}

// group is sessions that receive the same messages.
type group struct {
	sessions []*cryo.Session
	messages []int // indexes, in order
}

// targets evaluates the targets of a batch. A message whose target can't be determined gets
// an error.
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

// allSessions is every session, for every message.
type allSessions struct{}

func (allSessions) find(ln *listener, messages []int) (found []group, missing []int) {
	if sessions := ln.sessions(); len(sessions) > 0 {
		return []group{{sessions, messages}}, nil
	}
	return nil, messages
}

func (allSessions) missing(int) error { return errNobody }

// namedSessions is one session for each message, by its id.
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
	groups := make(map[uint64]int) // index in found, or -1, by session id
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
