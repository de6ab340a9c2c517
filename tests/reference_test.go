package tests

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"gopkg.in/yaml.v3"

	"github.com/cryo-connect/cryo-connect/internal/testkit"
)

func TestDocsOfEachComponentHaveThreeExamplesThatPassLint(t *testing.T) {
	pages, err := filepath.Glob("../docs/reference/components/*/*.md")
	require.NoError(t, err)
	require.Len(t, pages, 4)
	t.Setenv("CRYO_TOKEN", token)
	var files []string
	for _, page := range pages {
		_, examples, found := strings.Cut(testkit.ReadFile(t, page), "\n## Examples\n")
		require.True(t, found, page)
		examples, _, _ = strings.Cut(examples, "\n## Fields\n")
		shown := blocks(examples, "yaml")
		require.GreaterOrEqual(t, len(shown), 3, page)
		for i, example := range shown {
			var config any
			require.NoError(t, yaml.Unmarshal([]byte(example), &config), "%s: %s", page, example)
			wantPeriods(t, page, config)
			files = append(files, testkit.WriteFile(t, fmt.Sprintf("example%d.yaml", i), example))
		}
	}
	wantLinted(t, []string{"--skip-env-var-check"}, files...)
}
