package cryo

import (
	"cmp"
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"math/rand/v2"
	"net/http"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/cryo-connect/cryo-connect/internal/network"
	"github.com/cryo-connect/cryo-connect/internal/redact"
)

// Upgrade is a client's request for a session.
type Upgrade struct {
	Token     string        // text after "Bearer " in the query
	SessionID uint64        // the parameter x-cryo-sid
	Request   *http.Request // for query, headers and remote address; its URL contains the token
	// Value may be set by Authorize. OnSession and [Session.Value] return it.
	Value any
	// Expires may be set by Authorize: the time at which the session expires, such as that of
	// its token. Zero: never. If it has passed, the client is denied with 401. It is compared
	// with the wall clock, at least every 15 s, so that it is noticed within that time when the
	// machine was suspended or its clock was set.
	//
	// An expired session ends after [ServerOptions.ExpiryGrace]. As with [Session.Drain], streams
	// that are incomplete are cancelled and later messages discarded, and received messages can be
	// settled; but at most 30 s later, the session ends: BYE has the reason "session expired", and
	// the WebSocket is closed with code 4000. Sends and streams in flight fail as at any other end.
	// The cause is [ErrExpired].
	Expires time.Time
	// Owner may be set by Authorize: the name of the client's user or device. A client that
	// connects with the id of a session that has not ended takes it over if it has the same
	// Owner, such as with a renewed token. Without an Owner, or if the existing session has none,
	// its token and certificate must be the same. Set Owner only to a verified value: a client
	// that chose it could end the sessions of others.
	Owner string
}

// AdmissionError is returned by Authorize to deny a client for a reason other than its token. The
// client receives its status and message in place of 401. It may be wrapped: the text of the whole
// error is only logged.
type AdmissionError struct {
	StatusCode int    // the HTTP status. Default 403; 503 if the token cannot be checked at the moment
	Message    string // the text of the response
}

func (e *AdmissionError) Error() string { return e.Message }

// Tokens returns an Authorize function that accepts clients with one of the tokens, compared in
// constant time. It ignores empty tokens, such as that of an unset environment variable, so that clients
// without a token are always denied. Without tokens it denies all clients.
func Tokens(tokens ...string) func(*Upgrade) error {
	sums := make([][sha256.Size]byte, 0, len(tokens))
	for _, t := range tokens {
		if t != "" {
			sums = append(sums, sha256.Sum256([]byte(t)))
		}
	}
	return func(u *Upgrade) error {
		got, known := sha256.Sum256([]byte(u.Token)), 0
		for i := range sums {
			known |= subtle.ConstantTimeCompare(got[:], sums[i][:])
		}
		if known == 0 {
			return errors.New("unknown token")
		}
		return nil
	}
}

// denial is the response to an upgrade that is denied.
type denial struct {
	status   int
	message  string // for the client
	reason   string // for the log; empty: message
	cause    error  // error of Authorize, for the log in place of reason
	token    string // kept out of the log
	stranger bool   // not a Cryo client: neither counted nor logged
	answered bool   // the response is written already
	retry    int    // mean of Retry-After in seconds, with 429 and 503; 0: defaultRetry
}

const (
	defaultRetry  = 10 // seconds; until sessions of others have ended
	connectsRetry = 6  // until fewer clients connect at the same time
	shutdownRetry = 2  // until a balancer no longer selects this server, or it has restarted
)

// retrySeconds returns the seconds of a Retry-After header: from half to one and a half of the mean, at
// random, so that clients that were denied in the same second do not return in the same second.
func retrySeconds(mean int) string {
	return strconv.Itoa(mean/2 + rand.IntN(mean+1)) //nolint:gosec // no secret
}

// noUpgrade is the cause of 426 for a Cryo client, which always requests an upgrade.
const noUpgrade = "the request is not a WebSocket upgrade: a proxy between the client and this server must use HTTP/1.1 and forward the Upgrade and Connection headers"

func (s *Server) deny(w http.ResponseWriter, r *http.Request, denied *denial) {
	if !denied.stranger {
		s.reportDenied(r, denied)
	}
	if !denied.answered {
		if denied.status == http.StatusTooManyRequests || denied.status == http.StatusServiceUnavailable {
			w.Header().Set("Retry-After", retrySeconds(cmp.Or(denied.retry, defaultRetry)))
		}
		http.Error(w, denied.message, denied.status)
	}
}

func (s *Server) reportDenied(r *http.Request, denied *denial) {
	if s.opts.OnDeny != nil {
		s.opts.OnDeny(denied.status)
	}
	if suppressed, ok := s.denials.Allow(denied.status); ok {
		cause := cmp.Or(denied.reason, denied.message)
		if denied.cause != nil { // redacted only if it is logged: a long token is expensive to compare
			cause = denied.cause.Error()
			if redact.New(denied.token).In(cause) {
				cause = "the error is redacted, because it contains a part of the token"
			}
			cause = "authorizing: " + cause
		}
		s.opts.Logger.Warn("Denied a client", "remote", r.RemoteAddr, "status", denied.status, "cause", cause,
			"suppressed", suppressed)
	}
}

// admit decides whether to admit a request, and acquires a slot for its session.
func (s *Server) admit(r *http.Request) (*Upgrade, *entry, *denial) {
	query, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return nil, nil, &denial{status: http.StatusBadRequest, message: "The URL's query is malformed."}
	}
	token, ok := strings.CutPrefix(query.Get(paramAuthorization), bearer)
	if !ok {
		return nil, nil, &denial{status: http.StatusUnauthorized, message: "The parameter authorization with a Bearer token is missing."}
	}
	// Before the cost of Authorize: everything that depends on the request alone, and the rate.
	id, err := strconv.ParseUint(query.Get(paramSessionID), 10, 64)
	if err != nil {
		return nil, nil, &denial{status: http.StatusUnauthorized, message: "The parameter x-cryo-sid must be an unsigned 64-bit decimal number."}
	}
	if !s.opts.CheckOrigin(r) {
		return nil, nil, &denial{status: http.StatusForbidden, message: "This origin is not allowed."}
	}
	if s.connects.Tokens() < 1 {
		return nil, nil, tooFast
	}
	u := &Upgrade{Token: strings.TrimPrefix(token, " "), SessionID: id, Request: r}
	if err := s.opts.Authorize(u); err != nil {
		denied := &denial{status: http.StatusUnauthorized, message: "The token was rejected.", cause: err, token: u.Token}
		if other, ok := errors.AsType[*AdmissionError](err); ok {
			denied.status, denied.message = cmp.Or(other.StatusCode, http.StatusForbidden), other.Message
		}
		return nil, nil, denied
	}
	switch {
	case !u.Expires.IsZero() && time.Until(u.Expires.Round(0)) <= 0:
		return nil, nil, &denial{status: http.StatusUnauthorized, message: "The token has expired."}
	case s.opts.Full():
		return nil, nil, &denial{status: http.StatusServiceUnavailable, message: "Overloaded: closed sessions are still draining."}
	case !s.connects.Allow():
		return nil, nil, tooFast
	}
	e, denied := s.reserve(u)
	return u, e, denied
}

var tooFast = &denial{status: http.StatusServiceUnavailable, message: "Too many clients are connecting at the same time.", retry: connectsRetry}

// credentials are a hash of what identifies a client: its owner or, without one, its token and
// certificate.
type credentials struct {
	owned bool // sum is that of an owner
	sum   [sha256.Size]byte
}

func (c *credentials) equal(other *credentials) bool {
	return c.owned == other.owned && subtle.ConstantTimeCompare(c.sum[:], other.sum[:]) == 1
}

// credentials returns the client's credentials. With TLS, they include its certificate as well as
// its token: clients that are identified by certificates may all have the same token, or none.
func (u *Upgrade) credentials() credentials {
	if u.Owner != "" {
		return credentials{owned: true, sum: sha256.Sum256([]byte(u.Owner))}
	}
	sum := sha256.Sum256([]byte(u.Token))
	if state := u.Request.TLS; state != nil && len(state.PeerCertificates) > 0 {
		sum = sha256.Sum256(append(sum[:], state.PeerCertificates[0].Raw...))
	}
	return credentials{sum: sum}
}

// reserve acquires a slot. A client that connects with the id and the credentials of a session
// that has not ended takes it over, because its old connection is probably lost.
func (s *Server) reserve(u *Upgrade) (*entry, *denial) {
	e := &entry{credentials: u.credentials(), address: network.Of(u.Request.RemoteAddr)}
	s.mu.Lock()
	defer s.mu.Unlock()
	old := s.entries[u.SessionID]
	switch {
	case s.closed:
		return nil, &denial{status: http.StatusServiceUnavailable, message: "The server is shutting down.", retry: shutdownRetry}
	case old == nil && s.slots >= s.opts.MaxSessions, s.slots/2 >= s.opts.MaxSessions:
		return nil, &denial{status: http.StatusServiceUnavailable, message: "The server has reached its limit of sessions."}
	case old != nil && (old.session == nil || !old.credentials.equal(&e.credentials)):
		return nil, &denial{status: http.StatusUnauthorized, message: "The session already exists."}
	case s.addressFull(e.address, old):
		return nil, &denial{status: http.StatusTooManyRequests, message: "This address has reached its limit of sessions."}
	case old != nil:
		go old.session.endTakenOver()
		s.countAddress(old, -1)
	}
	s.entries[u.SessionID] = e
	s.countAddress(e, 1)
	s.slots++
	return e, nil
}

// addressFull reports whether another session would exceed MaxSessionsPerAddress. One that
// takes over a session from the same address does not add to it.
func (s *Server) addressFull(address netip.Prefix, old *entry) bool {
	limit := s.opts.MaxSessionsPerAddress
	return limit > 0 && s.perAddr[address] >= limit && (old == nil || old.address != address)
}

// countAddress adds to the number of sessions of an entry's address.
func (s *Server) countAddress(e *entry, change int) {
	if s.opts.MaxSessionsPerAddress <= 0 {
		return
	}
	s.perAddr[e.address] += change
	if s.perAddr[e.address] == 0 {
		delete(s.perAddr, e.address)
	}
}
