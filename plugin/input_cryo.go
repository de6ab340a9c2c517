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
		Description(aboutCryo+"This input is a Cryo client: it dials a server, such as one made with the npm package `cryo-server`, and dials again with the same session id when the connection is lost: immediately, and while that fails after waits that double up to ten seconds (after a denied token: 30 s). Without a connection it redelivers nothing, either.\n"+receiveGuarantee+receiveMetadata+receiveAnswers+receivePerformance+aboutExtraction+aboutMetrics).
		Fields(dialFields()...).
		Fields(receiveFields(false)...).
		Field(maxBufferField(false)).
		LintRule(lintMapping("input cryo")).
		Example("From a Cryo server to files", "Messages of a Cryo server are appended to a file; each is acknowledged when it is written.", `
input:
  cryo:
    url: ws://localhost:8080
    token: ${CRYO_TOKEN}
output:
  file:
    path: messages.txt
    codec: lines
`)
}

type input struct {
	*dialer
	*receiver
	lost <-chan struct{} // closed when the session has ended and its messages are handed over; owned by Connect and ReadBatch
}

var (
	_ service.BatchInput         = (*input)(nil)
	_ service.ConnectionTestable = (*input)(nil)
)

// newInput makes an input; opts are what the configuration has no field for.
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

// Connect dials once; the engine tries again.
func (in *input) Connect(ctx context.Context) error {
	s, err := in.connect(ctx)
	if err != nil {
		return err
	}
	in.lost = in.receiveFrom(&handover{session: s}) // the same channel for the same session
	return nil
}

// ReadBatch hands over what waits. All that a lost session had received comes
// before ErrNotConnected.
func (in *input) ReadBatch(ctx context.Context) (service.MessageBatch, service.AckFunc, error) {
	return in.read(ctx, in.lost)
}

// Close is called when all acknowledgements are queued. They are written before the socket
// closes.
func (in *input) Close(ctx context.Context) error {
	logUndelivered(in.receiver.log, in.receiver.close())
	return errors.Join(in.dialer.close(ctx), in.conf.streams.scanner.close(ctx))
}

// ConnectionTest dials, completes the handshake and hangs up.
func (in *input) ConnectionTest(ctx context.Context) service.ConnectionTestResults {
	return in.test(ctx)
}
