package plugin

import (
	"context"
	"slices"

	"github.com/redpanda-data/benthos/v4/public/service"
)

func init() {
	service.MustRegisterBatchOutput("cryo", outputSpec(), func(conf *service.ParsedConfig, res *service.Resources) (service.BatchOutput, service.BatchPolicy, int, error) {
		out, policy, maxInFlight, err := newOutput(conf, res)
		if err != nil {
			return nil, policy, 0, err
		}
		traced, err := withInjection(conf, "cryo", out)
		return traced, policy, maxInFlight, err
	})
}

func outputSpec() *service.ConfigSpec {
	return service.NewConfigSpec().
		Beta().
		Categories("Network").
		Summary("Connects to a Cryo server and sends it messages.").
		Description(aboutCryo+`This output is a Cryo client: it dials a server, such as one made with the npm package `+"`cryo-server`"+`, and dials again with the same session id when the connection is lost: with the next message, and while that fails after waits that double up to ten seconds (a refused token: every half minute).

== Delivery

A message is delivered when the server has acknowledged it. It has failed when the server rejects it, or does not acknowledge it within `+"`ack_timeout`"+`, or when it cannot be sent.
`+sendVerdicts+`
Data that the server sends on this session is rejected: to receive, use the `+"`cryo`"+` input.
`+sendMetadata+sendPerformance+aboutInjection+aboutMetrics).
		Fields(dialFields()...).
		Fields(sendFields("", "")...).
		LintRule(`root = `+dialLint).
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

func newOutput(conf *service.ParsedConfig, res *service.Resources) (*output, service.BatchPolicy, int, error) {
	d, err := dialerFromParsed(conf, res)
	if err != nil {
		return nil, service.BatchPolicy{}, 0, err
	}
	d.opts.SendOnly = true
	s, policy, maxInFlight, err := senderFromParsed(conf, res)
	return &output{dialer: d, sender: s}, policy, maxInFlight, err
}

// Connect dials once, unless the session lives; the engine tries again.
func (o *output) Connect(ctx context.Context) error {
	_, _, err := o.connect(ctx)
	return err
}

// WriteBatch returns when each message is acknowledged or has failed. On
// ErrNotConnected the engine sends the whole batch again, so that is only
// returned when the lost session is the reason for all of it.
func (o *output) WriteBatch(ctx context.Context, batch service.MessageBatch) error {
	if len(batch) == 0 {
		return nil // also without a session: it is no reason to connect
	}
	session := o.live()
	if session == nil {
		return service.ErrNotConnected
	}
	messages, errs := o.prepare(batch)
	o.send(ctx, session, messages, errs)
	if ctx.Err() == nil && !slices.ContainsFunc(errs, func(err error) bool { return !isEnd(err) }) {
		return service.ErrNotConnected
	}
	return o.verdict(ctx, batch, errs)
}

func (o *output) Close(ctx context.Context) error { return o.dialer.close(ctx) }

// ConnectionTest dials, completes the handshake and hangs up.
func (o *output) ConnectionTest(ctx context.Context) service.ConnectionTestResults {
	return o.test(ctx)
}
