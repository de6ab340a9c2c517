package plugin

import (
	"testing"

	"github.com/redpanda-data/benthos/v4/public/service"
	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// specs are the specifications of our components.
func specs() map[string]*service.ConfigSpec {
	return map[string]*service.ConfigSpec{
		"input cryo": specsOnce.input(), "output cryo": specsOnce.output(),
		"input cryo_server": specsOnce.serverInput(), "output cryo_server": specsOnce.serverOutput(),
	}
}

// construct makes a component as the engine does at start.
func construct(t *testing.T, kind, name, fields string) error {
	t.Helper()
	conf, err := specs()[kind+" "+name].ParseYAML(fields, nil)
	if err != nil {
		return err
	}
	res := service.MockResources()
	switch kind + " " + name {
	case "input cryo":
		_, err = dependencies{}.input(conf, res)
	case "output cryo":
		_, _, _, err = dependencies{}.output(conf, res)
	case "input cryo_server":
		_, err = dependencies{}.serverInput(conf, res)
	case "output cryo_server":
		_, _, _, err = dependencies{}.serverOutput(conf, res)
	}
	return err
}

// aloneInput makes an input without an engine around it.
func (e *engine) aloneInput(t *testing.T, fields string) *input {
	t.Helper()
	conf, err := specs()["input cryo"].ParseYAML("{ url: ws://"+somewhere+", token: "+token+fields+" }", nil)
	require.NoError(t, err)
	in, err := newInput(conf, service.MockResources(), cryo.DialOptions{NetDial: e.dialer})
	require.NoError(t, err)
	return in
}

// alone makes an output without an engine around it.
func (e *engine) alone(t *testing.T, fields string) *output {
	t.Helper()
	conf, err := specs()["output cryo"].ParseYAML("{ url: ws://"+somewhere+", token: "+token+fields+" }", nil)
	require.NoError(t, err)
	out, _, _, err := newOutput(conf, service.MockResources(service.MockResourcesOptUseLogger(service.NewLoggerFromSlog(e.log.logger()))), cryo.DialOptions{NetDial: e.dialer})
	require.NoError(t, err)
	return out
}

func (e *engine) aloneServerInput(t *testing.T, fields string) *serverInput {
	t.Helper()
	conf, err := specs()["input cryo_server"].ParseYAML("{ address: '"+somewhere+"', tokens: [ "+token+" ]"+fields+" }", nil)
	require.NoError(t, err)
	res := service.MockResources()
	res.GetOrSetGeneric(listenersKey{}, e.shared)
	in, err := newServerInput(conf, res)
	require.NoError(t, err)
	return in
}

// aloneServerOutput makes an output without an engine around it.
func (e *engine) aloneServerOutput(t *testing.T, fields string) *serverOutput {
	t.Helper()
	conf, err := specs()["output cryo_server"].ParseYAML("{ address: '"+somewhere+"', tokens: [ "+token+" ]"+fields+" }", nil)
	require.NoError(t, err)
	res := service.MockResources()
	res.GetOrSetGeneric(listenersKey{}, e.shared)
	out, _, _, err := newServerOutput(conf, res)
	require.NoError(t, err)
	return out
}
