package plugin

import (
	"context"

	"github.com/redpanda-data/benthos/v4/public/service"
)

func serverOutputSpec() *service.ConfigSpec {
	return service.NewConfigSpec().
		Beta().
		Categories("Network").
		Summary("Listens for Cryo clients and sends them messages.").
		Description(cryoText+`This output is a Cryo server: web pages and other clients, such as those made with the npm package `+"`cryo-client-node`"+`, connect to it. To receive from the same clients, add an input `+"`cryo_server`"+` with the same address and settings; without it, their messages are rejected.

## Delivery

`+"`send_to`"+` determines when a message is delivered:

- `+"`session`"+`: when the client acknowledges it.
- `+"`any`"+`: when one client acknowledges it. If its session ends first, the message is sent to another one, up to ten in all.
- `+"`all` and `match`"+`: when each session has acknowledged or rejected it, or has ended, and at least one has acknowledged it. Delivery to a single session is at most once.

A message fails if no session acknowledges it; with `+"`session` and `any`"+`, also if its client rejects it. A session that does not acknowledge within `+"`ack_timeout`"+` is closed; see [Targets](`+deliveryPage+`#targets). Without a session, `+"`no_session`"+` applies.
`+sendResultsText+sendMetadata+sendPerformance+injectionText+metricsText).
		Fields(listenFields()...).
		Fields(targetFields()...).
		Fields(sendFields("", ", to each session")...).
		Fields(listenOptionFields()...).
		LintRule(lintMapping("output cryo_server")).
		Example("Send to rooms", "A message that is posted to `/rooms/NAME` is sent to the clients whose URL has the query parameter `room=NAME`.", `
input:
  http_server:
    path: /rooms/{room}
output:
  cryo_server:
    address: 0.0.0.0:8080
    tokens: [ '${CRYO_TOKEN}' ]
    session_metadata:
      query_parameters: [ room ]
    send_to: match
    match: root = @cryo_session.cryo_query_room == @room
    no_session: drop # for an empty room
`).
		Example("Distribute work", "Each line is a job for one of the connected clients. A client acknowledges a job when it is done; the job of a client that disconnects is sent to another one.", `
input:
  stdin:
    scanner:
      lines: {}
output:
  cryo_server:
    address: 0.0.0.0:8080
    tokens: [ '${CRYO_TOKEN}' ]
    send_to: any
    max_in_flight_per_session: 1
    ack_timeout: 10m # longer than any job takes
`).
		Example("Reply to the sender", "Each message is sent back to its client, in upper case.", `
input:
  cryo_server:
    address: 0.0.0.0:8080
    tokens: [ '${CRYO_TOKEN}' ]
pipeline:
  processors:
    - mapping: root = content().uppercase()
output:
  cryo_server:
    address: 0.0.0.0:8080
    tokens: [ '${CRYO_TOKEN}' ]
    send_to: session
    session_id: ${! @cryo_session_id }
`)
}

type serverOutput struct {
	*serverComponent
	sender
	targetConfig
	queue  *workQueue // for send_to: any; nil before the first Connect
	missed *service.MetricCounter
}

var (
	_ service.BatchOutput        = (*serverOutput)(nil)
	_ service.ConnectionTestable = (*serverOutput)(nil)
)

func newServerOutput(conf *service.ParsedConfig, res *service.Resources) (*serverOutput, service.BatchPolicy, int, error) {
	c, err := serverComponentFromParsed(conf, res, "the output")
	if err != nil {
		return nil, service.BatchPolicy{}, 0, err
	}
	to, err := targetConfigFromParsed(conf, res.Logger())
	if err != nil {
		return nil, service.BatchPolicy{}, 0, err
	}
	s, policy, maxInFlight, err := senderFromParsed(conf, res)
	m := meterOf(res)
	s.late = newLateSessions(res.Logger(), s.ackTimeout, m.newCounter(metricSessionsLate))
	return &serverOutput{serverComponent: c, sender: s, targetConfig: to, missed: m.newCounter(metricMissed)}, policy, maxInFlight, err
}

// Connect starts the listener, or joins the listener of another component.
func (o *serverOutput) Connect(ctx context.Context) error {
	joined, err := o.open(ctx)
	if joined {
		o.queue = newWorkQueue(&o.sender, o.listener, &o.targetConfig, o.log)
	}
	return err
}

// WriteBatch returns when each message has been acknowledged, has been dropped or has failed.
func (o *serverOutput) WriteBatch(ctx context.Context, batch service.MessageBatch) error {
	switch {
	case len(batch) == 0:
		return nil
	case o.listener == nil || o.listener.downError() != nil:
		return service.ErrNotConnected
	}
	messages := o.prepare(batch)
	if o.sendTo == sendToAny {
		o.deliver(ctx, o.queue, withError(messages, isNil), 0)
	} else {
		b := broadcast{sender: &o.sender, listener: o.listener, noSession: o.noSession, missed: o.missed, messages: messages}
		b.send(ctx, o.targets(batch, messages))
	}
	return o.verdict(ctx, batch, messages)
}

// Close leaves the listener, which closes if no other component uses it. Otherwise it waits for the
// sessions that the output is closing.
func (o *serverOutput) Close(ctx context.Context) error {
	err := o.leave(ctx, nil)
	o.late.wait()
	return err
}
