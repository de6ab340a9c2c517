package plugin

import (
	"context"
	"testing"

	"github.com/redpanda-data/benthos/v4/public/service"
	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// Components without an engine around them: for tests that call Connect, ReadBatch,
// WriteBatch or Close themselves, in an order that the engine only has by chance. Such a
// test closes what it connects.

// specs are the specifications of our components, by kind and name.
func specs() map[string]*service.ConfigSpec {
	return map[string]*service.ConfigSpec{
		"input cryo": specsOnce.input(), "output cryo": specsOnce.output(),
		"input cryo_server": specsOnce.serverInput(), "output cryo_server": specsOnce.serverOutput(),
	}
}

// construct makes a component as the engine does at start, and returns its error.
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

// parse parses the fields of a component that dials, or listens, on somewhere.
func (e *engine) parse(component, fields string) (*service.ParsedConfig, *service.Resources) {
	e.t.Helper()
	base := "{ url: ws://" + somewhere + ", token: " + token + " }"
	if component == "input cryo_server" || component == "output cryo_server" {
		base = "{ address: '" + somewhere + "', tokens: [ " + token + " ] }"
	}
	conf, err := specs()[component].ParseYAML(with(base, fields), nil)
	require.NoError(e.t, err)
	res := service.MockResources(service.MockResourcesOptUseLogger(service.NewLoggerFromSlog(e.log.logger())))
	res.GetOrSetGeneric(listenersKey{}, e.shared)
	return conf, res
}

// bareInput makes an input cryo.
func (e *engine) bareInput(fields string) *input {
	e.t.Helper()
	conf, res := e.parse("input cryo", fields)
	in, err := newInput(conf, res, cryo.DialOptions{NetDial: e.dialer})
	require.NoError(e.t, err)
	return in
}

// bareOutput makes an output cryo.
func (e *engine) bareOutput(fields string) *output {
	e.t.Helper()
	conf, res := e.parse("output cryo", fields)
	out, _, _, err := newOutput(conf, res, cryo.DialOptions{NetDial: e.dialer})
	require.NoError(e.t, err)
	return out
}

// connectedOutput makes an output cryo, and connects it to a server.
func (e *engine) connectedOutput(fields string) (*output, *server, *cryo.Session) {
	e.t.Helper()
	server := e.serve()
	out := e.bareOutput(fields)
	require.NoError(e.t, out.Connect(context.Background()))
	return out, server, server.session()
}

// bareServerInput makes an input cryo_server.
func (e *engine) bareServerInput(fields string) *serverInput {
	e.t.Helper()
	in, err := newServerInput(e.parse("input cryo_server", fields))
	require.NoError(e.t, err)
	return in
}

// bareServerOutput makes an output cryo_server.
func (e *engine) bareServerOutput(fields string) *serverOutput {
	e.t.Helper()
	out, _, _, err := newServerOutput(e.parse("output cryo_server", fields))
	require.NoError(e.t, err)
	return out
}
