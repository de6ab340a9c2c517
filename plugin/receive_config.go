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

	// rejection is all that a peer receives of a failure in the pipeline. The cause is
	// logged.
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

A message is acknowledged to its Cryo sender when the outputs of the pipeline have delivered it, and not before, so delivery is at least once. When the connection is lost first, the sender gets no answer, and the message may come again on the next connection.

The pipeline has one result for a batch:

- No error: each of its messages is acknowledged.
- An error for a batch of one: that message has failed. With ` + "`auto_replay_nacks: true`" + ` it is redelivered, by itself, after a wait of 10 ms that doubles up to one second, each with jitter. After ten failures in a row it waits up to 30 s, and a message of this input that is delivered ends such waits. With ` + "`false`" + ` its sender gets an ERROR frame with the message's number and a fixed sentence.
- An error for a batch of several: it does not identify the messages that have failed, because the engine does not report these reliably. Each is handed to the pipeline again, alone, at once, in order, and once, *with ` + "`auto_replay_nacks: false`" + ` too*. They are processed side by side, unless ` + "`max_in_flight`" + ` is 1. Then its own result counts.

So the price of a message that fails is that its whole batch, of up to ` + "`max_batch_count`" + ` messages, is processed twice. If one message in a hundred fails, independently of the others, 47 % of the batches of 64 do. With ` + "`max_batch_count: 1`" + ` results are exact, and nothing is processed again that has not failed. Set it where failures of single messages are part of normal work: for validation, with ` + "`reject_errored`" + `, with ` + "`auto_replay_nacks: false`" + `, in front of HTTP services, and for pipelines that must not run twice for a message. A message that was delivered with its batch, and fails when it is processed alone, is rejected with ` + "`auto_replay_nacks: false`" + ` although it was delivered once.

The input cannot prevent these:

- The processor ` + "`dedupe`" + ` remembers a message before it is delivered. When it is redelivered, it is dropped as already seen, and acknowledged. https://github.com/cryo-connect/cryo-connect/blob/main/config/deduplicate.yaml[This example^] remembers it behind the output.
- ` + "`batched`, or a `broker` with `batching`" + `, around this input: what makes batches there attributes failures by itself. Leave it out: ` + "`max_batch_count`" + ` makes batches, too.
- A ` + "`buffer`" + ` acknowledges messages when it has them, before they are delivered.
- A filter, ` + "`split` or `unarchive` under `batching.processors`" + ` of an output that reports failures of single messages, such as ` + "`kafka`, `opensearch` and `aws_dynamodb`" + `: the engine reports the failure for another message, or for none. Do it in the pipeline instead.
- The pattern ` + "`fan_out_fail_fast`" + ` of a ` + "`broker`" + ` with more than two outputs, or within ` + "`retry`, `drop_on`, `fallback`, `reject_errored` or `batching`" + `: the engine takes the result of one batch for that of another, or hangs. Use ` + "`fan_out` or `fan_out_sequential`" + `.
- ` + "`drop_on` with `back_pressure`" + ` around an output with ` + "`max_in_flight`" + ` above 1: likewise.
- ` + "`read_until` and `while`" + ` look at the first message of a batch only. Set ` + "`max_batch_count: 1`" + `.

A stop delivers what processors and outputs have by then. What has failed, or fails during the stop, is not tried again; it stays unacknowledged, and its sender can send it again.

A stream is acknowledged as a whole when each message that the scanner has cut from it is delivered. When one of them is rejected for good, or the scanner fails, the stream is cancelled and never acknowledged. Of a stream that is cut off, what was complete has been delivered, and a partial last record is dropped.
`

const receiveAnswers = `
== Request and response

What the pipeline gives as a synchronous response, by the output or the processor ` + "`sync_response`" + ` or by ` + "`http_client` with `propagate_response: true`" + `, goes back on the session that the message came from, and has to be acknowledged there, within ` + "`ack_timeout`" + `, before the message is. So a client that sends one message after the other gets the answer to each before its acknowledgement.

The answer is of the same kind as the message: text to text (or bytes where it is no valid text), bytes to bytes, and to each message that was cut from a stream a stream of the same name. What tells of a session is not answered. There may be several answers to one message, which arrive in order, or none. Answers to different messages, and to the parts of a stream, come as these are delivered.

When the other end refuses the answer, or lets the time for it pass, the message is rejected to its sender, with ` + "`auto_replay_nacks: true`" + ` too: the pipeline has done its part. When the session ends first, nobody is told, and the sender may send again. An answer never goes to another connection.

The engine hands the responses to a batch back together. Which message each of them answers is told by the metadata ` + "`cryo_session_id`, `cryo_ack_id` and `cryo_tx_id`" + `, so keep them; where they are gone, the batch has failed. The responses of a batch that has failed are dropped: its messages are processed once more, each alone, and get the responses of that. What merges messages of several clients, merges their answers: don't use ` + "`archive`" + `, or ` + "`batching`" + ` of an output, in front of a response.
`

const receivePerformance = `
== Performance

Messages that wait already are handed over together, up to ` + "`max_batch_count`" + `, so processors and outputs work on many at once, and nothing waits for a batch to fill. Their acknowledgements travel together as well.

What limits the throughput is mostly ` + "`max_in_flight`" + ` divided by the time that the outputs take: 1,024 messages and outputs that need 100 ms make some 10,000 messages a second. Raise it for outputs that are slow but take much at once. An output with ` + "`batching`" + ` needs a ` + "`count`" + ` below it (below three quarters of it, where clients share it), and a ` + "`period`" + `: a batch that waits for messages which wait for its acknowledgement never fills.

For ` + "`http_client`, `max_batch_count: 1`" + ` is faster, because that output posts the messages of a batch one after the other and up to 64 batches side by side: 3,600 messages a second in place of 2,100 with a service that takes 5 ms and all else at its default.

A sender that waits for each acknowledgement before it sends the next message gets one message through per passage of the pipeline, whatever is set here.

The memory is bounded: ` + "`max_buffer_bytes`" + ` for messages, and for streams, with a scanner that needs the whole of one (` + "`to_the_end`" + `), ` + "`streams.max_open`" + ` times ` + "`streams.max_bytes`" + `. A scanner that cuts streams up (` + "`lines`" + `, ` + "`csv`" + `, ` + "`chunker`" + `) needs little, however long they are.
`

var (
	acknowledgeField = oneOfDescribed(fieldAcknowledge, map[string]string{
		acknowledgeDelivered: "When the outputs of the pipeline have delivered the message.",
		acknowledgeReceived:  "When the pipeline has received the message's batch. Messages in flight at the end of the process are lost; the log reports their number when the input closes. For senders that don't wait: `cryo-server` forgets acknowledgements that take longer than 2.5 seconds.",
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

// messageTypesField is the field of an input; with sessions, that of one that reports sessions.
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
				return nil, fmt.Errorf("field %s: unknown message type %q, it must be %s", fieldMessageTypes, name, words)
			}
		}
		if len(names) == 0 {
			return nil, fmt.Errorf("field %s is empty: every message would be dropped", fieldMessageTypes)
		}
		return names, nil
	}))
}

// receiveFields are those of an input; with sessions, of one that can report sessions.
func receiveFields(sessions bool) []*service.ConfigField {
	about, share := "", ""
	if sessions {
		about = " `session` reports clients that connect and disconnect."
		share = " The quota of one client is three quarters of it, so that a client whose messages fail, or that does not acknowledge responses, leaves capacity for others; if there is only one client, the batch must be smaller than that quota."
	}
	return []*service.ConfigField{
		messageTypesField(sessions).config().
			Description("Which kinds of messages the pipeline receives: `utf8` (text), `binary`, `stream`, and `error` (an error that the application at the other end reports)." + about + " Others are acknowledged, counted (`cryo_messages_filtered`) and dropped, as by a mapping's `deleted()`.").
			Default([]any{"utf8", "binary", messageTypeStream}),
		acknowledgeField.config().
			Description("When a message is acknowledged to its sender. The default makes delivery at least once.").
			Default(acknowledgeDelivered).
			Advanced(),
		streamsField(),
		receiveMaxInFlightField.config().
			Description("How many messages may be in flight in the pipeline. An output's batch must be smaller, or only its `period` sends it. With 1, the order of messages is kept even when some are redelivered." + share),
		maxBatchCountField.config().
			Description("How many messages may form one batch of the pipeline. Only messages that wait already are batched: nothing waits for a batch to fill. If a batch of several fails, each of its messages is processed once more, alone. With 1 that never happens: set it where failures of single messages are part of normal work, and where the pipeline must not run twice for a message. See [Delivery](#delivery).").
			Advanced(),
		includeMetadataField.config().
			Description("Whether messages carry the metadata that is listed under [Metadata](#metadata). Adding it takes about 15 % of the input's processor time; below 100,000 messages a second that hardly matters. Without it, `message_type: auto` of a `cryo` output depends on the content only, and synchronous responses can only be assigned to batches of one message: set `max_batch_count: 1`.").
			Advanced(),
		ackTimeoutField.config().
			Description("How long the sender of a message may take to acknowledge the response of the pipeline (`sync_response`), if there is one. After that the message is rejected.").
			Default("30s").
			Advanced(),
		autoReplayNacksField.config().
			Description("What to do with a message that the outputs fail to deliver. If `true`, it is redelivered until it is delivered, and its sender waits. If `false`, its sender gets a Cryo ERROR. In both cases, a batch of several messages that fails is processed once more, message by message, because the engine does not report which of them failed. With `max_batch_count: 1`, the setting for pipelines that must not run twice, it is not."),
		extractTracingField(),
	}
}

// maxBufferField is of one session, or of a listener's together.
func maxBufferField(shared bool) *service.ConfigField {
	sharing, slow := "", ""
	if shared {
		sharing = " It is a bound for all sessions together: each may hold up to eight times what is still free."
		slow = " A further one waits, and one that keeps others waiting for more than a minute costs its session: over slow lines, send what is large as a stream."
	}
	return maxBufferBytesField.config().
		Description("How many bytes may be received and not yet acknowledged: the contents, and 256 bytes a message. At this bound reading from the network pauses, which slows the senders down; no session is lost by it." + sharing + " As much again, and two messages, may be taken by messages of more than 64 KiB that are still coming in." + slow + " By default some 100,000 messages of 32 bytes fit. Where this process also sends on the same session, the acknowledgements that it waits for come behind what is not read. When one is awaited for 10 s like that, messages that there is no room for are refused with an ERROR, and streams cancelled, until the session holds no more than is still free. A peer that even then goes on sending and reads nothing loses its session.").
		Advanced()
}

type receiveConfig struct {
	types         map[cryo.Kind]bool
	sessions      bool // connected and disconnected are reported
	onReceipt     bool // acknowledge: received
	shared        bool // by several sessions: maxInFlight, and the streams' maxOpen
	maxInFlight   int
	maxBatchCount int
	replay        bool
	ackTimeout    time.Duration // of answers

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
