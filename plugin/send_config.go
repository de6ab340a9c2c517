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

// sendVerdicts follows each output's text about the delivery of a message.
const sendVerdicts = `
A batch is delivered when all of its messages are. Everything that can be sent is sent and awaited first. If a message is not delivered then, the whole batch fails, with one error that has the number of such messages and the first cause. It names no message: behind processors that filter or split, the engine takes such an error for another message's, and the one that failed would be lost. What follows depends on what is in front of the output:

- Inputs ` + "`cryo` and `cryo_server`" + `: the messages of a failed batch are sent again once, each alone. After that only those are repeated that fail alone.
- Other inputs: the whole batch is sent again, until all of it is delivered. Where messages fail in normal work, let such an input make batches of one: nothing but the message is repeated then.
- The output's own ` + "`batching`" + `, without ` + "`processors`" + ` under it: only the messages that failed go back to the input, or the input's batches that they are part of. With ` + "`processors`" + ` there, one rejected message fails the whole of each such batch.

No output can prevent that the engine takes a failure for another message's behind an input that makes batches and is not one of ours, where ` + "`split`, `group_by` or `group_by_value`" + ` makes several batches of one and not all of them fail, or where a filter is in front of ` + "`reject_errored` or `switch`" + ` around the output, or of ` + "`error_handling.strict`" + `. A message can be lost there. Let the input make batches of one, or use ours.
`

const sendMetadata = `
== Metadata

What was received from Cryo is sent as it was received: with ` + "`message_type: auto`" + ` the metadata ` + "`cryo_message_type`" + ` decides whether bytes and streams stay what they were, and ` + "`cryo_stream_name`" + ` is the name of a stream. Nothing else of a message's metadata is sent: Cryo has no headers. What the other end needs must be in the content.
`

const sendPerformance = `
== Performance

The messages of a batch are sent at once, and their acknowledgements awaited together. So what limits the throughput is the batch's size times ` + "`max_in_flight`" + ` divided by the time until the other end acknowledges: single messages, 64 in flight and 10 ms make 6,400 messages a second. Inputs that give single messages gain most from ` + "`batching`" + `, with a ` + "`count`" + ` and a short ` + "`period`" + ` (such as 10ms); the period is what an incomplete batch waits.

Where the order matters, set ` + "`max_in_flight: 1`" + `, which keeps it as far as is written there, and let the batches be larger. The streams of a batch are sent one after the other; behind one that is late, what is left is sent side by side.
`

var (
	sendMessageTypeField = newField(fieldMessageType, service.NewInterpolatedStringField, textRule(func(name string) (string, error) {
		interpolated, err := service.NewInterpolatedString(name)
		if err != nil {
			return name, nil // the engine reports it, by lint and at the start
		}
		if fixed, static := interpolated.Static(); static && fixed != messageTypeStream {
			_, err = typeOf(nil, fixed)
		}
		return name, err
	}))
	chunkBytesField      = wholeNumber(fieldStream+"."+fieldChunkBytes, 1, cryo.MaxPayload, cryo.DefaultChunkBytes)
	sendMaxInFlightField = positiveInt(fieldMaxInFlight, 64)
)

// sendFields are those of an output; lost describes a batch whose connection is lost, and
// order the effect on the order.
func sendFields(lost, order string) []*service.ConfigField {
	return []*service.ConfigField{
		sendMessageTypeField.config().
			Description("What kind of Cryo message each message becomes: `utf8` (text), `binary`, `stream` (a named stream of its own), or `auto`: what it was when it was received from Cryo, else `utf8` if it is valid UTF-8, else `binary`. Above 16 MiB a message can only travel as a `stream`. To send a whole batch as one stream, put the `archive` processor under `batching`.").
			Default(messageTypeAuto).
			Example(`${! if meta("content_type") == "text/plain" { "utf8" } else { "binary" } }`),
		service.NewObjectField(fieldStream,
			service.NewInterpolatedStringField(fieldName).
				Description("The name that the other end sees, at most 1,024 bytes, such as a file's. An empty one becomes `anonymous`.").
				Default(`${! @cryo_stream_name.or("anonymous") }`).
				Example("${! @path }"),
			chunkBytesField.config().
				Description("How many bytes of a stream travel in one frame, at most 16 MiB (16777216).").
				Advanced(),
		).
			Description("For messages that travel as a `stream`."),
		ackTimeoutField.config().
			Description("How long to wait for the peer's acknowledgement (of a stream: for each step of it) before a message counts as not delivered. It may arrive all the same, and again when it is sent again. Time in which a slow line still transfers the message does not count, as long as 4 KiB are transferred in half of it; but after ten times as long a message has failed in any case." + lost).
			Default("30s"),
		sendMaxInFlightField.config().
			Description("How many batches may be in flight at a time; without `batching` a batch is mostly one message. With 1, messages are sent in the order in which they come to the output" + order + ". But one that is rejected or late, and is sent again by its input, comes behind what the pipeline has read meanwhile. To keep the order even then, use an input `cryo` or `cryo_server` with `max_in_flight: 1`. Messages stay in memory while they are in flight, so keep it low for large ones."),
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

// batchPolicyFromParsed checks what the engine checks when it makes batches.
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
		return policy, fmt.Errorf("field %s needs a count, a byte_size, a period or a check: its processors have no batches without one", fieldBatching)
	}
	return policy, nil
}
