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
		Description(cryoText+"This input is a Cryo server: clients, such as those made with the npm package `cryo-client-node`, or web pages, connect to the pipeline, and it receives their messages.\n"+receiveDelivery+receiveMetadata+identityText+eventMetadataText+eventsText+receiveResponses+receivePerformance+extractionText+metricsText).
		Fields(listenFields()...).
		Fields(receiveFields(true)...).
		LintRule(lintMapping("input cryo_server")).
		Example("From clients to a file", "Messages of Cryo clients are appended to a file; each is acknowledged when it is written.", `
input:
  cryo_server:
    address: 0.0.0.0:8080
    tokens: [ '${CRYO_TOKEN}' ]
output:
  file:
    path: messages.txt
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
