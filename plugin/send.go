package plugin

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"
	"unicode/utf8"

	"github.com/redpanda-data/benthos/v4/public/service"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// The sending half of the outputs: batches → a session → a BatchError for what
// is not acknowledged.

const (
	fieldMessageType = "message_type"
	fieldAckTimeout  = "ack_timeout"
	fieldBatching    = "batching"

	messageTypeAuto = "auto"

	fieldStream     = "stream"
	fieldName       = "name"
	fieldChunkBytes = "chunk_bytes"
)

const sendMetadata = `
== Metadata

What was received from Cryo goes out as it came in: with ` + "`message_type: auto`" + ` the metadata ` + "`cryo_message_type`" + ` decides whether bytes and streams stay what they were, and ` + "`cryo_stream_name`" + ` is the name of a stream. Nothing else of a message's metadata is sent: Cryo has no headers. What the other end needs to know belongs into the content.
`

const sendPerformance = `
== Performance

The messages of a batch are sent at once, and their acknowledgements awaited together. So what limits the throughput is the batch's size times ` + "`max_in_flight`" + ` divided by the time until the other end acknowledges: single messages, 64 in flight and 10 ms make 6,400 messages a second. Inputs that give single messages gain most from ` + "`batching`" + `, with a ` + "`count`" + ` and a short ` + "`period`" + ` (such as 10ms); the period is what an incomplete batch waits.

With several batches in flight, a message that has to be sent again arrives behind later ones. Where the order matters, set ` + "`max_in_flight: 1`" + ` and let the batches be larger. Streams of one batch go one after the other.
`

func sendFields() []*service.ConfigField {
	return []*service.ConfigField{
		service.NewInterpolatedStringField(fieldMessageType).
			Description("What kind of Cryo message each message becomes: `utf8` (text), `binary`, `stream` (a named stream of its own), or `auto`: what it was when it was received from Cryo, else `utf8` if it is valid UTF-8, else `binary`. Above 16 MiB a message can only travel as a `stream`. To send a whole batch as one stream, put the `archive` processor under `batching`.").
			Default(messageTypeAuto).
			Example(`${! if meta("content_type") == "text/plain" { "utf8" } else { "binary" } }`).
			LintRule(`root = if this.type() == "string" && !this.contains("${!") && ![ "auto", "utf8", "binary", "stream" ].contains(this) { "field message_type: unknown message type %v, it has to be auto, utf8, binary or stream".format(this) }`),
		service.NewObjectField(fieldStream,
			service.NewInterpolatedStringField(fieldName).
				Description("The name that the other end sees, at most 1,024 bytes, such as a file's. An empty one becomes `anonymous`.").
				Default(`${! @cryo_stream_name.or("anonymous") }`).
				Example("${! @path }"),
			service.NewIntField(fieldChunkBytes).
				Description("How many bytes of a stream travel in one frame, at most 16 MiB (16777216).").
				LintRule(`root = if this.type() == "number" && this < 1 { "field chunk_bytes has to be at least 1, got %v".format(this) } else if this.type() == "number" && this > 16777216 { "field chunk_bytes is at most 16 MiB, got %v".format(this) }`).
				Default(cryo.DefaultChunkBytes).
				Advanced(),
		).
			Description("For messages that travel as a `stream`."),
		positiveDuration(fieldAckTimeout).
			Description("How long to wait for the peer's acknowledgement (of a stream: for each step of it) before a message counts as not delivered. It may arrive all the same, and again when it is tried again.").
			Default("30s"),
		positive(fieldMaxInFlight, service.NewOutputMaxInFlightField()).
			Description("How many batches may be on their way at a time; without `batching` a batch is mostly one message. With 1 the order of messages is kept even when some have to be sent again. Messages stay in memory while they are on their way, so keep it low for large ones."),
		service.NewBatchPolicyField(fieldBatching),
		injectTracingField(),
	}
}

// sender turns the pipeline's messages into Cryo's.
type sender struct {
	messageType *service.InterpolatedString
	streamName  *service.InterpolatedString
	chunkBytes  int
	ackTimeout  time.Duration
	metrics     sendMetrics
}

// parcel is a message as it travels: a frame, or a stream.
type parcel struct {
	cryo.Outgoing
	isStream bool
	name     string // of the stream
}

func senderFromParsed(conf *service.ParsedConfig, res *service.Resources) (s sender, policy service.BatchPolicy, maxInFlight int, err error) {
	s.metrics = newSendMetrics(meterOf(res))
	if s.messageType, err = conf.FieldInterpolatedString(fieldMessageType); err != nil {
		return
	}
	if fixed, ok := s.messageType.Static(); ok && fixed != messageTypeStream {
		if _, err = typeOf(nil, fixed); err != nil {
			return
		}
	}
	if s.streamName, err = conf.FieldInterpolatedString(fieldStream, fieldName); err != nil {
		return
	}
	if s.chunkBytes, err = fieldPositive(conf.Namespace(fieldStream), fieldChunkBytes); err != nil {
		return
	}
	if s.chunkBytes > cryo.MaxPayload {
		err = fmt.Errorf("field %s is at most 16 MiB, got %d", fieldChunkBytes, s.chunkBytes)
		return
	}
	if s.ackTimeout, err = fieldPositiveDuration(conf, fieldAckTimeout); err != nil {
		return
	}
	if maxInFlight, err = fieldPositive(conf, fieldMaxInFlight); err != nil {
		return
	}
	policy, err = conf.FieldBatchPolicy(fieldBatching)
	return
}

// prepare makes Cryo's messages of a batch. A message that can't be one has its
// error in errs, by index, and a type that the session refuses to send.
func (s *sender) prepare(batch service.MessageBatch) (messages []parcel, errs []error) {
	messages = make([]parcel, len(batch))
	errs = make([]error, len(batch))
	types, names := batch.InterpolationExecutor(s.messageType), batch.InterpolationExecutor(s.streamName)
	fixed, isFixed := s.messageType.Static() // the executor would allocate for each message
	for i, m := range batch {
		if messages[i].Payload, errs[i] = m.AsBytes(); errs[i] != nil {
			continue
		}
		name, err := fixed, error(nil)
		if !isFixed {
			name, err = types.TryString(i)
		}
		if err != nil {
			errs[i] = fmt.Errorf("field %s: %w", fieldMessageType, err)
			continue
		}
		if name == messageTypeAuto {
			name = asReceived(m)
		}
		if name == messageTypeStream {
			if messages[i].name, err = names.TryString(i); err != nil {
				errs[i] = fmt.Errorf("field %s.%s: %w", fieldStream, fieldName, err)
				continue
			}
			messages[i].isStream = true
		} else {
			messages[i].Type, errs[i] = typeOf(messages[i].Payload, name)
		}
	}
	return messages, errs
}

// asReceived is the type that a message had when it came from Cryo.
func asReceived(m *service.Message) string {
	switch name, _ := m.MetaGet(metaMessageType); name {
	case "binary", messageTypeStream:
		return name
	default:
		return messageTypeAuto // text may have become something else meanwhile
	}
}

func typeOf(payload []byte, name string) (cryo.Type, error) {
	switch name {
	case "utf8":
		return cryo.TypeUTF8, nil
	case "binary":
		return cryo.TypeBinary, nil
	case messageTypeAuto:
		if utf8.Valid(payload) {
			return cryo.TypeUTF8, nil
		}
		return cryo.TypeBinary, nil
	default:
		return 0, fmt.Errorf("field %s: unknown message type %s, it has to be auto, utf8, binary or stream", fieldMessageType, name)
	}
}

// errLate is an acknowledgement that did not come in time.
var errLate = errors.New("none within")

// send sends messages to one session, in order, and waits for their
// acknowledgements. Into errs, by index, go the errors of those that were not
// acknowledged; those that have one already are not sent.
func (s *sender) send(ctx context.Context, session *cryo.Session, messages []parcel, errs []error) {
	for start := 0; start < len(messages); {
		end := start + 1
		if messages[start].isStream {
			if errs[start] == nil {
				errs[start] = s.sendStream(ctx, session, &messages[start])
			}
		} else {
			for end < len(messages) && !messages[end].isStream {
				end++
			}
			s.sendFrames(ctx, session, messages[start:end], errs[start:end])
		}
		if late := slices.IndexFunc(errs[start:end], func(err error) bool { return errors.Is(err, errLate) }); late >= 0 {
			// Each of the others would wait as long.
			for i := end; i < len(errs); i++ {
				if errs[i] == nil {
					errs[i] = fmt.Errorf("not sent behind one that was late: %w", errs[start+late])
				}
			}
			return
		}
		start = end
	}
}

func (s *sender) sendFrames(ctx context.Context, session *cryo.Session, messages []parcel, errs []error) {
	ctx, cancel := s.bound(ctx)
	defer cancel()
	began := s.metrics.sending(len(messages))
	if failed, ok := errors.AsType[*cryo.BatchError](session.SendBatch(ctx, frames(messages))); ok {
		for i, err := range failed.Errs {
			if errs[i] == nil {
				errs[i] = err
			}
		}
	}
	s.metrics.awaited(ctx, len(messages), began)
	s.metrics.settled(messages, errs)
}

func frames(messages []parcel) []cryo.Outgoing {
	list := make([]cryo.Outgoing, len(messages))
	for i := range messages {
		list[i] = messages[i].Outgoing
	}
	return list
}

// bound is the time that an acknowledgement may take.
func (s *sender) bound(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeoutCause(ctx, s.ackTimeout, fmt.Errorf("%w %s (%v)", errLate, fieldAckTimeout, s.ackTimeout))
}

func (s *sender) sendStream(ctx context.Context, session *cryo.Session, m *parcel) error {
	s.metrics.streamsOpen.add(1)
	defer s.metrics.streamsOpen.add(-1)
	err := session.SendStream(ctx, bytes.NewReader(m.Payload), &cryo.StreamOptions{
		Name:        m.name,
		ChunkBytes:  s.chunkBytes,
		StepTimeout: s.ackTimeout,
	})
	if errors.Is(err, context.DeadlineExceeded) && (ctx.Err() == nil || errors.Is(context.Cause(ctx), errLate)) {
		err = fmt.Errorf("%w: %w %s (%v)", err, errLate, fieldAckTimeout, s.ackTimeout)
	}
	s.metrics.settled([]parcel{*m}, []error{err})
	return err
}

// batchError tells the engine which messages of a batch were not delivered.
func batchError(batch service.MessageBatch, errs []error) error {
	var failed *service.BatchError
	for i, err := range errs {
		switch {
		case err == nil:
		case len(batch) == 1:
			return err
		case failed == nil:
			failed = service.NewBatchError(batch, err).Failed(i, err)
		default:
			_ = failed.Failed(i, err)
		}
	}
	if failed == nil {
		return nil
	}
	return failed
}
