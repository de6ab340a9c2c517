package tests

import (
	"encoding/json"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestTheQuickstartPrintsTransformedMessagesAndEndsCleanly(t *testing.T) {
	p := launch(t, nil, []string{"QUICKSTART_ADDRESS=" + freeAddress(t)},
		"streams", "--set", "http.enabled=false", "config/quickstart")
	printed := p.stdout.want(t, 3, func(line string) bool { return strings.HasPrefix(line, "{") })
	for _, line := range printed {
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
	p.interrupt()
	for _, line := range p.said() {
		if strings.Contains(line, "connection refused") {
			continue // the client may be quicker than the server
		}
		require.NotRegexp(t, "level=(warn|error)", line)
	}
	// The client may say goodbye first, or the server.
	p.stdout.want(t, 1, regexp.MustCompile(
		`Closed the session with ws://|Disconnected from ws://.*server is shutting down`).MatchString)
	p.wantLogged("Closed the listener on ")
}
