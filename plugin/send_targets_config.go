package plugin

import (
	"fmt"

	"github.com/redpanda-data/benthos/v4/public/service"
)

// The fields that choose the sessions that a message is for.

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
		sendToAll:     "To every session that is connected.",
		sendToAny:     "To one of them in turn: a work queue. When a session goes, what it has not acknowledged goes to another.",
		sendToSession: "To the session that `session_id` names.",
		sendToMatch:   "To every session for which the mapping `match` says `true`: rooms, topics, users.",
	}, sendToAll, sendToAny, sendToSession, sendToMatch)
	noSessionField = oneOfDescribed(fieldNoSession, map[string]string{
		noSessionWait:   "Wait for it up to `ack_timeout`; then the message has failed.",
		noSessionDrop:   "Count the message as delivered.",
		noSessionReject: "The message has failed at once; the others of its batch are sent.",
	}, noSessionWait, noSessionDrop, noSessionReject)
	sessionInFlightField = positiveInt(fieldSessionInFlight, defaultSessionInFlight)
)

func targetFields() []*service.ConfigField {
	return []*service.ConfigField{
		sendToField.config().
			Description("Which clients get a message.").
			Default(sendToAll),
		service.NewInterpolatedStringField(fieldSessionID).
			Description("The id of the session that gets the message, with `send_to: session`. Messages that came from Cryo carry their sender's in the metadata `cryo_session_id`.").
			Default("").
			Example("${! @cryo_session_id }"),
		service.NewBloblangField(fieldMatch).
			Description("A mapping that decides, for each message and each session, whether the session gets the message, with `send_to: match`: it results in `true` or `false`. It runs on the message, so `this`, `content()` and `@` are the message's; the session's identity is the object `@cryo_session`, with the keys of the metadata of its own messages: `cryo_session_id`, `cryo_remote_address`, `cryo_auth_…`, `cryo_query_…` and `cryo_header_…`. All values of it are text; a list, such as the rooms that a token grants, is JSON. A session for which the mapping fails gets nothing, and the log has a warning. It runs once for each pair of a message and a session, which is some microseconds, also while a message waits for a session that matches (`no_session: wait`): then for those that connect. With thousands of sessions keep it short.").
			Example(`@cryo_session.cryo_auth_rooms.or("[]").parse_json().contains(@room)`).
			Example(`@cryo_session.cryo_query_topic == this.topic && @cryo_session.cryo_session_id != @cryo_session_id`).
			Optional(),
		sessionInFlightField.config().
			Description("How many messages a session may hold unacknowledged, with `send_to: any`; further ones go to others, or wait. With 1 a slow client holds up one message only, and the next goes to whoever is free; with more, a client need not be waited for between two messages."),
		noSessionField.config().
			Description("What to do with a message for which no session is connected: none at all, not the one that it names, or none that matches.").
			Default(noSessionWait),
	}
}

// targetConfig has the settings of an output's targets.
type targetConfig struct {
	sendTo          string
	sessionID       *service.InterpolatedString // of sendToSession
	match           *matcher                    // of sendToMatch
	sessionInFlight int                         // of sendToAny
	noSession       string
}

func targetConfigFromParsed(conf *service.ParsedConfig, log *service.Logger) (c targetConfig, err error) {
	r := &settingsReader{conf: conf}
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
