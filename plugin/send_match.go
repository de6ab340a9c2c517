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

// Who gets what by a mapping (send_to: match): rooms, topics, whatever the
// metadata of sessions tell.

// metaMatchSession is what a session's metadata are called for the mapping.
const metaMatchSession = "cryo_session"

var errNoMatch = errors.New("no session that is connected matches")

// matcher is the mapping.
type matcher struct {
	mapping *bloblang.Executor
	log     limitedLog
}

func newMatcher(mapping *bloblang.Executor, log *service.Logger) *matcher {
	return &matcher{mapping: mapping, log: newLimitedLog(log)}
}

// matchingSessions is the sessions that the mapping says yes to, for each
// message.
type matchingSessions struct {
	*matcher
	batch  service.MessageBatch
	views  []*service.Message // by message: its metadata with a session's, and what the mapping makes of it as content
	failed []error            // by message: the mapping's first failure
	asked  []*cryo.Session    // that the mapping has said no to, for all messages that are looked for again
}

func (m *matcher) sessionsFor(batch service.MessageBatch) *matchingSessions {
	return &matchingSessions{matcher: m, batch: batch, views: batch.Copy(), failed: make([]error, len(batch))}
}

func (m *matchingSessions) find(ln *listener, messages []int) (found []group, missing []int) {
	var (
		sessions = m.unasked(ln.sessions())
		matched  = make([]bool, len(m.views))
		groups   = make(map[string]int) // in found, by their messages
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

// unasked are those of the sessions that have come since it was called last: each
// pair of a message and a session is decided once.
func (m *matchingSessions) unasked(sessions []*cryo.Session) []*cryo.Session {
	known := make(map[*cryo.Session]bool, len(m.asked))
	for _, s := range m.asked {
		known[s] = true
	}
	m.asked = sessions
	return slices.DeleteFunc(slices.Clone(sessions), func(s *cryo.Session) bool { return known[s] })
}

func decodeIndexes(key []byte) (indexes []int) {
	for len(key) > 0 {
		i, n := binary.Uvarint(key)
		indexes, key = append(indexes, int(i)), key[n:]
	}
	return indexes
}

// matches asks the mapping. Where it fails, the session doesn't match: what one
// client lacks must not keep a message from the others.
func (m *matchingSessions) matches(i int, s *cryo.Session) bool {
	yes, err := m.decide(i, s)
	if err == nil {
		return yes
	}
	err = fmt.Errorf("field %s: the mapping fails for session %d: %w", fieldMatch, s.ID(), err)
	if m.failed[i] == nil {
		m.failed[i] = err
	}
	if log, ok := m.log.allow(); ok {
		log.Warnf("Not sent: %v", err)
	}
	return false
}

// decide runs the mapping from the message onto a view without content: what the
// mapping doesn't assign must not come from the message.
func (m *matchingSessions) decide(i int, s *cryo.Session) (yes bool, err error) {
	defer catchPanic(&err)
	view := m.views[i]
	view.SetBytes(nil)
	view.MetaSetImmut(metaMatchSession, service.ImmutableAny{V: identityOf(s).metadata})
	if _, err := view.BloblangMutateFrom(m.mapping, m.batch[i]); err != nil {
		return false, err
	}
	if view.HasStructured() { // a text "true" is bytes
		decision, _ := view.AsStructured()
		if yes, ok := decision.(bool); ok {
			return yes, nil
		}
	}
	return false, errors.New("it has to result in true or false")
}

func (m *matchingSessions) missed(i int) error {
	if err := m.failed[i]; err != nil {
		return fmt.Errorf("%w (%w)", errNoMatch, err)
	}
	return errNoMatch
}
