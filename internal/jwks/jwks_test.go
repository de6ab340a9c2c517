package jwks_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	mathrand "math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/internal/jwks"
)

// key is a private key of an identity provider.
type key struct {
	id        string
	algorithm jose.SignatureAlgorithm
	private   crypto.Signer
}

func newKey(t testing.TB, id string, algorithm jose.SignatureAlgorithm) key {
	t.Helper()
	k := key{id: id, algorithm: algorithm}
	var err error
	switch algorithm {
	case jose.ES256:
		k.private, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	case jose.ES384:
		k.private, err = ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	case jose.ES512:
		k.private, err = ecdsa.GenerateKey(elliptic.P521(), rand.Reader)
	case jose.EdDSA:
		_, k.private, err = ed25519.GenerateKey(rand.Reader)
	default:
		k.private, err = rsa.GenerateKey(rand.Reader, 2048)
	}
	require.NoError(t, err)
	return k
}

// public is the published key.
func (k key) public() jose.JSONWebKey {
	return jose.JSONWebKey{Key: k.private.Public(), KeyID: k.id, Algorithm: string(k.algorithm), Use: "sig"}
}

// sign makes a token of claims.
func (k key) sign(t testing.TB, claims string) string {
	t.Helper()
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: k.algorithm, Key: jose.JSONWebKey{Key: k.private, KeyID: k.id}}, nil)
	require.NoError(t, err)
	signed, err := signer.Sign([]byte(claims))
	require.NoError(t, err)
	token, err := signed.CompactSerialize()
	require.NoError(t, err)
	return token
}

// published is the JSON of a key set.
func published(t testing.TB, keys ...jose.JSONWebKey) []byte {
	t.Helper()
	text, err := json.Marshal(jose.JSONWebKeySet{Keys: keys})
	require.NoError(t, err)
	return text
}

func parsed(t testing.TB, keys ...jose.JSONWebKey) jwks.Set {
	t.Helper()
	set, err := jwks.Parse(published(t, keys...))
	require.NoError(t, err)
	return set
}

func verify(set jwks.Set, token string) (map[string]any, error) {
	return jwks.Verify(token, jwks.Expected{}, set.Key)
}

func TestTokensOfAllAsymmetricAlgorithmsAreVerified(t *testing.T) {
	for _, algorithm := range []jose.SignatureAlgorithm{jose.RS256, jose.RS384, jose.RS512, jose.PS256, jose.PS384, jose.PS512, jose.ES256, jose.ES384, jose.ES512, jose.EdDSA} {
		good, other := newKey(t, "a", algorithm), newKey(t, "a", algorithm)
		claims, err := verify(parsed(t, good.public()), good.sign(t, `{"sub":"ann"}`))
		require.NoError(t, err, algorithm)
		require.Equal(t, map[string]any{"sub": "ann"}, claims)
		_, err = verify(parsed(t, other.public()), good.sign(t, `{"sub":"ann"}`))
		require.ErrorIs(t, err, jwks.ErrSignature, algorithm)
	}
}

// unsigned makes a token with any header and signature.
func unsigned(header, claims string, signature func(signed string) []byte) string {
	encode := base64.RawURLEncoding.EncodeToString
	signed := encode([]byte(header)) + "." + encode([]byte(claims))
	return signed + "." + encode(signature(signed))
}

func TestForgedTokensAreRejected(t *testing.T) {
	k := newKey(t, "a", jose.RS256)
	unnamed := k.public()
	unnamed.Algorithm = "" // the header's algorithm would decide
	set := parsed(t, unnamed)
	der, err := x509.MarshalPKIXPublicKey(k.private.Public())
	require.NoError(t, err)
	nothing := func(string) []byte { return nil }
	withSecret := func(secret []byte) func(string) []byte {
		return func(signed string) []byte {
			mac := hmac.New(sha256.New, secret)
			mac.Write([]byte(signed))
			return mac.Sum(nil)
		}
	}
	good := k.sign(t, `{"sub":"ann"}`)
	parts := strings.Split(good, ".")
	for name, forged := range map[string]string{
		"no algorithm":                   unsigned(`{"alg":"none","kid":"a"}`, `{}`, nothing),
		"no algorithm in capitals":       unsigned(`{"alg":"NONE","kid":"a"}`, `{}`, nothing),
		"without the field":              unsigned(`{"kid":"a"}`, `{}`, nothing),
		"HMAC with the public key":       unsigned(`{"alg":"HS256","kid":"a"}`, `{}`, withSecret(der)),
		"HMAC with the PEM":              unsigned(`{"alg":"HS256","kid":"a"}`, `{}`, withSecret(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}))),
		"a curve with an RSA key":        unsigned(`{"alg":"ES256","kid":"a"}`, `{}`, func(string) []byte { return make([]byte, 64) }),
		"an unknown critical header":     unsigned(`{"alg":"RS256","kid":"a","crit":["x"],"x":1}`, `{}`, nothing),
		"its own key":                    unsigned(`{"alg":"RS256","kid":"a","jwk":{"kty":"oct","k":"AA"}}`, `{}`, nothing),
		"other claims":                   parts[0] + "." + base64.RawURLEncoding.EncodeToString([]byte(`{"sub":"bob"}`)) + "." + parts[2],
		"no signature":                   parts[0] + "." + parts[1] + ".",
		"two parts":                      parts[0] + "." + parts[1],
		"the signature of another token": parts[0] + "." + parts[1] + "." + strings.Split(k.sign(t, `{"sub":"bob"}`), ".")[2],
		"nothing":                        "",
		"JSON":                           `{"payload":"e30","signatures":[]}`,
	} {
		_, err := verify(set, forged)
		require.ErrorAs(t, err, new(jwks.TokenError), name)
	}
	_, err = verify(set, good)
	require.NoError(t, err)
}

func TestTokensWithExtensionsAreRejected(t *testing.T) {
	k := newKey(t, "a", jose.EdDSA)
	private := k.private.(ed25519.PrivateKey)
	sign := func(header, signed string) string {
		return unsigned(header, `{"sub":"ann"}`, func(encoded string) []byte {
			if signed == "" {
				return ed25519.Sign(private, []byte(encoded))
			}
			head, _, _ := strings.Cut(encoded, ".")
			return ed25519.Sign(private, []byte(head+"."+signed))
		})
	}
	_, err := verify(parsed(t, k.public()), sign(`{"alg":"EdDSA","kid":"a"}`, ""))
	require.NoError(t, err, "without")
	for header, signed := range map[string]string{
		`{"alg":"EdDSA","kid":"a","crit":["b64"],"b64":false}`: `{"sub":"ann"}`,
		`{"alg":"EdDSA","kid":"a","b64":false}`:                `{"sub":"ann"}`,
		`{"alg":"EdDSA","kid":"a","crit":["b64"],"b64":true}`:  "",
		`{"alg":"EdDSA","kid":"a","crit":["exp"]}`:             "",
		`{"alg":"EdDSA","kid":"a","crit":[]}`:                  "",
	} {
		_, err := verify(parsed(t, k.public()), sign(header, signed))
		require.ErrorIs(t, err, jwks.ErrExtension, header)
	}
}

func TestKeyVerifiesOnlyItsAlgorithm(t *testing.T) {
	k := newKey(t, "a", jose.RS256)
	other := k
	other.algorithm = jose.PS256
	_, err := verify(parsed(t, k.public()), other.sign(t, `{}`))
	require.ErrorIs(t, err, jwks.ErrUnknownKey)
}

// RFC 7517, section 4.5: keys of different types may have the same id.
func TestKeysWithOneIDAreDistinguishedByTheirTypes(t *testing.T) {
	var keys []key
	var set []jose.JSONWebKey
	for _, algorithm := range []jose.SignatureAlgorithm{jose.ES384, jose.RS256, jose.ES256, jose.EdDSA, jose.ES512} {
		k := newKey(t, "a", algorithm)
		unnamed := k.public()
		unnamed.Algorithm = ""
		keys, set = append(keys, k), append(set, unnamed)
	}
	for i, k := range keys {
		_, err := verify(parsed(t, set...), k.sign(t, `{}`))
		require.NoError(t, err, k.algorithm)
		_, err = verify(parsed(t, append(set[:i:i], set[i+1:]...)...), k.sign(t, `{}`))
		require.ErrorIs(t, err, jwks.ErrUnknownKey, k.algorithm)
	}
}

func TestTokenNamesItsKeyUnlessThereIsOne(t *testing.T) {
	a, b := newKey(t, "a", jose.ES256), newKey(t, "b", jose.ES256)
	nameless := a
	nameless.id = ""
	_, err := verify(parsed(t, a.public()), nameless.sign(t, `{}`))
	require.NoError(t, err)
	_, err = verify(parsed(t, a.public(), b.public()), nameless.sign(t, `{}`))
	require.ErrorIs(t, err, jwks.ErrUnknownKey)
	_, err = verify(parsed(t, nameless.public()), a.sign(t, `{}`))
	require.ErrorIs(t, err, jwks.ErrUnknownKey)
	for _, k := range []key{a, b} {
		_, err = verify(parsed(t, a.public(), b.public()), k.sign(t, `{}`))
		require.NoError(t, err)
	}
}

func TestKeysThatVerifyNothingAreIgnored(t *testing.T) {
	good := newKey(t, "good", jose.ES256)
	encrypting := newKey(t, "good", jose.ES256).public()
	encrypting.Use = "enc"
	ignored := []string{
		`{"kty":"oct","kid":"good","k":"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"}`,
		`{"kty":"new","kid":"good"}`, `{}`, `5`, `null`,
	}
	private, err := json.Marshal(jose.JSONWebKey{Key: newKey(t, "good", jose.ES256).private, KeyID: "good"})
	require.NoError(t, err)
	for _, k := range []jose.JSONWebKey{encrypting, good.public()} {
		text, err := json.Marshal(k)
		require.NoError(t, err)
		ignored = append(ignored, string(text))
	}
	set, err := jwks.Parse([]byte(`{"keys":[` + string(private) + "," + strings.Join(ignored, ",") + `]}`))
	require.NoError(t, err)
	require.Len(t, set, 1)
	_, err = verify(set, good.sign(t, `{}`))
	require.NoError(t, err)
}

func TestMalformedKeySetsAreErrors(t *testing.T) {
	for text, words := range map[string]string{
		``: "not a JSON object", `[]`: "not a JSON object", `{"keys":5}`: "not a JSON object", `<html>`: "not a JSON object",
		`{}`: "no public key", `{"keys":[]}`: "no public key", `{"keys":[{"kty":"oct","k":"AAAA"}]}`: "no public key",
		`{"keys":[` + strings.Repeat("{},", 100) + `{}]}`: "more than 100 keys",
	} {
		_, err := jwks.Parse([]byte(text))
		require.ErrorContains(t, err, words, text)
	}
}

func TestClaimsAreChecked(t *testing.T) {
	k := newKey(t, "a", jose.EdDSA)
	set := parsed(t, k.public())
	now := time.Now().Unix()
	for claims, want := range map[string]error{
		fmt.Sprintf(`{"exp":%d,"nbf":%d}`, now+60, now-60): nil,
		fmt.Sprintf(`{"exp":%d}`, now-60):                  jwks.ErrExpired,
		fmt.Sprintf(`{"nbf":%d}`, now+60):                  jwks.ErrNotValidYet,
		fmt.Sprintf(`{"iat":%d}`, now+60):                  nil,
		fmt.Sprintf(`{"exp":%d,"EXP":%d}`, now-60, now+60): jwks.ErrExpired,
		fmt.Sprintf(`{"exp":%d,"exp":%d}`, now-60, now+60): jwks.ErrMalformed,
		fmt.Sprintf(`{"exp":"%d"}`, now-60):                jwks.ErrMalformed,
		`{"exp":1e400}`:                                    jwks.ErrMalformed, `[]`: jwks.ErrMalformed, `null`: jwks.ErrMalformed, `text`: jwks.ErrMalformed, ``: jwks.ErrMalformed,
		`{"aud":5}`: jwks.ErrMalformed, `{"sub":5,"jti":[],"iat":"then"}`: nil,
	} {
		_, err := verify(set, k.sign(t, claims))
		if want == nil {
			require.NoError(t, err, claims)
		} else {
			require.ErrorIs(t, err, want, claims)
		}
	}
	expected := jwks.Expected{Audience: "cryo", Issuer: "https://idp"}
	for claims, want := range map[string]error{
		`{"aud":"cryo","iss":"https://idp"}`:          nil,
		`{"aud":["web","cryo"],"iss":"https://idp"}`:  nil,
		`{"aud":"cryonic","iss":"https://idp"}`:       jwks.ErrAudience,
		`{"aud":[],"iss":"https://idp"}`:              jwks.ErrAudience,
		`{"iss":"https://idp"}`:                       jwks.ErrAudience,
		`{"aud":"cryo"}`:                              jwks.ErrIssuer,
		`{"aud":"cryo","iss":"https://idp.evil.com"}`: jwks.ErrIssuer,
	} {
		_, err := jwks.Verify(k.sign(t, claims), expected, set.Key)
		if want == nil {
			require.NoError(t, err, claims)
		} else {
			require.ErrorIs(t, err, want, claims)
		}
	}
}

func TestNumbersKeepTheirDigits(t *testing.T) {
	k := newKey(t, "a", jose.EdDSA)
	set := parsed(t, k.public())
	rng := mathrand.New(mathrand.NewPCG(1, 2))
	for range 100 {
		n := fmt.Sprint(rng.Uint64() >> rng.IntN(64))
		claims, err := verify(set, k.sign(t, `{"uid":`+n+`,"a":{"b":[`+n+`]}}`))
		require.NoError(t, err)
		require.Equal(t, map[string]any{"uid": json.Number(n), "a": map[string]any{"b": []any{json.Number(n)}}}, claims)
	}
}
