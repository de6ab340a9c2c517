package plugin

import (
	"crypto/ed25519"
	"crypto/rand"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/redpanda-data/benthos/v4/public/bloblang"
	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// identityProvider signs tokens, and publishes its key as long as it is up.
type identityProvider struct {
	url    string
	signer jose.Signer
	keys   string // its key set
	down   atomic.Bool
}

func newIdentityProvider(t *testing.T) *identityProvider {
	t.Helper()
	public, private, err := ed25519.GenerateKey(rand.Reader)
	require.NoError(t, err)
	p := &identityProvider{}
	keys, err := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: public, KeyID: "1"}}})
	require.NoError(t, err)
	p.keys = string(keys)
	p.signer, err = jose.NewSigner(jose.SigningKey{Algorithm: jose.EdDSA, Key: jose.JSONWebKey{Key: private, KeyID: "1"}}, nil)
	require.NoError(t, err)
	return p
}

// serve publishes the keys, over a real socket.
func (p *identityProvider) serve(t *testing.T) *identityProvider {
	t.Helper()
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		if p.down.Load() {
			w.WriteHeader(http.StatusBadGateway)
		}
		_, _ = w.Write([]byte(p.keys))
	}))
	t.Cleanup(server.Close)
	p.url = server.URL
	return p
}

func (p *identityProvider) sign(t *testing.T, claims string) string {
	t.Helper()
	signed, err := p.signer.Sign([]byte(claims))
	require.NoError(t, err)
	token, err := signed.CompactSerialize()
	require.NoError(t, err)
	return token
}

func TestKeySetOfAMethodIsAURLOrTheKeysThemselves(t *testing.T) {
	p := newIdentityProvider(t).serve(t)
	client := map[string]any{"token": p.sign(t, `{"aud":"cryo","iss":"idp","uid":1234567890123456785}`), "keys": p.keys, "url": p.url}
	for _, args := range []string{
		`"` + p.url + `"`, `this.url`, `this.keys`, `this.keys.bytes()`, `this.keys.parse_json()`, `this.keys.parse_json(use_number: true)`,
		`keys: this.keys, audience: "cryo"`, `keys: this.keys, issuer: "idp", audience: "cryo"`,
	} {
		mapping, err := bloblang.Parse(`root = this.token.parse_jwt_jwks(` + args + `).uid.string()`)
		require.NoError(t, err, args)
		uid, err := mapping.Query(client)
		require.NoError(t, err, args)
		require.Equal(t, "1234567890123456785", uid, args)
	}
	for args, words := range map[string]string{
		`keys: this.keys, audience: "web"`: "another audience",
		`keys: this.keys, issuer: "else"`:  "another issuer",
		`this.none`:                        "keys must be a URL, or a key set",
		`this.token`:                       "the URL of the key set must be https://",
		`this.url + "x"`:                   "the URL of the key set is malformed",
		`this.keys.replace("keys", "")`:    "no public key",
	} {
		mapping, err := bloblang.Parse(`root = this.token.parse_jwt_jwks(` + args + `)`)
		require.NoError(t, err, args)
		_, err = mapping.Query(client)
		require.ErrorContains(t, err, words, args)
	}
}

func TestMistakesInTheArgumentsFailTheStart(t *testing.T) {
	for args, words := range map[string]string{
		``:                                "missing parameter: keys",
		`"http://login.example.com/"`:     "must be https://",
		`"{}"`:                            "no public key",
		`5`:                               "keys must be a URL, or a key set",
		`keys: "https://a", audience: ""`: "audience must not be empty",
		`keys: "https://a", issuer: ""`:   "issuer must not be empty",
		`"https://a", "cryo", "b", "c"`:   "wrong number of arguments",
	} {
		err := construct(t, "input", "cryo_server", "{ address: 'localhost:0', authorize: "+mapped(`root = this.token.parse_jwt_jwks(`+args+`)`)+" }")
		require.ErrorContains(t, err, words, args)
	}
}

func TestTokensOfAKeySetAuthorizeClients(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		const authorize = `root = this.token.parse_jwt_jwks(keys: this.answer, audience: "cryo").without("aud")`
		p := newIdentityProvider(t)
		other := newIdentityProvider(t)
		e.run(asking(authorize, "{ mapping: "+mapped(`root = `+p.keys)+" }"), toProbe)
		client, err := e.tryDial(cryo.DialOptions{Token: p.sign(t, `{"aud":"cryo","uid":1234567890123456785,"a":[{"b":9007199254740993}]}`)})
		require.NoError(t, err)
		send(client, "hello")
		got := metadataOf(t, e.arrival().batch[0])
		require.Equal(t, "1234567890123456785", got["cryo_auth_uid"])
		require.Equal(t, `[{"b":9007199254740993}]`, got["cryo_auth_a"])

		for token, log := range map[string]string{
			p.sign(t, `{"aud":"web"}`):                "authorize failed in line 1: token is for another audience",
			p.sign(t, `{"aud":"cryo","exp":1}`):       "authorize failed in line 1: token is expired",
			other.sign(t, `{"aud":"cryo"}`):           "authorize failed in line 1: token signature is invalid",
			strings.Repeat("eyJhbGciOi", 5) + "hush.": "authorize failed in line 1: token is malformed",
		} {
			e.wantDenied(cryo.DialOptions{Token: token}, http.StatusUnauthorized)
			time.Sleep(time.Second) // of the limit of the log
			e.log.want(t, log)
			for _, part := range append(strings.Split(token, "."), "hush") {
				require.True(t, part == "" || e.log.count(part) == 0, part)
			}
		}
	})
}

func TestClientMayReconnectWhenTheKeySetCannotBeFetched(t *testing.T) {
	p := newIdentityProvider(t).serve(t)
	p.down.Store(true)
	conf, err := specs()["input cryo_server"].ParseYAML("{ address: '"+somewhere+"', authorize: "+mapped(`root = this.token.parse_jwt_jwks("`+p.url+`/?secret=s3cret")`)+" }", nil)
	require.NoError(t, err)
	in, err := newServerInput(conf, conf.Resources())
	require.NoError(t, err)
	u := &cryo.Upgrade{Token: p.sign(t, `{"sub":"ann"}`), SessionID: 7, Request: httptest.NewRequest(http.MethodGet, "/", nil)}

	err = in.authorize(u)
	var denied *cryo.AdmissionError
	require.ErrorAs(t, err, &denied)
	require.Equal(t, http.StatusServiceUnavailable, denied.StatusCode)
	require.ErrorContains(t, err, "authorize failed in line 1: cannot fetch the key set from 127.0.0.1:")
	require.ErrorContains(t, err, ": status 502: Clients cannot be authorized at the moment.")
	require.NotContains(t, err.Error(), "s3cret")

	p.down.Store(false)
	require.NoError(t, in.authorize(u))
	require.Equal(t, "ann", u.Value.(*identity).metadata["cryo_auth_sub"])
}
