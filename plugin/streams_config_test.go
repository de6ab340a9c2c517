package plugin

import (
	"testing"

	"github.com/stretchr/testify/assert"
)

func TestABadConfigurationOfStreamsFailsLintAndStart(t *testing.T) {
	for _, tt := range []struct{ kind, fields, sentence string }{
		{"input", `streams: { flow_control: both }`, `field streams.flow_control must be push or pull, got "both"`},
		{"input", `streams: { flow_control: Push }`, `field streams.flow_control must be push or pull, got "Push"`},
		{"input", `streams: { max_bytes: -1 }`, "field streams.max_bytes must be at least 0, got -1"},
		{"input", `streams: { max_open: 0 }`, "field streams.max_open must be at least 1, got 0"},
		{"input", `streams: { idle_timeout: 0s }`, "field streams.idle_timeout must be greater than zero, got 0s"},
		{"input", `streams: { idle_timeout: soon }`, `field streams.idle_timeout must be a duration such as 5s, got "soon"`},
		{"input", `streams: { scanner: { decompress: { algorithm: zip } } }`, "field streams.scanner: compression type not recognised: zip"},
		{"input", `streams: { scanner: null }`, "field streams.scanner: invalid type !!null, expected object"},
		{"input", `streams: { scanner: {} }`, "field streams.scanner: an explicit scanner type must be specified"},
		{"input", `streams: { scanner: { chunker: { size: 0 } } }`, "field size of the scanner chunker must be at least 1 and at most 1 GiB (1073741824), got 0"},
		{"input", `streams: { scanner: { chunker: { size: 1099511627776 } } }`, "field size of the scanner chunker must be at least 1 and at most 1 GiB (1073741824), got 1099511627776"},
		{"input", `streams: { scanner: { switch: [ { scanner: { decompress: { algorithm: gzip, into: { chunker: { size: -1 } } } } } ] } }`, "field size of the scanner chunker must be at least 1 and at most 1 GiB (1073741824), got -1"},
		{"output", `stream: { chunk_bytes: 0 }`, "field stream.chunk_bytes must be at least 1, got 0"},
		{"output", `stream: { chunk_bytes: 16777217 }`, "field stream.chunk_bytes must be at most 16777216, got 16777217"},
		{"output", `message_type: streams`, `field message_type: unknown message type "streams": it must be auto, utf8, binary or stream`},
	} {
		for _, name := range []string{"cryo", "cryo_server"} {
			fields := `{ ` + map[string]string{"cryo": dials, "cryo_server": listens}[name] + `, ` + tt.fields + ` }`
			t.Run(tt.kind+" "+component(name, fields), func(t *testing.T) {
				assert.Equal(t, []string{tt.sentence}, lint(t, tt.kind, component(name, fields)))
				assert.ErrorContains(t, construct(t, tt.kind, name, fields), tt.sentence)
			})
		}
	}
}

func TestAnUnknownScannerFailsLintAndStart(t *testing.T) {
	fields := `{ ` + dials + `, streams: { scanner: { words: {} } } }`
	assert.Equal(t, []string{"unable to infer component type: words"}, lint(t, "input", component("cryo", fields)))
	assert.EqualError(t, construct(t, "input", "cryo", fields), "field streams.scanner: unable to infer scanner type from candidates: [words]")
}

func TestAMisspeltFieldOfStreamsFailsLint(t *testing.T) {
	assert.Equal(t, []string{"field name not recognised"}, lint(t, "input", component("cryo", `{ `+dials+`, streams: { name: orders } }`)))
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
