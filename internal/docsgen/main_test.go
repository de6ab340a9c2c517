package main

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestEachPageHasEverySection(t *testing.T) {
	pages, err := render()
	require.NoError(t, err)
	require.Len(t, pages, 4, "inputs and outputs cryo and cryo_server")

	for name, content := range pages {
		page := string(content)
		for _, section := range []string{"## Delivery", "## Metadata", "## Performance", "## Examples", "## Fields"} {
			assert.Contains(t, page, "\n\n"+section+"\n\n", "%s has no such section", name)
		}
		for _, leftover := range []string{"missing documentation", "xref:", "\n==", "^]", "<no value>"} {
			assert.NotContains(t, page, leftover, name)
		}
	}
}

// A page is for looking things up: what is longer belongs to a page that it links to.
func TestSectionsAndFieldsAreShort(t *testing.T) {
	pages, err := render()
	require.NoError(t, err)
	for name, content := range pages {
		page, fields, _ := strings.Cut(string(content), "\n## Fields\n")
		for section := range strings.SplitSeq(page, "\n## ") {
			title, text, _ := strings.Cut(section, "\n")
			if title == "Delivery" || title == "Metadata" || title == "Performance" {
				assert.LessOrEqual(t, len(strings.Fields(text)), 150, "%s: %s", name, title)
			}
		}
		for field := range strings.SplitSeq(fields, "\n### ") {
			title, text, _ := strings.Cut(strings.TrimPrefix(field, "\n### "), "\n")
			text, _, _ = strings.Cut(text, "\n```")
			text, _, _ = strings.Cut(text, "\n| value |")
			if !strings.HasPrefix(title, "`tls.") { // those of the engine
				assert.LessOrEqual(t, len(strings.Fields(text)), 90, "%s: %s", name, title)
			}
		}
	}
}

func TestFieldsShowTypeDefaultAndMarks(t *testing.T) {
	pages, err := render()
	require.NoError(t, err)

	input, output := string(pages["inputs/cryo.md"]), string(pages["outputs/cryo_server.md"])

	for page, wants := range map[*string][]string{
		&input: {
			"### `url`\n\n`string` · required\n",
			"### `token`\n\n`string` · default `\"\"` · **secret**",
			"### `connect_timeout`\n\n`string` · default `\"5s\"` · advanced\n",
			"### `headers`\n\n`map of string` · default `{}` · **secret**: set it from the environment, `'${NAME}'` with the single quotes · advanced\n",
			"### `tls.client_certs[].cert`\n\n`string` · default `\"\"` · advanced\n", // like its parent
			"### `streams`\n\n`object`\n",
			"| `received` | ",
			"url: ws://localhost:8080\n# or\nurl: wss://",
		},
		&output: {
			"### `session_id`\n\n`string` · default `\"\"` · [interpolated](https://",
			"### `tokens`\n\n`list of string` · default `[]` · **secret**",
			"### `authorize`\n\n`string`\n",
			"[batching policy](https://docs.redpanda.com/redpanda-connect/configuration/batching/)",
		},
	} {
		for _, want := range wants {
			assert.Contains(t, *page, want)
		}
	}
}

func TestDescriptionsBecomeMarkdown(t *testing.T) {
	assert.Equal(t, strings.Join([]string{
		"## Section",
		"a == b, see [there](https://example.com/a) and",
		"[queries](https://docs.redpanda.com/redpanda-connect/guides/bloblang/about/#methods)",
	}, "\n"), markdown(`
== Section
a == b, see https://example.com/a[there^] and
xref:guides:bloblang/about.adoc#methods[queries]
`))
}
