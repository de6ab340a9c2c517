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
		Description(cryoText+"This input is a Cryo client: it connects to a server, such as one made with the npm package `cryo-server`. When the connection is lost, it reconnects with the same session id: immediately, then after waits that double up to ten seconds (after a denied token: 30 s). While there is no connection, failed messages are not redelivered.\n"+receiveDelivery+receiveMetadata+receiveResponses+receivePerformance+extractionText+metricsText).
		Fields(dialFields()...).
		Fields(receiveFields(false)...).
		Field(maxBufferField(false)).
		LintRule(lintMapping("input cryo")).
		Example("From a Cryo server to files", "Messages from a Cryo server are appended to a file; each is acknowledged when it is written.", `
input:
  cryo:
    url: ws://localhost:8080
    token: '${CRYO_TOKEN}'
output:
  file:
    path: messages.txt
    codec: lines
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
