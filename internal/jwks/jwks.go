// Package jwks verifies JWTs with the public keys of a JSON Web Key Set (RFC 7517), which is
// given or fetched from a server that rotates its keys.
package jwks

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"encoding/json"
	"errors"
	"slices"
	"strings"

	"github.com/go-jose/go-jose/v4"
	strictjson "github.com/go-jose/go-jose/v4/json"
	"github.com/go-jose/go-jose/v4/jwt"
)

// maxKeys bounds the keys of a set. Identity providers publish two or three.
const maxKeys = 100

// algorithms are all with a public key. With a symmetric one, a client could sign a token with
// the published key.
var algorithms = []jose.SignatureAlgorithm{
	jose.RS256, jose.RS384, jose.RS512, jose.PS256, jose.PS384, jose.PS512, jose.ES256, jose.ES384, jose.ES512, jose.EdDSA,
}

// Set is the public keys for signatures of a key set. It is read-only.
type Set []jose.JSONWebKey

// Parse parses the JSON of a key set. It ignores keys that verify no signature, such as those
// for encryption, symmetric and private ones, and those of an unknown type. A set without any
// other key is an error.
func Parse(text []byte) (Set, error) {
	var published struct {
		Keys []json.RawMessage `json:"keys"`
	}
	if err := json.Unmarshal(text, &published); err != nil {
		return nil, errors.New("the key set is not a JSON object with a list of keys")
	}
	if len(published.Keys) > maxKeys {
		return nil, errors.New("the key set contains more than 100 keys")
	}
	var set Set
	for _, text := range published.Keys {
		var key jose.JSONWebKey
		if err := json.Unmarshal(text, &key); err == nil && key.IsPublic() && key.Use != "enc" {
			set = append(set, key)
		}
	}
	if len(set) == 0 {
		return nil, errors.New("the key set contains no public key for signatures")
	}
	return set, nil
}

// Key returns the key that a token's header names, if it is for the algorithm. A token that names
// none fits a set of one key. The error is ErrUnknownKey.
func (s Set) Key(header jose.Header) (jose.JSONWebKey, error) {
	at := slices.IndexFunc(s, func(key jose.JSONWebKey) bool {
		named := key.KeyID == header.KeyID || header.KeyID == "" && len(s) == 1
		return named && verifies(key, jose.SignatureAlgorithm(header.Algorithm))
	})
	if at < 0 {
		return jose.JSONWebKey{}, ErrUnknownKey
	}
	return s[at], nil
}

// verifies reports whether a key is for an algorithm. Keys of different types may have the same id.
func verifies(key jose.JSONWebKey, algorithm jose.SignatureAlgorithm) bool {
	if key.Algorithm != "" && key.Algorithm != string(algorithm) {
		return false
	}
	switch public := key.Key.(type) {
	case *rsa.PublicKey:
		return strings.HasPrefix(string(algorithm), "RS") || strings.HasPrefix(string(algorithm), "PS")
	case *ecdsa.PublicKey:
		return algorithm == curves[public.Curve]
	case ed25519.PublicKey:
		return algorithm == jose.EdDSA
	default:
		return false
	}
}

// curves are the algorithms with elliptic curves. Each has one curve.
var curves = map[elliptic.Curve]jose.SignatureAlgorithm{elliptic.P256(): jose.ES256, elliptic.P384(): jose.ES384, elliptic.P521(): jose.ES512}

// TokenError is the reason why a token is rejected. Its text contains no part of the token.
type TokenError string

func (e TokenError) Error() string { return string(e) }

// The reasons why a token is rejected.
const (
	ErrMalformed   TokenError = "token is malformed, or signed with an algorithm without a public key"
	ErrExtension   TokenError = "token has an extension of JWS in its header (crit or b64)"
	ErrUnknownKey  TokenError = "token is signed with a key that is not in the key set"
	ErrSignature   TokenError = "token signature is invalid"
	ErrExpired     TokenError = "token is expired"
	ErrNotValidYet TokenError = "token is not valid yet"
	ErrAudience    TokenError = "token is for another audience"
	ErrIssuer      TokenError = "token is of another issuer"
)

// Expected are the claims that a token must have. An empty field is not checked.
type Expected struct {
	Audience string // aud, or one of its elements
	Issuer   string // iss
}

// Keys returns the key for a token with a header.
type Keys func(jose.Header) (jose.JSONWebKey, error)

// Verify checks a token's signature, the claims that are expected, and exp and nbf if the token
// has them. It returns the claims, with numbers as json.Number, so that no digit is lost. The
// error is a TokenError, or that of keys.
func Verify(token string, expected Expected, keys Keys) (map[string]any, error) {
	signed, err := jose.ParseSignedCompact(token, algorithms)
	if err != nil {
		return nil, ErrMalformed
	}
	// The library supports one extension, b64 (RFC 7797), which changes the signed content. JWTs use none.
	for _, name := range []jose.HeaderKey{"crit", "b64"} {
		if _, extended := signed.Signatures[0].Protected.ExtraHeaders[name]; extended {
			return nil, ErrExtension
		}
	}
	key, err := keys(signed.Signatures[0].Header)
	if err != nil {
		return nil, err
	}
	payload, err := signed.Verify(key.Key)
	if err != nil {
		return nil, ErrSignature
	}
	var checked struct { // the others may be of any type
		Issuer    string           `json:"iss"`
		Audience  jwt.Audience     `json:"aud"`
		Expiry    *jwt.NumericDate `json:"exp"`
		NotBefore *jwt.NumericDate `json:"nbf"`
	}
	decoder := json.NewDecoder(bytes.NewReader(payload))
	decoder.UseNumber()
	var claims map[string]any
	// The strict decoder rejects a claim that occurs twice, and distinguishes exp and Exp.
	if strictjson.Unmarshal(payload, &checked) != nil || decoder.Decode(&claims) != nil || claims == nil {
		return nil, ErrMalformed
	}
	known := jwt.Claims{Issuer: checked.Issuer, Audience: checked.Audience, Expiry: checked.Expiry, NotBefore: checked.NotBefore}
	want := jwt.Expected{Issuer: expected.Issuer}
	if expected.Audience != "" {
		want.AnyAudience = jwt.Audience{expected.Audience}
	}
	switch err := known.ValidateWithLeeway(want, 0); {
	case err == nil:
		return claims, nil
	case errors.Is(err, jwt.ErrExpired):
		return nil, ErrExpired
	case errors.Is(err, jwt.ErrNotValidYet):
		return nil, ErrNotValidYet
	case errors.Is(err, jwt.ErrInvalidAudience):
		return nil, ErrAudience
	case errors.Is(err, jwt.ErrInvalidIssuer):
		return nil, ErrIssuer
	default:
		return nil, ErrMalformed
	}
}
