package jwks_test

import (
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/cryo-connect/cryo-connect/internal/jwks"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const address = "https://login.example.com/jwks.json?secret=s3cret"

// provider is an identity provider, reached without a network.
type provider struct {
	mu      sync.Mutex
	keys    []jose.JSONWebKey
	body    string // if it is not empty: in place of the keys
	status  int
	failure error
	delay   time.Duration
	fetches int
}

func (p *provider) RoundTrip(r *http.Request) (*http.Response, error) {
	p.mu.Lock()
	p.fetches++
	failure, status, delay, body := p.failure, p.status, p.delay, p.body
	if body == "" {
		text, _ := json.Marshal(jose.JSONWebKeySet{Keys: p.keys})
		body = string(text)
	}
	p.mu.Unlock()
	select {
	case <-time.After(delay):
	case <-r.Context().Done():
		return nil, r.Context().Err()
	}
	if failure != nil {
		return nil, failure
	}
	return &http.Response{StatusCode: max(status, http.StatusOK), Body: io.NopCloser(strings.NewReader(body)), Header: http.Header{}}, nil
}

func (p *provider) count() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.fetches
}

// source is the key set of the provider.
func (p *provider) source(t *testing.T) *jwks.Source {
	t.Helper()
	sources := jwks.Sources{Client: &http.Client{Transport: p}}
	source, err := sources.Source(address)
	require.NoError(t, err)
	return source
}

func check(source *jwks.Source, token string) error {
	_, err := jwks.Verify(token, jwks.Expected{}, source.Key)
	return err
}

func TestNewKeyIsAcceptedAndWithdrawnOneIsNot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		first, second := newKey(t, "1", jose.ES256), newKey(t, "2", jose.ES256)
		p := &provider{keys: []jose.JSONWebKey{first.public()}}
		source := p.source(t)
		require.NoError(t, check(source, first.sign(t, `{}`)))
		require.NoError(t, check(source, first.sign(t, `{}`)))
		require.Equal(t, 1, p.count())

		p.keys = []jose.JSONWebKey{first.public(), second.public()}
		require.NoError(t, check(source, second.sign(t, `{}`)), "immediately")
		require.Equal(t, 2, p.count())

		p.keys = []jose.JSONWebKey{second.public()}
		time.Sleep(jwks.MaxAge - time.Nanosecond)
		require.NoError(t, check(source, first.sign(t, `{}`)), "it is not known yet")
		time.Sleep(time.Nanosecond)
		require.ErrorIs(t, check(source, first.sign(t, `{}`)), jwks.ErrUnknownKey)
		require.NoError(t, check(source, second.sign(t, `{}`)))
	})
}

func TestWithdrawnKeyIsNotAcceptedAfterALongPause(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		first, second := newKey(t, "1", jose.ES256), newKey(t, "2", jose.ES256)
		p := &provider{keys: []jose.JSONWebKey{first.public()}}
		source := p.source(t)
		require.NoError(t, check(source, first.sign(t, `{}`)))
		p.failure = errors.New("connection refused")
		require.Error(t, check(source, second.sign(t, `{}`)), "a failure that is over by then")
		p.failure = nil
		p.keys = []jose.JSONWebKey{second.public()}
		time.Sleep(jwks.MaxStale - time.Second)
		require.ErrorIs(t, check(source, first.sign(t, `{}`)), jwks.ErrUnknownKey)
	})
}

func TestTokensWithUnknownKeysCauseFewFetches(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		good, stranger := newKey(t, "1", jose.ES256), newKey(t, "x", jose.ES256)
		p := &provider{keys: []jose.JSONWebKey{good.public()}}
		source := p.source(t)
		forged := stranger.sign(t, `{}`)
		for range 60 {
			for range 20 {
				require.ErrorIs(t, check(source, forged), jwks.ErrUnknownKey)
			}
			require.NoError(t, check(source, good.sign(t, `{}`)))
			time.Sleep(time.Second)
		}
		require.LessOrEqual(t, p.count(), 3+60/10)
	})
}

func TestOneFetchServesAllWaiters(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		good := newKey(t, "1", jose.ES256)
		p := &provider{keys: []jose.JSONWebKey{good.public()}, delay: time.Second}
		source := p.source(t)
		var all sync.WaitGroup
		for range 100 {
			all.Go(func() { require.NoError(t, check(source, good.sign(t, `{}`))) })
		}
		all.Wait()
		require.Equal(t, 1, p.count())
	})
}

func TestKnownKeysAreUsedWhileTheServerFails(t *testing.T) {
	for name, fail := range map[string]func(p *provider){
		"it is gone":         func(p *provider) { p.failure = errors.New("connection refused") },
		"it hangs":           func(p *provider) { p.delay = time.Hour },
		"it fails":           func(p *provider) { p.status = http.StatusBadGateway },
		"it returns no keys": func(p *provider) { p.body = `{"keys":[]}` },
		"it returns a page":  func(p *provider) { p.body = `<html>` },
		"it returns a lot": func(p *provider) {
			text, _ := json.Marshal(jose.JSONWebKeySet{Keys: p.keys})
			p.body = string(text) + strings.Repeat(" ", 1<<20)
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				good, second := newKey(t, "1", jose.ES256), newKey(t, "2", jose.ES256)
				p := &provider{keys: []jose.JSONWebKey{good.public()}}
				source := p.source(t)
				require.NoError(t, check(source, good.sign(t, `{}`)))
				begin := time.Now()
				fail(p)
				time.Sleep(jwks.MaxAge)
				waited := 0
				for time.Since(begin) < jwks.MaxStale-5*time.Second {
					asked := time.Now()
					require.NoError(t, check(source, good.sign(t, `{}`)))
					if time.Since(asked) > 0 {
						waited++
					}
					time.Sleep(time.Second)
				}
				require.LessOrEqual(t, waited, 1, "only until it is known that it fails")
				unavailable := new(jwks.UnavailableError)
				require.ErrorAs(t, check(source, second.sign(t, `{}`)), &unavailable, "it may be new")
				time.Sleep(10 * time.Second)
				err := check(source, good.sign(t, `{}`))
				require.ErrorAs(t, err, &unavailable)
				require.ErrorContains(t, err, "cannot fetch the key set from login.example.com: ")
				require.NotContains(t, err.Error(), "s3cret")

				p.mu.Lock()
				p.failure, p.delay, p.status, p.body = nil, 0, 0, ""
				p.mu.Unlock()
				time.Sleep(15 * time.Second)
				require.NoError(t, check(source, good.sign(t, `{}`)))
			})
		})
	}
}

func TestKeySetsAreFetchedFromSafeURLsOnly(t *testing.T) {
	var sources jwks.Sources
	for _, refused := range []string{
		"", "keys.json", "http://login.example.com/", "http://10.0.0.1/", "http://localhost.evil.com/", "ftp://localhost/", "file:///etc/passwd",
		"https://", "https:///path", "://", "http://[::1", "HTTP://example.com",
	} {
		_, err := sources.Source(refused)
		require.ErrorContains(t, err, "the URL of the key set", refused)
	}
	for _, accepted := range []string{"https://login.example.com/a", "http://localhost:80/", "http://127.0.0.1/", "http://[::1]:8080/"} {
		source, err := sources.Source(accepted)
		require.NoError(t, err, accepted)
		again, err := sources.Source(accepted)
		require.NoError(t, err)
		require.Same(t, source, again)
	}
}

func TestNumberOfKeySetURLsIsLimited(t *testing.T) {
	var sources jwks.Sources
	for i := range 64 {
		_, err := sources.Source("https://login.example.com/" + strings.Repeat("x", i))
		require.NoError(t, err)
	}
	_, err := sources.Source("https://login.example.com/another")
	require.ErrorContains(t, err, "more than 64 URLs of key sets")
	_, err = sources.Source("https://login.example.com/")
	require.NoError(t, err)
}

func TestUnusedKeySetsAreForgottenAfterAnHour(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := newKey(t, "1", jose.ES256)
		p := &provider{keys: []jose.JSONWebKey{k.public()}}
		sources := jwks.Sources{Client: &http.Client{Transport: p}}
		var all []*jwks.Source
		for i := range 64 {
			source, err := sources.Source("https://login.example.com/" + strings.Repeat("x", i))
			require.NoError(t, err)
			all = append(all, source)
		}
		time.Sleep(time.Hour - time.Nanosecond)
		require.NoError(t, check(all[0], k.sign(t, `{}`)))
		_, err := sources.Source("https://login.example.com/another")
		require.ErrorContains(t, err, "more than 64 URLs of key sets within 1h0m0s")
		time.Sleep(time.Nanosecond)
		_, err = sources.Source("https://login.example.com/another")
		require.NoError(t, err)
		same, err := sources.Source("https://login.example.com/")
		require.NoError(t, err)
		require.Same(t, all[0], same, "it was used meanwhile")
		require.NoError(t, check(all[1], k.sign(t, `{}`)), "whoever has it can use it on")
		time.Sleep(time.Second)
		synctest.Wait()
	})
}

func TestRedirectsLeadToSafeURLsOnly(t *testing.T) {
	good := newKey(t, "1", jose.ES256)
	mux := http.NewServeMux()
	server := httptest.NewServer(mux)
	defer server.Close()
	mux.HandleFunc("/keys", func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(published(t, good.public())) })
	mux.Handle("/moved", http.RedirectHandler("/keys", http.StatusFound))
	mux.Handle("/unsafe", http.RedirectHandler("http://192.0.2.1/keys", http.StatusFound))
	mux.Handle("/circle", http.RedirectHandler("/circle", http.StatusFound))
	var sources jwks.Sources
	for path, words := range map[string]string{"/keys": "", "/moved": "", "/unsafe": "must be https://", "/circle": "more than 3 redirects", "/none": "status 404"} {
		source, err := sources.Source(server.URL + path)
		require.NoError(t, err)
		err = check(source, good.sign(t, `{}`))
		if words == "" {
			require.NoError(t, err, path)
		} else {
			require.ErrorContains(t, err, words)
		}
	}
}

func TestRedirectsDoNotLeaveHTTPS(t *testing.T) {
	good := newKey(t, "1", jose.ES256)
	plain := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(published(t, good.public())) }))
	defer plain.Close()
	moved := httptest.NewTLSServer(http.RedirectHandler(plain.URL, http.StatusFound))
	defer moved.Close()
	client := jwks.NewClient()
	client.Transport = moved.Client().Transport
	sources := jwks.Sources{Client: client}
	source, err := sources.Source(moved.URL)
	require.NoError(t, err)
	require.ErrorContains(t, check(source, good.sign(t, `{}`)), "redirect from https to http")
}

func TestFailedFetchExposesNoSecret(t *testing.T) {
	good := newKey(t, "1", jose.ES256)
	const query = "/keys?api-key=s3cret-0123456789"
	for name, reply := range map[string]string{
		"for the response": "nothing at %s\r\n\r\n", "in a header": "HTTP/1.1 200 OK\r\nno header at %s\r\n\r\n",
		"for a length": "HTTP/1.1 200 OK\r\nContent-Length: %s\r\n\r\n", "in a redirect": "HTTP/1.1 302 Found\r\nLocation: http://[%s\r\n\r\n",
		"at length": "HTTP/1.1 200 OK\r\n" + strings.Repeat("x", 32<<10) + "%s\r\n\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				c, _, err := http.NewResponseController(w).Hijack()
				if err != nil {
					t.Error(err)
					return
				}
				_, _ = io.WriteString(c, strings.ReplaceAll(reply, "%s", r.RequestURI))
				_ = c.Close()
			}))
			defer server.Close()
			var sources jwks.Sources
			for _, path := range []string{query, "/keys"} {
				source, err := sources.Source(server.URL + path)
				require.NoError(t, err)
				err = check(source, good.sign(t, `{}`))
				require.ErrorContains(t, err, "cannot fetch the key set from 127.0.0.1:")
				require.NotContains(t, err.Error(), "s3cret")
				require.Less(t, len(err.Error()), 400)
			}
		})
	}
}
