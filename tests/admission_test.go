package tests

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"path/filepath"
	"strconv"
	"testing"
	"time"

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
