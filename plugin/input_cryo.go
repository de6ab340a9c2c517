package plugin

import (
	"context"
	"errors"

	"github.com/redpanda-data/benthos/v4/public/service"

	"github.com/cryo-connect/cryo-connect/cryo"
)

func inputSpec() *service.ConfigSpec {
	return service.NewConfigSpec().
		Beta().
		Categories("Network").
		Summary("Connects to a Cryo server and receives its messages.").
		Description(cryoText+"This input is a Cryo client: it connects to a server, such as one made with the npm package `cryo-server`. "+reconnectText+"\n"+receiveDelivery+receiveMetadata+receiveResponses+receivePerformance+extractionText+metricsText).
		Fields(dialFields()...).
		Fields(receiveFields(false)...).
		Fields(receiveOptionFields()...).
		Field(maxBufferField(false)).
		Fields(dialOptionFields()...).
		LintRule(lintMapping("input cryo")).
		Example("Write to Kafka", "Messages from a Cryo server are written to a topic. Each is acknowledged when the brokers have stored it.", `
input:
  cryo:
    url: wss://cryo.example.com/feed
    token: '${CRYO_TOKEN}'
output:
  redpanda:
    seed_brokers: [ localhost:9092 ]
    topic: events
    key: ${! @cryo_session_id }
`).
		Example("Reject invalid messages", "A message that is not JSON is rejected: its sender receives an error. All others are appended to a file.", `
input:
  cryo:
    url: ws://localhost:8080
    token: '${CRYO_TOKEN}'
    auto_replay_nacks: false
    max_batch_count: 1 # rejects exactly the messages that fail
pipeline:
  processors:
    - mapping: root = content().parse_json()
output:
  reject_errored:
    file:
      path: messages.jsonl
      codec: lines
`).
		Example("Store streams as files", "Each stream becomes a file, which is named by a hash of the stream's name.", `
input:
  cryo:
    url: ws://localhost:8080
    token_file: /run/secrets/cryo-token
    message_types: [ stream ]
    streams:
      scanner:
        to_the_end: {}
output:
  file:
    path: streams/${! @cryo_stream_name.hash("sha256").encode("hex") }
    codec: all-bytes
`)
}

type input struct {
	*dialer
	*receiver
	lost <-chan struct{} // closed when the session has ended and the pipeline has received its messages; accessed only by Connect and ReadBatch
}

var (
	_ service.BatchInput         = (*input)(nil)
	_ service.ConnectionTestable = (*input)(nil)
)

// newInput returns an input. opts contains the options for which there are no fields.
func newInput(conf *service.ParsedConfig, res *service.Resources, opts cryo.DialOptions) (*input, error) {
	r := &settingsReader{conf: conf}
	if opts.MaxBufferBytes = maxBufferBytesField.read(r); r.err != nil {
		return nil, r.err
	}
	d, err := dialerFromParsed(conf, res, opts)
	if err != nil {
		return nil, err
	}
	rc, err := receiveConfigFromParsed(conf, false)
	if err != nil {
		return nil, err
	}
	return &input{dialer: d, receiver: newReceiver(rc, res)}, nil
}

// Connect makes one attempt to connect. The engine calls it again after a failure.
func (in *input) Connect(ctx context.Context) error {
	s, err := in.connect(ctx)
	if err != nil {
		return err
	}
	in.lost = in.receiveFrom(&handover{session: s})
	return nil
}

// ReadBatch returns the next batch. All messages of a lost session precede ErrNotConnected.
func (in *input) ReadBatch(ctx context.Context) (service.MessageBatch, service.AckFunc, error) {
	return in.read(ctx, in.lost)
}

// Close stops receiving and closes the session. Acknowledgements that have already been queued
// are written first.
func (in *input) Close(ctx context.Context) error {
	logUndelivered(in.receiver.log, in.receiver.close())
	return errors.Join(in.dialer.close(ctx), in.conf.streams.scanner.close(ctx))
}

// ConnectionTest opens and closes another session, which does not affect that of the input.
func (in *input) ConnectionTest(ctx context.Context) service.ConnectionTestResults {
	return in.test(ctx)
}
