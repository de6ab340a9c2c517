package plugin

import (
	"crypto/tls"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/redpanda-data/benthos/v4/public/bloblang"
	"github.com/redpanda-data/benthos/v4/public/service"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// Admission of clients, and the metadata of their sessions.

const (
	fieldTokens          = "tokens"
	fieldAuthorize       = "authorize"
	fieldSessionMetadata = "session_metadata"
	fieldMetadataQuery   = "query_parameters"
	fieldMetadataHeaders = "headers"
	fieldAllowedOrigins  = "allowed_origins"

	anyOrigin = "*"

	// paramToken is the query parameter with Cryo's token, which must never
	// become metadata.
	paramToken = "authorization"
)

var (
	tokensField = listOf(fieldTokens, func(tokens []string) ([]string, error) {
		if slices.Contains(tokens, "") {
			return nil, fmt.Errorf("field %s has an empty token: it would let everybody in", fieldTokens)
		}
		return tokens, nil
	})
	metadataQueryField = listOf(fieldSessionMetadata+"."+fieldMetadataQuery, func(names []string) ([]string, error) {
		if slices.Contains(names, paramToken) {
			return nil, fmt.Errorf("field %s.%s: %s is the token, which must not become metadata", fieldSessionMetadata, fieldMetadataQuery, paramToken)
		}
		return names, nil
	})
	metadataHeadersField = listOf(fieldSessionMetadata+"."+fieldMetadataHeaders, anyList)

	originPattern       = regexp.MustCompile(`^(\*|null|[a-z][a-z0-9+.-]*://[^/?#*A-Z@]+)$`)
	allowedOriginsField = listOf(fieldAllowedOrigins, func(origins []string) ([]string, error) {
		for _, origin := range origins {
			if !originPattern.MatchString(origin) {
				return nil, fmt.Errorf("field %s: %q must be *, null or a scheme and a host such as https://app.example.com, in lower case and with nothing behind", fieldAllowedOrigins, origin)
			}
		}
		return origins, nil
	})
)

func admissionFields() []*service.ConfigField {
	return []*service.ConfigField{
		tokensField.config().
			Description("The secrets that let a client in: it has to send one of them as its token. Either this or `authorize` is required, so that no server is open by accident.").
			Default([]any{}).
			Secret(),
		service.NewBloblangField(fieldAuthorize).
			Description(fmt.Sprintf(`A mapping that decides whether a client may come in. Of the client it sees `+"`this.token`, `this.session_id`, `this.remote_address`, `this.query` and `this.headers`"+` (both with the first value of each name; headers in lower case, with host, the query without the token), and `+"`this.client_certificate`"+`: null, or, where `+"`tls.client_ca_file`"+` asks for it, an object with `+"`common_name`, `dns_names`, `uris` and `serial_number`"+`.

It results in `+"`true` or `false`"+`, or in an object, which lets the client in too. The object's fields become metadata of all messages of the session: the field `+"`tenant`"+` becomes `+"`cryo_auth_tenant`"+`. Strings stay as they are; numbers, booleans and times are written as text, arrays and nested objects as JSON (`+"`@cryo_auth_roles.parse_json()`"+` reads them), and null is left out. A session has at most %d fields and %d bytes of metadata from its client, that of `+"`session_metadata`"+` included; a client with more is denied with status 431, and one with control characters, such as line breaks, in any of it with 400.

Everything else denies the client: a mapping that fails or assigns nothing, an object without a field that is not null, and one that is no verdict but what the mapping was given: with a field `+"`token`"+`, or with all of the query or of the headers, as `+"`root = this`, `root = this.query` and `root = this.without(\"token\")`"+` make it. But any other object lets in whatever its fields say: `+"`root.allowed = false`"+` denies nobody, and `+"`root.room = this.query.room`"+` only those who name no room. So check first, and let `+"`root`"+` be an object then, as the last example does. `+"`root = true`"+` lets everybody in.

Of a mapping that fails, the log has the line, and of a JWT whether it is malformed, has another signature or algorithm, has expired, or is not valid yet. The rest of the error may quote a part of the token and is left out: `+"`cryo-connect blobl`"+` tells all, from a token of your own.

A client that comes back while its old connection is still thought alive takes it over when it has the same session id and the very same token, and the same client certificate if it has one. With another token, such as a renewed JWT, or a renewed certificate it is refused until the old connection is known to be dead, which takes up to three times `+"`heartbeat_interval`"+`, so clients do well to close before they renew.

The methods for JWTs are in the binary `+"`cryo-connect`"+`; a build of your own gets them from Redpanda Connect's package `+"`public/components/crypto`"+`.`, maxIdentityFields, maxIdentityBytes)).
			Example(`root = this.token == env("CRYO_TOKEN").not_empty()`).
			Example(`root = this.token.parse_jwt_hs256(env("JWT_SECRET").not_empty())`).
			Example(`root = if this.client_certificate != null { { "device": this.client_certificate.common_name } } else { false }`).
			Example(`
let claims = this.token.parse_jwt_hs256(env("JWT_SECRET").not_empty())
root = if $claims.aud == "cryo" { { "user": $claims.sub, "room": this.query.room } } else { false }`).
			Optional(),
		service.NewObjectField(fieldSessionMetadata,
			metadataQueryField.config().
				Description("Query parameters: `room` becomes `cryo_query_room`. The one with the token can't be had.").
				Default([]any{}).
				Example([]string{"room"}),
			metadataHeadersField.config().
				Description("HTTP headers: `User-Agent` becomes `cryo_header_user-agent`, and `Host` is the name that the client connects to.").
				Default([]any{}).
				Example([]string{"User-Agent"}),
		).
			Description("What else of a client's request becomes metadata of all its messages: the first value, where there is one. Clients choose them freely, unless `authorize` checks them. A client is denied with status 400 if one of them has control characters, such as line breaks: outputs that make headers of metadata would fail.").
			Advanced(),
		allowedOriginsField.config().
			Description("From which web sites a browser's page may connect, by its Origin header: a site is scheme, host and, where it is not the scheme's own, port, with nothing behind. `null` is a page from a file or a sandbox. `*` is any; then the token alone decides, which no browser adds by itself. A list that is empty lets in no page of a browser. Clients that are no browsers send no such header and are not asked.").
			Default([]any{anyOrigin}).
			Example([]string{"https://app.example.com", "http://localhost:3000"}).
			Advanced(),
	}
}

// admissionSettings must be equal for the components of one listener.
type admissionSettings struct {
	Tokens    []string        `field:"tokens"`
	Authorize string          `field:"authorize"` // the mapping's text
	Metadata  sessionMetadata `field:"session_metadata"`
	Origins   []string        `field:"allowed_origins"`
}

func readAdmission(r *settingsReader) (s admissionSettings, authorize func(*cryo.Upgrade) error) {
	s.Tokens = tokensField.read(r)
	s.Metadata.Query = metadataQueryField.read(r)
	s.Metadata.Headers = metadataHeadersField.read(r)
	s.Origins = allowedOriginsField.read(r)
	mapping, text := readMapping(r, fieldAuthorize)
	s.Authorize = text
	switch {
	case r.err != nil:
		return s, nil
	case len(s.Tokens) == 0 && mapping == nil:
		r.err = fmt.Errorf("either the field %s or %s is required: without them nobody could come in", fieldTokens, fieldAuthorize)
		return s, nil
	case len(s.Tokens) > 0 && mapping != nil:
		r.err = fmt.Errorf("the fields %s and %s can't be used together", fieldTokens, fieldAuthorize)
		return s, nil
	case mapping == nil:
		known := cryo.Tokens(s.Tokens...)
		return s, s.Metadata.admit(func(u *cryo.Upgrade, _ url.Values) (map[string]any, error) { return nil, known(u) })
	default:
		return s, s.Metadata.admit(func(u *cryo.Upgrade, query url.Values) (map[string]any, error) {
			return authorizeBy(mapping, u, query)
		})
	}
}

// allowsOrigin reports whether a page of the request's origin may connect. Clients that are
// no browsers have none.
func (s admissionSettings) allowsOrigin(r *http.Request) bool {
	origins, asked := r.Header["Origin"]
	return !asked || slices.Contains(s.Origins, anyOrigin) || len(origins) == 1 && slices.Contains(s.Origins, origins[0])
}

// admit returns an Authorize function: judge denies a client, or returns the metadata that it grants.
func (s sessionMetadata) admit(judge func(*cryo.Upgrade, url.Values) (map[string]any, error)) func(*cryo.Upgrade) error {
	return func(u *cryo.Upgrade) error {
		query := u.Request.URL.Query()
		granted, err := judge(u, query)
		if err != nil {
			return err
		}
		u.Value, err = s.identify(u, query, granted)
		return err
	}
}

// authorizeBy runs the mapping authorize: an error denies the client, an object has the
// metadata that it grants.
func authorizeBy(mapping *bloblang.Executor, u *cryo.Upgrade, query url.Values) (map[string]any, error) {
	headers := make(map[string]any, len(u.Request.Header)+1)
	for name := range u.Request.Header {
		headers[strings.ToLower(name)], _ = headerOf(u.Request, name)
	}
	if host, ok := headerOf(u.Request, "Host"); ok {
		headers["host"] = host
	}
	parameters := make(map[string]any, len(query))
	for name, values := range query {
		if name != paramToken { // no object made of the query may make metadata of it
			parameters[name] = values[0]
		}
	}
	result, err := runAuthorize(mapping, map[string]any{
		"token":              u.Token,
		"session_id":         strconv.FormatUint(u.SessionID, 10),
		"remote_address":     u.Request.RemoteAddr,
		"query":              parameters,
		"headers":            headers,
		"client_certificate": certificateOf(u.Request.TLS),
	})
	if err != nil {
		return nil, mappingFailed(err)
	}
	switch verdict := result.(type) {
	case bool:
		if !verdict {
			return nil, errors.New("denied by authorize")
		}
		return nil, nil
	case map[string]any:
		if _, leaks := verdict["token"]; leaks {
			return nil, errors.New("authorize returned an object with a field token, which must not become metadata")
		}
		if isEmpty(verdict) {
			return nil, errors.New("authorize returned an object without a field that is not null")
		}
		if echoesRequest(verdict, parameters) || echoesRequest(verdict, headers) {
			return nil, errors.New("authorize returned an object with all of the query or of the headers, which the client chooses")
		}
		return verdict, nil
	case nil:
		return nil, errors.New("authorize returned neither a boolean nor an object: it assigned nothing to root, or null")
	default:
		return nil, fmt.Errorf("authorize returned neither a boolean nor an object, but %T", result)
	}
}

// runAuthorize runs the mapping. Not by Query: where nothing is assigned, that results in
// what it was given, an object, which would let everybody in.
func runAuthorize(mapping *bloblang.Executor, client map[string]any) (result any, err error) {
	defer catchPanic(&err)
	err = mapping.Overlay(client, &result)
	return result, err
}

var (
	failedLine = regexp.MustCompile(`^failed assignment \(line (\d+)\)`)
	// jwtFailures are texts of the methods for JWTs that repeat no part of a token.
	jwtFailures = []string{"token is expired", "token is not valid yet", "token signature is invalid", "incorrect signing method", "token is malformed"}
)

// mappingFailed returns as much of a mapping's error as the log may have. The
// error itself may quote any part of the token, decoded too.
func mappingFailed(err error) error {
	text, where, why := err.Error(), "", "its error is left out, because it may have a part of the token"
	if line := failedLine.FindStringSubmatch(text); line != nil {
		where = " in line " + line[1]
	}
	for _, failure := range jwtFailures {
		if strings.Contains(text, failure) {
			why = failure
		}
	}
	if panicked, ok := errors.AsType[*panicError](err); ok {
		why = "panic in " + panicked.where
	}
	return fmt.Errorf("authorize failed%s: %s", where, why)
}

// isEmpty reports whether a value is null, or an object of nothing else. A mapping that
// catches the error of a malformed token makes such an object.
func isEmpty(value any) bool {
	object, ok := value.(map[string]any)
	if !ok {
		return value == nil
	}
	for _, field := range object {
		if !isEmpty(field) {
			return false
		}
	}
	return true
}

// echoesRequest reports whether a verdict is a part of the request, or has it in a field.
func echoesRequest(verdict, part map[string]any) bool {
	if reflect.DeepEqual(verdict, part) {
		return true
	}
	for _, field := range verdict {
		if reflect.DeepEqual(field, any(part)) {
			return true
		}
	}
	return false
}

// certificateOf returns the subject of a client's certificate; nil without one that was
// verified.
func certificateOf(state *tls.ConnectionState) any {
	if state == nil || len(state.VerifiedChains) == 0 {
		return nil
	}
	cert := state.PeerCertificates[0]
	dnsNames, uris := make([]any, len(cert.DNSNames)), make([]any, len(cert.URIs))
	for i, name := range cert.DNSNames {
		dnsNames[i] = name
	}
	for i, uri := range cert.URIs {
		uris[i] = uri.String()
	}
	return map[string]any{
		"common_name":   cert.Subject.CommonName,
		"dns_names":     dnsNames,
		"uris":          uris,
		"serial_number": cert.SerialNumber.Text(16),
	}
}
