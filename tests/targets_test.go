package tests

import (
	"context"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// listener is a client that acknowledges all that it gets, and keeps it.
type listener struct {
	mu    sync.Mutex
	texts []string
}

// listenIn connects one until the test's end.
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

func (l *listener) got() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.texts)
}

func TestRooms(t *testing.T) {
	address := freeAddress(t)
	p := example(t, "rooms.yaml", nil, "CRYO_ADDRESS=127.0.0.1:0", "JWT_SECRET=s3cret", "HTTP_ADDRESS="+address)
	cryoAddress := p.wantLogged("Listening for Cryo clients on ")
	p.wantLogged("Output type cryo_server is now active")
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	say := func(room, text string) (status int, err error) {
		resp, err := client.Post("http://"+address+"/rooms/"+room, "text/plain", strings.NewReader(text))
		if err != nil {
			return 0, err
		}
		return resp.StatusCode, resp.Body.Close()
	}
	enter := func(rooms ...string) *listener {
		l := listenIn(t, cryoAddress, jwt(t, "HS256", "s3cret", map[string]any{"rooms": rooms}))
		require.EventuallyWithT(t, func(c *assertT) { // until the pipeline knows the session
			_, err := say(rooms[0], "welcome")
			require.NoError(c, err)
			require.NotEmpty(c, l.got())
		}, patience, 10*time.Millisecond)
		return l
	}
	red, blue, both := enter("red"), enter("blue"), enter("both", "red", "blue")
	for room, text := range map[string]string{"red": "to red", "blue": "to blue", "green": "to nobody"} {
		status, err := say(room, text)
		require.NoError(t, err)
		require.Equal(t, http.StatusOK, status)
	}
	said := func(l *listener) []string {
		return slices.DeleteFunc(l.got(), func(text string) bool { return text == "welcome" })
	}
	require.Equal(t, []string{"to red"}, said(red))
	require.Equal(t, []string{"to blue"}, said(blue))
	require.ElementsMatch(t, []string{"to red", "to blue"}, said(both))
	p.interrupt()
}

func TestWorkQueue(t *testing.T) {
	p := example(t, "work_queue.yaml", strings.NewReader("one\ntwo\nthree\n"), "CRYO_ADDRESS=127.0.0.1:0", "CRYO_TOKEN="+token)
	address := p.wantLogged("Listening for Cryo clients on ")
	jobs := map[string]bool{"one": true, "two": true, "three": true}
	leaves := dial(t, address)
	undone := string(receive(t, leaves).Payload)
	require.True(t, jobs[undone])

	stays := dial(t, address)
	m := receive(t, stays)
	require.NotEqual(t, undone, string(m.Payload), "each job goes to one client")
	require.NoError(t, leaves.Close(t.Context(), ""))
	for len(jobs) > 0 {
		require.True(t, jobs[string(m.Payload)], "%q is done already", m.Payload)
		delete(jobs, string(m.Payload))
		require.NoError(t, m.Ack())
		if len(jobs) > 0 {
			m = receive(t, stays) // in the end also what the other left undone
		}
	}
	p.wantSuccess()
}
