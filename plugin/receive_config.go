package plugin

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/redpanda-data/benthos/v4/public/service"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// The fields of the receiving half.

const (
	fieldMessageTypes   = "message_types"
	fieldAcknowledge    = "acknowledge"
	fieldMaxInFlight    = "max_in_flight"
	fieldMaxBufferBytes = "max_buffer_bytes"
	fieldMaxBatchCount  = "max_batch_count"
	fieldMetadata       = "include_metadata"

	acknowledgeDelivered = "delivered"
	acknowledgeReceived  = "received"

	metaMessageType = "cryo_message_type"
	metaAckID       = "cryo_ack_id"

	// rejection is the text of an ERROR for a message that was not delivered. The cause is
	// logged, but not sent.
	rejection = "the message could not be delivered"
)

// messageTypes are the values of message_types and of cryo_message_type.
var messageTypes = map[string]cryo.Kind{
	"utf8":   cryo.KindText,
	"binary": cryo.KindBinary,
	"error":  cryo.KindError,

	messageTypeStream: cryo.KindStream,
}

func messageTypeName(t cryo.Kind) string {
	switch t {
	case cryo.KindText:
		return "utf8"
	case cryo.KindBinary:
		return "binary"
	case cryo.KindStream:
		return messageTypeStream
	default:
		return "error"
	}
}

// deliveryPage is the page about delivery in detail.
const deliveryPage = docsURL + "reference/delivery.md"

const receiveMetadata = `
## Metadata

Each message carries:

- ` + "`cryo_message_type`: `utf8`, `binary`, `stream` or `error`" + `
- ` + "`cryo_session_id`" + `: the id of the session, a 64-bit decimal number
- ` + "`cryo_ack_id`" + `: the sender's number of the message, valid on its connection only; not for streams

A message of a stream also has:

- ` + "`cryo_stream_name`" + `: the name of the stream, which is untrusted: do not use it as a file path without checks
- ` + "`cryo_tx_id`" + `: the sender's number of the stream, valid on its connection only
- ` + "`cryo_stream_size`" + `: the announced size in bytes, or -1, as with all pushed streams
`

const receiveDelivery = `
## Delivery

Delivery is at least once: a message is acknowledged to its sender when the outputs of the pipeline have delivered it. A message that fails is redelivered, or rejected with ` + "`auto_replay_nacks: false`" + `.

If a batch of several messages fails, each of them is redelivered once, alone, because the engine does not report reliably which of them failed. The pipeline then processes the whole batch twice, with either value of ` + "`auto_replay_nacks`. Set `max_batch_count: 1`" + ` where failures of single messages are normal, or where the pipeline must not process a message twice.

A stream is acknowledged when all its messages are delivered. It is cancelled if one of them is rejected, or if the scanner fails.

Some components of the engine lose messages behind any input: ` + "`dedupe`, `buffer`, `batched`" + ` and some brokers. See [the list](` + docsURL + `guarantees.md#engine-components-that-lose-messages) and [failed batches](` + deliveryPage + `#failed-batches).
`

const receiveResponses = `
## Request and response

A synchronous response of the pipeline is sent to the sender of its message, on the same session and before the acknowledgement. It comes from the output or processor ` + "`sync_response`, or from `http_client` with `propagate_response: true`" + `. If the sender does not acknowledge it within ` + "`ack_timeout`" + `, the message is rejected.

A response has the type of its message; a response to a message of a stream is a stream with the same name. Keep the metadata ` + "`cryo_session_id`, `cryo_ack_id` and `cryo_tx_id`" + `, which identify the message of a response. Do not use ` + "`archive`, or the `batching`" + ` of an output, before a response: they merge responses. [Responses](` + deliveryPage + `#responses) has the details.
`

const receivePerformance = `
## Performance

The input delivers the messages that are waiting, in batches of up to ` + "`max_batch_count`" + `; it never waits for a batch to fill. The throughput is at most ` + "`max_in_flight`" + ` divided by the latency of the outputs: 1,024 messages and 100 ms allow about 10,000 messages per second.

An output with ` + "`batching` needs a `period`, and a `count` below `max_in_flight` (for `cryo_server`" + `, below three quarters of it). Otherwise a batch can wait for messages that wait for its acknowledgement. With ` + "`http_client`, set `max_batch_count: 1`" + `: that output posts the messages of a batch one after the other, but up to 64 batches concurrently.

A sender that waits for each acknowledgement sends only one message per pipeline latency. Memory is bounded by ` + "`max_buffer_bytes`" + `; with the ` + "`to_the_end`" + ` scanner, ` + "streams need up to `streams.max_open` times `streams.max_bytes`" + ` more.
`

var (
	acknowledgeField = oneOfDescribed(fieldAcknowledge, map[string]string{
		acknowledgeDelivered: "When the outputs of the pipeline have delivered the message.",
		acknowledgeReceived:  "When the pipeline has received the message. Messages in flight at the end of the process are lost. For senders that cannot wait, such as `cryo-server`.",
	}, acknowledgeDelivered, acknowledgeReceived)
	receiveMaxInFlightField = positiveInt(fieldMaxInFlight, 1024)
	maxBatchCountField      = positiveInt(fieldMaxBatchCount, 64)
	maxBufferBytesField     = positiveInt(fieldMaxBufferBytes, cryo.DefaultMaxBufferBytes)
	includeMetadataField    = boolean(fieldMetadata, true)
	autoReplayNacksField    = boolean(service.AutoRetryNacksToggleFieldName, true)
	ackTimeoutField         = positiveDuration(fieldAckTimeout)

	dialMessageTypes   = messageTypesOf("message_types", "utf8", "binary", messageTypeStream, "error")
	listenMessageTypes = messageTypesOf("message_types with session", "utf8", "binary", messageTypeStream, "error", messageTypeSession)
)

// messageTypesField returns the field message_types. If sessions is true, it also allows
// session events.
func messageTypesField(sessions bool) setting[[]string] {
	if sessions {
		return listenMessageTypes
	}
	return dialMessageTypes
}

func messageTypesOf(lint string, known ...string) setting[[]string] {
	last := len(known) - 1
	words := strings.Join(known[:last], ", ") + " or " + known[last]
	return newVariant(lint, fieldMessageTypes, service.NewStringListField, listRule(func(names []string) ([]string, error) {
		for _, name := range names {
			if !slices.Contains(known, name) {
				return nil, fmt.Errorf("field %s: unknown message type %q: it must be %s", fieldMessageTypes, name, words)
			}
		}
		if len(names) == 0 {
			return nil, fmt.Errorf("field %s is empty: every message would be dropped", fieldMessageTypes)
		}
		return names, nil
	}))
}

// receiveFields returns the common fields of an input. If sessions is true, the input supports
// session events.
func receiveFields(sessions bool) []*service.ConfigField {
	events, quotaText := "", ""
	if sessions {
		events = ", and `session` (an event for each client that connects or disconnects)"
		quotaText = " One client may use three quarters of it: see [Quotas](" + docsURL + "reference/limits.md#quotas)."
	}
	return []*service.ConfigField{
		messageTypesField(sessions).config().
			Description("The types of messages to receive: `utf8` (text), `binary`, `stream`, `error` (an error message of the peer's application)" + events + ". Other messages are acknowledged, counted in `cryo_messages_filtered` and dropped.").
			Default([]any{"utf8", "binary", messageTypeStream}),
		streamsField(),
		receiveMaxInFlightField.config().
			Description("The maximum number of messages in flight in the pipeline. A batch of an output must be smaller, or only its `period` completes it. With 1, messages stay in order even if some are redelivered." + quotaText),
		autoReplayNacksField.config().
			Description("Whether a message that the outputs fail to deliver is redelivered until it is delivered. If `false`, it is rejected: its sender receives a Cryo ERROR. See [Delivery](#delivery) for failed batches."),
	}
}

// receiveOptionFields returns the advanced fields of an input, except for max_buffer_bytes.
func receiveOptionFields() []*service.ConfigField {
	return []*service.ConfigField{
		maxBatchCountField.config().
			Description("The maximum number of messages in a batch. Only messages that are already waiting are batched. Use 1 where failures of single messages are normal: see [Delivery](#delivery).").
			Advanced(),
		acknowledgeField.config().
			Description("When a message is acknowledged to its sender. Only `delivered` makes delivery at least once.").
			Default(acknowledgeDelivered).
			Advanced(),
		ackTimeoutField.config().
			Description("The time within which the sender of a message must acknowledge a synchronous response. Otherwise the message is rejected.").
			Default("30s").
			Advanced(),
		includeMetadataField.config().
			Description("Whether messages carry the [metadata](#metadata). Without it, they cost less CPU time, `message_type: auto` of an output depends on the content only, and synchronous responses need `max_batch_count: 1`.").
			Advanced(),
		extractTracingField(),
	}
}

// maxBufferField returns the field max_buffer_bytes. If shared is true, all sessions of a
// listener share the receive buffer; otherwise it belongs to a single session.
func maxBufferField(shared bool) *service.ConfigField {
	owner := "the session"
	if shared {
		owner = "all sessions"
	}
	return maxBufferBytesField.config().
		Description("The size of the receive buffer of " + owner + ": the bytes of unacknowledged messages, plus 256 bytes per message. When it is full, reads are paused (backpressure), and senders slow down. Large messages use additional memory: see [Receive buffer](" + docsURL + "reference/limits.md#receive-buffer).").
		Advanced()
}

type receiveConfig struct {
	types         map[cryo.Kind]bool
	sessions      bool // whether to emit session events
	onReceipt     bool // whether acknowledge is set to received
	shared        bool // whether several sessions share maxInFlight and streams.maxOpen
	maxInFlight   int
	maxBatchCount int
	replay        bool          // auto_replay_nacks
	ackTimeout    time.Duration // for acknowledgements of responses

	includeMetadata bool
	streams         streamConfig
}

func receiveConfigFromParsed(conf *service.ParsedConfig, sessions bool) (c receiveConfig, err error) {
	r := &settingsReader{conf: conf}
	c.types = make(map[cryo.Kind]bool)
	for _, name := range messageTypesField(sessions).read(r) {
		if name == messageTypeSession {
			c.sessions = true
		} else {
			c.types[messageTypes[name]] = true
		}
	}
	c.onReceipt = acknowledgeField.read(r) == acknowledgeReceived
	c.maxInFlight = receiveMaxInFlightField.read(r)
	c.maxBatchCount = maxBatchCountField.read(r)
	c.includeMetadata = includeMetadataField.read(r)
	c.ackTimeout = ackTimeoutField.read(r)
	c.replay = autoReplayNacksField.read(r)
	c.streams = readStreamConfig(r)
	return c, r.err
}
