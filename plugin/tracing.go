package plugin

import (
	"context"

	"github.com/redpanda-data/benthos/v4/public/service"
)

// Spans that go on from one process to another. Cryo has no headers to carry
// them, so mappings of the configuration say where in a message they are.

// The names are the engine's, and its wrappers look for them. Its own fields have
// examples that would do harm here: one writes metadata, which Cryo doesn't
// carry, and one replaces what is no JSON.
const (
	fieldExtractTracing = "extract_tracing_map"
	fieldInjectTracing  = "inject_tracing_map"
)

// extractTrace is the mapping that we recommend. It gives an object whatever a
// message is: for each that has none the engine would log an error.
const extractTrace = `root = if this.trace.type().or("") == "object" { this.trace } else { {} }`

const aboutExtraction = `
== Tracing

With ` + "`extract_tracing_map`" + ` the pipeline's spans go on from those of the sender. Cryo has no headers, so the sender puts what its tracer propagates, such as ` + "`traceparent`" + `, into the content, where both have agreed on:

` + "```yaml\nextract_tracing_map: " + extractTrace + "\n```" + `

finds it in the field ` + "`trace`" + ` of JSON, and nothing elsewhere, so that a new trace begins. The condition matters: for what is not an object there, which any sender can send, the log would have an error. The names of streams and sessions are no place for it.
`

const aboutInjection = `
== Tracing

With ` + "`inject_tracing_map`" + ` the receiver can go on from the pipeline's spans. Cryo has no headers, so what the tracer propagates, such as ` + "`traceparent`" + `, goes into the content, where both have agreed on:

` + "```yaml\ninject_tracing_map: root.trace = if root.type() == \"object\" { this }\n```" + `

puts it into the field ` + "`trace`" + ` of JSON, and leaves alone what is no JSON object. The condition matters: without it, text and bytes would be replaced by an object that has nothing but the field.
`

func extractTracingField() *service.ConfigField {
	return service.NewBloblangField(fieldExtractTracing).
		Description("A mapping that finds in a message the span of its sender: an object with what a tracer propagates, such as `traceparent`. An empty one begins a new trace. See [Tracing](#tracing).").
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

// testableInput is any of our inputs.
type testableInput interface {
	service.BatchInput
	service.ConnectionTestable
}

// withExtraction lets an input find spans in its messages, if the configuration
// asks for it. The engine's own wrapper of batches would take the first message's
// span for all of them, though they come from several senders; so its wrapper of
// single messages is asked for each.
func withExtraction(conf *service.ParsedConfig, name string, in testableInput) (service.BatchInput, error) {
	one := &oneMessage{}
	extract, err := conf.WrapInputExtractTracingSpanMapping(name, one)
	if err != nil || extract == service.Input(one) {
		return in, err
	}
	return &tracedInput{in, one, extract}, nil
}

type tracedInput struct {
	testableInput
	one     *oneMessage // what extract reads; the engine's reading goroutine's
	extract service.Input
}

// ReadBatch gives the input's batch, with a span in each message.
func (in *tracedInput) ReadBatch(ctx context.Context) (service.MessageBatch, service.AckFunc, error) {
	batch, ack, err := in.testableInput.ReadBatch(ctx)
	for i := range batch {
		in.one.message = batch[i]
		if m, _, err := in.extract.Read(ctx); err == nil { // it logs why not
			batch[i] = m
		}
	}
	return batch, ack, err
}

// oneMessage is an input of the message that it holds.
type oneMessage struct{ message *service.Message }

func (o *oneMessage) Connect(context.Context) error { return nil }

func (o *oneMessage) Read(context.Context) (*service.Message, service.AckFunc, error) {
	return o.message, nil, nil
}

func (o *oneMessage) Close(context.Context) error { return nil }

// testableOutput is any of our outputs.
type testableOutput interface {
	service.BatchOutput
	service.ConnectionTestable
}

// withInjection lets an output put spans into its messages, if the configuration
// asks for it.
func withInjection(conf *service.ParsedConfig, name string, out testableOutput) (service.BatchOutput, error) {
	traced, err := conf.WrapBatchOutputExtractTracingSpanMapping(name, out)
	if err != nil || traced == service.BatchOutput(out) {
		return out, err
	}
	return struct {
		service.BatchOutput
		service.ConnectionTestable
	}{traced, out}, nil
}
