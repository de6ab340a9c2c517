package plugin

import (
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/redpanda-data/benthos/v4/public/service"
	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// byRoom sends each message to the clients whose token names its room.
const byRoom = `
cryo_server:
  address: ` + somewhere + `
  authorize: 'root.rooms = this.token.split("+")'
  send_to: match
  match: '@cryo_session.cryo_auth_rooms.parse_json().contains(@room)'
`

// inRooms runs a test with a pipeline to rooms, and a client for each token.
func inRooms(t *testing.T, output string, tokens []string, test func(t *testing.T, e *engine, clients []*cryo.Session)) {
	t.Helper()
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(fromOnce, output)
		var clients []*cryo.Session
		for _, rooms := range tokens {
			clients = append(clients, e.enter(rooms))
		}
		test(t, e, clients)
	})
}

// enter connects a client with this token.
func (e *engine) enter(rooms string) *cryo.Session {
	e.t.Helper()
	s, err := e.tryDial(cryo.DialOptions{Token: rooms})
	require.NoError(e.t, err)
	synctest.Wait()
	return s
}

// said is a batch of messages m0, m1, … for these rooms.
func said(rooms ...string) service.MessageBatch {
	batch := batchOf(numbered("m%d", len(rooms))...)
	for i, room := range rooms {
		batch[i].MetaSetMut("room", room)
	}
	return batch
}

func TestMessageIsSentToMatchingSessions(t *testing.T) {
	inRooms(t, byRoom, []string{"red", "blue", "red+blue", "green"}, func(t *testing.T, e *engine, clients []*cryo.Session) {
		f := e.produceBatch(said("red", "blue", "red"))
		for i, want := range [][]string{{"m0", "m2"}, {"m1"}, {"m0", "m1", "m2"}} {
			messages, texts := held(t, clients[i])
			require.Equal(t, want, texts)
			f.wantPending(t, "not all have acknowledged")
			ackAll(t, messages)
		}
		f.wantDelivered(t, "all have")
		wantNothing(t, clients[3])
	})
}

func TestMatchSeesTheMessageAndTheSession(t *testing.T) {
	const byTopic = `
cryo_server:
  address: ` + somewhere + `
  authorize: 'root.user = this.token'
  send_to: match
  match: 'root = this.to.contains(@cryo_session.cryo_auth_user) && @cryo_session.cryo_session_id != @sender && @cryo_session.cryo_remote_address != ""'
`
	inRooms(t, byTopic, []string{"ann", "bob", "bob"}, func(t *testing.T, e *engine, clients []*cryo.Session) {
		batch := batchOf(`{"to":["bob"]}`)
		batch[0].MetaSetMut("sender", fmt.Sprint(clients[1].ID()))
		f := e.produceBatch(batch)
		require.NoError(t, receiveTexts(t, clients[2], `{"to":["bob"]}`)[0].Ack())
		f.wantDelivered(t, "the one that it is for has it")
		wantNothing(t, clients[0])
		wantNothing(t, clients[1])
	})
}

func TestLateMatchingSessionIsClosed(t *testing.T) {
	inRooms(t, byRoom+"  ack_timeout: 3s\n", []string{"red", "red", "blue"}, func(t *testing.T, e *engine, clients []*cryo.Session) {
		begin := time.Now()
		f := e.produceBatch(said("red"))
		require.NoError(t, receive(t, clients[0]).Ack())
		receive(t, clients[1])
		f.wantDelivered(t, "one has acknowledged")
		require.Equal(t, 3*time.Second, time.Since(begin))
		synctest.Wait()
		require.NoError(t, clients[0].Err())
		require.Error(t, clients[1].Err())
		require.NoError(t, clients[2].Err())
	})
}

func TestNoSessionAppliesToAMessageWithoutAMatchingSession(t *testing.T) {
	t.Run("waits for one, without holding up others", func(t *testing.T) {
		inRooms(t, byRoom, []string{"red"}, func(t *testing.T, e *engine, clients []*cryo.Session) {
			f := e.produceBatch(said("blue", "red"))
			require.NoError(t, receiveTexts(t, clients[0], "m1")[0].Ack())
			time.Sleep(10 * time.Second)
			green := e.enter("green")
			f.wantPending(t, "another came")
			wantNothing(t, green)
			require.NoError(t, receiveTexts(t, e.enter("blue"), "m0")[0].Ack())
			f.wantDelivered(t, "it came")
			wantNothing(t, clients[0])
		})
	})
	t.Run("fails its batch at ack_timeout, when all others are acknowledged", func(t *testing.T) {
		inRooms(t, byRoom, []string{"red"}, func(t *testing.T, e *engine, clients []*cryo.Session) {
			begin := time.Now()
			f := e.produceBatch(said("blue", "red"))
			require.NoError(t, receiveTexts(t, clients[0], "m1")[0].Ack())
			f.wantFailed(t, "1 of 2 messages were not acknowledged, first error: no connected session matches")
			require.Equal(t, 30*time.Second, time.Since(begin))
		})
	})
	t.Run("is dropped", func(t *testing.T) {
		inRooms(t, byRoom+"  no_session: drop\n", []string{"red"}, func(t *testing.T, e *engine, clients []*cryo.Session) {
			e.produceBatch(said("blue")).wantDelivered(t, "as if")
			wantNothing(t, clients[0])
		})
	})
	t.Run("is rejected", func(t *testing.T) {
		inRooms(t, byRoom+"  no_session: reject\n", []string{"red"}, func(t *testing.T, e *engine, clients []*cryo.Session) {
			require.ErrorContains(t, next(t, e.produceBatch(said("blue")).verdict), "no connected session matches")
		})
	})
}

func TestMatchRunsOncePerMessageAndSession(t *testing.T) {
	const byTurn = `
cryo_server:
  address: ` + somewhere + `
  authorize: 'true'
  send_to: match
  match: 'root = counter() == 5'
`
	inRooms(t, byTurn, []string{"first", "second"}, func(t *testing.T, e *engine, clients []*cryo.Session) {
		f := e.produce("m")
		f.wantPending(t, "asked for two")
		clients = append(clients, e.enter("third"), e.enter("fourth"))
		f.wantPending(t, "asked for two more, and not again for the first")
		require.NoError(t, receiveTexts(t, e.enter("fifth"), "m")[0].Ack())
		f.wantDelivered(t, "to the fifth that it was asked for")
		for _, c := range clients {
			wantNothing(t, c)
		}
	})
}

func TestFailedMatchForOneSessionDoesNotAffectOthers(t *testing.T) {
	const output = `
cryo_server:
  address: ` + somewhere + `
  authorize: 'root = if this.token == "none" { true } else { { "rooms": this.token.split("+") } }'
  send_to: match
  match: '@cryo_session.cryo_auth_rooms.parse_json().contains(@room)'
  no_session: reject
`
	inRooms(t, output, []string{"none", "red"}, func(t *testing.T, e *engine, clients []*cryo.Session) {
		f := e.produceBatch(said("red"))
		require.NoError(t, receive(t, clients[1]).Ack())
		f.wantDelivered(t, "to the one that matches")
		wantNothing(t, clients[0])
		id := fmt.Sprint(clients[0].ID())
		e.log.want(t, "WARN Message not sent to a session: cannot evaluate the match field", "error=mapping failed: ", "session="+id)
		require.ErrorContains(t, next(t, e.produceBatch(said("blue")).verdict), "no connected session matches (field match: session "+id+": mapping failed: ")
	})
}

func TestNonBooleanMatchSendsNothing(t *testing.T) {
	for name, mapping := range map[string]string{
		"something else":       "root = @room",
		"nothing":              "let x = 1",
		"deleted":              "root = deleted()",
		"nothing of its own":   "root = if @room == \"blue\" { true }",
		"for one session only": "root = if @cryo_session.cryo_auth_user == \"x\" { @room } else { true }",
	} {
		t.Run(name, func(t *testing.T) {
			const output = `
cryo_server:
  address: ` + somewhere + `
  authorize: 'root.user = this.token'
  send_to: match
  match: '%s'
  no_session: reject
`
			inRooms(t, fmt.Sprintf(output, mapping), []string{"x"}, func(t *testing.T, e *engine, clients []*cryo.Session) {
				batch := batchOf("true") // which is no decision
				batch[0].MetaSetMut("room", "true")
				require.ErrorContains(t, next(t, e.produceBatch(batch).verdict), "the mapping returned neither true nor false")
				wantNothing(t, clients[0])
			})
		})
	}
}

func TestStreamIsSentToMatchingSessions(t *testing.T) {
	inRooms(t, byRoom+"  message_type: stream\n", []string{"red", "blue", "red"}, func(t *testing.T, e *engine, clients []*cryo.Session) {
		f := e.produceBatch(said("red"))
		for _, i := range []int{0, 2} {
			st, content := readStream(t, clients[i])
			require.Equal(t, "m0", content)
			f.wantPending(t, "not all have acknowledged")
			require.NoError(t, st.Ack())
		}
		f.wantDelivered(t, "both have")
	})
}

func TestMatchDoesNotChangeTheMessage(t *testing.T) {
	conf, err := specs()["output cryo_server"].ParseYAML(byRoom[len("\ncryo_server:"):], nil)
	require.NoError(t, err)
	c, err := targetConfigFromParsed(conf, nil)
	require.NoError(t, err)
	batch := said("red")
	m := c.match.sessionsFor(batch)
	m.views[0].MetaSetMut(metaMatchSession, "x")
	_, there := batch[0].MetaGet(metaMatchSession)
	require.False(t, there)
}
