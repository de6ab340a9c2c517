package plugin

import (
	"crypto/sha256"
	"encoding/hex"
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

// The identity of a session consists of its id and the metadata of its messages. The match mapping
// also uses it to select sessions.

const (
	metaSessionID     = "cryo_session_id"
	metaSessionOwner  = "cryo_session_owner"
	metaRemoteAddress = "cryo_remote_address"

	metaAuthPrefix   = "cryo_auth_"
	metaQueryPrefix  = "cryo_query_"
	metaHeaderPrefix = "cryo_header_"

	// Limits on the metadata from a client, which stays in memory until the session ends.
	maxIdentityFields = 64
	maxIdentityBytes  = 8 << 10
)

const identityText = `
A message of a client also carries:

- ` + "`cryo_remote_address`" + `: the network address of the client
- ` + "`cryo_session_owner`: the SHA-256 hash, in hexadecimal, of the result of `session_owner`" + `
- ` + "`cryo_auth_…`: the fields of the object that `authorize`" + ` returns
- ` + "`cryo_query_…` and `cryo_header_…`: the query parameters and headers in `session_metadata`" + `
`

// identity is the id of a session and the metadata that its messages share. It is read-only.
type identity struct {
	id       string         // the session id as a decimal number
	metadata map[string]any // the metadata of all messages, including the id; the values are strings
	bytes    int            // total size of the keys and values
	owner    string         // hash of the result of session_owner, as in the metadata; empty: none
}

// setOwner sets the owner of the session, and adds it to the metadata. It is hashed, because it may be
// a secret, such as the token, and of any length. An empty name is no owner.
func (i *identity) setOwner(name string) {
	if name == "" {
		return
	}
	sum := sha256.Sum256([]byte(name))
	i.owner = hex.EncodeToString(sum[:])
	i.metadata[metaSessionOwner] = i.owner
	i.bytes += len(metaSessionOwner) + len(i.owner)
}

// client identifies the client for quotas: the owner of its session, because a client may choose
// any number of session ids, or else the session id.
func (i *identity) client() string {
	if i.owner != "" {
		return "owner " + i.owner // an id has no spaces
	}
	return i.id
}

// identityOf returns the identity of a session. The authorization sets it for sessions of a
// listener; that of a dialled session contains only the id.
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

// textOf converts a value to text as the engine does, except for numbers: all numbers of a JWT
// are floating-point, and the engine would convert times to text such as 1.7e+09.
func textOf(value any) string {
	if number, ok := value.(float64); ok {
		if text, err := json.Marshal(number); err == nil {
			return string(text)
		}
	}
	return bloblang.ValueToString(value)
}

// sessionMetadata holds the names of the query parameters and headers of a client's request
// that become metadata.
type sessionMetadata struct {
	Query, Headers []string
}

// identify returns the identity of a client's session. granted is the object that authorize has
// returned, or nil. Control characters are not allowed, because an output that sends metadata
// as headers would fail for each message of the session.
func (s sessionMetadata) identify(u *cryo.Upgrade, query url.Values, granted map[string]any) (*identity, error) {
	i := newIdentity(u.SessionID)
	i.metadata[metaRemoteAddress] = u.Request.RemoteAddr
	i.bytes += len(metaRemoteAddress) + len(u.Request.RemoteAddr)
	fields, size, invalid := 0, 0, ""
	add := func(key, value string) {
		if strings.ContainsFunc(key+value, unicode.IsControl) {
			invalid = key
			if strings.HasPrefix(key, metaAuthPrefix) {
				invalid = metaAuthPrefix + "…" // the key may contain a part of the token
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
	if invalid != "" {
		return nil, &cryo.AdmissionError{
			StatusCode: http.StatusBadRequest,
			Message:    fmt.Sprintf("The metadata %s must not contain control characters.", invalid),
		}
	}
	if fields > maxIdentityFields || size > maxIdentityBytes {
		return nil, &cryo.AdmissionError{
			StatusCode: http.StatusRequestHeaderFieldsTooLarge,
			Message: fmt.Sprintf("Too much session metadata: %d fields (limit %d), %d bytes (limit %d).",
				fields, maxIdentityFields, size, maxIdentityBytes),
		}
	}
	i.bytes += size
	return i, nil
}

// headerOf returns the first value of a header, and reports whether there is one. Host is a
// special case, because the HTTP server stores it in a field of the request.
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
