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
		Description(aboutCryo+"This input is a Cryo server: clients, such as those made with the npm package `cryo-client-node` or pages in a browser, connect straight to the pipeline, and each of them feeds it.\n"+receiveGuarantee+receiveMetadata+identityMetadata+sessionMetadataText+sessionsText+receiveAnswers+receivePerformance+aboutExtraction+aboutMetrics).
		Fields(listenFields()...).
		Fields(receiveFields(true)...).
		LintRule(lintMapping("input cryo_server")).
		Example("Clients to a file", "What Cryo clients send is appended to a file; each message is acknowledged when it is written.", `
input:
  cryo_server:
    address: 0.0.0.0:8080
    tokens: [ "${CRYO_TOKEN}" ]
output:
  file:
    path: messages.txt
    codec: lines
`)
}

type serverInput struct {
	*receiver
	*serverComponent
	lost <-chan struct{} // closed when no client can connect until Connect is called; the engine's reading goroutine's
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

// Connect starts the listener, or joins that of another component.
func (in *serverInput) Connect(ctx context.Context) error {
	fresh, err := in.open(ctx)
	if err != nil {
		return err
	}
	in.lost = in.listener.outage()
	if fresh {
		in.listener.inputs.add(in.receiver)
	}
	return nil
}

// ReadBatch hands over what waits, of any session.
func (in *serverInput) ReadBatch(ctx context.Context) (service.MessageBatch, service.AckFunc, error) {
	return in.read(ctx, in.lost)
}

// Close is called when all acknowledgements are queued. They are written before the
// sessions close.
func (in *serverInput) Close(ctx context.Context) error {
	return errors.Join(in.leave(ctx, in.receiver), in.conf.streams.scanner.close(ctx))
}
