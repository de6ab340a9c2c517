package plugin

import (
	"context"
	"io"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// decrypting panics in the engine's method, whose nonce has to have 12 bytes. In a
// mapping of clients' data both come from outside.
const decrypting = `decrypt_aes("gcm", "0123456789abcdef", "short")`

// mapped is a mapping as a field's value.
func mapped(mapping string) string { return strconv.Quote(mapping) }

func TestAClientAtWhichAuthorizePanicsIsNotLetIn(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		e.run("cryo_server: { address: '"+somewhere+"', max_sessions: 1, authorize: "+mapped(`root = if this.token == "sesame" { true } else { this.token.bytes().`+decrypting+` == "x" }`)+" }", toProbe)
		for range 3 {
			_, err := e.tryDial(cryo.DialOptions{Token: "hush-hush"})
			require.ErrorIs(t, err, cryo.ErrUnauthorized)
		}
		e.log.want(t, "the mapping failed: panic in crypto/")
		require.Zero(t, e.log.count("hush"))
		client, err := e.tryDial(cryo.DialOptions{Token: "sesame"})
		require.NoError(t, err, "those who failed hold no slot")
		m := send(client, "hello")
		e.arrival().deliver()
		m.wantAcked(t, "delivered")
	})
}

func TestAMessageAtWhichAFieldPanicsFailsAlone(t *testing.T) {
	field := func(name, other string) string {
		return name + ": " + mapped(`${! if content().string() == "poison" { content().`+decrypting+` } else { `+other+` } }`)
	}
	for name, output := range map[string]string{
		"message_type of cryo_server": with(listenOutput, field("message_type", `"utf8"`)),
		"stream.name of cryo_server":  with(listenOutput, "message_type: stream, stream: { "+field("name", `"a"`)+" }"),
		"session_id of cryo_server":   with(listenOutput, "send_to: session, "+field("session_id", `"7"`)),
		"message_type of cryo":        with(dialOutput, field("message_type", `"utf8"`)),
		"stream.name of cryo":         with(dialOutput, "message_type: stream, stream: { "+field("name", `"a"`)+" }"),
	} {
		t.Run(name, func(t *testing.T) {
			inEngine(t, func(t *testing.T, e *engine) {
				var peer *cryo.Session
				if strings.HasPrefix(output, "cryo:") {
					server := e.serve()
					e.run(fromOnce, output)
					peer = server.session()
				} else {
					e.run(fromOnce, output)
					var err error
					peer, err = e.tryDial(cryo.DialOptions{Token: token, SessionID: 7})
					require.NoError(t, err)
				}
				takeAll(peer)
				require.ErrorContains(t, next(t, e.give("poison").verdict), "panic in crypto/")
				e.give("a").wantDelivered(t, "the output goes on")
				require.Error(t, next(t, e.give("a", "poison", "b").verdict), "poison is not delivered")
				e.give("b").wantDelivered(t, "and on")
			})
		})
	}
}

func TestASessionAtWhichMatchPanicsGetsNothing(t *testing.T) {
	output := "cryo_server: { address: '" + somewhere + "', authorize: 'root.user = this.token', send_to: match, no_session: reject, match: " +
		mapped(`root = if @cryo_session.cryo_auth_user == "poison" { content().`+decrypting+` == "x" } else { true }`) + " }"
	inRooms(t, output, []string{"ann", "poison"}, func(t *testing.T, e *engine, clients []*cryo.Session) {
		f := e.give("m")
		messages, texts := held(t, clients[0])
		require.Equal(t, []string{"m"}, texts)
		ackAll(t, messages)
		f.wantDelivered(t, "the one that matches has it")
		wantNothing(t, clients[1])
		end(clients[0])
		synctest.Wait()
		require.ErrorContains(t, next(t, e.give("n").verdict), "panic in crypto/", "none matches")
	})
}

// takeAll acknowledges all that a session receives, until it ends.
func takeAll(s *cryo.Session) {
	go func() {
		for {
			st, err := s.AcceptStream(context.Background())
			if err != nil {
				return
			}
			_, _ = io.Copy(io.Discard, st)
			_ = st.Ack()
		}
	}()
	go func() {
		for {
			m, err := s.Receive(context.Background())
			if err != nil {
				return
			}
			_ = m.Ack()
		}
	}()
}
