package plugin

import (
	"fmt"
	"time"

	"github.com/redpanda-data/benthos/v4/public/service"

	"github.com/cryo-connect/cryo-connect/cryo"
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
			Description("The names of the streams to take. Others are acknowledged and dropped. Empty: all are taken.").
			Default([]any{}),
		service.NewScannerField(fieldScanner).
			Description("How the bytes of a stream become messages: the whole as one (`to_the_end`), lines, CSV rows, files of an archive, and so on. A stream of any length costs little memory with a scanner that cuts it up.").
			Default(map[string]any{"to_the_end": map[string]any{}}),
		service.NewStringAnnotatedEnumField(fieldFlowControl, map[string]string{
			flowPush: "The sender sends as fast as the network takes it.",
			flowPull: "Each chunk is asked for, which costs a round trip. `cryo-server` can be pulled from; `cryo-client-node` can't: it stops working.",
		}).
			Description("Who decides when the bytes of a stream travel.").
			Default(flowPush).
			Advanced(),
		service.NewIntField(fieldMaxBytes).
			Description("A longer stream is cancelled. 0 takes any length, for scanners that cut it up.").
			Default(64<<20).
			LintRule(`root = if this.type() == "number" && this < 0 { "field max_bytes can't be negative, got %v".format(this) }`),
		positiveInt(fieldMaxOpen).
			Description("How many streams may be open at a time. The senders of others wait. With a scanner that needs the whole stream, this times `max_bytes` bounds the memory.").
			Default(cryo.DefaultMaxOpenStreams),
		positiveDuration(fieldIdleTimeout).
			Description("An open stream of which nothing came for so long is cancelled. Pauses of the pipeline don't count.").
			Default("60s"),
	).
		Description("What to do with streams, which are how Cryo carries files and large data.")
}

// streamConfig says how streams are taken.
type streamConfig struct {
	names       []string
	scanner     *service.OwnedScannerCreator
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
	if c.scanner, err = conf.FieldScanner(fieldScanner); err != nil {
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
	if c.maxOpen, err = fieldPositive(conf, fieldMaxOpen); err != nil {
		return
	}
	c.idleTimeout, err = fieldPositiveDuration(conf, fieldIdleTimeout)
	return
}
