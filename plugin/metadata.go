package plugin

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"unicode"

	"github.com/redpanda-data/benthos/v4/public/bloblang"
	"github.com/redpanda-data/benthos/v4/public/service"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// The identity of a session: metadata of its messages, by which sessions are chosen, too.

const (
	metaSessionID     = "cryo_session_id"
	metaRemoteAddress = "cryo_remote_address"

	metaAuthPrefix   = "cryo_auth_"
	metaQueryPrefix  = "cryo_query_"
	metaHeaderPrefix = "cryo_header_"

	// Bounds of the metadata that come from the client, for as long as the session lives.
	maxIdentityFields = 64
	maxIdentityBytes  = 8 << 10
)

const identityMetadata = `
All of them carry the identity of their session, too:

- ` + "`cryo_remote_address`" + `: the client's network address
- ` + "`cryo_auth_…`" + `: the fields of the object that the mapping ` + "`authorize`" + ` results in, see there
- ` + "`cryo_query_…` and `cryo_header_…`" + `: the query parameters and headers that ` + "`session_metadata`" + ` asks for
`

// identity identifies a session. It never changes, and many messages share it.
type identity struct {
	id string // of the session, as text
	// metadata of all messages of the session, the id included. All values are strings.
	// The map is not changed.
	metadata map[string]any
	bytes    int // of all keys and values
}

// identityOf returns the identity of a session: that of its admission, or, if it was
// dialled, its id.
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

// describe adds the session's metadata to a message.
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

// sessionMetadata names the parts of a client's request that become metadata.
type sessionMetadata struct {
	Query, Headers []string
}

// identify returns the identity of a client's session: granted is the object of authorize,
// nil without one. No metadata may have control characters: an output that makes headers of
// it would fail each of the session's messages.
func (s sessionMetadata) identify(u *cryo.Upgrade, query url.Values, granted map[string]any) (*identity, error) {
	i := newIdentity(u.SessionID)
	i.metadata[metaRemoteAddress] = u.Request.RemoteAddr
	i.bytes += len(metaRemoteAddress) + len(u.Request.RemoteAddr)
	fields, size, odd := 0, 0, ""
	add := func(key, value string) {
		if strings.ContainsFunc(key+value, unicode.IsControl) {
			odd = key
			if strings.HasPrefix(key, metaAuthPrefix) {
				odd = metaAuthPrefix + "…" // its name may be a part of the token
			}
		}
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
		if value, ok := headerOf(u.Request, name); ok {
			add(metaHeaderPrefix+strings.ToLower(name), value)
		}
	}
	if odd != "" {
		return nil, &cryo.AdmissionError{
			StatusCode: http.StatusBadRequest,
			Message:    fmt.Sprintf("The metadata %s would have control characters.", odd),
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

// headerOf returns the first value of a header. The HTTP server has moved Host out of the
// headers.
func headerOf(r *http.Request, name string) (value string, ok bool) {
	name = http.CanonicalHeaderKey(name)
	if name == "Host" {
		return r.Host, r.Host != ""
	}
	values := r.Header[name]
	if len(values) == 0 {
		return "", false
	}
	return values[0], true
}
