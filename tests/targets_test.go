package tests

import (
	"context"
	"net/http"
	"slices"
	"sync"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/testkit"
)

// listener is a client that acknowledges and collects every message.
type listener struct {
	mu    sync.Mutex
	texts []string
}

// listenIn connects a listener until the test's end.
func listenIn(t *testing.T, address, token string) *listener {
	t.Helper()
	s, err := cryo.Dial(t.Context(), "ws://"+address, &cryo.DialOptions{Token: token})
	require.NoError(t, err)
	l := &listener{}
	var receiving sync.WaitGroup
	receiving.Go(func() {
		for {
			m, err := s.Receive(context.Background())
			if err != nil {
				return
			}
			l.mu.Lock()
			l.texts = append(l.texts, string(m.Payload))
			l.mu.Unlock()
			_ = m.Ack()
		}
	})
	t.Cleanup(func() {
		_ = s.Close(context.Background(), "")
		receiving.Wait()
	})
	return l
}

// got returns the texts up to now.
func (l *listener) got() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.texts)
}

func TestMessageToARoomReachesOnlyItsClients(t *testing.T) {
	address := testkit.ReserveAddress(t)
	p := example(t, "rooms.yaml", "CRYO_ADDRESS=127.0.0.1:0", "JWT_SECRET=s3cret", "HTTP_ADDRESS="+address)
	cryoAddress := p.Listening()
	p.WantLog("Output type cryo_server is now active")
	post := func(room, text string) (testkit.Response, error) {
		return testkit.HTTP(http.MethodPost, "http://"+address+"/rooms/"+room, text)
	}
	enter := func(rooms ...string) *listener {
		l := listenIn(t, cryoAddress, jwt(t, "HS256", "s3cret", map[string]any{"rooms": rooms}))
		testkit.Eventually(t, func(c *assert.CollectT) { // until the output has the session
			_, err := post(rooms[0], "welcome")
			require.NoError(c, err)
			require.NotEmpty(c, l.got())
		})
		return l
	}
	red, blue, both := enter("red"), enter("blue"), enter("both", "red", "blue")
	for room, text := range map[string]string{"red": "to red", "blue": "to blue", "green": "to nobody"} {
		resp, err := post(room, text)
		require.NoError(t, err)
		require.Equal(t, http.StatusOK, resp.Status)
	}
	received := func(l *listener) []string {
		return slices.DeleteFunc(l.got(), func(text string) bool { return text == "welcome" })
	}
	require.Equal(t, []string{"to red"}, received(red))
	require.Equal(t, []string{"to blue"}, received(blue))
	require.ElementsMatch(t, []string{"to red", "to blue"}, received(both))
	p.Interrupt()
}

func TestJobOfADisconnectedClientGoesToAnother(t *testing.T) {
	p := exampleReading(t, "work_queue.yaml", "one\ntwo\nthree\n")
	address := p.Listening()
	jobs := map[string]bool{"one": true, "two": true, "three": true}
	leaves := testkit.Dial(t, address)
	undone := string(testkit.Receive(t, leaves).Payload)
	require.True(t, jobs[undone])

	stays := testkit.Dial(t, address)
	m := testkit.Receive(t, stays)
	require.NotEqual(t, undone, string(m.Payload), "each job goes to one client")
	require.NoError(t, leaves.Close(t.Context(), ""))
	for len(jobs) > 0 {
		require.True(t, jobs[string(m.Payload)], "%q is done already", m.Payload)
		delete(jobs, string(m.Payload))
		require.NoError(t, m.Ack())
		if len(jobs) > 0 {
			m = testkit.Receive(t, stays) // the last one is the job of the client that left
		}
	}
	p.WantExit(0)
}
