package plugin

import (
	"context"
	"errors"

	"github.com/redpanda-data/benthos/v4/public/service"
)

func serverInputSpec() *service.ConfigSpec {
	return service.NewConfigSpec().
		Beta().
		Categories("Network").
		Summary("Listens for Cryo clients and receives their messages.").
		Description(cryoText+"This input is a Cryo server: web pages and other clients, such as those made with the npm package `cryo-client-node`, connect to it.\n"+receiveDelivery+receiveMetadata+identityText+eventsText+receiveResponses+receivePerformance+extractionText+metricsText).
		Fields(listenFields()...).
		Fields(receiveFields(true)...).
		Fields(receiveOptionFields()...).
		Fields(listenOptionFields()...).
		LintRule(lintMapping("input cryo_server")).
		Example("Write to Kafka", "Messages of Cryo clients are written to a topic. Each is acknowledged when the brokers have stored it.", `
input:
  cryo_server:
    address: 0.0.0.0:8080
    tokens: [ '${CRYO_TOKEN}' ]
output:
  redpanda:
    seed_brokers: [ localhost:9092 ]
    topic: events
    key: ${! @cryo_session_id }
`).
		Example("Authorize clients by JWT", "Clients connect over TLS with a JWT, whose claims become metadata. A session ends when its token expires, and a client with a renewed token replaces its session.", `
input:
  cryo_server:
    address: 0.0.0.0:8443
    tls:
      cert_file: /etc/cryo/tls.crt
      key_file: /etc/cryo/tls.key
    authorize: |
      let claims = this.token.parse_jwt_hs256(env("JWT_SECRET").not_empty())
      root = if $claims.aud == "cryo" { { "user": $claims.sub, "exp": $claims.exp } } else { false }
    session_expires: root = this.authorized.exp.not_null()
    session_owner: root = this.authorized.user
pipeline:
  processors:
    - mapping: |
        root.user = @cryo_auth_user
        root.text = content().string()
output:
  file:
    path: messages.jsonl
    codec: lines
`).
		Example("Answer requests", "Each message is posted to an HTTP service, whose response is sent to the client before its message is acknowledged.", `
input:
  cryo_server:
    address: 0.0.0.0:8080
    tokens: [ '${CRYO_TOKEN}' ]
    max_batch_count: 1 # a request that fails is repeated alone
output:
  http_client:
    url: http://localhost:8081/
    verb: POST
    propagate_response: true
`).
		Example("Split CSV streams", "Each row of a CSV stream becomes a JSON message. The stream is acknowledged when all rows are delivered.", `
input:
  cryo_server:
    address: 0.0.0.0:8080
    tokens: [ '${CRYO_TOKEN}' ]
    message_types: [ stream ]
    streams:
      scanner:
        csv: {}
      max_bytes: 0
output:
  file:
    path: rows.jsonl
    codec: lines
`)
}

type serverInput struct {
	*receiver
	*serverComponent
	lost <-chan struct{} // closed when the listener is down; accessed only by Connect and ReadBatch
}

var (
	_ service.BatchInput         = (*serverInput)(nil)
	_ service.ConnectionTestable = (*serverInput)(nil)
)

func newServerInput(conf *service.ParsedConfig, res *service.Resources) (*serverInput, error) {
	c, err := serverComponentFromParsed(conf, res, "the input")
	if err != nil {
		return nil, err
	}
	rc, err := receiveConfigFromParsed(conf, true)
	if err != nil {
		return nil, err
	}
	rc.shared = true
	return &serverInput{receiver: newReceiver(rc, res), serverComponent: c}, nil
}

// Connect starts the listener, or joins the listener of another component.
func (in *serverInput) Connect(ctx context.Context) error {
	joined, err := in.open(ctx)
	if err != nil {
		return err
	}
	in.lost = in.listener.outage()
	if joined {
		in.listener.inputs.add(in.receiver)
	}
	return nil
}

// ReadBatch returns the next batch. Its messages may be from several sessions.
func (in *serverInput) ReadBatch(ctx context.Context) (service.MessageBatch, service.AckFunc, error) {
	return in.read(ctx, in.lost)
}

// Close stops receiving and leaves the listener. If the input was the listener's last
// component, the listener closes its sessions after it has written the acknowledgements that
// have already been queued.
func (in *serverInput) Close(ctx context.Context) error {
	return errors.Join(in.leave(ctx, in.receiver), in.conf.streams.scanner.close(ctx))
}
