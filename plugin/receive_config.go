package plugin

import (
	"fmt"

	"github.com/redpanda-data/benthos/v4/public/service"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// What can be set of the receiving half.

const (
	fieldMessageTypes   = "message_types"
	fieldAcknowledge    = "acknowledge"
	fieldMaxInFlight    = "max_in_flight"
	fieldMaxBufferBytes = "max_buffer_bytes"
	fieldMaxBatchCount  = "max_batch_count"

	acknowledgeDelivered = "delivered"
	acknowledgeReceived  = "received"

	metaMessageType   = "cryo_message_type"
	metaSessionID     = "cryo_session_id"
	metaAckID         = "cryo_ack_id"
	metaRemoteAddress = "cryo_remote_address"

	// rejection is all that a peer learns of a failure in the pipeline; the
	// pipeline's own words go to the log.
	rejection = "the message could not be delivered"
)

// messageTypes are the values of message_types and of cryo_message_type.
var messageTypes = map[string]cryo.Type{
	"utf8":   cryo.TypeUTF8,
	"binary": cryo.TypeBinary,
	"error":  cryo.TypeError,

	messageTypeStream: cryo.TypeTxStart,
}

func messageTypeName(t cryo.Type) string {
	switch t {
	case cryo.TypeUTF8:
		return "utf8"
	case cryo.TypeBinary:
		return "binary"
	default:
		return "error"
	}
}

const receiveMetadata = `
== Metadata

Each message carries:

- ` + "`cryo_message_type`" + `: ` + "`utf8`, `binary`, `stream` or `error`" + `
- ` + "`cryo_session_id`" + `: the id of the Cryo session, a decimal number of 64 bits
- ` + "`cryo_ack_id`" + `: the number that the sender gave the message; it means something on this connection only

Messages of a stream have no ` + "`cryo_ack_id`" + `, and carry in addition:

- ` + "`cryo_stream_name`" + `: the name that the sender gave the stream; it comes from outside, so don't make a path of it as it is
- ` + "`cryo_tx_id`" + `: the sender's number for the stream, on this connection
- ` + "`cryo_stream_size`" + `: the size in bytes that was announced, or -1, as it is when streams are pushed
`

const receiveGuarantee = `
== Delivery

A message is acknowledged to its Cryo sender when the outputs of the pipeline have it, and not before, so delivery is at least once. With ` + "`auto_replay_nacks: true`" + ` a message that an output rejects is tried again, by itself, until it is delivered; with ` + "`false`" + ` the sender is told by an ERROR frame that carries the message's number and a fixed sentence. When the connection is lost first, the sender learns nothing, and the message may come again on the next connection.

One limit comes from the engine. Where the pipeline's processors first split a batch (` + "`group_by`, `group_by_value`, `split`" + `) and then merge messages (` + "`archive`" + `), and a part of it can't be delivered, only the first message of that part is known to have failed, and the others are acknowledged. Do both in ` + "`batching.processors`" + ` of the output instead.

A stream is acknowledged as a whole when each message that the scanner has cut from it is delivered. When one of them is rejected for good, or the scanner fails, the stream is cancelled and never acknowledged. Of a stream that is cut off, what was complete has been delivered, and a partial last record is dropped.

== Metrics

The counter ` + "`cryo_filtered`" + `, with the label ` + "`message_type`" + `, counts the messages that were acknowledged and dropped because ` + "`message_types`" + ` does not name their type.
`

func receiveFields() []*service.ConfigField {
	return []*service.ConfigField{
		service.NewStringListField(fieldMessageTypes).
			Description("Which kinds of messages are taken: `utf8` (text), `binary`, `stream`, and `error` (what the application at the other end sends as an error). Others are acknowledged, counted and dropped, as a mapping's `deleted()` would.").
			Default([]any{"utf8", "binary", messageTypeStream}).
			LintRule(`
let known = [ "utf8", "binary", "stream", "error" ]
root = if this.type() == "array" && this.length() == 0 { [ "field message_types is empty: no message would ever be taken" ] } else if this.type() == "array" { this.filter(t -> !$known.contains(t)).map_each(t -> "field message_types: unknown message type %v, it has to be utf8, binary, stream or error".format(t)) }`),
		service.NewStringAnnotatedEnumField(fieldAcknowledge, map[string]string{
			acknowledgeDelivered: "When the outputs of the pipeline have the message.",
			acknowledgeReceived:  "When the message is handed to the pipeline. What is in the pipeline, or on its way there, is lost when the process ends. For senders that don't wait: `cryo-server` forgets acknowledgements that take longer than 2.5 seconds.",
		}).
			Description("When a message is acknowledged to its sender.").
			Default(acknowledgeDelivered).
			Advanced(),
		streamsField(),
		positiveInt(fieldMaxInFlight).
			Description("How many messages may be in the pipeline, not yet acknowledged. An output's batch has to be smaller, or it only fills by its `period`.").
			Default(1024),
		positiveInt(fieldMaxBatchCount).
			Description("How many messages that wait already are handed to the pipeline together. It never waits for more.").
			Default(64).
			Advanced(),
		service.NewAutoRetryNacksToggleField().
			Description("Whether a message that the pipeline rejects is tried again until it is delivered. If `false`, it is rejected to its sender."),
	}
}

func maxBufferField() *service.ConfigField {
	return positiveInt(fieldMaxBufferBytes).
		Description("How many bytes may be received and not yet acknowledged: payloads, and 256 bytes a message. Beyond it nothing is read from the network, which slows the senders down. A session is not lost by that. With several sessions, each may hold up to eight times what is still free.").
		Default(cryo.DefaultMaxBufferBytes).
		Advanced()
}

type receiveConfig struct {
	types         map[cryo.Type]bool
	onReceipt     bool // acknowledge: received
	maxInFlight   int
	maxBatchCount int
	replay        bool
	remoteAddress bool // as metadata
	streams       streamConfig
}

func receiveConfigFromParsed(conf *service.ParsedConfig) (c receiveConfig, err error) {
	names, err := conf.FieldStringList(fieldMessageTypes)
	if err != nil {
		return c, err
	}
	c.types = make(map[cryo.Type]bool)
	for _, name := range names {
		t, ok := messageTypes[name]
		if !ok {
			return c, fmt.Errorf("field %s: unknown message type %s, it has to be utf8, binary, stream or error", fieldMessageTypes, name)
		}
		c.types[t] = true
	}
	if len(c.types) == 0 {
		return c, fmt.Errorf("field %s is empty: no message would ever be taken", fieldMessageTypes)
	}
	acknowledge, err := conf.FieldString(fieldAcknowledge)
	if err != nil {
		return c, err
	}
	switch acknowledge {
	case acknowledgeDelivered:
	case acknowledgeReceived:
		c.onReceipt = true
	default:
		return c, fmt.Errorf("field %s: %q is neither %s nor %s", fieldAcknowledge, acknowledge, acknowledgeDelivered, acknowledgeReceived)
	}
	if c.streams, err = streamConfigFromParsed(conf); err != nil {
		return c, err
	}
	if c.maxInFlight, err = fieldPositive(conf, fieldMaxInFlight); err != nil {
		return c, err
	}
	if c.maxBatchCount, err = fieldPositive(conf, fieldMaxBatchCount); err != nil {
		return c, err
	}
	c.replay, err = conf.FieldBool(service.AutoRetryNacksToggleFieldName)
	return c, err
}
