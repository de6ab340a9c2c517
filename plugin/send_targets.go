package plugin

import (
	"errors"
	"fmt"
	"strconv"

	"github.com/redpanda-data/benthos/v4/public/service"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// Who gets what: the sessions of a listener that a message is for.

var (
	errNobody    = errors.New("no client is connected")
	errNoSession = errors.New("that session is not connected")
)

// targets finds the sessions that a batch is for, as often as it is asked: who
// is not there may come.
type targets interface {
	// find groups messages, by their indexes, for the sessions that are there,
	// and gives back those for which there is none. Only these are looked for again.
	find(ln *listener, messages []int) (found []group, missing []int)
	// missed is the error of a message for which there is none.
	missed(message int) error
}

// group is sessions that get the same messages.
type group struct {
	sessions []*cryo.Session
	messages []int // indexes, in order
}

// targets evaluates what the batch says of its targets. A message that says
// nothing sensible has its error in errs.
func (c *targetConfig) targets(batch service.MessageBatch, errs []error) targets {
	switch c.sendTo {
	case sendToSession:
		return newNamedSessions(batch, c.sessionID, errs)
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

func (allSessions) missed(int) error { return errNobody }

// namedSessions is one session for each message, by its id.
type namedSessions []uint64

func newNamedSessions(batch service.MessageBatch, field *service.InterpolatedString, errs []error) namedSessions {
	ids := make(namedSessions, len(batch))
	texts := batch.InterpolationExecutor(field)
	for i := range batch {
		if errs[i] != nil {
			continue
		}
		text, err := interpolate(texts, i)
		if err != nil {
			errs[i] = fmt.Errorf("field %s: %w", fieldSessionID, err)
			continue
		}
		if ids[i], err = strconv.ParseUint(text, 10, 64); err != nil {
			errs[i] = fmt.Errorf("field %s: %q is not the id of a session", fieldSessionID, text)
		}
	}
	return ids
}

func (n namedSessions) find(ln *listener, messages []int) (found []group, missing []int) {
	at := make(map[uint64]int) // in found, or -1
	for _, i := range messages {
		place, looked := at[n[i]]
		if !looked {
			place = -1
			if s, ok := ln.session(n[i]); ok {
				place = len(found)
				found = append(found, group{sessions: []*cryo.Session{s}})
			}
			at[n[i]] = place
		}
		if place < 0 {
			missing = append(missing, i)
		} else {
			found[place].messages = append(found[place].messages, i)
		}
	}
	return found, missing
}

func (n namedSessions) missed(i int) error { return fmt.Errorf("session %d: %w", n[i], errNoSession) }
