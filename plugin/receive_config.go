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

const receiveMetadata = `
== Metadata

Each message carries:

- ` + "`cryo_message_type`" + `: ` + "`utf8`" + `, ` + "`binary`" + `, ` + "`stream`" + ` or ` + "`error`" + `
- ` + "`cryo_session_id`" + `: the id of the Cryo session, a decimal number of 64 bits
- ` + "`cryo_ack_id`" + `: the number that the sender gave the message, valid on this connection only

Messages of a stream have no ` + "`cryo_ack_id`" + `, and carry in addition:

- ` + "`cryo_stream_name`" + `: the name that the sender gave the stream; it is untrusted, so do not use it as a file path without checks
- ` + "`cryo_tx_id`" + `: the number that the sender gave the stream, valid on this connection only
- ` + "`cryo_stream_size`" + `: the size in bytes that was announced, or -1 if it is unknown, as with streams that are pushed
`

const receiveDelivery = `
== Delivery

A message is acknowledged to its Cryo sender only when the outputs of the pipeline have delivered it, so delivery is at least once. If the connection is lost first, the sender gets no acknowledgement and may send the message again.

The pipeline returns one result for a batch:

- No error: all its messages are acknowledged.
- An error for a batch of one: the message has failed. With ` + "`auto_replay_nacks: true`" + ` it is redelivered, alone, after a wait of 10 ms that doubles up to one second, with jitter. After ten failures in a row the wait grows up to 30 s; it ends early when another message of this input is delivered. With ` + "`false`" + `, the message is rejected: its sender gets an ERROR frame with the message's number and a fixed text.
- An error for a batch of several: the engine does not report reliably which messages have failed. So each is redelivered once, alone, immediately and in order, *with ` + "`auto_replay_nacks: false`" + ` too*, and then gets a result of its own. These redeliveries run concurrently, unless ` + "`max_in_flight`" + ` is 1.

The cost of a failed message is that its whole batch, of up to ` + "`max_batch_count`" + ` messages, is processed twice. If 1 % of the messages fail, independently of each other, 47 % of the batches of 64 do. With ` + "`max_batch_count: 1`" + `, results are exact and only failed messages are processed again. Set it where failures of single messages are part of normal operation: for validation, with ` + "`reject_errored`" + `, with ` + "`auto_replay_nacks: false`" + `, for HTTP services, and for pipelines that must not run twice for a message. With ` + "`auto_replay_nacks: false`" + `, a message that was delivered with its failed batch, and fails when it is redelivered alone, is rejected although it was delivered once.

The input cannot prevent the following:

- The processor ` + "`dedupe`" + ` remembers a message before it is delivered. Its redelivery is dropped as a duplicate, and acknowledged. https://github.com/cryo-connect/cryo-connect/blob/main/config/deduplicate.yaml[This example^] remembers it after the output.
- ` + "`batched`" + `, or a ` + "`broker`" + ` with ` + "`batching`" + `, around this input attributes failures to messages by itself. Remove it: ` + "`max_batch_count`" + ` already makes batches.
- A ` + "`buffer`" + ` acknowledges messages when it stores them, before they are delivered.
- A filter, ` + "`split`" + ` or ` + "`unarchive`" + ` under ` + "`batching.processors`" + ` of an output that reports failures of single messages, such as ` + "`kafka`" + `, ` + "`opensearch`" + ` and ` + "`aws_dynamodb`" + `: the engine reports the failure for another message, or for none. Use these processors in the pipeline instead.
- The pattern ` + "`fan_out_fail_fast`" + ` of a ` + "`broker`" + ` with more than two outputs, or within ` + "`retry`" + `, ` + "`drop_on`" + `, ` + "`fallback`" + `, ` + "`reject_errored`" + ` or ` + "`batching`" + `: the engine mistakes the result of one batch for that of another, or hangs. Use ` + "`fan_out`" + ` or ` + "`fan_out_sequential`" + `.
- ` + "`drop_on`" + ` with ` + "`back_pressure`" + ` around an output with ` + "`max_in_flight`" + ` above 1: likewise.
- ` + "`read_until`" + ` and ` + "`while`" + ` check the first message of a batch only. Set ` + "`max_batch_count: 1`" + `.

A stop waits for the messages that processors and outputs have. Messages that have failed, or fail during the stop, are not redelivered: they stay unacknowledged, and their senders can send them again.

A stream is acknowledged as a whole when all messages that the scanner has made of it are delivered. If one of them is rejected, or the scanner fails, the stream is cancelled and never acknowledged. The complete records of a truncated stream are delivered, and a partial last record is dropped.
`

const receiveResponses = `
== Request and response

A synchronous response of the pipeline, by the output or processor ` + "`sync_response`" + ` or by ` + "`http_client`" + ` with ` + "`propagate_response: true`" + `, is sent on the session of its message. It must be acknowledged within ` + "`ack_timeout`" + ` before the message is acknowledged. So a sender that sends one message at a time receives the response before the acknowledgement.

A response has the type of its message: text for text (bytes if it is not valid UTF-8), bytes for bytes, and for each message of a stream a stream of the same name. Session events have no responses. A message may have several responses, which are sent in order, or none. Responses to different messages, and to parts of a stream, are sent as these are delivered.

If the sender rejects the response, or does not acknowledge it in time, the message is rejected, with ` + "`auto_replay_nacks: true`" + ` too, because the pipeline has delivered it. If the session ends first, nothing is sent, and the sender may send the message again. A response is never sent on another connection.

The engine returns the responses of a batch together. The metadata ` + "`cryo_session_id`" + `, ` + "`cryo_ack_id`" + ` and ` + "`cryo_tx_id`" + ` identify the message of each: keep them, or the batch fails. The responses of a failed batch are dropped: its messages are processed once more, each alone, and their new responses are sent. Merging messages of several clients, or of two connections of one client, merges their responses: do not use ` + "`archive`" + `, or ` + "`batching`" + ` of an output, before a response.
`

const receivePerformance = `
== Performance

Messages that are already waiting are delivered to the pipeline in batches of up to ` + "`max_batch_count`" + `; the input never waits for a batch to fill. Their acknowledgements are sent together as well.

The throughput is limited by ` + "`max_in_flight`" + ` divided by the latency of the outputs: 1,024 messages and 100 ms allow about 10,000 messages a second. Raise it for outputs with a high latency and a high throughput. An output with ` + "`batching`" + ` needs a ` + "`count`" + ` below ` + "`max_in_flight`" + ` (below three quarters of it if clients share it), and a ` + "`period`" + `; otherwise a batch may never fill, because it waits for messages that wait for its acknowledgement.

For ` + "`http_client`" + `, ` + "`max_batch_count: 1`" + ` is faster, because that output posts the messages of a batch one after the other, and up to 64 batches concurrently: 3,600 instead of 2,100 messages a second with a service that takes 5 ms and defaults otherwise.

A sender that waits for each acknowledgement before it sends the next message is limited to one message per latency of the pipeline, regardless of these settings.

Memory is bounded by ` + "`max_buffer_bytes`" + ` for messages, and, with a scanner that buffers whole streams (` + "`to_the_end`" + `), by ` + "`streams.max_open`" + ` times ` + "`streams.max_bytes`" + `. A scanner that splits streams (` + "`lines`" + `, ` + "`csv`" + `, ` + "`chunker`" + `) needs little memory for streams of any length.
`

var (
	acknowledgeField = oneOfDescribed(fieldAcknowledge, map[string]string{
		acknowledgeDelivered: "When the outputs of the pipeline have delivered the message.",
		acknowledgeReceived:  "When the pipeline has received the message's batch. Messages in flight at the end of the process are lost; their number is logged when the input closes. For senders that do not wait longer: `cryo-server` ignores acknowledgements after 2.5 seconds.",
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

// receiveFields returns the fields of an input. If sessions is true, the input supports session
// events.
func receiveFields(sessions bool) []*service.ConfigField {
	events, quotaText := "", ""
	if sessions {
		events = " `session` is an event for each client that connects or disconnects."
		quotaText = " The quota of one client is three quarters of it, so that a client whose messages fail, or that does not acknowledge responses, leaves capacity for others; sessions with the same `session_owner` are one client, others are one by their session id. With a single client, an output's batch must be smaller than that quota."
	}
	return []*service.ConfigField{
		messageTypesField(sessions).config().
			Description("The types of messages to receive: `utf8` (text), `binary`, `stream`, and `error` (an error that the application at the other end reports)." + events + " Messages of other types are acknowledged, counted (`cryo_messages_filtered`) and dropped.").
			Default([]any{"utf8", "binary", messageTypeStream}),
		acknowledgeField.config().
			Description("When a message is acknowledged to its sender. The default makes delivery at least once.").
			Default(acknowledgeDelivered).
			Advanced(),
		streamsField(),
		receiveMaxInFlightField.config().
			Description("The maximum number of messages in flight in the pipeline. An output's batch must be smaller, or only its `period` completes it. With 1, the order of messages is kept even if some are redelivered." + quotaText),
		maxBatchCountField.config().
			Description("The maximum number of messages in a batch. Only messages that are already waiting are batched. If a batch of several fails, each of its messages is processed once more, alone. Set 1 where failures of single messages are part of normal operation, or where the pipeline must not run twice for a message. See [Delivery](#delivery).").
			Advanced(),
		includeMetadataField.config().
			Description("Whether messages carry the metadata listed under [Metadata](#metadata). It costs about 15 % of the input's CPU time, which is negligible below 100,000 messages a second. Without it, `message_type: auto` of an output depends on the content only, and synchronous responses require `max_batch_count: 1`.").
			Advanced(),
		ackTimeoutField.config().
			Description("The time for the sender of a message to acknowledge a response of the pipeline (`sync_response`). After it, the message is rejected.").
			Default("30s").
			Advanced(),
		autoReplayNacksField.config().
			Description("What to do with a message that the outputs fail to deliver. If `true`, it is redelivered until it is delivered. If `false`, it is rejected: its sender gets a Cryo ERROR. In both cases, the messages of a failed batch of several are processed once more, each alone, because the engine does not report which of them failed; set `max_batch_count: 1` for pipelines that must not run twice for a message."),
		extractTracingField(),
	}
}

// maxBufferField returns the field max_buffer_bytes. If shared is true, all sessions of a
// listener share the receive buffer; otherwise it belongs to a single session.
func maxBufferField(shared bool) *service.ConfigField {
	sharing, slow := "", ""
	if shared {
		sharing = " All sessions share the buffer; each, or all with the same `session_owner`, may use up to eight times the free part."
		slow = " Further ones wait: all sessions with the same `session_owner`, or without one with the same token, client certificate and address, may use one message or up to eight times the free part, and one that takes more than a minute, while another has waited for a minute, ends its session. Over slow lines, send large data as a stream."
	}
	return maxBufferBytesField.config().
		Description("The size of the receive buffer: the bytes of unacknowledged messages, plus 256 bytes per message. When it is full, reads are paused (backpressure), which slows senders down and ends no session." + sharing + " Messages of more than 64 KiB that are not yet complete may use as much again, plus two messages." + slow + " The default fits about 100,000 messages of 32 bytes. If this process also sends on the session, the acknowledgements that it waits for may be behind data that is not read. When an acknowledgement has been delayed like that for 10 s, messages that do not fit are rejected with an ERROR, and streams are cancelled, until the session uses no more than is free. A peer that keeps sending without reading loses its session.").
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
