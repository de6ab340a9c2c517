package redact_test

import (
	"encoding/base64"
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/internal/cryotest"
	"github.com/cryo-connect/cryo-connect/internal/redact"
)

const secret = "Zm9v+YmFyYmF6/cXV4Cg=="

func TestPlainTextIsRepeated(t *testing.T) {
	s := redact.New(secret, "5")
	for _, text := range []string{
		"", "Session already exists", "The session already exists.", "The token was rejected.", "The parameter authorization with a Bearer token is missing.",
		"The parameter x-cryo-sid must be an unsigned 64-bit decimal number.", "Too much session metadata: 61 fields (limit 64), 900 bytes (limit 8192).",
		"Client sent an HTTP request to an HTTPS server.", "Overloaded: closed sessions are still draining.", "taken over by a newer connection of the same client",
		"upstream connect error or disconnect/reset before headers. reset reason: connection termination", "no healthy upstream", "404 page not found",
		"order 17 of 2026-11-30 has no customer", "could not be delivered", "timed out after 30s", "Das Konto ist gelöscht",
		`{"type":"about:blank","title":"Unauthorized","status":401,"detail":"The access token expired","instance":"/cryo"}`,
		`{"timestamp":"2026-11-30T04:10:11.123+00:00","status":404,"error":"Not Found","path":"/cryo"}`, `{"statusCode":401,"error":"Unauthorized","message":"Invalid token"}`,
		`{"kind":"Status","apiVersion":"v1","metadata":{},"status":"Failure","code":401}`, "UNAUTHENTICATED", "RST_STREAM closed stream. HTTP/2 error code: PROTOCOL_ERROR",
		"WebSocket idle timeout exceeded", "Missing or invalid Sec-WebSocket-Key header", "x448: not implemented", "Expected OAuth 2 access token", "JSONDecodeError", "read ECONNRESET",
		"payload too large: 17000000 bytes", "NullPointerException", "violates unique constraint `events_pkey`", "missing userId", "token expired at 2026-11-30T04:00:00Z",
	} {
		require.True(t, s.Plain(text), text)
		require.Equal(t, text, s.Text(text))
	}
}

func TestTextThatMayContainASecretIsRedacted(t *testing.T) {
	s := redact.New(secret, "correct horse", "s3c", "4815162342")
	for _, text := range []string{
		"nothing at /?authorization=Bearer+x", "a=b", "100%", "back\\slash", "Tom & Jerry", "Q29ycmVjdA", "deadbeef42cafe", "it is correct, horse", "s3c",
		"48151 62342", "correct-horse", "CORRECT HORSE", "a word of aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "1 2 3 4 5 6 7 8 9 10 11", "cXV4Cg", "0123456", "2026-11-30T04:00:00Z and 2026-11-30T04:00:01Z", "ONSWG4TFOQ", "aBcDeF", "AbCdEf", "17000000 > 16777216",
	} {
		require.False(t, s.Plain(text), text)
		require.Equal(t, fmt.Sprintf("(redacted: %d bytes)", len(text)), s.Text(text))
	}
}

func TestWithoutSecretsEveryTextIsPlain(t *testing.T) {
	for _, s := range []*redact.Secrets{nil, {}, redact.New(), redact.New("", "")} {
		require.True(t, s.Plain("a=b&c=%2B"))
		require.False(t, s.In("a=b&c=%2B"))
	}
}

func TestRedactedTextContainsNoToken(t *testing.T) {
	repeated := 0
	for seed := range uint64(20_000) {
		rng := rand.New(rand.NewPCG(21, seed))
		token := cryotest.RandomToken(rng)
		text := cryotest.Repeat(rng, token)
		line := redact.New(token).Text(text)
		if line == text {
			repeated++
		}
		if part := cryotest.PartOf(token, line); part != "" {
			t.Fatalf("seed %d: %q of the token %q is in the line %q", seed, part, token, line)
		}
	}
	require.Greater(t, repeated, 100, "short parts may be repeated")
}

func TestSpellingsOfFrameworksAreRedacted(t *testing.T) {
	for _, text := range []string{
		`/?authorization=Bearer Zm9v+YmFyYmF6\/cXV4Cg==&x-cryo-sid=1`, `Bearer Zm9v\u002BYmFyYmF6/cXV4Cg==`, `Bearer Zm9v+YmFyYmF6/cXV4Cg\u003d\u003d`,
		"?rd=%2F%3Fauthorization%3DBearer%2520Zm9v%252BYmFyYmF6%252FcXV4Cg%253D%253D", "Zm9v%2bYmFyYmF6%2fcXV4Cg%3d%3d", "Zm9v&#43;YmFyYmF6&#x2F;cXV4Cg&#x3D;&#x3D;",
		base64.StdEncoding.EncodeToString([]byte("GET /?authorization=Bearer+" + secret)),
	} {
		require.Equal(t, fmt.Sprintf("(redacted: %d bytes)", len(text)), redact.New(secret).Text(text))
	}
}
