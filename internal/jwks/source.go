package jwks

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"sync"
	"syscall"
	"time"

	"github.com/go-jose/go-jose/v4"
	"golang.org/x/time/rate"
)

// How long the keys of a server are used. They are fetched only when a token arrives.
const (
	// MaxAge is the time after which keys are fetched again.
	MaxAge = 5 * time.Minute
	// MaxStale is the time for which keys are used while the server cannot be reached.
	MaxStale = time.Hour

	fetchTimeout  = 5 * time.Second
	fetchInterval = 10 * time.Second // between two fetches from one server
	fetchBurst    = 3                // fetches without that interval
	failureAge    = time.Minute      // for which keys are used without waiting for the next fetch
	maxSetBytes   = 1 << 20
	maxSources    = 64
	maxIdle       = time.Hour // for which an unused key set counts towards maxSources
)

// UnavailableError reports that there are no keys because their server cannot be reached. It
// says nothing about the token.
type UnavailableError struct{ cause string }

func (e *UnavailableError) Error() string { return e.cause }

// Sources are the key sets that are fetched, by their URLs. At most 64 are remembered. Those that were
// not used for an hour are forgotten when a further one needs their entry.
type Sources struct {
	Client *http.Client // Default: see NewClient. It must not be changed after the first use.

	mu    sync.Mutex
	byURL map[string]*Source
}

// Source returns the key set of a URL, which is fetched when it is first used. The URL must be
// https, or http to a loopback address: whoever changes the keys on the way can sign tokens.
func (s *Sources) Source(address string) (*Source, error) {
	u, err := url.Parse(address)
	if err != nil {
		return nil, errors.New("the URL of the key set is malformed")
	}
	if err := checkURL(u); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if known := s.byURL[address]; known != nil {
		known.use()
		return known, nil
	}
	if len(s.byURL) >= maxSources {
		// Whoever has such a source can use it on: it then only does not share its keys with another of its URL.
		maps.DeleteFunc(s.byURL, func(_ string, source *Source) bool { return source.idle() >= maxIdle })
	}
	if len(s.byURL) >= maxSources {
		return nil, fmt.Errorf("more than %d URLs of key sets within %v: a URL must not be made from a token", maxSources, maxIdle)
	}
	if s.byURL == nil {
		s.byURL = make(map[string]*Source)
	}
	if s.Client == nil {
		s.Client = NewClient()
	}
	source := &Source{url: address, host: u.Host, client: s.Client, limit: rate.NewLimiter(rate.Every(fetchInterval), fetchBurst)}
	source.use()
	s.byURL[address] = source
	return source, nil
}

// proxy returns the proxy of the environment. Its error does not contain the proxy's password.
func proxy(r *http.Request) (*url.URL, error) {
	via, err := http.ProxyFromEnvironment(r)
	if err != nil {
		return nil, urlError("choosing a proxy failed: check HTTPS_PROXY and HTTP_PROXY")
	}
	return via, nil
}

// NewClient returns a client that uses the proxy of the environment, and follows redirects only
// to URLs that Source accepts, and not from https to http. It keeps no connections, because
// fetches are rare.
func NewClient() *http.Client {
	return &http.Client{
		Transport: &http.Transport{Proxy: proxy, DisableKeepAlives: true, ForceAttemptHTTP2: true, MaxResponseHeaderBytes: 64 << 10},
		CheckRedirect: func(r *http.Request, via []*http.Request) error {
			if len(via) >= 3 {
				return urlError("more than 3 redirects")
			}
			if via[len(via)-1].URL.Scheme == "https" && r.URL.Scheme != "https" {
				return urlError("redirect from https to http")
			}
			return checkURL(r.URL)
		},
	}
}

func checkURL(u *url.URL) error {
	loopback := u.Hostname() == "localhost"
	if ip, err := netip.ParseAddr(u.Hostname()); err == nil {
		loopback = ip.IsLoopback()
	}
	if u.Host == "" || u.Scheme != "https" && (u.Scheme != "http" || !loopback) {
		return urlError("the URL of the key set must be https://, or http:// to a loopback address")
	}
	return nil
}

// Source is the key set of one URL.
type Source struct {
	url, host string
	client    *http.Client
	limit     *rate.Limiter // of fetches

	mu       sync.Mutex
	used     time.Time // time of the last call of Key, or of Sources.Source
	set      Set
	fetched  time.Time     // time of the request that returned set
	failure  error         // of the last fetch; nil: it has succeeded
	failed   time.Time     // time of failure
	fetching chan struct{} // closed when the fetch that runs has ended; nil: none runs
}

func (s *Source) use() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.used = time.Now()
}

// idle returns the time since the last use.
func (s *Source) idle() time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	return time.Since(s.used)
}

// Key returns the key for a token with a header. It waits for a fetch, for 5 seconds at most, if
// the keys are older than MaxAge, or none of them fits: the server may have a new one. For a
// minute after a fetch has failed, keys up to MaxStale are returned without waiting. One fetch
// serves all who wait, and tokens with unknown keys cause one every 10 seconds, after the first 3.
func (s *Source) Key(header jose.Header) (jose.JSONWebKey, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.used = time.Now()
	key, unknown := s.set.Key(header)
	age := time.Since(s.fetched)
	if unknown == nil && age < MaxAge {
		return key, nil
	}
	if s.fetching == nil && s.limit.Allow() {
		s.fetching = make(chan struct{})
		go s.fetch()
	}
	isDown := s.failure != nil && time.Since(s.failed) < failureAge
	if fetching := s.fetching; fetching != nil && (unknown != nil || !isDown || age >= MaxStale) {
		s.mu.Unlock()
		<-fetching
		s.mu.Lock()
		key, unknown = s.set.Key(header)
	}
	if s.failure != nil && (unknown != nil || time.Since(s.fetched) >= MaxStale) {
		return jose.JSONWebKey{}, &UnavailableError{fmt.Sprintf("cannot fetch the key set from %s: %v", s.host, s.failure)}
	}
	return key, unknown
}

// fetch replaces the keys, or sets failure.
func (s *Source) fetch() {
	begin := time.Now()
	set, err := s.load()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.failure = err; err != nil {
		s.failed = time.Now()
	} else {
		s.set, s.fetched = set, begin
	}
	close(s.fetching)
	s.fetching = nil
}

func (s *Source) load() (Set, error) {
	ctx, cancel := context.WithTimeout(context.Background(), fetchTimeout)
	defer cancel()
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, s.url, nil)
	if err != nil {
		return nil, err
	}
	r.Header.Set("Accept", "application/jwk-set+json, application/json")
	response, err := s.client.Do(r)
	if err != nil {
		return nil, withoutSecrets(err)
	}
	defer func() { _ = response.Body.Close() }()
	if response.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("status %d", response.StatusCode)
	}
	text, err := io.ReadAll(io.LimitReader(response.Body, maxSetBytes+1))
	switch {
	case err != nil:
		return nil, withoutSecrets(err)
	case len(text) > maxSetBytes:
		return nil, fmt.Errorf("the key set is larger than %d bytes", maxSetBytes)
	default:
		return Parse(text)
	}
}

// urlError is an error of a URL or a proxy, whose text contains no part of it.
type urlError string

func (e urlError) Error() string { return string(e) }

// withoutSecrets returns an error without the URL, whose query may be secret. It also leaves out
// text of the server or a proxy, because it may contain the URL or the proxy's password.
func withoutSecrets(err error) error {
	if failed, ok := errors.AsType[*url.Error](err); ok {
		err = failed.Err
	}
	if timeout, ok := errors.AsType[net.Error](err); ok && timeout.Timeout() {
		return fmt.Errorf("timed out after %v", fetchTimeout)
	}
	_, isOurs := errors.AsType[urlError](err)
	_, isSystem := errors.AsType[syscall.Errno](err)
	_, isDNS := errors.AsType[*net.DNSError](err)
	_, isCertificate := errors.AsType[*tls.CertificateVerificationError](err)
	_, isUnknown := errors.AsType[x509.UnknownAuthorityError](err)
	wrong, isHost := errors.AsType[x509.HostnameError](err)
	switch {
	case isOurs, isSystem, isDNS, errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return err
	case isUnknown:
		return errors.New("its certificate is signed by an unknown authority")
	case isHost:
		return fmt.Errorf("its certificate is not valid for %s", wrong.Host)
	case isCertificate:
		return errors.New("its certificate is invalid, or has expired")
	default:
		return errors.New("its response is malformed, or the proxy denied the connection (the reason may contain a secret of the URL or of the proxy)")
	}
}
