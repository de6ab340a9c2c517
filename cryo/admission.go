package cryo

import (
	"cmp"
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strconv"
	"strings"

	"github.com/cryo-connect/cryo-connect/internal/redact"
)

// Who may come in.

// Upgrade is a client's request to come in.
type Upgrade struct {
	Token     string // what followed "Bearer " in the query
	SessionID uint64
	Request   *http.Request // for query, headers and remote address; its URL has the token
	// Value is Authorize's to set, and reaches OnSession and [Session.Value].
	Value any
}

// AdmissionError is returned by Authorize to deny a client whose token is right. The client
// receives its status and message, and not that the token was rejected.
type AdmissionError struct {
	StatusCode int    // the HTTP status. Default 403; 401 would be a rejected token
	Message    string // the text of the response
}

func (e *AdmissionError) Error() string { return e.Message }

// Tokens authorizes clients that have one of the tokens, compared in constant
// time. Without tokens nobody may come in.
func Tokens(tokens ...string) func(*Upgrade) error {
	sums := make([][sha256.Size]byte, len(tokens))
	for i, t := range tokens {
		sums[i] = sha256.Sum256([]byte(t))
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

// refusal is an answer to an upgrade that is not let in.
type refusal struct {
	status   int
	sentence string // for the client
	cause    error  // for the log; nil if the sentence says it all
	token    string // what the log must not repeat
	answered bool   // on the connection already
}

func (s *Server) refuse(w http.ResponseWriter, r *http.Request, refused *refusal) {
	if s.opts.OnDeny != nil {
		s.opts.OnDeny(refused.status)
	}
	s.refused.Add(1)
	due := false
	s.refusals.Do(func() { due = true }) // and no more: a handler of the log may wait
	if due {
		cause := refused.cause
		if cause == nil {
			cause = errors.New(refused.sentence)
		}
		// Here and not for each refusal: much work may be made of a long token.
		cause = redact.New(refused.token).Error(cause)
		s.opts.Logger.Warn("Denied a client"+rateLimited, "remote", r.RemoteAddr, "status", refused.status, "cause", cause,
			"left_out", max(s.refused.Swap(0)-1, 0))
	}
	if !refused.answered {
		http.Error(w, refused.sentence, refused.status)
	}
}

// admit judges a request and takes a place for its session.
func (s *Server) admit(r *http.Request) (*Upgrade, *entry, *refusal) {
	query, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return nil, nil, &refusal{status: http.StatusBadRequest, sentence: "The URL's query can't be read."}
	}
	token, ok := strings.CutPrefix(query.Get(paramAuthorization), bearer)
	if !ok {
		return nil, nil, &refusal{status: http.StatusUnauthorized, sentence: "The parameter authorization with a Bearer token is missing."}
	}
	u := &Upgrade{Token: strings.TrimPrefix(token, " "), Request: r}
	id, idErr := strconv.ParseUint(query.Get(paramSessionID), 10, 64)
	u.SessionID = id
	if err := s.opts.Authorize(u); err != nil {
		refused := &refusal{status: http.StatusUnauthorized, sentence: "The token was rejected.", cause: fmt.Errorf("authorizing: %w", err), token: u.Token}
		if other, ok := errors.AsType[*AdmissionError](err); ok {
			refused.status, refused.sentence = cmp.Or(other.StatusCode, http.StatusForbidden), other.Message
		}
		return nil, nil, refused
	}
	switch {
	case idErr != nil:
		return nil, nil, &refusal{status: http.StatusUnauthorized, sentence: "The parameter x-cryo-sid has to be an unsigned decimal number of 64 bits."}
	case !s.opts.CheckOrigin(r):
		return nil, nil, &refusal{status: http.StatusForbidden, sentence: "This origin is not allowed."}
	case s.opts.Full():
		return nil, nil, &refusal{status: http.StatusServiceUnavailable, sentence: "The server is behind with sessions that have ended."}
	}
	e, refused := s.reserve(u)
	return u, e, refused
}

// credentials are a client's token and, by TLS, its certificate: where certificates
// tell clients apart, all may have the same token, or none.
func (u *Upgrade) credentials() [sha256.Size]byte {
	known := sha256.Sum256([]byte(u.Token))
	if state := u.Request.TLS; state != nil && len(state.PeerCertificates) > 0 {
		return sha256.Sum256(append(known[:], state.PeerCertificates[0].Raw...))
	}
	return known
}

// reserve takes a place. A client that comes back with the id and the credentials
// of a session that is still thought alive takes it over: the old one is its ghost.
func (s *Server) reserve(u *Upgrade) (*entry, *refusal) {
	e := &entry{credentials: u.credentials(), address: networkOf(u.Request.RemoteAddr)}
	s.mu.Lock()
	defer s.mu.Unlock()
	old := s.entries[u.SessionID]
	switch {
	case s.closed:
		return nil, &refusal{status: http.StatusServiceUnavailable, sentence: "The server is shutting down."}
	case old == nil && s.places >= s.opts.MaxSessions, s.places/2 >= s.opts.MaxSessions:
		return nil, &refusal{status: http.StatusServiceUnavailable, sentence: "The server has as many sessions as it may."}
	case old != nil && (old.session == nil || subtle.ConstantTimeCompare(old.credentials[:], e.credentials[:]) == 0):
		return nil, &refusal{status: http.StatusUnauthorized, sentence: "The session already exists."}
	case s.crowded(e.address, old):
		return nil, &refusal{status: http.StatusTooManyRequests, sentence: "There are as many sessions from this address as there may be."}
	case old != nil:
		go old.session.fail(ErrTakenOver) // closing TLS may wait for the network
		s.count(old, -1)
	}
	s.entries[u.SessionID] = e
	s.count(e, 1)
	s.places++
	return e, nil
}

// networkOf is what MaxSessionsPerAddress takes for one client: who has an IPv6
// address has the other 2⁶⁴ of its network too.
func networkOf(remote string) netip.Prefix {
	host, _, err := net.SplitHostPort(remote)
	if err != nil {
		host = strings.Trim(remote, "[]") // as a proxy tells it
	}
	ip, err := netip.ParseAddr(host)
	if err != nil {
		return netip.Prefix{} // all that are no IP addresses are one
	}
	ip = ip.Unmap().WithZone("")
	if ip.Is4() {
		return netip.PrefixFrom(ip, 32)
	}
	network, _ := ip.Prefix(64) // 64 is always valid here
	return network
}

// crowded tells whether another session from an address would be one too many.
// One that takes over a session from there is none more.
func (s *Server) crowded(address netip.Prefix, old *entry) bool {
	limit := s.opts.MaxSessionsPerAddress
	return limit > 0 && s.perAddr[address] >= limit && (old == nil || old.address != address)
}

func (s *Server) count(e *entry, change int) {
	if s.opts.MaxSessionsPerAddress <= 0 {
		return
	}
	s.perAddr[e.address] += change
	if s.perAddr[e.address] == 0 {
		delete(s.perAddr, e.address)
	}
}
