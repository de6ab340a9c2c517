package plugin

import (
	"fmt"
	"time"

	"github.com/redpanda-data/benthos/v4/public/service"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// The fields of the sending half.

const (
	fieldMessageType = "message_type"
	fieldAckTimeout  = "ack_timeout"
	fieldBatching    = "batching"

	messageTypeAuto = "auto"

	fieldStream     = "stream"
	fieldName       = "name"
	fieldChunkBytes = "chunk_bytes"
)

// sendResultsText continues the section about delivery in the description of each output.
const sendResultsText = `
A batch is delivered when all its messages are. All messages that can be sent are sent, and their acknowledgements awaited, first. If a message is not delivered, the whole batch fails with one error, which contains the number of failed messages and the first cause. The error does not identify messages, because after processors that filter or split, the engine would attribute it to another message, and the failed one would be lost. The consequence depends on the input:

- Inputs ` + "`cryo`" + ` and ` + "`cryo_server`" + `: each message of a failed batch is redelivered once, alone. After that, only messages that fail alone are redelivered.
- Other inputs: the whole batch is sent again, until all of it is delivered. Where failures of messages are part of normal operation, let such an input make batches of one, so that only the failed message is repeated.
- The output's own ` + "`batching`" + `, without ` + "`processors`" + `: only the failed messages, or the input's batches that contain them, are returned to the input. With ` + "`processors`" + `, a rejected message fails its whole batch.

No output can prevent the engine from attributing a failure to another message, so that a message is lost, behind an input that makes batches (other than the inputs of this plugin) in these cases: ` + "`split`" + `, ` + "`group_by`" + ` or ` + "`group_by_value`" + ` makes several batches of one and only some of them fail; or there is a filter before ` + "`reject_errored`" + ` or ` + "`switch`" + ` around the output, or ` + "`error_handling.strict`" + ` is used with a filter. Let the input make batches of one, or use an input of this plugin.
`

const sendMetadata = `
== Metadata

Messages that were received from Cryo are sent with the same type: with ` + "`message_type: auto`" + `, the metadata ` + "`cryo_message_type`" + ` determines whether bytes and streams remain what they were, and ` + "`cryo_stream_name`" + ` is the name of a stream. No other metadata is sent, because Cryo has no headers: data for the other end must be part of the content.
`

const sendPerformance = `
== Performance

The messages of a batch are sent together, and their acknowledgements are awaited together. So the throughput is limited by the batch size times ` + "`max_in_flight`" + `, divided by the time to the acknowledgement: single messages, 64 in flight and 10 ms allow 6,400 messages a second. Inputs that return single messages benefit most from ` + "`batching`" + `, with a ` + "`count`" + ` and a short ` + "`period`" + ` (such as 10ms), which is the maximum wait of an incomplete batch.

If the order matters, set ` + "`max_in_flight: 1`" + `, with the limits described there, and use larger batches. The streams of a batch are sent one after the other; after one that has timed out, the rest are sent concurrently.
`

var (
	sendMessageTypeField = newField(fieldMessageType, service.NewInterpolatedStringField, textRule(func(name string) (string, error) {
		interpolated, err := service.NewInterpolatedString(name)
		if err != nil {
			return name, nil // the engine reports the error
		}
		if fixed, static := interpolated.Static(); static && fixed != messageTypeStream {
			_, err = typeOf(nil, fixed)
		}
		return name, err
	}))
	chunkBytesField      = wholeNumber(fieldStream+"."+fieldChunkBytes, 1, cryo.MaxPayload, cryo.DefaultChunkBytes)
	sendMaxInFlightField = positiveInt(fieldMaxInFlight, 64)
)

// sendFields returns the fields that both outputs have. lost is appended to the description of
// ack_timeout. order qualifies what the description of max_in_flight says about the order of
// messages.
func sendFields(lost, order string) []*service.ConfigField {
	return []*service.ConfigField{
		sendMessageTypeField.config().
			Description("The type of Cryo message to send: `utf8` (text), `binary`, `stream` (a named stream per message), or `auto`: the type with which the message was received from Cryo, otherwise `utf8` if it is valid UTF-8, otherwise `binary`. Messages of more than 16 MiB can only be sent as a `stream`. To send a whole batch as one stream, use the processor `archive` under `batching`.").
			Default(messageTypeAuto).
			Example(`${! if meta("content_type") == "text/plain" { "utf8" } else { "binary" } }`),
		service.NewObjectField(fieldStream,
			service.NewInterpolatedStringField(fieldName).
				Description("The name of the stream, such as a file name, of at most 1,024 bytes. An empty name becomes `anonymous`.").
				Default(`${! @cryo_stream_name.or("anonymous") }`).
				Example("${! @path }"),
			chunkBytesField.config().
				Description("The number of bytes of a stream per frame, at most 16 MiB (16777216).").
				Advanced(),
		).
			Description("Settings of messages that are sent as a `stream`."),
		ackTimeoutField.config().
			Description("The timeout for the acknowledgement of a message, or of each step of a stream. After it the message has failed, although the peer may still receive it, and again if it is sent again. Time during which a slow line still transfers the message does not count, if at least 4 KiB are transferred in half of the timeout; but after ten times the timeout the message fails in any case." + lost).
			Default("30s"),
		sendMaxInFlightField.config().
			Description("The maximum number of batches in flight; without `batching`, a batch is usually one message. With 1, messages are sent in the order in which the output receives them" + order + ". But a message that is rejected or times out, and is sent again by its input, follows messages that the pipeline has read in the meantime. To keep the order even then, use an input `cryo` or `cryo_server` with `max_in_flight: 1`. Messages in flight stay in memory, so use a low value for large ones."),
		service.NewBatchPolicyField(fieldBatching),
		injectTracingField(),
	}
}

func senderFromParsed(conf *service.ParsedConfig, res *service.Resources) (s sender, policy service.BatchPolicy, maxInFlight int, err error) {
	r := &settingsReader{conf: conf}
	sendMessageTypeField.read(r)
	s.messageType = readInterpolated(r, fieldMessageType)
	s.streamName = readInterpolated(r, fieldStream, fieldName)
	s.chunkBytes = chunkBytesField.read(r)
	s.ackTimeout = ackTimeoutField.read(r)
	maxInFlight = sendMaxInFlightField.read(r)
	if r.err != nil {
		return s, policy, 0, r.err
	}
	s.metrics = newSendMetrics(meterOf(res))
	policy, err = batchPolicyFromParsed(conf)
	onlyProcessors := policy
	onlyProcessors.ByteSize, onlyProcessors.Count, onlyProcessors.Check, onlyProcessors.Period = 0, 0, "", ""
	s.exact = !policy.IsNoop() && onlyProcessors.IsNoop()
	return s, policy, maxInFlight, err
}

// batchPolicyFromParsed returns the batch policy. It also checks it, which the engine would not
// do before the first batch.
func batchPolicyFromParsed(conf *service.ParsedConfig) (service.BatchPolicy, error) {
	policy, err := conf.FieldBatchPolicy(fieldBatching)
	if err != nil {
		return policy, &fieldError{fmt.Errorf("field %s: %w", fieldBatching, err)}
	}
	if policy.Period != "" {
		if _, err := time.ParseDuration(policy.Period); err != nil {
			return policy, fmt.Errorf("field %s.period must be a duration such as 10ms, got %q", fieldBatching, policy.Period)
		}
	}
	if !policy.IsNoop() && policy.ByteSize <= 0 && policy.Count <= 0 && policy.Check == "" && policy.Period == "" {
		return policy, fmt.Errorf("field %s needs a count, a byte_size, a period or a check: without one, its processors never run", fieldBatching)
	}
	return policy, nil
}
