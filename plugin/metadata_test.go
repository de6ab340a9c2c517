package plugin

import (
	"net/http"
	"net/url"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/redpanda-data/benthos/v4/public/service"
	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// metadataOf are a message's, but for what numbers the message itself.
func metadataOf(t *testing.T, m *service.Message) map[string]any {
	t.Helper()
	got := make(map[string]any)
	require.NoError(t, m.MetaWalkMut(func(key string, value any) error {
		if key != metaAckID && key != metaTxID && key != metaStreamSize {
			got[key] = value
		}
		return nil
	}))
	return got
}

const authorizing = `
cryo_server:
  address: '` + somewhere + `'
  authorize: |
    root = if this.token == "sesame" {
      { "user": "ann", "roles": [ "a", "b" ], "age": 42, "expires": "1700000000".number(), "share": 0.5, "admin": false, "boss": null,
        "address": { "city": "Bern" } }
    } else { this.token == "plain" }
  session_metadata: { query_parameters: [ room, floor ], headers: [ x-Room, X-Floor ] }
`

func TestSessionMetadataIsSetOnMessagesAndStreams(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(authorizing, toProbe)
		client, err := e.tryDial(cryo.DialOptions{
			Token: "sesame", SessionID: 1<<64 - 1,
			Query: url.Values{"room": {"5", "8"}, "secret": {"x"}}, Header: http.Header{"X-Room": {"6"}, "X-Secret": {"x"}},
		})
		require.NoError(t, err)
		want := map[string]any{
			"cryo_message_type":   "utf8",
			"cryo_session_id":     "18446744073709551615",
			"cryo_remote_address": "192.0.2.1:50000",
			"cryo_auth_user":      "ann",
			"cryo_auth_roles":     `["a","b"]`,
			"cryo_auth_age":       "42",
			"cryo_auth_expires":   "1700000000",
			"cryo_auth_share":     "0.5",
			"cryo_auth_admin":     "false",
			"cryo_auth_address":   `{"city":"Bern"}`,
			"cryo_query_room":     "5",
			"cryo_header_x-room":  "6",
		}
		m := send(client, "hello")
		a := e.arrival()
		require.Equal(t, want, metadataOf(t, a.batch[0]))
		a.deliver()
		m.wantAcked(t, "delivered")

		stream := sendAny(func() error {
			return client.SendStream(t.Context(), strings.NewReader("abc"), &cryo.StreamOptions{Name: "letters"})
		})
		a = e.arrival()
		want["cryo_message_type"], want["cryo_stream_name"] = "stream", "letters"
		require.Equal(t, want, metadataOf(t, a.batch[0]))
		a.deliver()
		stream.wantAcked(t, "delivered")

		other, err := e.tryDial(cryo.DialOptions{Token: "plain", SessionID: 7})
		require.NoError(t, err)
		send(other, "hello")
		require.Equal(t, map[string]any{
			"cryo_message_type": "utf8", "cryo_session_id": "7", "cryo_remote_address": "192.0.2.1:50000",
		}, metadataOf(t, e.arrival().batch[0]))
	})
}

func TestAuthorizeSeesTheQueryWithoutTheToken(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run("cryo_server: { address: '"+somewhere+"', authorize: 'root = this.query.without(\"x-cryo-sid\")' }", toProbe)
		client, err := e.tryDial(cryo.DialOptions{Token: "sesame", SessionID: 7, Query: url.Values{"room": {"5"}}})
		require.NoError(t, err)
		send(client, "hello")
		require.Equal(t, map[string]any{
			"cryo_message_type": "utf8", "cryo_session_id": "7", "cryo_remote_address": "192.0.2.1:50000",
			"cryo_auth_room": "5",
		}, metadataOf(t, e.arrival().batch[0]))
	})
}

func TestSessionMetadataSurvivesAHandover(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		first := e.run(authorizing, toProbe)
		e.run(authorizing, toProbe)
		client, err := e.tryDial(cryo.DialOptions{Token: "sesame"})
		require.NoError(t, err)
		first.stop()
		send(client, "hello")
		user, _ := e.arrival().batch[0].MetaGet("cryo_auth_user")
		require.Equal(t, "ann", user)
	})
}

func TestMutatingAMessageDoesNotAffectOthers(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(authorizing, toProbe, `mapping: 'meta cryo_auth_user = @cryo_auth_user + "!"'`)
		client, err := e.tryDial(cryo.DialOptions{Token: "sesame"})
		require.NoError(t, err)
		for range 2 {
			m := send(client, "hello")
			a := e.arrival()
			user, _ := a.batch[0].MetaGet("cryo_auth_user")
			require.Equal(t, "ann!", user)
			a.deliver()
			m.wantAcked(t, "delivered")
			synctest.Wait()
		}
	})
}

func TestHostIsAvailableAsAHeader(t *testing.T) {
	for name, fields := range map[string]string{
		"session_metadata": "authorize: 'root = true', session_metadata: { headers: [ host ] }",
		"authorize":        "authorize: 'root.host = this.headers.host'",
	} {
		t.Run(name, func(t *testing.T) {
			inEngine(t, func(t *testing.T, e *engine) {
				e.run("cryo_server: { address: '"+somewhere+"', "+fields+" }", toProbe)
				client, err := e.tryDial(cryo.DialOptions{Token: "sesame", Header: http.Header{"Host": {"cryo.example.com"}}})
				require.NoError(t, err)
				send(client, "hello")
				key := map[string]string{"session_metadata": "cryo_header_host", "authorize": "cryo_auth_host"}[name]
				require.Equal(t, "cryo.example.com", metadataOf(t, e.arrival().batch[0])[key])
			})
		})
	}
}

func TestClientWithControlCharactersInMetadataIsDenied(t *testing.T) {
	for name, fields := range map[string]string{
		"of session_metadata": "authorize: 'root = true', session_metadata: { query_parameters: [ room ] }",
		"of authorize":        "authorize: 'root.query_room = this.query.room'",
		"of an answer":        "authorize: 'root.room = this.answer', authorize_processors: [ { mapping: 'root = this.query.room' } ]",
		"in a name":           "authorize: 'root = { (this.query.room): 1 }'",
	} {
		t.Run(name, func(t *testing.T) {
			inEngine(t, func(t *testing.T, e *engine) {
				e.run("cryo_server: { address: '"+somewhere+"', "+fields+" }", toProbe)
				for _, room := range []string{"a\r\nb", "\x00", "a\x7f", "\t", "\u0085"} {
					denied := e.wantDenied(cryo.DialOptions{Token: "sesame", Query: url.Values{"room": {room}}}, http.StatusBadRequest)
					require.Contains(t, denied.Message, "control characters")
				}
				e.log.want(t, "must not contain control characters.")
				require.Equal(t, int64(5), e.metrics.value("cryo_sessions_denied{status=400}"))

				_, err := e.tryDial(cryo.DialOptions{Token: "sesame", Query: url.Values{"room": {"ä b"}}})
				require.NoError(t, err)
				_, err = e.tryDial(cryo.DialOptions{Token: "sesame", Query: url.Values{"room": {"a"}, "other": {"a\r\nb"}}})
				require.NoError(t, err, "it becomes no metadata")
			})
		})
	}
}
