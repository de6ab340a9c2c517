package tests

import (
	"fmt"
	"io"
	"net/http"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/testkit"
)

// Each client uses a descriptor of the process, which has too few.
func TestListenerWithoutDescriptorsReportsItAndRecovers(t *testing.T) {
	const limit = 60
	service := testkit.ReserveAddress(t)
	file := testkit.WriteFile(t, "config.yaml", `
input: { label: clients, cryo_server: { address: "127.0.0.1:0", tokens: [ "`+token+`" ] } }
output: { drop: {} }
`)
	limited := exec.Command("sh", "-c", fmt.Sprintf(`ulimit -n %d && exec "$@"`, limit), "sh", testkit.Binary(t), "run", "--set", "http.address="+service, file)
	p := testkit.Start(t, limited)
	address := p.Listening()
	first := testkit.Dial(t, address)
	scraper := &http.Client{Transport: &http.Transport{}} // its connection stays, as that of Prometheus does
	t.Cleanup(scraper.CloseIdleConnections)
	wantMetric := func(series, value string) {
		t.Helper()
		testkit.Eventually(t, func(c *assert.CollectT) {
			resp, err := scraper.Get("http://" + service + "/metrics") //nolint:noctx // the test's end kills the server
			require.NoError(c, err)
			defer resp.Body.Close()
			body, err := io.ReadAll(resp.Body)
			require.NoError(c, err)
			assert.Contains(c, string(body), "\n"+series+"{"+value+"\n")
		})
	}
	wantMetric("cryo_listening", `label="clients",path="root.input"} 1`)

	begin := time.Now()
	var clients []*cryo.Session
	for range limit {
		s, err := cryo.Dial(t.Context(), "ws://"+address, &cryo.DialOptions{Token: token, ConnectTimeout: time.Second})
		if err != nil {
			break
		}
		clients = append(clients, s)
	}
	require.Less(t, len(clients), limit)
	p.WantLog("Cannot accept clients; retrying", "too many open files", "ulimit -n", "LimitNOFILE")
	wantMetric("cryo_listening", `label="clients",path="root.input"} 0`)
	testkit.WantDelivered(t, first, "sessions go on")
	for _, s := range clients {
		testkit.WantDelivered(t, s, "sessions go on")
	}
	elapsed := time.Since(begin)
	lines := p.Count(func(line string) bool { return strings.Contains(line, "Cannot accept clients") })
	require.LessOrEqual(t, lines, 1+int(elapsed/time.Second), "one a second")

	for _, s := range clients {
		testkit.HangUp(s)
	}
	testkit.WantDelivered(t, testkit.Dial(t, address), "of a new client")
	wantMetric("cryo_listening", `label="clients",path="root.input"} 1`)
	require.NoError(t, first.Err())
	p.Interrupt()
}
