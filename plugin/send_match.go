package plugin

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"github.com/redpanda-data/benthos/v4/public/bloblang"
	"github.com/redpanda-data/benthos/v4/public/service"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// Targets that a mapping selects (send_to: match), for example for rooms or topics.

// metaMatchSession is the metadata key with which the mapping reads a session's metadata.
const metaMatchSession = "cryo_session"

var errNoMatch = errors.New("no connected session matches")

// matcher holds the match mapping, which decides whether a message is sent to a session.
type matcher struct {
	mapping *bloblang.Executor
	log     limitedLog
}

func newMatcher(mapping *bloblang.Executor, log *service.Logger) *matcher {
	return &matcher{mapping: mapping, log: newLimitedLog(log)}
}

// matchingSessions are the targets of a batch: for each message, the sessions for which the
// mapping returns true.
type matchingSessions struct {
	*matcher
	batch     service.MessageBatch
	views     []*service.Message // by message: its metadata and that of a session, and as the content, the result of the mapping
	failed    []error            // by message: the first error of the mapping
	evaluated []*cryo.Session    // the sessions for which the mapping has run
}

func (m *matcher) sessionsFor(batch service.MessageBatch) *matchingSessions {
	return &matchingSessions{matcher: m, batch: batch, views: batch.Copy(), failed: make([]error, len(batch))}
}

func (m *matchingSessions) find(ln *listener, messages []int) (found []group, missing []int) {
	var (
		sessions = m.unevaluated(ln.sessions())
		matched  = make([]bool, len(m.views))
		groups   = make(map[string]int) // index in found, by the encoded indexes of the messages
		key      []byte
	)
	for _, s := range sessions {
		key = key[:0]
		for _, i := range messages {
			if m.matches(i, s) {
				matched[i] = true
				key = binary.AppendUvarint(key, uint64(i))
			}
		}
		if len(key) == 0 {
			continue
		}
		at, known := groups[string(key)]
		if !known {
			at = len(found)
			groups[string(key)] = at
			found = append(found, group{messages: decodeIndexes(key)})
		}
		found[at].sessions = append(found[at].sessions, s)
	}
	for _, i := range messages {
		if !matched[i] {
			missing = append(missing, i)
		}
	}
	return found, missing
}

// unevaluated returns those of the connected sessions for which the mapping has not run yet, so
// that it runs once for each pair of a message and a session.
func (m *matchingSessions) unevaluated(sessions []*cryo.Session) []*cryo.Session {
	known := make(map[*cryo.Session]bool, len(m.evaluated))
	for _, s := range m.evaluated {
		known[s] = true
	}
	m.evaluated = sessions
	return slices.DeleteFunc(slices.Clone(sessions), func(s *cryo.Session) bool { return known[s] })
}

func decodeIndexes(key []byte) (indexes []int) {
	for len(key) > 0 {
		i, n := binary.Uvarint(key)
		indexes, key = append(indexes, int(i)), key[n:]
	}
	return indexes
}

// matches reports whether a session matches message i. If the mapping fails, the session does
// not match, so that metadata that one session lacks does not affect the others.
func (m *matchingSessions) matches(i int, s *cryo.Session) bool {
	matches, err := m.evaluate(i, s)
	if err == nil {
		return matches
	}
	if log, ok := m.log.allow(); ok {
		log.With("session", s.ID(), "error", err).Warn("Message not sent to a session: cannot evaluate the match field")
	}
	if m.failed[i] == nil {
		m.failed[i] = fmt.Errorf("field %s: session %d: %w", fieldMatch, s.ID(), err)
	}
	return false
}

// evaluate runs the mapping on message i and a session. The mapping reads the message and
// writes to its view. The view is emptied first, so that the result contains only the fields that the mapping
// assigns.
func (m *matchingSessions) evaluate(i int, s *cryo.Session) (matches bool, err error) {
	defer catchPanic(&err)
	view := m.views[i]
	view.SetBytes(nil)
	view.MetaSetImmut(metaMatchSession, service.ImmutableAny{V: identityOf(s).metadata})
	if _, err := view.BloblangMutateFrom(m.mapping, m.batch[i]); err != nil {
		return false, fmt.Errorf("mapping failed: %w", err)
	}
	if view.HasStructured() { // not the text "true"
		result, _ := view.AsStructured()
		if matches, ok := result.(bool); ok {
			return matches, nil
		}
	}
	return false, errors.New("the mapping returned neither true nor false")
}

func (m *matchingSessions) missing(i int) error {
	if err := m.failed[i]; err != nil {
		return fmt.Errorf("%w (%w)", errNoMatch, err)
	}
	return errNoMatch
}
