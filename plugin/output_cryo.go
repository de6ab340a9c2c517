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
		Description(cryoText+`This output is a Cryo client: it connects to a server, such as one made with the npm package `+"`cryo-server`"+`. When the connection is lost, it reconnects with the same session id: immediately while a batch is in flight, otherwise with the next message. Failed attempts are repeated after waits that double up to ten seconds (after a denied token: 30 s).

== Delivery

A message is delivered when the server has acknowledged it. It has failed when the server rejects it, when it is not acknowledged within `+"`ack_timeout`"+`, or when it cannot be sent. A stream has failed when the server cancels it, which a server also does if it closes the connection before it has received the whole stream.

A lost connection alone is not a failure: a batch in flight waits for the next connection, and only its unacknowledged messages are sent again there. The output waits for connections until `+"`ack_timeout`"+` after the first loss; then the remaining messages have failed. They have also failed when 10 connections were lost with the batch, because the batch may be the cause. A batch that arrives while there is no connection waits for one without a time limit, because none of it was sent.

When cryo-connect receives SIGTERM or SIGINT, the server has a quarter of `+"`shutdown_timeout`"+` (5 s of 20 s, after `+"`shutdown_delay`"+`) to acknowledge what is in flight. Then the sends are cancelled: their messages have failed, and their senders may send them again. The connection is closed within another 5 s. Raise `+"`shutdown_timeout`"+` if the server needs longer. An output around this one treats a cancelled send like any other failure: `+"`drop_on`"+` with `+"`error: true`"+` drops the message, `+"`fallback`"+` passes it to its next output, and `+"`retry`"+` keeps it until the engine stops by force, as does a `+"`broker`"+` that copies it to all its outputs.
`+sendResultsText+`
Data that the server sends on this session is rejected: to receive, use the input `+"`cryo`"+`.
`+sendMetadata+sendPerformance+injectionText+metricsText).
		Fields(dialFields()...).
		Fields(sendFields(
			" After the loss of a connection, the output waits for other connections up to this time: see [Delivery](#delivery). `/ready` may report the loss with that delay.",
			", also after a lost connection that is replaced within `ack_timeout`",
		)...).
		LintRule(lintMapping("output cryo")).
		Example("From Kafka to a Cryo server", "Records of a topic are sent to a Cryo server; offsets are committed when the server acknowledges.", `
input:
  redpanda:
    seed_brokers: [ localhost:9092 ]
    topics: [ orders ]
    consumer_group: cryo
output:
  cryo:
    url: wss://cryo.example.com
    token: '${CRYO_TOKEN}'
`)
}

type output struct {
	*dialer
	sender
	sends     *sends
	cancelled cancelledSends
}

var (
	_ service.BatchOutput        = (*output)(nil)
	_ service.ConnectionTestable = (*output)(nil)
)

// newOutput returns an output. opts contains the options for which there are no fields.
func newOutput(conf *service.ParsedConfig, res *service.Resources, opts cryo.DialOptions) (*output, service.BatchPolicy, int, error) {
	opts.SendOnly = true
	d, err := dialerFromParsed(conf, res, opts)
	if err != nil {
		return nil, service.BatchPolicy{}, 0, err
	}
	s, policy, maxInFlight, err := senderFromParsed(conf, res)
	return &output{dialer: d, sender: s, sends: sendsOf(res)}, policy, maxInFlight, err
}

// Connect makes one attempt to connect, unless there is a session. The engine calls it again
// after a failure. When the sends are cancelled, it succeeds without a session: the engine then
// writes the batch for which it connects, which fails, and acknowledges nothing.
func (o *output) Connect(ctx context.Context) error {
	bounded, release := o.sends.bound(ctx)
	defer release()
	if _, err := o.connect(bounded); err != nil && o.sends.err() == nil {
		return err
	}
	return nil
}

// WriteBatch returns when each message has been acknowledged or has failed. It returns
// ErrNotConnected only if no message has been sent, because the engine then sends the whole
// batch again.
func (o *output) WriteBatch(ctx context.Context, batch service.MessageBatch) error {
	if len(batch) == 0 {
		return nil // even without a session
	}
	if err := o.sends.err(); err != nil {
		o.cancelled.fail(ctx)
		return err
	}
	session := o.client.Session()
	if session == nil {
		return service.ErrNotConnected
	}
	bounded, release := o.sends.bound(ctx)
	defer release()
	messages := o.prepare(batch)
	o.deliver(bounded, &reconnecting{dialer: o.dialer, session: session, timeout: o.ackTimeout}, withError(messages, isNil), 0)
	return o.verdict(ctx, batch, messages)
}

func (o *output) Close(ctx context.Context) error { return o.dialer.close(ctx) }

// ConnectionTest opens and closes another session, which does not affect that of the output.
func (o *output) ConnectionTest(ctx context.Context) service.ConnectionTestResults {
	return o.test(ctx)
}
