package tests

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/testkit"
)

// jwt signs claims with HS256. The header names the algorithm.
func jwt(t *testing.T, algorithm, secret string, claims map[string]any) string {
	t.Helper()
	text, err := json.Marshal(claims)
	require.NoError(t, err)
	encode := base64.RawURLEncoding.EncodeToString
	signed := encode([]byte(`{"alg":"`+algorithm+`","typ":"JWT"}`)) + "." + encode(text)
	mac := hmac.New(sha256.New, []byte(secret))
	mac.Write([]byte(signed))
	return signed + "." + encode(mac.Sum(nil))
}

func TestOnlyClientsWithAValidJWTAreAccepted(t *testing.T) {
	path := filepath.Join(t.TempDir(), "messages.jsonl")
	p := example(t, "jwt_clients.yaml", "CRYO_ADDRESS=127.0.0.1:0", "JWT_SECRET=s3cret", "FILE="+path)
	url := "ws://" + p.Listening()
	expires := time.Now().Add(time.Hour).Unix()
	good := map[string]any{"sub": "ann", "aud": "cryo", "roles": []string{"admin", "ops"}, "exp": expires}

	for name, denied := range map[string]string{
		"another secret":         jwt(t, "HS256", "guessed", good),
		"an empty secret":        jwt(t, "HS256", "", good),
		"no algorithm":           jwt(t, "none", "s3cret", good),
		"another algorithm":      jwt(t, "HS512", "s3cret", good),
		"expired":                jwt(t, "HS256", "s3cret", map[string]any{"sub": "ann", "aud": "cryo", "exp": time.Now().Add(-time.Hour).Unix()}),
		"not valid yet":          jwt(t, "HS256", "s3cret", map[string]any{"sub": "ann", "aud": "cryo", "nbf": expires}),
		"for another audience":   jwt(t, "HS256", "s3cret", map[string]any{"sub": "ann", "aud": "else", "exp": expires}),
		"no JWT":                 "s3cret",
		"a signature of nothing": ".." + jwt(t, "HS256", "s3cret", good),
	} {
		_, err := cryo.Dial(t.Context(), url, &cryo.DialOptions{Token: denied})
		require.ErrorIs(t, err, cryo.ErrUnauthorized, name)
	}

	s, err := cryo.Dial(t.Context(), url, &cryo.DialOptions{Token: jwt(t, "HS256", "s3cret", good)})
	require.NoError(t, err)
	testkit.WantDelivered(t, s, "hello")
	require.JSONEq(t, `{"user":"ann","roles":["admin","ops"],"expires":`+strconv.FormatInt(expires, 10)+`,"text":"hello"}`, testkit.ReadFile(t, path))
	require.NoError(t, s.Close(t.Context(), ""))
	p.Interrupt()
}

func TestEveryJWTIsDeniedWithoutASecret(t *testing.T) {
	p := example(t, "jwt_clients.yaml", "CRYO_ADDRESS=127.0.0.1:0", "JWT_SECRET=", "FILE="+filepath.Join(t.TempDir(), "messages.jsonl"))
	_, err := cryo.Dial(t.Context(), "ws://"+p.Listening(), &cryo.DialOptions{
		Token: jwt(t, "HS256", "", map[string]any{"sub": "ann", "aud": "cryo"}),
	})
	require.ErrorIs(t, err, cryo.ErrUnauthorized)
}

func TestExpiredJWTIsLogged(t *testing.T) {
	p := example(t, "jwt_clients.yaml", "CRYO_ADDRESS=127.0.0.1:0", "JWT_SECRET=s3cret", "FILE="+filepath.Join(t.TempDir(), "messages.jsonl"))
	_, err := cryo.Dial(t.Context(), "ws://"+p.Listening(), &cryo.DialOptions{
		Token: jwt(t, "HS256", "s3cret", map[string]any{"sub": "ann", "aud": "cryo", "exp": time.Now().Add(-time.Hour).Unix()}),
	})
	require.ErrorIs(t, err, cryo.ErrUnauthorized)
	p.WantLog("line 1", "token is expired")
}

// rotatingKeys is an identity provider with one key at a time.
type rotatingKeys struct {
	mu      sync.Mutex
	fetches int
	public  jose.JSONWebKey
	signer  jose.Signer
}

func (p *rotatingKeys) rotate(t *testing.T, id string) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.public = jose.JSONWebKey{Key: private.Public(), KeyID: id, Algorithm: "ES256", Use: "sig"}
	p.signer, err = jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: private, KeyID: id}}, nil)
	require.NoError(t, err)
}

func (p *rotatingKeys) ServeHTTP(w http.ResponseWriter, _ *http.Request) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.fetches++
	_ = json.NewEncoder(w).Encode(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{p.public}})
}

func (p *rotatingKeys) sign(t *testing.T, claims string) string {
	t.Helper()
	signed, err := p.signer.Sign([]byte(claims))
	require.NoError(t, err)
	token, err := signed.CompactSerialize()
	require.NoError(t, err)
	return token
}

// When a withdrawn key is no longer accepted is a test of internal/jwks, in virtual time.
func TestTokenOfANewKeyIsAcceptedWithoutARestart(t *testing.T) {
	provider := &rotatingKeys{}
	provider.rotate(t, "2026-11")
	server := httptest.NewServer(provider)
	defer server.Close()
	path := filepath.Join(t.TempDir(), "messages.jsonl")
	p := example(t, "jwks_clients.yaml", "CRYO_ADDRESS=127.0.0.1:0", "FILE="+path, "JWKS_URL="+server.URL, "JWT_ISSUER=idp")
	url := "ws://" + p.Listening()
	const claims = `{"sub":1234567890123456785,"aud":["web","cryo"],"iss":"idp","roles":["ops"]}`
	for _, key := range []string{"2026-11", "2026-12"} {
		provider.rotate(t, key)
		for range 3 {
			s, err := cryo.Dial(t.Context(), url, &cryo.DialOptions{Token: provider.sign(t, claims)})
			require.NoError(t, err)
			testkit.WantDelivered(t, s, "hello")
			require.NoError(t, s.Close(t.Context(), ""))
		}
	}
	require.Equal(t, 2, provider.fetches)
	lines := strings.Split(strings.TrimSpace(testkit.ReadFile(t, path)), "\n")
	require.Len(t, lines, 6)
	require.JSONEq(t, `{"user":"1234567890123456785","roles":["ops"],"text":"hello"}`, lines[0])

	for name, denied := range map[string]string{
		"another audience":       provider.sign(t, `{"sub":"ann","aud":"web","iss":"idp"}`),
		"another issuer":         provider.sign(t, `{"sub":"ann","aud":"cryo","iss":"else"}`),
		"expired":                provider.sign(t, `{"sub":"ann","aud":"cryo","iss":"idp","exp":1}`),
		"no algorithm":           jwt(t, "none", "", map[string]any{"sub": "ann", "aud": "cryo", "iss": "idp"}),
		"a symmetric algorithm":  jwt(t, "HS256", provider.public.KeyID, map[string]any{"sub": "ann", "aud": "cryo", "iss": "idp"}),
		"claims without a token": "ann",
	} {
		_, err := cryo.Dial(t.Context(), url, &cryo.DialOptions{Token: denied})
		require.ErrorIs(t, err, cryo.ErrUnauthorized, name)
	}
	p.Interrupt()
}

func TestHTTPServiceAuthorizesClients(t *testing.T) {
	var mu sync.Mutex
	asked, status := 0, http.StatusOK
	service := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		asked++
		body, _ := io.ReadAll(r.Body)
		w.WriteHeader(status)
		switch string(body) {
		case `{"token":"of ann"}`:
			_, _ = io.WriteString(w, `{"allowed":true,"user":"ann","rooms":["a",1234567890123456785]}`)
		case `{"token":"of bob"}`:
			_, _ = io.WriteString(w, `{"allowed":false,"user":"bob"}`)
		default:
			_, _ = io.WriteString(w, `{"user":"nobody"}`)
		}
	}))
	defer service.Close()
	path := filepath.Join(t.TempDir(), "messages.jsonl")
	p := example(t, "authorize_by_http.yaml", "CRYO_ADDRESS=127.0.0.1:0", "FILE="+path, "AUTHORIZE_URL="+service.URL)
	url := "ws://" + p.Listening()
	wantDenied := func(token string, status int) {
		t.Helper()
		_, err := cryo.Dial(t.Context(), url, &cryo.DialOptions{Token: token})
		var denied *cryo.HandshakeError
		require.ErrorAs(t, err, &denied)
		require.Equal(t, status, denied.StatusCode)
	}
	set := func(code int) {
		mu.Lock()
		defer mu.Unlock()
		status = code
	}
	for range 3 {
		s, err := cryo.Dial(t.Context(), url, &cryo.DialOptions{Token: "of ann"})
		require.NoError(t, err)
		testkit.WantDelivered(t, s, "hello")
		require.NoError(t, s.Close(t.Context(), ""))
		wantDenied("of bob", http.StatusUnauthorized)
		wantDenied("of nobody", http.StatusUnauthorized)
	}
	require.Equal(t, 3, asked, "the answers are cached")
	require.JSONEq(t, `{"user":"ann","rooms":["a",1234567890123456785],"text":"hello"}`, strings.Split(strings.TrimSpace(testkit.ReadFile(t, path)), "\n")[0])

	set(http.StatusForbidden)
	wantDenied("of carl", http.StatusUnauthorized)
	set(http.StatusInternalServerError)
	for range 2 {
		wantDenied("of dora", http.StatusServiceUnavailable) // a failure is not cached as a denial
	}
	p.WantLog("authorize_processors failed: HTTP status 500")
	set(http.StatusOK)
	wantDenied("of dora", http.StatusUnauthorized)
	service.CloseClientConnections()
	service.Close()
	for range 2 {
		wantDenied("of eve", http.StatusServiceUnavailable)
	}
	s, err := cryo.Dial(t.Context(), url, &cryo.DialOptions{Token: "of ann"})
	require.NoError(t, err, "the answer is cached")
	require.NoError(t, s.Close(t.Context(), ""))
	p.Interrupt()
}

func TestSessionEndsWithItsJWT(t *testing.T) {
	const id = 7
	path := filepath.Join(t.TempDir(), "messages.jsonl")
	p := example(t, "jwt_clients.yaml", "CRYO_ADDRESS=127.0.0.1:0", "JWT_SECRET=s3cret", "FILE="+path)
	url := "ws://" + p.Listening()
	token := func(subject string, lifetime time.Duration) string {
		return jwt(t, "HS256", "s3cret", map[string]any{"sub": subject, "aud": "cryo", "exp": time.Now().Add(lifetime).Unix()})
	}
	dial := func(token string) (*cryo.Session, error) {
		return cryo.Dial(t.Context(), url, &cryo.DialOptions{Token: token, SessionID: id})
	}

	long, err := dial(token("ann", time.Hour))
	require.NoError(t, err)
	testkit.WantDelivered(t, long, "hello")
	_, err = dial(token("eve", time.Hour))
	require.ErrorIs(t, err, cryo.ErrSessionExists)

	short := token("ann", 5*time.Second)
	s, err := dial(short)
	require.NoError(t, err, "a client with another token of the same owner takes over")
	var closed *cryo.PeerClosedError
	testkit.Next(t, long.Done())
	require.ErrorAs(t, long.Err(), &closed)
	require.Equal(t, "taken over by a newer connection of the same client", closed.Reason)
	testkit.WantDelivered(t, s, "hello")

	testkit.Next(t, s.Done())
	require.ErrorAs(t, s.Err(), &closed)
	require.Equal(t, "session expired", closed.Reason)
	p.WantLog("Closed an expired session", "session="+strconv.Itoa(id), "unacknowledged=0")
	_, err = dial(short)
	require.ErrorIs(t, err, cryo.ErrUnauthorized)
	s, err = dial(token("ann", time.Hour))
	require.NoError(t, err)
	testkit.WantDelivered(t, s, "hello")
	require.NoError(t, s.Close(t.Context(), ""))
	p.Interrupt()
}
