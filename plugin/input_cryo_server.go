package plugin

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/redpanda-data/benthos/v4/public/service"

	"github.com/cryo-connect/cryo-connect/cryo"
)

func serverInputSpec() *service.ConfigSpec {
	return service.NewConfigSpec().
		Beta().
		Categories("Network").
		Summary("Listens for Cryo clients and receives their messages.").
		Description(aboutCryo+"This input is a Cryo server: clients, such as those made with the npm package `cryo-client-node` or pages in a browser, connect straight to the pipeline, and each of them feeds it.\n"+receiveGuarantee+receiveMetadata+identityMetadata+sessionMetadataText+sessionsText+receiveAnswers+receivePerformance+aboutExtraction+aboutMetrics).
		Fields(listenFields()...).
		Fields(receiveFields(true)...).
		LintRule(`root = `+listenLint).
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
	if fresh {
		in.listener.addInput(in.receiver)
	}
	return err
}

// ReadBatch hands over what waits, of any session.
func (in *serverInput) ReadBatch(ctx context.Context) (service.MessageBatch, service.AckFunc, error) {
	return in.read(ctx, nil)
}

// Close is called when all acknowledgements are queued. They are written before the
// sessions close.
func (in *serverInput) Close(ctx context.Context) error {
	return errors.Join(in.leave(ctx, in.receiver), in.conf.streams.scanner.close(ctx))
}

// serverComponent is an input's or output's part in a listener.
type serverComponent struct {
	name      string // for errors: its kind, its label or path, and its stream
	log       *service.Logger
	meter     meter // for a listener of its own
	all       *listeners
	settings  listenSettings
	authorize func(*cryo.Upgrade) error
	listener  *listener // nil before the first Connect and after Close
}

func serverComponentFromParsed(conf *service.ParsedConfig, res *service.Resources, kind string) (*serverComponent, error) {
	c := &serverComponent{name: kind + " cryo_server", log: res.Logger(), meter: meterOf(res), all: listenersOf(res)}
	if label := res.Label(); label != "" {
		c.name += " " + label
	} else {
		c.name += " at " + strings.Join(res.Path(), ".")
	}
	if stream := res.StreamID(); stream != "" {
		c.name += " of the stream " + stream
	}
	var err error
	c.settings, c.authorize, err = listenSettingsFromParsed(conf)
	return c, err
}

// agree tells in what another component of the same address differs from this one.
func (c *serverComponent) agree(other *serverComponent) error {
	different := c.settings.differences(other.settings)
	if len(different) == 0 {
		return nil
	}
	return fmt.Errorf("%s and %s share the listener on %s, but differ in %s: make that equal, or give one another address",
		c.name, other.name, c.settings.Address, strings.Join(different, ", "))
}

// open joins the listener once, however often the engine connects.
func (c *serverComponent) open(ctx context.Context) (fresh bool, err error) {
	if c.listener != nil {
		return false, nil
	}
	c.listener, err = c.all.open(ctx, c)
	return err == nil, err
}

// ConnectionTest reads the certificate, and listens for a moment.
func (c *serverComponent) ConnectionTest(context.Context) service.ConnectionTestResults {
	if err := c.all.test(c); err != nil {
		return service.ConnectionTestFailed(err).AsList()
	}
	return service.ConnectionTestSucceeded().AsList()
}

// leave leaves the listener, if it was joined; in is nil for an output.
func (c *serverComponent) leave(ctx context.Context, in *receiver) error {
	joined := c.listener
	if joined == nil {
		return nil
	}
	c.listener = nil
	return c.all.leave(ctx, joined, c, in)
}
