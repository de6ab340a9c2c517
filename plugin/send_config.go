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
A batch with an undelivered message fails as a whole, after all its messages have been sent. The inputs ` + "`cryo` and `cryo_server`" + ` then redeliver each message alone; other inputs redeliver the batch. The output's own ` + "`batching`, without `processors`" + `, returns only the failed messages. See [Failed sends](` + deliveryPage + `#failed-sends).
`

const sendMetadata = `
## Metadata

Cryo has no headers, so no metadata is sent: data for the receiver must be part of the content. Messages that were received from Cryo keep their type, from the metadata ` + "`cryo_message_type`" + `, and streams keep their name, from ` + "`cryo_stream_name`" + `.
`

const sendPerformance = `
## Performance

The messages of a batch are sent together, and their acknowledgements are awaited together. The throughput is at most the batch size times ` + "`max_in_flight`" + `, divided by the latency of acknowledgements: single messages, 64 in flight and 10 ms allow 6,400 messages per second. Behind inputs of single messages, set ` + "`batching` with a `count` and a short `period`" + ` such as 10ms.

For order, set ` + "`max_in_flight: 1`" + ` and use larger batches. The streams of a batch are sent one after the other; after one that has timed out, the rest are sent concurrently.
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
// ack_timeout. order qualifies the description of max_in_flight about the order of messages.
func sendFields(lost, order string) []*service.ConfigField {
	return []*service.ConfigField{
		sendMessageTypeField.config().
			Description("The type of message to send: `utf8` (text), `binary` or `stream`. `auto` keeps the type of messages that were received from Cryo; of others it sends valid UTF-8 as `utf8`, and the rest as `binary`. Messages of more than 16 MiB must be sent as a `stream`.").
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
			Description("Settings of messages that are sent as a `stream`. To send a batch as one stream, use the `archive` processor under `batching`."),
		ackTimeoutField.config().
			Description("The time within which a message, or each step of a stream, must be acknowledged. Otherwise the message fails. Time spent transferring the message over a slow connection does not count, up to ten times the timeout." + lost).
			Default("30s"),
		sendMaxInFlightField.config().
			Description("The maximum number of batches in flight; without `batching`, a batch is usually one message. With 1, messages are sent in the order in which the output receives them" + order + ": see [Order](" + deliveryPage + "#order). Messages in flight stay in memory, so use a low value for large ones."),
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
