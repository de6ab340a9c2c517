package tests

import (
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"gopkg.in/yaml.v3"

	"github.com/cryo-connect/cryo-connect/internal/testkit"
)

// The files of config/prometheus.
const (
	rulesFile      = "../config/prometheus/cryo-connect.rules.yml"
	rulesTestsFile = "../config/prometheus/cryo-connect.rules.test.yml"
)

// alertRule is one of the rules.
type alertRule struct {
	Alert, Expr string
	For         *time.Duration
	Labels      map[string]string
	Annotations struct {
		Summary, Description string
		Runbook              string `yaml:"runbook_url"`
	}
}

// alertRules returns all rules.
func alertRules(t *testing.T) (rules []alertRule) {
	t.Helper()
	var file struct{ Groups []struct{ Rules []alertRule } }
	require.NoError(t, yaml.Unmarshal([]byte(testkit.ReadFile(t, rulesFile)), &file))
	for _, group := range file.Groups {
		rules = append(rules, group.Rules...)
	}
	require.NotEmpty(t, rules)
	return rules
}

// alertTest is what promtool evaluates over made-up series.
type alertTest struct {
	Name  string
	Input []struct{ Series string } `yaml:"input_series"`
	Tests []struct {
		Expr    string
		Samples []struct{} `yaml:"exp_samples"`
	} `yaml:"promql_expr_test"`
}

// alertTests returns the unit tests of the rules.
func alertTests(t *testing.T) []alertTest {
	t.Helper()
	var file struct{ Tests []alertTest }
	require.NoError(t, yaml.Unmarshal([]byte(testkit.ReadFile(t, rulesTestsFile)), &file))
	require.NotEmpty(t, file.Tests)
	return file.Tests
}

func TestAlertsFireAsTheirUnitTestsExpect(t *testing.T) {
	for _, test := range []struct{ command, file string }{{"check", rulesFile}, {"test", rulesTestsFile}} {
		file, err := filepath.Abs(test.file)
		require.NoError(t, err)
		// Without the service discoveries of Prometheus, which compile for minutes.
		promtool := exec.Command("go", "run", "-C", "../tools/promtool", "-tags", "remove_all_sd",
			"github.com/prometheus/prometheus/cmd/promtool", test.command, "rules", file)
		testkit.Output(t, promtool)
	}
}

func TestEveryAlertIsTestedAndLinksToTroubleshooting(t *testing.T) {
	fires, silent := make(map[string]bool), make(map[string]bool)
	alert := regexp.MustCompile(`^ALERTS\{alertname="(\w+)",alertstate="firing"\}$`)
	for _, test := range alertTests(t) {
		for _, expectation := range test.Tests {
			match := alert.FindStringSubmatch(expectation.Expr)
			require.NotNil(t, match, "%s: %s", test.Name, expectation.Expr)
			if len(expectation.Samples) > 0 {
				fires[match[1]] = true
			} else {
				silent[match[1]] = true
			}
		}
	}
	headings := anchors(testkit.ReadFile(t, troubleshootingPage))
	known := make(map[string]bool)
	for _, rule := range alertRules(t) {
		require.False(t, known[rule.Alert], "two alerts have the name %s", rule.Alert)
		known[rule.Alert] = true
		require.True(t, fires[rule.Alert], "%s fires in no test", rule.Alert)
		require.True(t, silent[rule.Alert], "no test shows when %s does not fire", rule.Alert)
		require.NotNil(t, rule.For, rule.Alert)
		require.Contains(t, []string{"critical", "warning", "info"}, rule.Labels["severity"], rule.Alert)
		require.NotEmpty(t, rule.Annotations.Summary, rule.Alert)
		require.NotEmpty(t, rule.Annotations.Description, rule.Alert)
		heading, found := strings.CutPrefix(rule.Annotations.Runbook, "https://github.com/cryo-connect/cryo-connect/blob/main/docs/operations/troubleshooting.md#")
		require.True(t, found && headings[heading], "%s links to %q", rule.Alert, rule.Annotations.Runbook)
	}
	for _, file := range []string{testkit.ReadFile(t, rulesFile), testkit.ReadFile(t, "../docs/operations/metrics.md"), testkit.ReadFile(t, troubleshootingPage)} {
		for _, name := range find(file, `\b(Cryo[A-Z]\w+)`) {
			require.True(t, known[name], "there is no alert %s", name)
		}
	}
}
