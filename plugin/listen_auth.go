package plugin

import (
	"crypto/tls"
	"errors"
	"fmt"
	"math"
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
	"github.com/cryo-connect/cryo-connect/internal/jwks"
)

// The authorization of clients, and the metadata of their sessions.

const (
	fieldTokens          = "tokens"
	fieldTokensFile      = "tokens_file"
	fieldAuthorize       = "authorize"
	fieldSessionMetadata = "session_metadata"
	fieldMetadataQuery   = "query_parameters"
	fieldMetadataHeaders = "headers"
	fieldAllowedOrigins  = "allowed_origins"

	anyOrigin = "*"

	// paramToken is the query parameter with the token. It must not become metadata.
	paramToken = "authorization"
)

var (
	tokensField = secretListField(fieldTokens, func(tokens []string) ([]string, error) {
		if slices.Contains(tokens, "") {
			return nil, fmt.Errorf("field %s contains an empty token, which would accept every client", fieldTokens)
		}
		for i, token := range tokens {
			if err := checkSecret(fmt.Sprintf("field %s: element %d", fieldTokens, i+1), token); err != nil {
				return nil, err
			}
		}
		return tokens, nil
	})
	tokensFileField    = stringOf(fieldTokensFile, anyText)
	metadataQueryField = listOf(fieldSessionMetadata+"."+fieldMetadataQuery, func(names []string) ([]string, error) {
		if slices.Contains(names, paramToken) {
			return nil, fmt.Errorf("field %s.%s: %s contains the token, which must not become metadata", fieldSessionMetadata, fieldMetadataQuery, paramToken)
		}
		return names, nil
	})
	metadataHeadersField = listOf(fieldSessionMetadata+"."+fieldMetadataHeaders, anyList)

	originPattern       = regexp.MustCompile(`^(\*|null|[a-z][a-z0-9+.-]*://[^/?#*A-Z@]+)$`)
	allowedOriginsField = listOf(fieldAllowedOrigins, func(origins []string) ([]string, error) {
		for _, origin := range origins {
			if !originPattern.MatchString(origin) {
				return nil, fmt.Errorf("field %s: %q must be *, null or a scheme and a host such as https://app.example.com, in lower case and without a path", fieldAllowedOrigins, origin)
			}
		}
		return origins, nil
	})
)

// authorizationPage is the page about fields that decide which clients connect.
const authorizationPage = docsURL + "reference/authorization.md"

// admissionFields returns the common fields that determine which clients are admitted.
func admissionFields() []*service.ConfigField {
	return []*service.ConfigField{
		tokensField.config().
			Description("The accepted tokens: a client must send one of them. Exactly one of `tokens`, `tokens_file` and `authorize` must be set."),
		tokensFileField.config().
			Description("The path of a file with the accepted tokens, one per line. To change it, rename a new file over it; it is reloaded when the next client connects, at most once per second. [Tokens in a file](" + authorizationPage + "#tokens-in-a-file) explains invalid files and removed tokens.").
			Default(""),
		service.NewBloblangField(fieldAuthorize).
			Description("A mapping that accepts a client (`true` or an object) or denies it (`false` and all other results). Its input has `token`, `session_id`, `remote_address`, `query`, `headers` and `client_certificate`. The fields of an object become metadata of all messages of the session: `tenant` becomes `cryo_auth_tenant`.\n\nAny object accepts the client, so check first: [Authorization](" + authorizationPage + "#the-authorize-mapping) has the rules.").
			Example(`root = this.token == env("CRYO_TOKEN").not_empty()`).
			Example(`root = this.token.parse_jwt_hs256(env("JWT_SECRET").not_empty())`).
			Example(`root = if this.client_certificate != null { { "device": this.client_certificate.common_name } } else { false }`).
			Example(`
let claims = this.token.parse_jwt_hs256(env("JWT_SECRET").not_empty())
root = if $claims.aud == "cryo" { { "user": $claims.sub, "room": this.query.room } } else { false }`).
			Example(`root = this.token.parse_jwt_jwks(keys: "https://login.example.com/.well-known/jwks.json", audience: "cryo", issuer: "https://login.example.com/").without("aud", "iat", "nbf")`).
			Optional(),
	}
}

// admissionOptionFields returns the advanced fields that determine which clients are admitted.
func admissionOptionFields() []*service.ConfigField {
	return []*service.ConfigField{
		authorizeProcessorsField(),
		service.NewObjectField(fieldSessionMetadata,
			metadataQueryField.config().
				Description("The names of query parameters: `room` becomes `cryo_query_room`. The parameter with the token is not allowed.").
				Default([]any{}).
				Example([]string{"room"}),
			metadataHeadersField.config().
				Description("The names of HTTP headers: `User-Agent` becomes `cryo_header_user-agent`. `Host` is the host name that the client connects to.").
				Default([]any{}).
				Example([]string{"User-Agent"}),
		).
			Description("The parts of a client's request that become metadata of all its messages. If a name occurs several times, its first value is used. The values are untrusted, unless `authorize` checks them. A client is denied with status 400 if a value contains control characters.").
			Advanced(),
		allowedOriginsField.config().
			Description("The origins of web pages that may connect: scheme, host and, unless it is the default, port. `*` is any origin, `null` is a page from a file or a sandbox, and an empty list denies all web pages. Clients that send no `Origin` header are not checked.").
			Default([]any{anyOrigin}).
			Example([]string{"https://app.example.com", "http://localhost:3000"}).
			Advanced(),
	}
}

// admissionSettings are the settings of a listener that determine which clients are admitted.
type admissionSettings struct {
	Tokens     []string        `field:"tokens"`
	TokensFile string          `field:"tokens_file"`
	Authorize  string          `field:"authorize"` // source text of the mapping
	Processors []any           `field:"authorize_processors"`
	Metadata   sessionMetadata `field:"session_metadata"`
	Origins    []string        `field:"allowed_origins"`
}

func readAdmission(r *settingsReader, processors *authorizeProcessors, lasting lifetime, log *service.Logger) (s admissionSettings, authorize func(*cryo.Upgrade) error) {
	s.Tokens = tokensField.read(r)
	s.TokensFile = tokensFileField.read(r)
	s.Metadata.Query = metadataQueryField.read(r)
	s.Metadata.Headers = metadataHeadersField.read(r)
	s.Origins = allowedOriginsField.read(r)
	mapping, text := readMapping(r, fieldAuthorize)
	s.Authorize = text
	s.Processors = readProcessorsSource(r)
	var given []string
	if len(s.Tokens) > 0 {
		given = append(given, fieldTokens)
	}
	if s.TokensFile != "" {
		given = append(given, fieldTokensFile)
	}
	if mapping != nil {
		given = append(given, fieldAuthorize)
	}
	switch {
	case r.err != nil:
		return s, nil
	case len(given) == 0:
		r.err = fmt.Errorf("one of the fields %s, %s and %s is required: without it, all clients would be denied", fieldTokens, fieldTokensFile, fieldAuthorize)
		return s, nil
	case len(given) > 1:
		r.err = fmt.Errorf("the fields %s cannot be used together", strings.Join(given, " and "))
		return s, nil
	case len(s.Processors) > 0 && mapping == nil:
		r.err = fmt.Errorf("the field %s requires the field %s, which evaluates the result of the processors", fieldAuthorizeProcessors, fieldAuthorize)
		return s, nil
	case s.TokensFile != "":
		file, err := watchFiles(fieldTokensFile, []string{s.TokensFile}, filesInterval, shortageTime, log, tokensOfFile)
		if err != nil {
			r.err = fmt.Errorf("field %s: %w", fieldTokensFile, withoutToken(err, fieldTokens))
			return s, nil
		}
		file.log = log.With("file", s.TokensFile)
		file.expectLines()
		return s, s.Metadata.admit(lasting, func(u *cryo.Upgrade, _ map[string]any) (map[string]any, error) { return nil, file.current()(u) })
	case mapping == nil:
		checkToken := cryo.Tokens(s.Tokens...)
		return s, s.Metadata.admit(lasting, func(u *cryo.Upgrade, _ map[string]any) (map[string]any, error) { return nil, checkToken(u) })
	default:
		return s, s.Metadata.admit(lasting, func(u *cryo.Upgrade, client map[string]any) (map[string]any, error) {
			return authorizeBy(mapping, processors, u, client)
		})
	}
}

// allowsOrigin reports whether a web page of the request's origin may connect. A request
// without an origin is allowed, because it is not from a browser.
func (s admissionSettings) allowsOrigin(r *http.Request) bool {
	origins, isBrowser := r.Header["Origin"]
	return !isBrowser || slices.Contains(s.Origins, anyOrigin) || len(origins) == 1 && slices.Contains(s.Origins, origins[0])
}

// admit returns an Authorize function that sets the identity of the session. check receives the
// description of the client, to which it may add, and either returns the metadata that it grants
// to the client, or denies the client by returning an error. lasting sets the expiry and the
// owner of the session.
func (s sessionMetadata) admit(lasting lifetime, check func(u *cryo.Upgrade, client map[string]any) (map[string]any, error)) func(*cryo.Upgrade) error {
	return func(u *cryo.Upgrade) error {
		query := u.Request.URL.Query()
		client := describeClient(u, query)
		granted, err := check(u, client)
		if err != nil {
			return err
		}
		who, err := s.identify(u, query, granted)
		if err != nil {
			return err
		}
		if err := lasting.apply(u, client, granted); err != nil {
			return err
		}
		who.setOwner(u.Owner)
		u.Value = who
		return nil
	}
}

// authorizeBy runs the processors and the authorize mapping. It returns the metadata that the
// mapping grants, or an error if the client is denied.
func authorizeBy(mapping *bloblang.Executor, processors *authorizeProcessors, u *cryo.Upgrade, client map[string]any) (map[string]any, error) {
	parameters, headers := client["query"].(map[string]any), client["headers"].(map[string]any)
	if err := processors.run(u.Request.Context(), client); err != nil {
		return nil, err
	}
	result, err := runAuthorize(mapping, client)
	if err != nil {
		return nil, mappingFailed(fieldAuthorize, err)
	}
	switch result := result.(type) {
	case bool:
		if !result {
			return nil, errors.New("denied by the field authorize")
		}
		return nil, nil
	case map[string]any:
		if _, leaks := result["token"]; leaks {
			return nil, errors.New("authorize returned an object with the field token, which must not become metadata")
		}
		if isEmpty(result) {
			return nil, errors.New("authorize returned an object whose fields are all null")
		}
		return result, checkGranted(result, u.Token, parameters, headers)
	case nil:
		return nil, errors.New("authorize returned neither a boolean nor an object: root is null or not assigned")
	default:
		return nil, fmt.Errorf("authorize returned neither a boolean nor an object, but %T", result)
	}
}

// describeClient returns the object that describes a client's request to the mappings.
func describeClient(u *cryo.Upgrade, query url.Values) map[string]any {
	headers := make(map[string]any, len(u.Request.Header)+1)
	for name := range u.Request.Header {
		headers[strings.ToLower(name)], _ = headerOf(u.Request, name)
	}
	if host, ok := headerOf(u.Request, "Host"); ok {
		headers["host"] = host
	}
	parameters := make(map[string]any, len(query))
	for name, values := range query {
		if name != paramToken { // an object that the mapping builds from the query must not contain the token
			parameters[name] = values[0]
		}
	}
	return map[string]any{
		"token":              u.Token,
		"session_id":         strconv.FormatUint(u.SessionID, 10),
		"remote_address":     u.Request.RemoteAddr,
		"query":              parameters,
		"headers":            headers,
		"client_certificate": certificateOf(u.Request.TLS),
	}
}

// runAuthorize runs authorize, or another mapping of this kind, on an object that describes the
// client. It does not use Query, which returns its input if the mapping assigns nothing: that is
// an object, so every client would be accepted.
func runAuthorize(mapping *bloblang.Executor, client map[string]any) (result any, err error) {
	defer catchPanic(&err)
	err = mapping.Overlay(client, &result)
	return result, err
}

var (
	failedLine = regexp.MustCompile(`^failed assignment \(line (\d+)\)`)
	// jwtFailures are errors of the methods for JWTs whose texts contain no part of a token.
	jwtFailures = []string{"token is expired", "token is not valid yet", "token signature is invalid", "incorrect signing method", "token is malformed"}
)

// mappingFailed returns a redacted error of the mapping in a field, because the original may
// quote any part of the token, even decoded.
func mappingFailed(field string, err error) error {
	text, where, why := err.Error(), "", "the error is redacted, because it may contain a part of the token"
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
	if rejected, ok := errors.AsType[jwks.TokenError](err); ok {
		why = rejected.Error()
	}
	if unavailable, ok := errors.AsType[*jwks.UnavailableError](err); ok {
		return notNow(fmt.Sprintf("%s failed%s: %v", field, where, unavailable))
	}
	return fmt.Errorf("%s failed%s: %s", field, where, why)
}

// isEmpty reports whether a value is null, or an object whose fields are all empty. A mapping
// returns such an object if it catches the error of a malformed token.
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

// checkGranted returns an error if a value that authorize returned, or any value in it, must not
// become metadata: an object with the token, as in an answer that repeats the request, an object
// that equals one of those that the client chooses, or a number that may have lost digits.
func checkGranted(value any, token string, chosen ...map[string]any) error {
	switch value := value.(type) {
	case map[string]any:
		if repeated, ok := value["token"].(string); ok && repeated == token {
			return errors.New("authorize returned an object that contains the token, which must not become metadata")
		}
		for _, part := range chosen {
			if reflect.DeepEqual(value, part) {
				return errors.New("authorize returned an object with the whole query or all headers, which the client controls: return single values instead")
			}
		}
		for _, field := range value {
			if err := checkGranted(field, token, chosen...); err != nil {
				return err
			}
		}
	case []any:
		for _, element := range value {
			if err := checkGranted(element, token, chosen...); err != nil {
				return err
			}
		}
	case float64:
		if value == math.Trunc(value) && math.Abs(value) >= maxNumber {
			return fmt.Errorf("authorize returned an integer of 2^53 or more, which may have lost digits: parse a JWT with %s, and JSON with parse_json(use_number: true)", jwksMethod)
		}
	}
	return nil
}

// certificateOf returns the subject of a client's verified certificate, or nil.
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
