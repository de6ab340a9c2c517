package tests

import (
	"context"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/testkit"
)

// logLine matches the time, which has whole seconds, and the message of a line.
var logLine = regexp.MustCompile(`^time="([^"]+)" level=\w+ msg="((?:[^"\\]|\\.)*)"`)

// ofTheEngine are the beginnings of lines that the engine writes without a limit (docs/operations/running.md).
var ofTheEngine = []string{"Failed to send message to ", "Failed to connect to "}

// wantLimitedLines wants each message of ours at most once a second.
func wantLimitedLines(t *testing.T, lines []string) {
	t.Helper()
	times := make(map[string][]time.Time)
	for _, line := range lines {
		match := logLine.FindStringSubmatch(line)
		if match == nil {
			continue
		}
		at, err := time.Parse(time.RFC3339, match[1])
		require.NoError(t, err)
		if text := match[2]; !strings.HasPrefix(text, ofTheEngine[0]) && !strings.HasPrefix(text, ofTheEngine[1]) {
			times[text] = append(times[text], at)
		}
	}
	for text, at := range times {
		span := at[len(at)-1].Sub(at[0]) + time.Second
		require.LessOrEqual(t, len(at), int(span/time.Second)+1, "%s", text)
	}
}

func TestRepeatedFailuresLogOneLinePerSecond(t *testing.T) {
	const failing = 1024 // max_in_flight
	rejects := testkit.Serve(t)
	go func() {
		s := <-rejects.Sessions
		for {
			m, err := s.Receive(context.Background())
			if err != nil {
				return
			}
			_ = m.Reject("no")
		}
	}()
	for _, tt := range []struct{ name, output string }{
		{"an output fails", "file: { path: /dev/full, codec: lines }"},
		{"every message is rejected", "reject: no"},
		{"the server rejects", "cryo: { url: '" + rejects.URL() + "', token: '" + token + "' }"},
		{"its client is not connected", "cryo_server: { address: '127.0.0.1:0', tokens: [ " + token + " ], send_to: session, session_id: '7', ack_timeout: 10ms }"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			p := runConfig(t, "{ input: { cryo_server: { address: '127.0.0.1:0', tokens: [ "+token+" ] } }, output: { "+tt.output+" } }")
			s := testkit.Dial(t, p.Listening())
			var messages []cryo.OutMessage
			for _, text := range numbered(failing) {
				messages = append(messages, cryo.Text(text))
			}
			ctx, cancel := context.WithCancel(context.Background())
			sending := testkit.Go(func() error { return s.SendBatch(ctx, messages) })
			for range 3 {
				p.WantLog("level=warning", "A message has failed repeatedly: redelivering it until it is delivered", "failures=", "suppressed=")
			}
			cancel()
			require.Error(t, testkit.Next(t, sending))
			wantLimitedLines(t, p.All())
			p.Kill()
		})
	}
}
