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
		flowPush: "The sender sends at the speed of the network.",
		flowPull: "Each chunk is requested, which costs a round trip. `cryo-server` supports it; `cryo-client-node` does not, and stops working.",
	}, flowPush, flowPull)
	streamMaxBytesField    = wholeNumber(fieldStreams+"."+fieldMaxBytes, 0, maxNumber, 64<<20)
	streamMaxOpenField     = positiveInt(fieldStreams+"."+fieldMaxOpen, defaultMaxOpen)
	streamIdleTimeoutField = positiveDuration(fieldStreams + "." + fieldIdleTimeout)
)

func streamsField() *service.ConfigField {
	return service.NewObjectField(fieldStreams,
		streamNamesField.config().
			Description("The exact names of the streams to receive. Other streams are acknowledged, counted (`cryo_messages_filtered`) and dropped. Empty: all streams are received.").
			Default([]any{}),
		service.NewScannerField(fieldScanner).
			Description("How a stream is split into messages: one for the whole stream (`to_the_end`), or one per line (`lines`), CSV row (`csv`), file of an archive (`tar`), number of bytes (`chunker`), and so on; `decompress` decompresses the stream first. With a scanner that splits it, a stream of any length needs little memory.").
			Default(map[string]any{"to_the_end": map[string]any{}}).
			LintRule(lintMapping(scannerRule)),
		flowControlField.config().
			Description("Whether the sender pushes the chunks of a stream, or sends them on request. The flow control of TCP applies in both cases.").
			Default(flowPush).
			Advanced(),
		streamMaxBytesField.config().
			Description("The maximum number of bytes of a stream, and of each of its messages. A stream that exceeds it is cancelled. Messages can be larger than their stream: compressed data (`decompress`) and sparse files of an archive (`tar`) can expand to a thousand times its size, and rows of `csv` repeat the names of their columns. A stream is read on when its messages in flight are no larger together. 0: no limit; use that only with a scanner that splits streams, without these two. A record, such as a row, is limited to 64 MiB then, and so are the messages in flight."),
		streamMaxOpenField.config().
			Description("The maximum number of streams that are received concurrently, of all sessions. Senders of further streams wait. One session may have at most 256 streams. If several sessions can be connected, the quota of one client (see `max_in_flight`) is half of the streams that others do not use, and at least one. With a scanner that buffers whole streams, this times `max_bytes` bounds the memory."),
		streamIdleTimeoutField.config().
			Description("The time after which a stream is cancelled if none of its data is received. Time spent waiting for the pipeline does not count.").
			Default("60s"),
	).
		Description("How to receive streams: named sequences of bytes of any length, for files and large data.")
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
