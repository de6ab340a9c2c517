package plugin

import (
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"time"

	"github.com/redpanda-data/benthos/v4/public/bloblang"
	"github.com/redpanda-data/benthos/v4/public/service"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// How long the sessions of a listener may last, and which client may take one over.

const (
	fieldSessionExpires     = "session_expires"
	fieldSessionExpiryGrace = "session_expiry_grace"
	fieldMaxSessionAge      = "max_session_age"
	fieldSessionOwner       = "session_owner"

	// inputAuthorized is the field of the mappings' input with the result of authorize.
	inputAuthorized = "authorized"
)

var (
	sessionExpiryGraceField = durationOrZero(fieldSessionExpiryGrace)
	maxSessionAgeField      = durationOrZero(fieldMaxSessionAge)
)

// lifetimeFields returns the common fields about the lifetime of sessions.
func lifetimeFields() []*service.ConfigField {
	return []*service.ConfigField{
		service.NewBloblangField(fieldSessionExpires).
			Description("A mapping to the time at which a session expires: Unix seconds, a timestamp or RFC 3339 text. Its input is that of `authorize`, with the result of `authorize` as `this.authorized`. If the mapping returns null, the session does not expire; see [Expiry](" + authorizationPage + "#expiry).").
			Example(`root = this.authorized.exp`).
			Example(`root = this.token.parse_jwt_hs256(env("JWT_SECRET")).exp.not_null()`).
			Optional(),
	}
}

// lifetimeOptionFields returns the advanced fields about the lifetime and the owners of sessions.
func lifetimeOptionFields() []*service.ConfigField {
	return []*service.ConfigField{
		sessionExpiryGraceField.config().
			Description("The time from `session_expires` to the end of the session. It lets clients connect with a renewed token first, and tolerates clocks that differ. A new connection with the expired token is still denied.").
			Default("0s").
			Advanced(),
		maxSessionAgeField.config().
			Description("The maximum duration of a session. The session ends at a random point in the last tenth of it, so that sessions do not end together; its client should reconnect. 0s means no limit.").
			Default("0s").
			Advanced(),
		service.NewBloblangField(fieldSessionOwner).
			Description("A mapping to the user or device that owns the session, with the input of `session_expires`. A client that returns with the same session id and owner replaces its old connection, even with a renewed token. Use only what `authorize` has verified: see [Owners](" + authorizationPage + "#owners).").
			Example(`root = this.authorized.sub`).
			Example(`root = this.client_certificate.common_name`).
			Optional().
			Advanced(),
	}
}

// lifetimeSettings are the settings of a listener about the duration and the owners of sessions.
type lifetimeSettings struct {
	SessionExpires     string        `field:"session_expires"` // source text of the mapping
	SessionExpiryGrace time.Duration `field:"session_expiry_grace"`
	MaxSessionAge      time.Duration `field:"max_session_age"`
	SessionOwner       string        `field:"session_owner"` // source text of the mapping
}

// lifetime holds the session_expires and session_owner mappings, which may be nil.
type lifetime struct{ expires, owner *bloblang.Executor }

func readLifetime(r *settingsReader) (s lifetimeSettings, l lifetime) {
	s.SessionExpiryGrace = sessionExpiryGraceField.read(r)
	s.MaxSessionAge = maxSessionAgeField.read(r)
	l.expires, s.SessionExpires = readMapping(r, fieldSessionExpires)
	l.owner, s.SessionOwner = readMapping(r, fieldSessionOwner)
	if r.err == nil && s.SessionExpiryGrace > 0 && l.expires == nil {
		r.err = fmt.Errorf("the field %s has no effect without %s", fieldSessionExpiryGrace, fieldSessionExpires)
	}
	return s, l
}

// apply sets the expiry and the owner of an authorized client's session. client describes the
// client, and granted is the object that authorize has returned, or nil. An error denies the
// client.
func (l lifetime) apply(u *cryo.Upgrade, client, granted map[string]any) (err error) {
	client[inputAuthorized] = true
	if granted != nil {
		client[inputAuthorized] = granted
	}
	if u.Expires, err = evaluate(l.expires, fieldSessionExpires, client, expiryTime); err != nil {
		return err
	}
	u.Owner, err = evaluate(l.owner, fieldSessionOwner, client, ownerName)
	return err
}

// evaluate runs a mapping on an object that describes the client, and converts its result. A
// mapping that is not set, and one that returns null or deletes its result, result in the zero
// value.
func evaluate[T any](mapping *bloblang.Executor, field string, client map[string]any, convert func(any) (T, error)) (result T, err error) {
	if mapping == nil {
		return result, nil
	}
	value, err := runAuthorize(mapping, client)
	switch {
	case errors.Is(err, bloblang.ErrRootDeleted):
		return result, nil
	case err != nil:
		return result, mappingFailed(field, err)
	case value == nil:
		return result, nil
	}
	if result, err = convert(value); err != nil {
		return result, fmt.Errorf("field %s: %w", field, err)
	}
	return result, nil
}

var (
	errNotATime = errors.New("the mapping must return a time: a number of seconds since 1970, a timestamp, or text in the format of RFC 3339 such as 2030-01-02T15:04:05Z")
	errTooLate  = errors.New("the mapping must return a time between the years 1970 and 9999; a number must be in seconds, not in milliseconds")
	errNotText  = errors.New("the mapping must return text or a number")
	errInexact  = errors.New("the mapping returned a floating-point number of 2^53 or more, which may have lost digits that distinguish owners; return text")
)

// latestExpiry is the end of the year 9999, in seconds since 1970.
const latestExpiry = 253402300799

// expiryTime converts the result of session_expires. Its errors do not contain the value, which
// may be a part of the token.
func expiryTime(value any) (time.Time, error) {
	var at time.Time
	switch v := value.(type) {
	case time.Time:
		at = v
	case string:
		var err error
		if at, err = time.Parse(time.RFC3339, v); err != nil {
			return time.Time{}, errNotATime
		}
	case int64, int, uint64, float64, float32, json.Number:
		seconds, err := bloblang.ValueAsFloat64(v)
		if err != nil {
			return time.Time{}, errNotATime
		}
		if !(seconds >= 0 && seconds <= latestExpiry) { // not for others: their conversion to an integer depends on the platform
			return time.Time{}, errTooLate
		}
		whole, fraction := math.Modf(seconds)
		at = time.Unix(int64(whole), int64(fraction*1e9))
	default:
		return time.Time{}, errNotATime
	}
	if at.Unix() < 0 || at.Unix() > latestExpiry { // the zero time would mean that the session does not expire
		return time.Time{}, errTooLate
	}
	return at, nil
}

// ownerName converts the result of session_owner.
func ownerName(value any) (string, error) {
	switch v := value.(type) {
	case string:
		return v, nil
	case float64:
		if math.Abs(v) >= maxNumber {
			return "", errInexact
		}
	case int64, int, uint64, json.Number:
	default:
		return "", errNotText
	}
	return textOf(value), nil
}
