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

// Spans that continue from one process to another. Cryo has no headers for
// them, so mappings of the configuration find them in a message.

// The names are the engine's. The examples of its own fields would do harm
// here: one writes metadata, which Cryo does not carry, and one replaces content that is no
// JSON.
const (
	fieldExtractTracing = "extract_tracing_map"
	fieldInjectTracing  = "inject_tracing_map"
)

// extractTrace is the recommended mapping. It returns an object for every message, so that
// one without a span begins a trace.
const extractTrace = `root = if this.trace.type().or("") == "object" { this.trace } else { {} }`

const aboutExtraction = `
== Tracing

With ` + "`extract_tracing_map`" + ` the pipeline's spans continue those of the sender. Cryo has no headers, so the sender puts what its tracer propagates, such as ` + "`traceparent`" + `, into the content, where both have agreed on:

` + "```yaml\nextract_tracing_map: " + extractTrace + "\n```" + `

finds it in the field ` + "`trace`" + ` of JSON, and nothing elsewhere, so that a new trace begins. The condition matters: without it, a message with something else there, which any sender can send, would go without a span. The names of streams and sessions are no place for it.

A message for which the mapping fails, or results in anything but an object, goes on without a span from here, and is not changed. The log has a warning, at most one a second, unless the mapping deletes ` + "`root`" + ` or results in null: that is how it says that there is none.
`

const aboutInjection = `
== Tracing

With ` + "`inject_tracing_map`" + ` the receiver can go on from the pipeline's spans. Cryo has no headers, so what the tracer propagates, such as ` + "`traceparent`" + `, goes into the content, where both have agreed on:

` + "```yaml\ninject_tracing_map: root.trace = if root.type() == \"object\" { this }\n```" + `

puts it into the field ` + "`trace`" + ` of JSON, and leaves alone what is no JSON object. The condition matters: without it, text and bytes would be replaced by an object that has nothing but the field.

A message for which the mapping fails or deletes ` + "`root`" + ` is sent as it is. The log has a warning if it fails, at most one a second.
`

func extractTracingField() *service.ConfigField {
	return service.NewBloblangField(fieldExtractTracing).
		Description("A mapping that finds in a message the span of its sender: an object with what a tracer propagates, such as `traceparent`. An empty one begins a new trace; null, and `deleted()`, leave the message without a span. See [Tracing](#tracing).").
		Example(extractTrace).
		Optional().
		Advanced()
}

func injectTracingField() *service.ConfigField {
	return service.NewBloblangField(fieldInjectTracing).
		Description("A mapping that puts the pipeline's span into a message. In it `this` is an object with what the tracer propagates, such as `traceparent`, and `root` the message. See [Tracing](#tracing).").
		Example(`root.trace = if root.type() == "object" { this }`).
		Optional().
		Advanced()
}

// tracing is the mapping of one of the two fields, with the engine's tracer.
//
// The engine has wrappers for these fields. They are not used: that of inputs
// takes the first message's span for all of its batch, and dereferences nil where
// the mapping deletes root, which a client can cause; that of outputs leaves a
// message half changed where the mapping fails; both log each message of which the
// mapping makes nothing.
type tracing struct {
	mapping *bloblang.Executor
	tracer  trace.Tracer
	log     limitedLog
}

// tracingFromParsed returns nil where the field is not set.
func tracingFromParsed(conf *service.ParsedConfig, field string) (*tracing, error) {
	r := &settingsReader{conf: conf}
	mapping, _ := readMapping(r, field)
	if mapping == nil {
		return nil, r.err
	}
	res := conf.Resources()
	return &tracing{mapping, res.OtelTracer().Tracer(tracerName), newLimitedLog(res.Logger())}, nil
}

// tracerName is that of the engine's own spans.
const tracerName = "redpanda-connect"

// failed logs that a message has no span.
func (t *tracing) failed(field string, err error) {
	if log, ok := t.log.allow(); ok {
		log.Warnf("A message has no span: field %s: %v", field, err)
	}
}

// testableInput is any of our inputs.
type testableInput interface {
	service.BatchInput
	service.ConnectionTestable
}

// withExtraction returns an input that finds spans in its messages, if the field is set.
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

// ReadBatch returns the input's batch, with a span in each message for which the mapping
// returns one.
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

// extract returns the sender's span; nil where the mapping deletes root or results
// in null.
func (t *tracing) extract(m *service.Message) (parent propagation.MapCarrier, err error) {
	defer catchPanic(&err)
	result, err := m.BloblangQuery(t.mapping) // of a copy
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

// testableOutput is any of our outputs.
type testableOutput interface {
	service.BatchOutput
	service.ConnectionTestable
}

// withInjection returns an output that puts spans into its messages, if the field is set.
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

// WriteBatch sends copies of the messages, with their spans. A message for which the
// mapping fails or deletes root is sent unchanged.
func (out *tracedOutput) WriteBatch(ctx context.Context, batch service.MessageBatch) error {
	spanned := batch.Copy()
	for i := range spanned {
		m, err := out.tracing.inject(spanned[i])
		if err != nil {
			out.tracing.failed(fieldInjectTracing, err)
		}
		if m == nil {
			m = batch[i] // the mapping may have changed a part of the copy
		}
		spanned[i] = m
	}
	return out.testableOutput.WriteBatch(ctx, spanned)
}

// inject puts a message's span into it.
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
