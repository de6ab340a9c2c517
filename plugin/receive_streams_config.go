package plugin

import (
	"time"

	"github.com/redpanda-data/benthos/v4/public/service"
)

// The fields that configure received streams.

const (
	fieldStreams     = "streams"
	fieldNames       = "names"
	fieldScanner     = "scanner"
	fieldFlowControl = "flow_control"
	fieldMaxBytes    = "max_bytes"
	fieldMaxOpen     = "max_open"
	fieldIdleTimeout = "idle_timeout"

	defaultMaxOpen = 16

	flowPush = "push"
	flowPull = "pull"

	messageTypeStream = "stream"

	metaStreamName = "cryo_stream_name"
	metaTxID       = "cryo_tx_id"
	metaStreamSize = "cryo_stream_size"
)

var (
	streamNamesField = listOf(fieldStreams+"."+fieldNames, anyList)
	flowControlField = oneOfDescribed(fieldStreams+"."+fieldFlowControl, map[string]string{
		flowPush: "The sender sends at the speed of the network. The flow control of TCP applies.",
		flowPull: "Each chunk is requested, which costs a round trip. Do not use it with `cryo-client-node`, which stops working.",
	}, flowPush, flowPull)
	streamMaxBytesField    = wholeNumber(fieldStreams+"."+fieldMaxBytes, 0, maxNumber, 64<<20)
	streamMaxOpenField     = positiveInt(fieldStreams+"."+fieldMaxOpen, defaultMaxOpen)
	streamIdleTimeoutField = positiveDuration(fieldStreams + "." + fieldIdleTimeout)
)

func streamsField() *service.ConfigField {
	return service.NewObjectField(fieldStreams,
		streamNamesField.config().
			Description("The exact names of the streams to receive. Other streams are acknowledged, counted in `cryo_messages_filtered` and dropped. If empty, all streams are received.").
			Default([]any{}),
		service.NewScannerField(fieldScanner).
			Description("The scanner that splits a stream into messages: one for the whole stream (`to_the_end`), or one per line (`lines`), CSV row (`csv`), file of an archive (`tar`) or block of a fixed size (`chunker`). With a scanner that splits it, a stream of any length needs little memory.").
			Default(map[string]any{"to_the_end": map[string]any{}}).
			LintRule(lintMapping(scannerRule)),
		flowControlField.config().
			Description("Whether the sender pushes the chunks of a stream, or sends them on request.").
			Default(flowPush).
			Advanced(),
		streamMaxBytesField.config().
			Description("The maximum number of bytes of a stream, of each of its messages, and of its messages in flight. A stream that exceeds it is cancelled. 0 means no limit, for scanners that split streams: see [Streams]("+docsURL+"reference/limits.md#streams)."),
		streamMaxOpenField.config().
			Description("The maximum number of streams that the component receives concurrently; senders of further streams wait. With the `to_the_end` scanner, memory is bounded by this value times `max_bytes`."),
		streamIdleTimeoutField.config().
			Description("The time without data after which a stream is cancelled. Time spent waiting for the pipeline does not count.").
			Default("60s"),
	).
		Description("Settings of received streams: named sequences of bytes of any length, for files and large data.")
}

// streamConfig holds the settings of received streams.
type streamConfig struct {
	names       []string
	scanner     *scanner
	pull        bool
	maxBytes    int64
	maxOpen     int
	idleTimeout time.Duration
}

func readStreamConfig(r *settingsReader) streamConfig {
	c := streamConfig{
		names:       streamNamesField.read(r),
		pull:        flowControlField.read(r) == flowPull,
		maxBytes:    int64(streamMaxBytesField.read(r)),
		maxOpen:     streamMaxOpenField.read(r),
		idleTimeout: streamIdleTimeoutField.read(r),
	}
	if r.err == nil {
		var err error
		c.scanner, err = scannerFromParsed(r.conf.Namespace(fieldStreams), c.maxBytes)
		r.fail(err)
	}
	return c
}

// maxHeld returns the bytes of its messages that a stream may have in flight, beyond a first one.
func (c *streamConfig) maxHeld() int64 {
	if c.maxBytes == 0 {
		return maxRecord
	}
	return c.maxBytes
}
