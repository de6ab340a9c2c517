package plugin

import (
	"time"

	"github.com/redpanda-data/benthos/v4/public/service"
)

// The fields of received streams.

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
		flowPush: "The sender sends as fast as the network takes it.",
		flowPull: "Each chunk is requested, which costs a round trip. `cryo-server` supports it; `cryo-client-node` does not: it stops working.",
	}, flowPush, flowPull)
	streamMaxBytesField    = wholeNumber(fieldStreams+"."+fieldMaxBytes, 0, maxNumber, 64<<20)
	streamMaxOpenField     = positiveInt(fieldStreams+"."+fieldMaxOpen, defaultMaxOpen)
	streamIdleTimeoutField = positiveDuration(fieldStreams + "." + fieldIdleTimeout)
)

func streamsField() *service.ConfigField {
	return service.NewObjectField(fieldStreams,
		streamNamesField.config().
			Description("The names of the streams to receive, exactly as their senders write them. Others are acknowledged, counted (`cryo_messages_filtered`) and dropped. Empty: all are received.").
			Default([]any{}),
		service.NewScannerField(fieldScanner).
			Description("How the bytes of a stream become messages: the whole stream as one (`to_the_end`), one a line (`lines`), a CSV row (`csv`), a file of an archive (`tar`), a number of bytes (`chunker`), and so on; `decompress` goes in front. With a scanner that cuts it up, a stream of any length costs little memory.").
			Default(map[string]any{"to_the_end": map[string]any{}}).
			LintRule(lintMapping(scannerRule)),
		flowControlField.config().
			Description("Whether chunks of a stream are sent on demand. The network's own flow control applies in both cases.").
			Default(flowPush).
			Advanced(),
		streamMaxBytesField.config().
			Description("How many bytes a stream may have. A longer one is cancelled, and so is one of which a single message would have more: what is compressed (`decompress`), and sparse files of an archive (`tar`), can have a thousand times as many bytes as the stream. 0 is no limit; only use that with a scanner that cuts streams up, and, in front of that, neither of these two."),
		streamMaxOpenField.config().
			Description("How many streams are received at a time, from all sessions together. Senders of others wait. One session has at most 256. If several sessions can be connected, one of them has no more than it leaves free for others: at most half, and at least one. With a scanner that needs the whole stream, this times `max_bytes` bounds the memory."),
		streamIdleTimeoutField.config().
			Description("A stream is cancelled when nothing of it is received for this long. Time spent waiting for the pipeline does not count.").
			Default("60s"),
	).
		Description("What to do with streams, which are how Cryo carries files and large data: a name, and then bytes of any length.")
}

// streamConfig has the settings of received streams.
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
