package plugin

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"github.com/redpanda-data/benthos/v4/public/bloblang"

	"github.com/cryo-connect/cryo-connect/internal/jwks"
)

// The Bloblang method for JWTs of an identity provider that publishes its keys.

const jwksMethod = "parse_jwt_jwks"

// keySets are the key sets of this process that are fetched.
var keySets jwks.Sources

func init() {
	spec := bloblang.NewPluginSpec().
		Category("JSON Web Tokens").
		Description(fmt.Sprintf("Verifies a JWT with the public keys of a JSON Web Key Set (JWKS), and returns its claims. Integers keep all their digits. An expired token (`exp`), one that is not valid yet (`nbf`), and one that is not signed with RS, PS, ES (256, 384 or 512 bits) or EdDSA are errors.\n\nKeys of a URL are fetched when they are first used, when they are older than %v, and when a token names an unknown key. If they cannot be fetched, they stay in use for up to %v. A fetch takes at most 5 seconds, and uses the proxy of the environment (HTTPS_PROXY).", jwks.MaxAge, jwks.MaxStale)).
		Param(bloblang.NewAnyParam("keys").Description("The URL of the key set, or the key set itself as an object or JSON. A URL must be https, unless it is a loopback address; never make it from a token.")).
		Param(bloblang.NewStringParam("audience").Description("The required audience: the `aud` claim, or one of its elements.").Optional()).
		Param(bloblang.NewStringParam("issuer").Description("The required issuer: the `iss` claim.").Optional()).
		Example("Claims of a token for one audience.", `root = this.token.parse_jwt_jwks(keys: "https://login.example.com/.well-known/jwks.json", audience: "cryo")`)
	bloblang.MustRegisterMethodV2(jwksMethod, spec, newJWKSMethod)
}

func newJWKSMethod(args *bloblang.ParsedParams) (bloblang.Method, error) {
	published, err := args.Get("keys")
	if err != nil {
		return nil, err
	}
	keys, err := keysOf(published)
	if err != nil {
		return nil, err
	}
	var expected jwks.Expected
	if expected.Audience, err = expectedClaim(args, "audience"); err != nil {
		return nil, err
	}
	if expected.Issuer, err = expectedClaim(args, "issuer"); err != nil {
		return nil, err
	}
	return bloblang.StringMethod(func(token string) (any, error) {
		claims, err := jwks.Verify(token, expected, keys)
		if err != nil {
			return nil, err
		}
		return claims, nil
	}), nil
}

// expectedClaim returns an optional argument.
func expectedClaim(args *bloblang.ParsedParams, name string) (string, error) {
	value, err := args.GetOptionalString(name)
	switch {
	case err != nil:
		return "", err
	case value == nil:
		return "", nil
	case *value == "":
		return "", fmt.Errorf("%s must not be empty: omit it if the claim should not be checked", name)
	default:
		return *value, nil
	}
}

// keysOf returns the keys of the argument keys.
func keysOf(published any) (jwks.Keys, error) {
	var text []byte
	switch published := published.(type) {
	case string:
		if !strings.HasPrefix(strings.TrimSpace(published), "{") {
			source, err := keySets.Source(published)
			if err != nil {
				return nil, err
			}
			return source.Key, nil
		}
		text = []byte(published)
	case []byte:
		text = published
	case map[string]any:
		var err error
		if text, err = json.Marshal(published); err != nil {
			return nil, err
		}
	default:
		return nil, errors.New("keys must be a URL, or a key set as an object or as JSON")
	}
	set, err := jwks.Parse(text)
	if err != nil {
		return nil, err
	}
	return set.Key, nil
}
