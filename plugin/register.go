package plugin

import (
	"context"
	"errors"
	"net"
	"sync"

	"github.com/redpanda-data/benthos/v4/public/service"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// specsOnce builds each specification once: the engine compiles its lint rules, which costs
// more than most tests.
var specsOnce = struct{ input, serverInput, output, serverOutput func() *service.ConfigSpec }{
	sync.OnceValue(inputSpec), sync.OnceValue(serverInputSpec), sync.OnceValue(outputSpec), sync.OnceValue(serverOutputSpec),
}

func init() {
	d := dependencies{}
	if err := register(service.GlobalEnvironment(), d); err != nil {
		panic(err) // another package of this program registers the same names
	}
	lintByBuilding("input cryo", specsOnce.input, func(conf *service.ParsedConfig, res *service.Resources) error {
		_, err := d.input(conf, res)
		return err
	})
	lintByBuilding("input cryo_server", specsOnce.serverInput, func(conf *service.ParsedConfig, res *service.Resources) error {
		_, err := d.serverInput(conf, res)
		return err
	})
	lintByBuilding("output cryo", specsOnce.output, func(conf *service.ParsedConfig, res *service.Resources) error {
		_, _, _, err := d.output(conf, res)
		return err
	})
	lintByBuilding("output cryo_server", specsOnce.serverOutput, func(conf *service.ParsedConfig, res *service.Resources) error {
		_, _, _, err := d.serverOutput(conf, res)
		return err
	})
}

// register adds the components to an environment: each is a half (receive, send) and a way
// to have sessions (dial, listen).
func register(env *service.Environment, d dependencies) error {
	return errors.Join(
		env.RegisterBatchInput("cryo", specsOnce.input(), d.input),
		env.RegisterBatchInput("cryo_server", specsOnce.serverInput(), d.serverInput),
		env.RegisterBatchOutput("cryo", specsOnce.output(), d.output),
		env.RegisterBatchOutput("cryo_server", specsOnce.serverOutput(), d.serverOutput),
	)
}

// dependencies are what components use of their process. The zero value is for programs;
// tests have a network of their own.
type dependencies struct {
	dial      func(ctx context.Context, network, address string) (net.Conn, error) // nil: the network's
	listeners *listeners                                                           // nil: those of the engine
}

func (d dependencies) input(conf *service.ParsedConfig, res *service.Resources) (service.BatchInput, error) {
	in, err := newInput(conf, res, cryo.DialOptions{NetDial: d.dial})
	if err != nil {
		return nil, err
	}
	return withExtraction(conf, "cryo", in)
}

func (d dependencies) serverInput(conf *service.ParsedConfig, res *service.Resources) (service.BatchInput, error) {
	d.share(res)
	in, err := newServerInput(conf, res)
	if err != nil {
		return nil, err
	}
	return withExtraction(conf, "cryo_server", in)
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
	d.share(res)
	out, policy, maxInFlight, err := newServerOutput(conf, res)
	if err != nil {
		return nil, policy, 0, err
	}
	traced, err := withInjection(conf, out)
	return traced, policy, maxInFlight, err
}

// share lets components find the listeners of a test.
func (d dependencies) share(res *service.Resources) {
	if d.listeners != nil {
		res.GetOrSetGeneric(listenersKey{}, d.listeners)
	}
}
