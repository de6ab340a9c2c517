package plugin

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"strings"

	"github.com/redpanda-data/benthos/v4/public/bloblang"
	"github.com/redpanda-data/benthos/v4/public/service"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// What a session is known by: to the pipeline, and to whoever chooses sessions.

const (
	metaSessionID     = "cryo_session_id"
	metaRemoteAddress = "cryo_remote_address"

	metaAuthPrefix   = "cryo_auth_"
	metaQueryPrefix  = "cryo_query_"
	metaHeaderPrefix = "cryo_header_"

	// Of what a session may add to each of its messages. It is kept as long as
	// the session is.
	maxIdentityFields = 64
	maxIdentityBytes  = 8 << 10
)

const identityMetadata = `
All of them carry what their session is known by, too:

- ` + "`cryo_remote_address`" + `: the client's network address
- ` + "`cryo_auth_…`" + `: the fields of the object that the mapping ` + "`authorize`" + ` results in, see there
- ` + "`cryo_query_…` and `cryo_header_…`" + `: the query parameters and headers that ` + "`session_metadata`" + ` asks for
`

// identity is what a session is known by. It never changes, and many messages
// share it.
type identity struct {
	id string // of the session, as text
	// metadata are the session's part in the metadata of all its messages, the
	// id included. All values are strings. Nobody changes the map.
	metadata map[string]any
	bytes    int // of all keys and values
}

// identityOf gives what is known of a session: of one that was let in what
// admission kept, of one that was dialled no more than its id.
func identityOf(s *cryo.Session) *identity {
	if known, ok := s.Value().(*identity); ok {
		return known
	}
	return newIdentity(s.ID())
}

func newIdentity(session uint64) *identity {
	id := strconv.FormatUint(session, 10)
	return &identity{id: id, metadata: map[string]any{metaSessionID: id}, bytes: len(metaSessionID) + len(id)}
}

// describe gives a message the session's metadata.
func (i *identity) describe(m *service.Message) {
	for key, value := range i.metadata {
		m.MetaSetMut(key, value)
	}
}

// textOf writes a value as the engine does, but for numbers: those of a JWT are
// all floating point, and its times would become 1.7e+09.
func textOf(value any) string {
	if number, ok := value.(float64); ok {
		if text, err := json.Marshal(number); err == nil {
			return string(text)
		}
	}
	return bloblang.ValueToString(value)
}

// sessionMetadata is what is asked for of a client's request.
type sessionMetadata struct {
	Query, Headers []string
}

// identify keeps what is known of a client: granted is the object of authorize,
// nil without one.
func (s sessionMetadata) identify(u *cryo.Upgrade, query url.Values, granted map[string]any) (*identity, error) {
	i := newIdentity(u.SessionID)
	i.metadata[metaRemoteAddress] = u.Request.RemoteAddr
	i.bytes += len(metaRemoteAddress) + len(u.Request.RemoteAddr)
	fields, size := 0, 0
	add := func(key, value string) {
		i.metadata[key] = value
		fields++
		size += len(key) + len(value)
	}
	for name, value := range granted {
		if value != nil {
			add(metaAuthPrefix+name, textOf(value))
		}
	}
	for _, name := range s.Query {
		if values := query[name]; len(values) > 0 {
			add(metaQueryPrefix+name, values[0])
		}
	}
	for _, name := range s.Headers {
		if values := u.Request.Header[http.CanonicalHeaderKey(name)]; len(values) > 0 {
			add(metaHeaderPrefix+strings.ToLower(name), values[0])
		}
	}
	if fields > maxIdentityFields || size > maxIdentityBytes {
		return nil, &cryo.AdmissionError{
			StatusCode: http.StatusRequestHeaderFieldsTooLarge,
			Message: fmt.Sprintf("The session would have too much metadata: fields: %d, at most %d; bytes: %d, at most %d.",
				fields, maxIdentityFields, size, maxIdentityBytes),
		}
	}
	i.bytes += size
	return i, nil
}
