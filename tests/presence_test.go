package tests

import (
	"net/http"
	"net/url"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/testkit"
)

func TestPresenceFollowsTheSessions(t *testing.T) {
	address := testkit.ReserveAddress(t)
	p := example(t, "presence.yaml", "HTTP_ADDRESS="+address)
	server := "ws://" + p.Listening()
	want := func(id, query, presence string) {
		t.Helper()
		testkit.Eventually(t, func(c *assert.CollectT) {
			resp, err := testkit.HTTP(http.MethodGet, "http://"+address+"/presence/"+id+query, "")
			require.NoError(c, err)
			require.JSONEq(c, presence, resp.Body)
		})
	}
	visit := func(name string) *cryo.Session {
		s, err := cryo.Dial(t.Context(), server, &cryo.DialOptions{Token: token, SessionID: 7, Query: url.Values{"name": {name}}})
		require.NoError(t, err)
		return s
	}
	const offline = `{"connected":false}`
	want("7", "", offline)
	want("7", "?cryo_session_event=connected&cryo_session_id=7&cryo_message_type=session", offline)
	want("7", "", offline)

	s := visit("ann")
	want("7", "", `{"connected":true,"name":"ann"}`)
	want("8", "", offline)
	require.NoError(t, s.Close(t.Context(), ""))
	want("7", "", offline)

	lost := visit("ann") // whose connection is lost without a close
	want("7", "", `{"connected":true,"name":"ann"}`)
	s = visit("ann again")
	want("7", "", `{"connected":true,"name":"ann again"}`)
	<-lost.Done()
	want("7", "", `{"connected":true,"name":"ann again"}`)
	require.NoError(t, s.Close(t.Context(), ""))
	want("7", "", offline)
	p.Interrupt()
}
