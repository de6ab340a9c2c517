package plugin

import (
	"fmt"

	"github.com/redpanda-data/benthos/v4/public/service"
)

// The fields that determine to which sessions a message is sent.

const (
	fieldSendTo            = "send_to"
	fieldSessionID         = "session_id"
	fieldMatch             = "match"
	fieldNoSession         = "no_session"
	fieldSessionInFlight   = "max_in_flight_per_session"
	defaultSessionInFlight = 16

	sendToAll     = "all"
	sendToAny     = "any"
	sendToSession = "session"
	sendToMatch   = "match"

	noSessionWait   = "wait"
	noSessionDrop   = "drop"
	noSessionReject = "reject"
)

var (
	sendToField = oneOfDescribed(fieldSendTo, map[string]string{
		sendToAll:     "To all connected sessions.",
		sendToAny:     "To one session in turn, as a work queue. When a session ends, its unacknowledged messages are sent to another one.",
		sendToSession: "To the session with the id `session_id`.",
		sendToMatch:   "To all sessions for which the mapping `match` returns `true`: rooms, topics, users.",
	}, sendToAll, sendToAny, sendToSession, sendToMatch)
	noSessionField = oneOfDescribed(fieldNoSession, map[string]string{
		noSessionWait:   "Wait for a session up to `ack_timeout`; after that the message has failed.",
		noSessionDrop:   "Drop the message, and count it as delivered.",
		noSessionReject: "The message fails immediately; the other messages of its batch are sent.",
	}, noSessionWait, noSessionDrop, noSessionReject)
	sessionInFlightField = positiveInt(fieldSessionInFlight, defaultSessionInFlight)
)

func targetFields() []*service.ConfigField {
	return []*service.ConfigField{
		sendToField.config().
			Description("The sessions that a message is sent to.").
			Default(sendToAll),
		service.NewInterpolatedStringField(fieldSessionID).
			Description("The id of the session that a message is sent to, with `send_to: session`. Messages that were received from Cryo carry the id of their session in the metadata `cryo_session_id`. The client chooses the id, and it is not a proof of who the client is: when a session has ended, any authorized client may connect with its id, and receives what is sent to it.\n\nWhere clients must not read what is for others, set `session_owner`. The metadata `cryo_session_owner` of a message must then be that of the session, otherwise the message is not sent to it, a warning is logged, and `no_session` applies. Messages that were received from the session have that metadata. Where it is lost on the way, as in a queue that carries only the content, messages are sent only to sessions without an owner, so carry it with the id. To send to a session of somebody else, set it to the SHA-256 hash of its owner: `meta cryo_session_owner = \"bob\".hash(\"sha256\").encode(\"hex\")`.").
			Default("").
			Example("${! @cryo_session_id }"),
		service.NewBloblangField(fieldMatch).
			Description("A mapping that returns whether a message is sent to a session, `true` or `false`, with `send_to: match`. It runs on the message; the object `@cryo_session` contains the metadata of the session: `cryo_session_id`, `cryo_session_owner`, `cryo_remote_address`, `cryo_auth_…`, `cryo_query_…` and `cryo_header_…`. All its values are text; a list, such as the rooms that a token grants, is JSON. If the mapping fails, the message is not sent to that session, and a warning is logged. It runs once for each pair of a message and a session, which takes some microseconds; while a message waits for a match (`no_session: wait`), it runs for new sessions. Keep it short if there are thousands of sessions.").
			Example(`@cryo_session.cryo_auth_rooms.or("[]").parse_json().contains(@room)`).
			Example(`@cryo_session.cryo_session_id == @cryo_session_id && @cryo_session.cryo_auth_sub == @cryo_auth_sub`).
			Example(`@cryo_session.cryo_query_topic == this.topic && @cryo_session.cryo_session_id != @cryo_session_id`).
			Optional(),
		sessionInFlightField.config().
			Description("The maximum number of unacknowledged messages of a session, with `send_to: any`; further messages are sent to other sessions, or wait. With 1, a slow client delays a single message; higher values avoid a round trip between two messages."),
		noSessionField.config().
			Description("What to do with a message if no session is connected, or not the one with `session_id`, or that one has another owner, or none matches.").
			Default(noSessionWait),
	}
}

// targetConfig holds the settings of an output's targets.
type targetConfig struct {
	sendTo          string
	sessionID       *service.InterpolatedString // for sendToSession
	match           *matcher                    // for sendToMatch
	sessionInFlight int                         // for sendToAny
	noSession       string
	ownerLog        limitedLog // of messages for sessions with another owner
}

func targetConfigFromParsed(conf *service.ParsedConfig, log *service.Logger) (c targetConfig, err error) {
	r := &settingsReader{conf: conf}
	c.ownerLog = newLimitedLog(log)
	c.sendTo = sendToField.read(r)
	c.noSession = noSessionField.read(r)
	c.sessionInFlight = sessionInFlightField.read(r)
	c.sessionID = readInterpolated(r, fieldSessionID)
	mapping, _ := readMapping(r, fieldMatch)
	if r.err != nil {
		return c, r.err
	}
	if mapping != nil {
		c.match = newMatcher(mapping, log)
	}
	id, static := c.sessionID.Static()
	named := !static || id != ""
	switch {
	case c.sendTo == sendToSession && !named:
		return c, fmt.Errorf("%s: %s needs the field %s", fieldSendTo, sendToSession, fieldSessionID)
	case c.sendTo != sendToSession && named:
		return c, fmt.Errorf("the field %s has no effect without %s: %s", fieldSessionID, fieldSendTo, sendToSession)
	case c.sendTo == sendToMatch && c.match == nil:
		return c, fmt.Errorf("%s: %s needs the field %s", fieldSendTo, sendToMatch, fieldMatch)
	case c.sendTo != sendToMatch && c.match != nil:
		return c, fmt.Errorf("the field %s has no effect without %s: %s", fieldMatch, fieldSendTo, sendToMatch)
	}
	return c, nil
}
