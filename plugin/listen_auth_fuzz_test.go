package plugin

import (
	"net/http"
	"net/url"
	"strings"
	"testing"
	"unicode"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// fuzzedAdmissions are mappings that make something of all that a client sends.
var fuzzedAdmissions = []string{
	`root = this.token.parse_json()`,
	`root.claims = this.token.parse_json()`,
	`root = this.token.parse_json().map_each_key(k -> k.uppercase())`,
	`root = this.query.merge({ "user": this.token, "headers": this.headers })`,
	`root.secret = this.token.decode("base64rawurl").` + decrypting,
	`root.number = this.token.number()` + "\n" + `root.list = this.token.split(".").map_each(t -> t.decode("base64rawurl").catch(null))`,
	`root = this.remote_address.re_find_all_submatch("(.*):(.*)").index(0)`,
}

// fuzzedAnswers are mappings that make something of any answer: the processors of fuzzedAdmissions
// return what the token, the query or the headers contain.
var fuzzedAnswers = []string{
	`root = this.answer`,
	`root.a.b = [ this.answer ]`,
	`root = if this.answer.type() == "object" { this.answer.without("token") } else { { "text": this.answer } }`,
	`root = this.token.parse_jwt_jwks(this.answer)`,
}

// FuzzAdmission asks listeners about any request. Whatever it is, the client comes in
// with metadata that are text and bounded, or is denied with a reason that has
// nothing of its token.
func FuzzAdmission(f *testing.F) {
	const trusting = "session_metadata: { query_parameters: [ room, \"\" ], headers: [ X-Room, Host ] }, trusted_proxies: [ 0.0.0.0/0, '::/0' ], allowed_origins: [ 'https://a.example' ]"
	var components []*serverComponent
	add := func(fields string) {
		conf, err := specs()["input cryo_server"].ParseYAML("{ address: '"+somewhere+"', "+trusting+", "+fields+" }", nil)
		require.NoError(f, err)
		in, err := newServerInput(conf, conf.Resources())
		require.NoError(f, err)
		require.NoError(f, dependencies{}.complete(conf, in.serverComponent))
		components = append(components, in.serverComponent)
	}
	for _, header := range []string{headerXForwardedFor, headerForwarded} {
		for _, mapping := range fuzzedAdmissions {
			add("forwarded_header: " + header + ", authorize: " + mapped(mapping))
		}
	}
	for _, processor := range []string{`root = this.token`, `root = this`, `root = this.query.room.parse_json()`, `root = this.headers.get("x-room").bytes().` + decrypting, `root = if this.token == "" { deleted() } else { [ this.query, this.token ] }`} {
		for _, mapping := range fuzzedAnswers {
			add("authorize: " + mapped(mapping) + ", authorize_processors: [ { mapping: " + mapped(processor) + " } ]")
		}
	}
	for i := range components {
		f.Add(uint8(i), `{"sub":"ann","exp":1e400,"roles":["a",null],"a":{"b":{}}}`, "room=5&room=6&=x", "10.0.0.1, [2001:db8::1%25lo]:80", "https://a.example", "192.0.2.1:5")
		f.Add(uint8(i), "aGVsbG8", "room=", "", "https://b.example", "[::1]:5")
		f.Add(uint8(i), `{"keys":[{"kty":"OKP","crv":"Ed25519","x":"AAAA","kid":null}],"uid":9007199254740993}`, `room={"token":"a","n":1e300}`, "10.0.0.1", "null", "192.0.2.1:5")
		f.Add(uint8(i), "aGVsbG8.\xff", "%zz;&&==", `for="[::1]:4711";proto=https, for=unknown`, "null", "@")
	}
	f.Fuzz(func(t *testing.T, at uint8, token, query, forwarded, origin, remote string) {
		c := components[int(at)%len(components)]
		r := &http.Request{URL: &url.URL{RawQuery: query}, RemoteAddr: remote, Header: http.Header{
			"X-Forwarded-For": {forwarded}, "Forwarded": {forwarded, query}, "X-Room": {token}, "Origin": {origin},
		}}
		r.RemoteAddr = c.settings.clientAddress(r)
		c.settings.allowsOrigin(r)
		u := &cryo.Upgrade{Token: token, SessionID: 7, Request: r}
		if err := c.authorize(u); err != nil {
			if len(token) > 20 {
				require.NotContains(t, err.Error(), token)
			}
			return
		}
		known := u.Value.(*identity)
		require.LessOrEqual(t, len(known.metadata), maxIdentityFields+2)
		size := 0
		for key, value := range known.metadata {
			text, ok := value.(string)
			require.True(t, ok, "%s is %T", key, value)
			require.True(t, strings.HasPrefix(key, "cryo_"), key)
			if key != metaRemoteAddress {
				require.False(t, strings.ContainsFunc(key+text, unicode.IsControl), "%q: %q", key, text)
			}
			size += len(key) + len(text)
		}
		require.Equal(t, known.bytes, size)
		require.LessOrEqual(t, size, maxIdentityBytes+len(r.RemoteAddr)+100)
	})
}
