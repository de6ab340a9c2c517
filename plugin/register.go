package plugin

import (
	"context"
	"errors"
	"net"
	"sync"

	"github.com/redpanda-data/benthos/v4/public/service"

	"github.com/cryo-connect/cryo-connect/cryo"
)

func init() {
	if err := register(service.GlobalEnvironment(), dependencies{}); err != nil {
		panic(err) // another package of this program registers the same names
	}
}

// dependencies are what components use of their process. The zero value is for programs;
// tests have a network of their own.
type dependencies struct {
	dial      func(ctx context.Context, network, address string) (net.Conn, error) // nil: the network's
	listeners *listeners                                                           // nil: those of the engine
}

// madeOnce are the specs, made once: each environment of a process has the same.
var madeOnce = struct{ inputSpec, serverInputSpec, outputSpec, serverOutputSpec func() *service.ConfigSpec }{
	sync.OnceValue(inputSpec), sync.OnceValue(serverInputSpec), sync.OnceValue(outputSpec), sync.OnceValue(serverOutputSpec),
}

// register adds the components to an environment: each is a half (receive, send) and a way
// to have sessions (dial, listen).
func register(env *service.Environment, d dependencies) error {
	dialOptions := cryo.DialOptions{NetDial: d.dial}
	share := func(res *service.Resources) {
		if d.listeners != nil {
			res.GetOrSetGeneric(listenersKey{}, d.listeners)
		}
	}
	return errors.Join(
		env.RegisterBatchInput("cryo", madeOnce.inputSpec(), func(conf *service.ParsedConfig, res *service.Resources) (service.BatchInput, error) {
			in, err := newInput(conf, res, dialOptions)
			if err != nil {
				return nil, err
			}
			return withExtraction(conf, "cryo", in)
		}),
		env.RegisterBatchInput("cryo_server", madeOnce.serverInputSpec(), func(conf *service.ParsedConfig, res *service.Resources) (service.BatchInput, error) {
			share(res)
			in, err := newServerInput(conf, res)
			if err != nil {
				return nil, err
			}
			return withExtraction(conf, "cryo_server", in)
		}),
		env.RegisterBatchOutput("cryo", madeOnce.outputSpec(), func(conf *service.ParsedConfig, res *service.Resources) (service.BatchOutput, service.BatchPolicy, int, error) {
			out, policy, maxInFlight, err := newOutput(conf, res, dialOptions)
			if err != nil {
				return nil, policy, 0, err
			}
			traced, err := withInjection(conf, out)
			return traced, policy, maxInFlight, err
		}),
		env.RegisterBatchOutput("cryo_server", madeOnce.serverOutputSpec(), func(conf *service.ParsedConfig, res *service.Resources) (service.BatchOutput, service.BatchPolicy, int, error) {
			share(res)
			out, policy, maxInFlight, err := newServerOutput(conf, res)
			if err != nil {
				return nil, policy, 0, err
			}
			traced, err := withInjection(conf, out)
			return traced, policy, maxInFlight, err
		}),
	)
}
