package plugin

import (
	"fmt"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// secretFields are the fields for secrets, and what their components require.
var secretFields = []struct{ kind, name, required, field, format string }{
	{"input", "cryo", "url: ws://h", "token", "token: %s"},
	{"output", "cryo", "url: ws://h", "token", "token: %s"},
	{"input", "cryo", "url: ws://h", "headers", "headers: { X-Key: %s }"},
	{"output", "cryo", "url: ws://h", "query_parameters", "query_parameters: { key: %s }"},
	{"input", "cryo_server", "address: 127.0.0.1:0", "tokens", "tokens: [ first-token, %s ]"},
	{"output", "cryo_server", "address: 127.0.0.1:0", "tokens", "tokens: [ %s ]"},
}

// wantSecretRefused wants a value refused by lint and at start, with the same sentence, which does
// not contain the value.
func wantSecretRefused(t *testing.T, value, sentence string) {
	t.Helper()
	for _, f := range secretFields {
		text := f.required + "\n" + fmt.Sprintf(f.format, value)
		lints, err := linter().LintYAML(f.kind, []byte(f.name+":\n  "+strings.ReplaceAll(text, "\n", "\n  ")))
		require.NoError(t, err, text)
		require.Len(t, lints, 1, text)
		require.Contains(t, lints[0].What, "field "+f.field)
		require.Contains(t, lints[0].What, sentence)
		require.NotContains(t, strings.ReplaceAll(lints[0].What, "as null", ""), strings.Trim(value, `"'`))
		require.ErrorContains(t, construct(t, f.kind, f.name, text), lints[0].What)
	}
}

func TestSecretThatYAMLDoesNotReadAsTextIsRejected(t *testing.T) {
	for value, kind := range map[string]string{
		"4815162342": "a number", "007123": "a number", "0x1F2": "a number", "1e55": "a number", ".inf": "a number",
		"100000000000000000000": "a number", "true": "a boolean", "FALSE": "a boolean", "2026-11-30": "a date",
		"2026-11-30T12:00:00Z": "a date", "null": "null", "~": "null", "[ s3cret ]": "an object or a list", "{ s3cret: a }": "an object or a list",
	} {
		t.Run(value, func(t *testing.T) {
			wantSecretRefused(t, value, "must be text, but YAML reads it as "+kind+": put it in single quotes, for example '${TOKEN}'")
		})
	}
}

func TestSecretWithArtefactsOfItsSourceIsRejected(t *testing.T) {
	for value, sentence := range map[string]string{
		`"s3cret\n"`: "begins or ends with whitespace", `"s3cret\r\n"`: "begins or ends with whitespace", `' s3cret'`: "begins or ends with whitespace",
		`"\ts3cret"`: "begins or ends with whitespace", `'s3cret '`: "begins or ends with whitespace", `'s3cret\n'`: `ends with \n`,
		`"s3cret\nmore"`: "contains an invisible character", `"s3\tcret"`: "contains an invisible character", `"s3\0cret"`: "contains an invisible character",
		`"s3\x7Fcret"`: "contains an invisible character", `"\uFEFFs3cret"`: "contains an invisible character", `"s3\u200Bcret"`: "contains an invisible character",
	} {
		t.Run(value, func(t *testing.T) { wantSecretRefused(t, value, sentence) })
	}
}

func TestQuotedSecretIsUnchanged(t *testing.T) {
	for _, secret := range []string{
		"4815162342", "007123", "true", "null", "~", "2026-11-30", "abc #def", "#x", "&abc", "*abc", `pa\nss`, `pa"ss`, `back\slash`, "a: b", "[a]", "{a}", "% @`", "two  spaces", "ä€",
	} {
		value, err := tokenField.rule(secret)
		require.NoError(t, err)
		text, err := value.evaluate()
		require.NoError(t, err)
		require.Equal(t, secret, text)
		for _, f := range secretFields {
			text := f.required + "\n" + fmt.Sprintf(f.format, "'"+secret+"'")
			lints, err := linter().LintYAML(f.kind, []byte(f.name+":\n  "+strings.ReplaceAll(text, "\n", "\n  ")))
			require.NoError(t, err, text)
			require.Empty(t, lints, text)
			require.NoError(t, construct(t, f.kind, f.name, text))
		}
	}
}
