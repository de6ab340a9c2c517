package plugin

import (
	"context"

	"github.com/redpanda-data/benthos/v4/public/service"

	"github.com/cryo-connect/cryo-connect/cryo"
)

func outputSpec() *service.ConfigSpec {
	return service.NewConfigSpec().
		Beta().
		Categories("Network").
		Summary("Connects to a Cryo server and sends it messages.").
		Description(aboutCryo+`This output is a Cryo client: it dials a server, such as one made with the npm package `+"`cryo-server`"+`, and dials again with the same session id when the connection is lost: at once while a batch is in flight, else with the next message, and while that fails after waits that double up to ten seconds (a rejected token: every half minute).

== Delivery

A message is delivered when the server has acknowledged it. It has failed when the server rejects it, or does not acknowledge it within `+"`ack_timeout`"+`, or when it cannot be sent. A stream has failed when the server cancels it, as a server does too that closes the connection before it has all of the stream.

A lost connection is no failure by itself. A batch that is in flight then waits for the next connection, and only what is not acknowledged is sent again there. Connections are waited for until `+"`ack_timeout`"+` after the first loss; then what is left has failed, and so it has when 10 connections were lost with one batch, because the batch may be what ends them. A batch that comes while there is no connection is kept until there is one, for however long: nothing of it was sent.
`+sendVerdicts+`
Data that the server sends on this session is rejected: to receive, use the `+"`cryo`"+` input.
`+sendMetadata+sendPerformance+aboutInjection+aboutMetrics).
		Fields(dialFields()...).
		Fields(sendFields(
			" When a connection is lost, other connections are waited for as long, from the first loss: see [Delivery](#delivery). `/ready` may report the loss that much later.",
			", also when the connection is lost and comes back within `ack_timeout`",
		)...).
		LintRule(lintMapping("output cryo")).
		Example("From Kafka to a Cryo server", "Records of a topic go to a Cryo server; offsets are committed as the server acknowledges.", `
input:
  redpanda:
    seed_brokers: [ localhost:9092 ]
    topics: [ orders ]
    consumer_group: cryo
output:
  cryo:
    url: wss://cryo.example.com
    token: ${CRYO_TOKEN}
`)
}

type output struct {
	*dialer
	sender
}

var (
	_ service.BatchOutput        = (*output)(nil)
	_ service.ConnectionTestable = (*output)(nil)
)

// newOutput makes an output; opts are what the configuration has no field for.
func newOutput(conf *service.ParsedConfig, res *service.Resources, opts cryo.DialOptions) (*output, service.BatchPolicy, int, error) {
	opts.SendOnly = true
	d, err := dialerFromParsed(conf, res, opts)
	if err != nil {
		return nil, service.BatchPolicy{}, 0, err
	}
	s, policy, maxInFlight, err := senderFromParsed(conf, res)
	return &output{dialer: d, sender: s}, policy, maxInFlight, err
}

// Connect dials once, unless the session lives; the engine tries again.
func (o *output) Connect(ctx context.Context) error {
	_, err := o.connect(ctx)
	return err
}

// WriteBatch returns when each message is acknowledged or has failed. On
// ErrNotConnected the engine sends the whole batch again, so that is only returned
// before anything of it is sent.
func (o *output) WriteBatch(ctx context.Context, batch service.MessageBatch) error {
	if len(batch) == 0 {
		return nil // also without a session: it is no reason to connect
	}
	session := o.client.Session()
	if session == nil {
		return service.ErrNotConnected
	}
	messages := o.prepare(batch)
	o.deliver(ctx, &reconnecting{dialer: o.dialer, session: session, timeout: o.ackTimeout}, withError(messages, isNil), 0)
	return o.verdict(ctx, batch, messages)
}

func (o *output) Close(ctx context.Context) error { return o.dialer.close(ctx) }

// ConnectionTest dials, completes the handshake and hangs up.
func (o *output) ConnectionTest(ctx context.Context) service.ConnectionTestResults {
	return o.test(ctx)
}
