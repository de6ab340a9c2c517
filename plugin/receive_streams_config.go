package plugin

import (
	"fmt"
	"time"

	"github.com/redpanda-data/benthos/v4/public/service"
)

// What can be set of received streams.

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

func streamsField() *service.ConfigField {
	return service.NewObjectField(fieldStreams,
		service.NewStringListField(fieldNames).
			Description("The names of the streams to take, exactly as their senders write them. Others are acknowledged, counted (`cryo_messages_filtered`) and dropped. Empty: all are taken.").
			Default([]any{}),
		service.NewScannerField(fieldScanner).
			Description("How the bytes of a stream become messages: the whole stream as one (`to_the_end`), one a line (`lines`), a CSV row (`csv`), a file of an archive (`tar`), a number of bytes (`chunker`), and so on; `decompress` goes in front. With a scanner that cuts it up, a stream of any length costs little memory.").
			Default(map[string]any{"to_the_end": map[string]any{}}).
			LintRule(chunksLint),
		service.NewStringAnnotatedEnumField(fieldFlowControl, map[string]string{
			flowPush: "The sender sends as fast as the network takes it.",
			flowPull: "Each chunk is asked for, which costs a round trip. `cryo-server` can be pulled from; `cryo-client-node` can't: it stops working.",
		}).
			Description("Who sets the pace at which the bytes of a stream travel. The network's own flow control holds in both cases.").
			Default(flowPush).
			Advanced(),
		service.NewIntField(fieldMaxBytes).
			Description("How many bytes a stream may have. A longer one is cancelled, and so is one of which a single message would have more: what is compressed (`decompress`), and sparse files of an archive (`tar`), can have a thousand times as many bytes as the stream. 0 takes any length; only use that with a scanner that cuts streams up, and, in front of that, neither of these two.").
			Default(64<<20).
			LintRule(`root = if this.type() == "number" && this < 0 { "field max_bytes can't be negative, got %v".format(this) }`),
		positiveInt(fieldMaxOpen).
			Description("How many streams are taken at a time, from all sessions together. Senders of others wait. One session has at most 256. Where several sessions can be connected, one of them gets no more than it leaves free for others: at most half, and at least one. With a scanner that needs the whole stream, this times `max_bytes` bounds the memory.").
			Default(defaultMaxOpen),
		positiveDuration(fieldIdleTimeout).
			Description("A stream of which nothing came for so long is cancelled. Time in which the pipeline is what it waits for doesn't count.").
			Default("60s"),
	).
		Description("What to do with streams, which are how Cryo carries files and large data: a name, and then bytes of any length.")
}

// streamConfig says how streams are taken.
type streamConfig struct {
	names       []string
	scanner     *scanner
	pull        bool
	maxBytes    int64
	maxOpen     int
	idleTimeout time.Duration
}

func streamConfigFromParsed(conf *service.ParsedConfig) (c streamConfig, err error) {
	conf = conf.Namespace(fieldStreams)
	if c.names, err = conf.FieldStringList(fieldNames); err != nil {
		return
	}
	flow, err := conf.FieldString(fieldFlowControl)
	if err != nil {
		return c, err
	}
	if flow != flowPush && flow != flowPull {
		return c, fmt.Errorf("field %s.%s: %q is neither %s nor %s", fieldStreams, fieldFlowControl, flow, flowPush, flowPull)
	}
	c.pull = flow == flowPull
	maxBytes, err := conf.FieldInt(fieldMaxBytes)
	if err != nil {
		return c, err
	}
	if maxBytes < 0 {
		return c, fmt.Errorf("field %s can't be negative, got %d", fieldMaxBytes, maxBytes)
	}
	c.maxBytes = int64(maxBytes)
	if c.scanner, err = scannerFromParsed(conf, c.maxBytes); err != nil {
		return
	}
	if c.maxOpen, err = fieldPositive(conf, fieldMaxOpen); err != nil {
		return
	}
	c.idleTimeout, err = fieldPositiveDuration(conf, fieldIdleTimeout)
	return
}
