package plugin

import (
	"context"
	"errors"
	"net"
	"sync"

	"github.com/redpanda-data/benthos/v4/public/service"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// specsOnce builds each specification only once, because the engine compiles its lint rules,
// which is slow.
var specsOnce = struct{ input, serverInput, output, serverOutput func() *service.ConfigSpec }{
	sync.OnceValue(inputSpec), sync.OnceValue(serverInputSpec), sync.OnceValue(outputSpec), sync.OnceValue(serverOutputSpec),
}

func init() {
	d := dependencies{}
	if err := register(service.GlobalEnvironment(), d); err != nil {
		panic(err) // only possible if another package has registered one of the names
	}
	lint := dependencies{lint: true}
	lintByBuilding("input cryo", specsOnce.input, func(conf *service.ParsedConfig, res *service.Resources) error {
		_, err := lint.input(conf, res)
		return err
	})
	lintByBuilding("input cryo_server", specsOnce.serverInput, func(conf *service.ParsedConfig, res *service.Resources) error {
		_, err := lint.serverInput(conf, res)
		return err
	})
	lintByBuilding("output cryo", specsOnce.output, func(conf *service.ParsedConfig, res *service.Resources) error {
		_, _, _, err := lint.output(conf, res)
		return err
	})
	lintByBuilding("output cryo_server", specsOnce.serverOutput, func(conf *service.ParsedConfig, res *service.Resources) error {
		_, _, _, err := lint.serverOutput(conf, res)
		return err
	})
}

// register adds the components to an environment. Each consists of a half (receive or send)
// and a way to open sessions (dial or listen).
func register(env *service.Environment, d dependencies) error {
	return errors.Join(
		env.RegisterBatchInput("cryo", specsOnce.input(), d.input),
		env.RegisterBatchInput("cryo_server", specsOnce.serverInput(), d.serverInput),
		env.RegisterBatchOutput("cryo", specsOnce.output(), d.output),
		env.RegisterBatchOutput("cryo_server", specsOnce.serverOutput(), d.serverOutput),
	)
}

// dependencies lets tests replace the network. The zero value uses the network of the process.
type dependencies struct {
	dial      func(ctx context.Context, network, address string) (net.Conn, error) // nil means the library's own
	listeners *listeners                                                           // nil means those in the engine's resources
	lint      bool                                                                 // components are built and discarded, without Close
}

func (d dependencies) input(conf *service.ParsedConfig, res *service.Resources) (service.BatchInput, error) {
	in, err := newInput(conf, res, cryo.DialOptions{NetDial: d.dial})
	if err != nil {
		return nil, err
	}
	return withExtraction(conf, "cryo", in)
}

func (d dependencies) serverInput(conf *service.ParsedConfig, res *service.Resources) (service.BatchInput, error) {
	d.setListeners(res)
	in, err := newServerInput(conf, res)
	if err != nil {
		return nil, err
	}
	extracting, err := withExtraction(conf, "cryo_server", in)
	if err != nil {
		return nil, err
	}
	return extracting, d.complete(conf, in.serverComponent)
}

func (d dependencies) output(conf *service.ParsedConfig, res *service.Resources) (service.BatchOutput, service.BatchPolicy, int, error) {
	out, policy, maxInFlight, err := newOutput(conf, res, cryo.DialOptions{NetDial: d.dial})
	if err != nil {
		return nil, policy, 0, err
	}
	traced, err := withInjection(conf, out)
	return traced, policy, maxInFlight, err
}

func (d dependencies) serverOutput(conf *service.ParsedConfig, res *service.Resources) (service.BatchOutput, service.BatchPolicy, int, error) {
	d.setListeners(res)
	out, policy, maxInFlight, err := newServerOutput(conf, res)
	if err != nil {
		return nil, policy, 0, err
	}
	traced, err := withInjection(conf, out)
	if err != nil {
		return nil, policy, 0, err
	}
	return traced, policy, maxInFlight, d.complete(conf, out.serverComponent)
}

// complete builds the processors of a component that will be closed. For lint, it loads the files
// that Connect loads.
func (d dependencies) complete(conf *service.ParsedConfig, c *serverComponent) error {
	if d.lint {
		_, err := c.settings.tlsSettings.watch(shortageTime, c.log)
		return err
	}
	return c.processors.build(conf, c.settings.HandshakeTimeout)
}

// setListeners adds the listeners of a test to the engine's resources.
func (d dependencies) setListeners(res *service.Resources) {
	if d.listeners != nil {
		res.GetOrSetGeneric(listenersKey{}, d.listeners)
	}
}
