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
		Description(aboutCryo+`This output is a Cryo server: clients, such as those made with the npm package `+"`cryo-client-node`"+` or pages in a browser, connect straight to the pipeline and are sent its messages.

To receive from the same clients, give a `+"`cryo_server`"+` input the same address and the same settings. Without such an input, what clients send is rejected.

== Delivery

To one session (`+"`send_to: session`"+`), a message is delivered when the client has acknowledged it. It has failed when the client rejects it, or has not acknowledged it within `+"`ack_timeout`"+`; then the session is closed too, so that a client that takes nothing holds up others once, and not with each of its messages.

To all (`+"`all`"+`), or to those that match (`+"`match`"+`), it is delivered when every such session that was connected has answered or gone. A session that has not acknowledged within `+"`ack_timeout`"+` is closed, instead of everything being sent to everybody again; so for those who leave or reject it is at most once. A slow session holds up the others by no more than that (by ten times that if a large message takes so long to get to it), and by nothing as long as it is fewer than `+"`max_in_flight`"+` batches behind. A stream may take `+"`ack_timeout`"+` for each of its steps; when one session has all of it, the others have as long again, and `+"`ack_timeout`"+`. When nobody has acknowledged a message, it has failed.

To one in turn (`+"`any`"+`), it is delivered when one session has acknowledged it. When a session ends first, the message goes to another; so it may be processed twice, and a stream is sent anew. A session that has not acknowledged within `+"`ack_timeout`"+` is closed, and its messages go to others: set it above the longest time that a client takes for one. A message that a client rejects has failed, and so has a stream that it cancels, as it does when it closes its session before it has all of it, and a message that 10 sessions in a row have not acknowledged. While all sessions hold as much as they may (`+"`max_in_flight_per_session`"+`), the pipeline waits.

A late session that `+"`max_buffer_bytes`"+` keeps from being read may have acknowledged, so it is not closed. It counts as one that has not: a message to several sessions is delivered if another has acknowledged it; any other has failed, or goes to another session (`+"`any`"+`).

A message for which no client is connected fails at `+"`ack_timeout`"+` with `+"`no_session: wait`"+`. The others of its batch are sent at once, but the batch fails with it. So behind an input that makes batches and is not one of ours, they are sent to their clients again and again, until the absent one connects. Use `+"`no_session: drop`"+`, batches of one, or an input `+"`cryo` or `cryo_server`"+`, behind which only the message itself is repeated.
`+sendVerdicts+sendMetadata+sendPerformance+aboutInjection+aboutMetrics).
		Fields(listenFields()...).
		Fields(targetFields()...).
		Fields(sendFields("", ", to each session")...).
		LintRule(lintMapping("output cryo_server")).
		Example("Rooms", "Each message goes to the clients that asked for its room, by the query parameter `room` of their URL.", `
input:
  http_server:
    path: /rooms/{room}
output:
  cryo_server:
    address: 0.0.0.0:8080
    tokens: [ "${CRYO_TOKEN}" ]
    session_metadata:
      query_parameters: [ room ]
    send_to: match
    match: root = @cryo_session.cryo_query_room == @room
`).
		Example("Back to the sender", "Each message goes back to the client that sent it, in capitals.", `
input:
  cryo_server:
    address: 0.0.0.0:8080
    tokens: [ "${CRYO_TOKEN}" ]
pipeline:
  processors:
    - mapping: root = content().uppercase()
output:
  cryo_server:
    address: 0.0.0.0:8080
    tokens: [ "${CRYO_TOKEN}" ]
    send_to: session
    session_id: ${! @cryo_session_id }
`)
}

type serverOutput struct {
	*serverComponent
	sender
	targetConfig
	queue *workQueue // of send_to: any; nil before the first Connect
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
	s.lateLog = newLimitedLog(res.Logger())
	return &serverOutput{serverComponent: c, sender: s, targetConfig: to}, policy, maxInFlight, err
}

// Connect starts the listener, or joins that of another component.
func (o *serverOutput) Connect(ctx context.Context) error {
	fresh, err := o.open(ctx)
	if fresh {
		o.queue = newWorkQueue(&o.sender, o.listener, &o.targetConfig, o.log)
	}
	return err
}

// WriteBatch returns when each message is acknowledged or dropped, or has failed.
func (o *serverOutput) WriteBatch(ctx context.Context, batch service.MessageBatch) error {
	switch {
	case len(batch) == 0:
		return nil
	case o.listener == nil || o.listener.isDown():
		return service.ErrNotConnected
	}
	messages := o.prepare(batch)
	if o.sendTo == sendToAny {
		o.deliver(ctx, o.queue, withError(messages, isNil), 0)
	} else {
		b := broadcast{sender: &o.sender, listener: o.listener, noSession: o.noSession, messages: messages}
		b.send(ctx, o.targets(batch, messages))
	}
	return o.verdict(ctx, batch, messages)
}

// Close closes the listener, if nobody else uses it.
func (o *serverOutput) Close(ctx context.Context) error { return o.leave(ctx, nil) }
