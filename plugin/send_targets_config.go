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
		sendToAny:     "To one session in turn, as a work queue. Messages that a session leaves unacknowledged are sent to another one.",
		sendToSession: "To the session with the id `session_id`.",
		sendToMatch:   "To all sessions for which the `match` mapping returns `true`, such as those of a room, topic or user.",
	}, sendToAll, sendToAny, sendToSession, sendToMatch)
	noSessionField = oneOfDescribed(fieldNoSession, map[string]string{
		noSessionWait:   "Wait for a session for up to `ack_timeout`; after that the message has failed.",
		noSessionDrop:   "Drop the message, and count it as delivered.",
		noSessionReject: "The message fails immediately. The other messages of its batch are sent.",
	}, noSessionWait, noSessionDrop, noSessionReject)
	sessionInFlightField = positiveInt(fieldSessionInFlight, defaultSessionInFlight)
)

func targetFields() []*service.ConfigField {
	return []*service.ConfigField{
		sendToField.config().
			Description("The sessions that a message is sent to.").
			Default(sendToAll),
		service.NewInterpolatedStringField(fieldSessionID).
			Description("The id of the session that a message is sent to, with `send_to: session`. Messages from Cryo carry the id of their session as `cryo_session_id`. Clients choose their ids: where they must not read messages for others, set `session_owner`, as [Owners](" + authorizationPage + "#owners) explains.").
			Default("").
			Example("${! @cryo_session_id }"),
		service.NewBloblangField(fieldMatch).
			Description("A mapping that returns whether a message is sent to a session, with `send_to: match`. It runs on the message, for each session; `@cryo_session` is an object with the metadata of the session, whose values are text, such as `cryo_session_id` and `cryo_auth_…`. If it fails, the message is not sent to that session, and a warning is logged.").
			Example(`@cryo_session.cryo_auth_rooms.or("[]").parse_json().contains(@room)`).
			Example(`@cryo_session.cryo_session_id == @cryo_session_id && @cryo_session.cryo_auth_sub == @cryo_auth_sub`).
			Example(`@cryo_session.cryo_query_topic == this.topic && @cryo_session.cryo_session_id != @cryo_session_id`).
			Optional(),
		sessionInFlightField.config().
			Description("The maximum number of unacknowledged messages of a session, with `send_to: any`; further messages are sent to other sessions, or wait. With 1, a slow client delays a single message; more avoids a round trip between two messages."),
		noSessionField.config().
			Description("The result of a message whose target is not connected: no session, none with `session_id` and the right owner, or none that matches.").
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
