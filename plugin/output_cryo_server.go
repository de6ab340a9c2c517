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
		Description(cryoText+`This output is a Cryo server: clients, such as those made with the npm package `+"`cryo-client-node`"+`, or web pages, connect to the pipeline, and it sends them messages.

To receive from the same clients, use an input `+"`cryo_server`"+` with the same address and the same settings. Without such an input, messages from clients are rejected.

== Delivery

To one session (`+"`send_to: session`"+`), a message is delivered when the client has acknowledged it. It has failed when the client rejects it, or does not acknowledge it within `+"`ack_timeout`"+`. After a timeout the session is also closed, so that a client that does not acknowledge delays others once, and not with each message. The close code is 1013 (try again later), after which the published client for browsers connects again.

To all sessions (`+"`all`"+`), or to those that match (`+"`match`"+`), a message is delivered when each of these sessions has acknowledged or rejected it, or has ended. A session that does not acknowledge within `+"`ack_timeout`"+` is closed; the message is not sent again to all. So delivery is at most once for sessions that end, or reject the message. A slow session delays the others by at most `+"`ack_timeout`"+` (by ten times that if the transfer of a large message takes so long), and not at all while it is fewer than `+"`max_in_flight`"+` batches behind. A stream may take `+"`ack_timeout`"+` for each of its steps; when one session has received all of it, the others have the same time again, plus `+"`ack_timeout`"+`. A message that no session acknowledges has failed.

To one session in turn (`+"`any`"+`), a message is delivered when one session has acknowledged it. If its session ends first, the message is sent to another one; so it may be processed twice, and a stream is sent again from the beginning. A session that does not acknowledge within `+"`ack_timeout`"+` is closed, and its messages are sent to others: set it above the maximum time that a client needs for a message. A message has failed when a client rejects it, or cancels its stream, which a client also does if it closes its session before it has received the whole stream, or when 10 sessions in a row have not acknowledged it. While all sessions have `+"`max_in_flight_per_session`"+` unacknowledged messages, the pipeline waits.

A session whose reads are paused (`+"`max_buffer_bytes`"+`) may have acknowledged in time, so it is not closed after a timeout. The message counts as not acknowledged by it: a message to several sessions is delivered if another one has acknowledged it; any other message has failed, or is sent to another session (`+"`any`"+`).

A message for which no client is connected fails after `+"`ack_timeout`"+` with `+"`no_session: wait`"+`. The other messages of its batch are sent immediately, but the batch fails with it. So an input that makes batches sends them again and again, until the missing client connects. To avoid that, use `+"`no_session: drop`"+`, batches of one, or an input `+"`cryo`"+` or `+"`cryo_server`"+`, which redelivers only the failed message.
`+sendResultsText+sendMetadata+sendPerformance+injectionText+metricsText).
		Fields(listenFields()...).
		Fields(targetFields()...).
		Fields(sendFields("", ", to each session")...).
		LintRule(lintMapping("output cryo_server")).
		Example("Rooms", "Each message is sent to the clients in its room, which is the query parameter `room` of their URL.", `
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
`).
		Example("Back to the sender", "Each message is sent back to its client, in upper case.", `
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
