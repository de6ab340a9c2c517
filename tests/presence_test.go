package tests

import (
	"context"
	"io"
	"net/http"
	"net/url"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
)

func TestPresence(t *testing.T) {
	address := freeAddress(t)
	p := example(t, "presence.yaml", nil, "CRYO_ADDRESS=127.0.0.1:0", "CRYO_TOKEN="+token, "HTTP_ADDRESS="+address)
	server := "ws://" + p.wantLogged("Listening for Cryo clients on ")
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	want := func(id, query, presence string) {
		t.Helper()
		require.EventuallyWithT(t, func(c *assertT) {
			resp, err := client.Get("http://" + address + "/presence/" + id + query)
			require.NoError(c, err)
			body, err := io.ReadAll(resp.Body)
			require.NoError(c, err)
			require.NoError(c, resp.Body.Close())
			require.JSONEq(c, presence, string(body))
		}, patience, 10*time.Millisecond)
	}
	visit := func(name string) *cryo.Session {
		s, err := cryo.Dial(t.Context(), server, &cryo.DialOptions{Token: token, SessionID: 7, Query: url.Values{"name": {name}}})
		require.NoError(t, err)
		return s
	}
	const away = `{"connected":false}`
	want("7", "", away)
	want("7", "?cryo_session_event=connected&cryo_session_id=7&cryo_message_type=session", away)
	want("7", "", away)

	s := visit("ann")
	want("7", "", `{"connected":true,"name":"ann"}`)
	want("8", "", away)
	require.NoError(t, s.Close(t.Context(), ""))
	want("7", "", away)

	ghost := visit("ann") // whose network is gone
	want("7", "", `{"connected":true,"name":"ann"}`)
	s = visit("ann again")
	want("7", "", `{"connected":true,"name":"ann again"}`)
	<-ghost.Done()
	want("7", "", `{"connected":true,"name":"ann again"}`)
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	require.NoError(t, s.Close(ctx, ""))
	want("7", "", away)
	p.interrupt()
}
