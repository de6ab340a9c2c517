package tests

import (
	"encoding/json"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/internal/testkit"
)

func TestQuickstartPrintsTransformedMessagesAndEndsCleanly(t *testing.T) {
	p := launch(t, []string{"QUICKSTART_ADDRESS=" + testkit.ReserveAddress(t)},
		"streams", "--set", "http.enabled=false", "config/quickstart")
	for range 3 {
		line := p.Take("a message", func(line string) bool { return strings.HasPrefix(line, "{") })
		var m struct {
			Sensor     string
			Celsius    float64
			Fahrenheit float64
			Session    string
			Time       string
		}
		require.NoError(t, json.Unmarshal([]byte(line), &m))
		require.Regexp(t, `^sensor-[1-3]$`, m.Sensor)
		require.InDelta(t, m.Celsius*9/5+32, m.Fahrenheit, 0.51)
		require.Regexp(t, `^\d{1,20}$`, m.Session)
		require.NotEmpty(t, m.Time)
	}
	p.Interrupt()
	for _, line := range p.All() {
		if strings.Contains(line, "connection refused") {
			continue // the client can be faster than the server
		}
		require.NotRegexp(t, "level=(warn|error)", line)
	}
	// Either end can be the first to close.
	p.Take("the end of the session", regexp.MustCompile(
		`Session closed|Disconnected.*server is shutting down`).MatchString)
	p.WantLog("Listener closed")
}
