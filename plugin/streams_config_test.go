package plugin

import (
	"testing"

	"github.com/stretchr/testify/assert"
)

func TestABadConfigurationOfStreamsFailsLintAndStart(t *testing.T) {
	for _, tt := range []struct{ kind, fields, lint, start string }{
		{"input", `streams: { flow_control: both }`, "value both is not a valid option for this field", `field streams.flow_control: "both" is neither push nor pull`},
		{"input", `streams: { max_bytes: -1 }`, "field max_bytes can't be negative, got -1", ""},
		{"input", `streams: { max_open: 0 }`, "field max_open has to be at least 1, got 0", ""},
		{"input", `streams: { idle_timeout: 0s }`, "field idle_timeout has to be above zero, got 0s", ""},
		{"input", `streams: { idle_timeout: soon }`, "field idle_timeout has to be a duration such as 5s, got soon", "field idle_timeout has to be a duration such as 5s"},
		{"input", `streams: { scanner: { words: {} } }`, "unable to infer component type: words", "words"},
		{"input", `streams: { scanner: { chunker: { size: 0 } } }`, "field size of the scanner chunker must be at least 1 and at most 1 GiB (1073741824), got 0", ""},
		{"input", `streams: { scanner: { chunker: { size: 1099511627776 } } }`, "field size of the scanner chunker must be at least 1 and at most 1 GiB (1073741824), got 1099511627776", ""},
		{"input", `streams: { scanner: { switch: [ { scanner: { decompress: { algorithm: gzip, into: { chunker: { size: -1 } } } } } ] } }`, "field size of the scanner chunker must be at least 1 and at most 1 GiB (1073741824), got -1", ""},
		{"input", `streams: { name: orders }`, "field name not recognised", "-"},
		{"output", `stream: { chunk_bytes: 0 }`, "field chunk_bytes has to be at least 1, got 0", ""},
		{"output", `stream: { chunk_bytes: 16777217 }`, "field chunk_bytes is at most 16 MiB, got 16777217", ""},
		{"output", `message_type: streams`, "field message_type: unknown message type streams, it has to be auto, utf8, binary or stream", ""},
	} {
		for _, name := range []string{"cryo", "cryo_server"} {
			fields := `{ ` + map[string]string{"cryo": dials, "cryo_server": listens}[name] + `, ` + tt.fields + ` }`
			t.Run(tt.kind+" "+component(name, fields), func(t *testing.T) {
				assert.Equal(t, []string{tt.lint}, lint(t, tt.kind, component(name, fields)))

				if tt.start == "" {
					tt.start = tt.lint
				}
				if tt.start != "-" {
					assert.ErrorContains(t, construct(t, tt.kind, name, fields), tt.start)
				}
			})
		}
	}
}

func TestAGoodConfigurationOfStreamsIsLintedCleanAndStarts(t *testing.T) {
	for _, tt := range []struct{ kind, fields string }{
		{"input", `streams: {}`},
		{"input", `message_types: [ stream ], streams: { names: [ "a", "b c" ], flow_control: pull, max_bytes: 0, max_open: 1, idle_timeout: 1ms }`},
		{"input", `streams: { scanner: { decompress: { algorithm: gzip, into: { csv: { continue_on_error: true } } } } }`},
		{"input", `streams: { scanner: { switch: [ { re_match_name: "csv$", scanner: { csv: {} } }, { scanner: { chunker: { size: 65536 } } } ] } }`},
		{"input", `streams: { scanner: { type: chunker, chunker: { size: 1073741824 } } }`},
		{"output", `message_type: stream, stream: { name: "${! @path }", chunk_bytes: 16777216 }`},
		{"output", `message_type: stream, batching: { count: 100, processors: [ { archive: { format: tar } } ] }`},
	} {
		for _, name := range []string{"cryo", "cryo_server"} {
			fields := `{ ` + map[string]string{"cryo": dials, "cryo_server": listens}[name] + `, ` + tt.fields + ` }`
			t.Run(tt.kind+" "+component(name, fields), func(t *testing.T) {
				assert.Empty(t, lint(t, tt.kind, component(name, fields)))
				assert.NoError(t, construct(t, tt.kind, name, fields))
			})
		}
	}
}
