package plugin

import (
	"context"
	"fmt"
	"strings"

	"github.com/redpanda-data/benthos/v4/public/bloblang"
	"github.com/redpanda-data/benthos/v4/public/service"
	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"
)

// Distributed tracing. Cryo has no headers, so mappings of the configuration read the trace
// context from the content of a message, or write it there.

// The engine has fields with the same names. Its examples are not suitable for Cryo: one writes
// metadata, which Cryo does not send, and one replaces content that is not JSON.
const (
	fieldExtractTracing = "extract_tracing_map"
	fieldInjectTracing  = "inject_tracing_map"
)

// extractTrace is the recommended mapping. It returns an object for every message, so that a
// message without a trace context begins a new trace.
const extractTrace = `root = if this.trace.type().or("") == "object" { this.trace } else { {} }`

const extractionText = `
## Tracing

With ` + "`extract_tracing_map`" + `, the spans of the pipeline continue those of the sender. Cryo has no headers, so the sender must write the trace context, such as ` + "`traceparent`" + `, into the content. This mapping reads it from the ` + "`trace`" + ` field of a JSON object, and begins a new trace for all other messages:

` +
	"```yaml\nextract_tracing_map: " + extractTrace + "\n```" + `

If the mapping fails, or returns a value that is not an object, the message has no span, and a rate-limited warning is logged.
`

const injectionText = `
## Tracing

With ` + "`inject_tracing_map`" + `, the receiver can continue the spans of the pipeline. Cryo has no headers, so the mapping must write the trace context, such as ` + "`traceparent`" + `, into the content. This mapping writes it into the ` + "`trace`" + ` field of a JSON object, and leaves other content unchanged:

` +
	"```yaml\ninject_tracing_map: root.trace = if root.type() == \"object\" { this }\n```" + `

If the mapping fails, the message is sent unchanged, and a rate-limited warning is logged.
`

func extractTracingField() *service.ConfigField {
	return service.NewBloblangField(fieldExtractTracing).
		Description("A mapping that returns the trace context of a message, an object with keys such as `traceparent`. An empty object begins a new trace; with null or `deleted()` the message has no span, and nothing is logged. See [Tracing](#tracing).").
		Example(extractTrace).
		Optional().
		Advanced()
}

func injectTracingField() *service.ConfigField {
	return service.NewBloblangField(fieldInjectTracing).
		Description("A mapping that writes the trace context into a message: `this` is an object with keys such as `traceparent`, and `root` is the message. With `deleted()` the message is sent unchanged. See [Tracing](#tracing).").
		Example(`root.trace = if root.type() == "object" { this }`).
		Optional().
		Advanced()
}

// tracing holds the mapping of one of the two fields, and the engine's tracer.
//
// It replaces the wrappers that the engine has for these fields. The engine's wrapper of an
// input uses the span of the first message for its whole batch, and panics if the mapping
// deletes root, which a client can cause. Its wrapper of an output leaves a message partly
// changed if the mapping fails. Both log a line for each message for which the mapping returns
// nothing.
type tracing struct {
	mapping *bloblang.Executor
	tracer  trace.Tracer
	log     limitedLog
}

// tracingFromParsed returns the tracing of a field, or nil if the field is not set.
func tracingFromParsed(conf *service.ParsedConfig, field string) (*tracing, error) {
	r := &settingsReader{conf: conf}
	mapping, _ := readMapping(r, field)
	if mapping == nil {
		return nil, r.err
	}
	res := conf.Resources()
	return &tracing{mapping, res.OtelTracer().Tracer(tracerName), newLimitedLog(res.Logger())}, nil
}

// tracerName is the name of the engine's own tracer.
const tracerName = "redpanda-connect"

// failed logs that the mapping of a field has failed.
func (t *tracing) failed(field string, err error) {
	if log, ok := t.log.allow(); ok {
		// The text may repeat a value of any size.
		log.With("field", field, "error", fmt.Sprintf("%.1000v", err)).Warn("Message has no span: the tracing mapping failed")
	}
}

// testableInput is implemented by the inputs of this plugin.
type testableInput interface {
	service.BatchInput
	service.ConnectionTestable
}

// withExtraction returns an input that extracts the trace context of its messages and starts
// their spans, if the field is set; otherwise it returns in. name is the name of the component.
func withExtraction(conf *service.ParsedConfig, name string, in testableInput) (service.BatchInput, error) {
	t, err := tracingFromParsed(conf, fieldExtractTracing)
	if t == nil {
		return in, err
	}
	return &tracedInput{in, t, "input_" + name}, nil
}

type tracedInput struct {
	testableInput
	tracing  *tracing
	spanName string
}

// ReadBatch returns the next batch of the input. It starts a span for each message for which
// the mapping returns a trace context.
func (in *tracedInput) ReadBatch(ctx context.Context) (service.MessageBatch, service.AckFunc, error) {
	batch, ack, err := in.testableInput.ReadBatch(ctx)
	for i, m := range batch {
		parent, err := in.tracing.extract(m)
		if err != nil {
			in.tracing.failed(fieldExtractTracing, err)
		}
		if parent != nil {
			spanned, _ := in.tracing.tracer.Start(otel.GetTextMapPropagator().Extract(m.Context(), parent), in.spanName)
			batch[i] = m.WithContext(spanned)
		}
	}
	return batch, ack, err
}

// extract returns the trace context that the mapping finds in a message. It returns nil if the
// mapping returns null or deletes root.
func (t *tracing) extract(m *service.Message) (parent propagation.MapCarrier, err error) {
	defer catchPanic(&err)
	result, err := m.BloblangQuery(t.mapping) // does not change the message
	if err != nil || result == nil {
		return nil, err
	}
	content, err := result.AsStructured()
	if err != nil || content == nil {
		return nil, err
	}
	object, ok := content.(map[string]any)
	if !ok {
		return nil, fmt.Errorf("expected an object, got %T", content)
	}
	parent = make(propagation.MapCarrier)
	for key, value := range object {
		if text, ok := value.(string); ok {
			parent[strings.ToLower(key)] = text
		}
	}
	return parent, nil
}

// testableOutput is implemented by the outputs of this plugin.
type testableOutput interface {
	service.BatchOutput
	service.ConnectionTestable
}

// withInjection returns an output that injects the trace context into its messages, if the
// field is set; otherwise it returns out.
func withInjection(conf *service.ParsedConfig, out testableOutput) (service.BatchOutput, error) {
	t, err := tracingFromParsed(conf, fieldInjectTracing)
	if t == nil {
		return out, err
	}
	return &tracedOutput{out, t}, nil
}

type tracedOutput struct {
	testableOutput
	tracing *tracing
}

// WriteBatch writes copies of the messages into which the mapping has written the trace
// context. A message for which the mapping fails or deletes root is written unchanged.
func (out *tracedOutput) WriteBatch(ctx context.Context, batch service.MessageBatch) error {
	spanned := batch.Copy()
	for i := range spanned {
		m, err := out.tracing.inject(spanned[i])
		if err != nil {
			out.tracing.failed(fieldInjectTracing, err)
		}
		if m == nil {
			m = batch[i] // the mapping may have changed the copy
		}
		spanned[i] = m
	}
	return out.testableOutput.WriteBatch(ctx, spanned)
}

// inject returns a message into which the mapping has written the trace context, or nil if the
// mapping deletes root.
func (t *tracing) inject(m *service.Message) (spanned *service.Message, err error) {
	defer catchPanic(&err)
	carrier := make(propagation.MapCarrier)
	otel.GetTextMapPropagator().Inject(m.Context(), carrier)
	span := make(map[string]any, len(carrier))
	for key, value := range carrier {
		span[key] = value
	}
	from := service.NewMessage(nil)
	from.SetStructuredMut(span)
	if spanned, err = m.BloblangMutateFrom(t.mapping, from); err != nil || spanned == nil {
		return nil, err
	}
	if _, err := contentOf(spanned); err != nil {
		return nil, err
	}
	return spanned, nil
}
