package tests

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/internal/testkit"
)

// jsonSchema is the part of a JSON schema with which an editor completes fields.
type jsonSchema struct {
	Type                 any
	Ref                  string `json:"$ref"`
	Required             []string
	AdditionalProperties *bool
	Properties           map[string]jsonSchema
	Items                *jsonSchema
	AllOf, AnyOf         []jsonSchema
	Definitions          map[string]jsonSchema
}

func TestJSONSchemaHasEveryFieldOfTheComponents(t *testing.T) {
	out := testkit.Output(t, testkit.Command(t, "list", "--format", "jsonschema"))
	var schema jsonSchema
	require.NoError(t, json.Unmarshal([]byte(out), &schema))
	require.Equal(t, "#/definitions/input", schema.Properties["input"].Ref)
	require.Equal(t, "#/definitions/output", schema.Properties["output"].Ref)

	for _, c := range []struct {
		kind, name string
		required   []string
	}{
		{"input", "cryo", []string{"url"}},
		{"input", "cryo_server", []string{"address"}},
		{"output", "cryo", []string{"url"}},
		{"output", "cryo_server", []string{"address"}},
	} {
		t.Run(c.kind+" "+c.name, func(t *testing.T) {
			alternatives := schema.Definitions[c.kind].AllOf[0].AnyOf
			at := slices.IndexFunc(alternatives, func(s jsonSchema) bool { _, ours := s.Properties[c.name]; return ours })
			require.GreaterOrEqual(t, at, 0)
			component := alternatives[at].Properties[c.name]
			require.Equal(t, c.required, component.Required)
			require.False(t, *component.AdditionalProperties, "the schema rejects a misspelt field")

			// The reference pages are generated from the same specifications.
			fields := metricNames(t, "../docs/reference/components/"+c.kind+"s/"+c.name+".md", "(?m)^### `(.+)`$")
			require.NotEmpty(t, fields)
			for _, field := range fields {
				component.wantField(t, field)
			}
			if c.kind == "input" {
				require.Equal(t, "#/definitions/scanner", component.Properties["streams"].Properties["scanner"].Ref)
			}
		})
	}
}

// wantField wants a field with a name of the reference, such as
// tls.client_certs[].key.
func (s jsonSchema) wantField(t *testing.T, path string) {
	t.Helper()
	for name := range strings.SplitSeq(path, ".") {
		name, isList := strings.CutSuffix(name, "[]")
		require.Contains(t, s.Properties, name, path)
		s = s.Properties[name]
		if isList {
			require.NotNil(t, s.Items, path)
			s = *s.Items
		}
	}
}
