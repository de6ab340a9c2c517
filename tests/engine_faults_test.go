package tests

import (
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/internal/testkit"
)

// Faults of the engine in docs/development/engine-faults.md that only the binary shows: those of
// components that the packages do not link. Each test fails when the engine is mended.

// printed runs a configuration until it ends, and returns the lines of its output stdout.
func printed(t *testing.T, configuration string) []string {
	t.Helper()
	path := testkit.WriteFile(t, "fault.yaml", configuration)
	out := testkit.Output(t, testkit.Command(t, "run", "--set", "http.enabled=false", "--set", "logger.level=NONE", path))
	return strings.Fields(out)
}

func TestEngineInputFileEndsWithoutARejectedLine(t *testing.T) {
	lines := testkit.WriteFile(t, "abc.txt", "a\nb\nc\n")
	require.Equal(t, []string{"b", "c"}, printed(t, `
input:
  file: { paths: [ `+lines+` ], scanner: { lines: {} } }
output:
  switch:
    cases:
      - check: content() == "a"
        output: { reject: "a is rejected" }
      - output: { stdout: {} }
`), "the engine is mended: config/files_to_cryo.yaml needs no retry")
}

func TestEngineInputS3EndsAtAClosedConnection(t *testing.T) {
	store := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.URL.Query().Has("list-type"):
			var keys strings.Builder
			for i := range 3 {
				fmt.Fprintf(&keys, "<Contents><Key>k%d</Key><Size>5</Size></Contents>", i)
			}
			fmt.Fprint(w, "<ListBucketResult><IsTruncated>false</IsTruncated>"+keys.String()+"</ListBucketResult>")
		case strings.HasSuffix(r.URL.Path, "k1"):
			panic(http.ErrAbortHandler) // closes the connection
		default:
			fmt.Fprint(w, "hello")
		}
	}))
	defer store.Close()
	require.Equal(t, []string{"hello"}, printed(t, `
input:
  aws_s3:
    bucket: b
    region: us-east-1
    endpoint: `+store.URL+`
    force_path_style_urls: true
    credentials: { id: a, secret: b }
    scanner: { to_the_end: {} }
output:
  stdout: {}
`), "the engine is mended: the objects k1 and k2 are not skipped")
}

func TestEngineOutputHTTPClientFailsItsWholeBatch(t *testing.T) {
	service := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if body, _ := io.ReadAll(r.Body); string(body) == "b" {
			w.WriteHeader(http.StatusUnprocessableEntity)
		}
	}))
	defer service.Close()
	require.Equal(t, []string{"a", "b", "c"}, printed(t, `
input:
  generate: { count: 3, batch_size: 3, interval: "", mapping: 'root = ["a", "b", "c"].index(counter() - 1)' }
output:
  fallback:
    - http_client: { url: `+service.URL+`, verb: POST, drop_on: [ 422 ] }
    - stdout: {}
`), "the engine is mended: the examples with http_client need no max_batch_count: 1")
}

func TestEngineIgnoresFieldsThatYAMLMerges(t *testing.T) {
	path := testkit.WriteFile(t, "fault.yaml", `
input:
  broker:
    inputs:
      - generate: &first { count: 1, interval: 100ms, mapping: root = "first" }
      - generate: { <<: *first, mapping: root = "second" }
output:
  stdout: {}
`)
	testkit.Output(t, testkit.Command(t, "lint", path))
	p := launch(t, nil, "run", "--set", "http.enabled=false", path)
	for range 2 {
		p.Take("second", func(line string) bool { return line == "second" }) // its count is 1
	}
}
