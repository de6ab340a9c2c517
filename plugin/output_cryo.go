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
		Description(cryoText+"This output is a Cryo client: it connects to a server, such as one made with the npm package `cryo-server`. "+reconnectText+`

## Delivery

A message is delivered when the server acknowledges it. It fails if the server rejects it, or does not acknowledge it within `+"`ack_timeout`"+`. A stream also fails if the server cancels it.

After a lost connection, unacknowledged messages are sent again on the next one, until `+"`ack_timeout`"+` after the loss. A batch that arrives without a connection waits for one without a time limit.

On SIGTERM or SIGINT, the server has a quarter of `+"`shutdown_timeout`"+` to acknowledge; then the messages in flight fail.
`+sendResultsText+`
Messages from the server are rejected on this session. To receive, use the input `+"`cryo`"+`.
`+sendMetadata+sendPerformance+injectionText+metricsText).
		Fields(dialFields()...).
		Fields(sendFields(
			" After the loss of a connection, the output waits for another one for this long, and `/ready` may report the loss with that delay.",
			"",
		)...).
		Fields(dialOptionFields()...).
		LintRule(lintMapping("output cryo")).
		Example("Read from Kafka", "Records of a topic are sent to a Cryo server. Their offsets are committed when the server acknowledges them.", `
input:
  redpanda:
    seed_brokers: [ localhost:9092 ]
    topics: [ orders ]
    consumer_group: cryo
output:
  cryo:
    url: wss://cryo.example.com
    token: '${CRYO_TOKEN}'
`).
		Example("Send files as streams", "Each file is sent as a stream with the file's name. `retry` repeats files that the server rejects, which the `file` input does not.", `
input:
  file:
    paths: [ ./outbox/* ]
    scanner:
      to_the_end: {}
output:
  retry:
    output:
      cryo:
        url: wss://cryo.example.com
        token: '${CRYO_TOKEN}'
        message_type: stream
        stream:
          name: ${! @path.filepath_split().index(1) }
        max_in_flight: 4 # files in flight stay in memory
`).
		Example("Batch lines", "Lines are sent in batches of up to 100, which wait for at most 10 ms. `token_file` is read again for each connection attempt.", `
input:
  stdin:
    scanner:
      lines: {}
output:
  cryo:
    url: wss://cryo.example.com
    token_file: /run/secrets/cryo-token
    message_type: utf8
    batching:
      count: 100
      period: 10ms
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
