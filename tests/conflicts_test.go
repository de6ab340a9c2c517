package tests

import (
	"net"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/internal/testkit"
)

// Whichever component opened the listener first would decide who may connect, and for how long.
func TestComponentsWithConflictingListenerSettingsDoNotStart(t *testing.T) {
	const (
		input = `{ cryo_server: { address: "127.0.0.1:0", authorize: 'root = this.token == "a"', session_expires: 'root = now()' } }`
		other = `{ cryo_server: { address: "127.0.0.1:0", authorize: 'root = this.token == "a"' } }`
	)
	for name, config := range map[string]string{
		"input and output": "input: " + input + "\noutput: " + other,
		"two inputs":       "input: { broker: { inputs: [ " + input + ", " + other + " ] } }\noutput: { drop: {} }",
		"a resource of a resource": "input: { resource: all }\noutput: { drop: {} }\ninput_resources: [ { label: one, " + input[2:len(input)-2] + " }, { label: two, " + other[2:len(other)-2] +
			" }, { label: all, broker: { inputs: [ { resource: one }, { resource: two } ] } } ]",
		"a resource": "input: " + input + "\noutput: { fallback: [ { resource: clients } ] }\noutput_resources: [ { label: clients, " + other[2:len(other)-2] + " } ]",
	} {
		t.Run(name, func(t *testing.T) {
			p := runConfig(t, config)
			p.WantExit(1)
			p.WantLog("share the listener on 127.0.0.1:0, but differ in session_expires: make these fields equal, or use different addresses")
		})
	}
}

func TestComponentsWithTheSameSettingsStart(t *testing.T) {
	const component = `{ cryo_server: { address: "127.0.0.1:0", tokens: [ ` + token + ` ] } }`
	p := runConfig(t, "input: "+component+"\noutput: { switch: { cases: [ { check: 'false', output: "+component+" }, { output: { drop: {} } } ] } }")
	testkit.WantDelivered(t, testkit.Dial(t, p.Listening()), "of an address with one listener")
	p.Interrupt()
}

// They do not share a listener, and the error must not blame another process.
func TestAddressConflictNamesTheComponentDespiteAnotherSpelling(t *testing.T) {
	_, port, err := net.SplitHostPort(testkit.ReserveAddress(t))
	require.NoError(t, err)
	for spelling, other := range map[string]string{
		"localhost:" + port: "127.0.0.1:" + port,
		"0.0.0.0:" + port:   "127.0.0.2:" + port,
	} {
		t.Run(spelling, func(t *testing.T) {
			p := runConfig(t, `
input: { cryo_server: { address: "`+spelling+`", tokens: [ `+token+` ] } }
output: { cryo_server: { address: "`+other+`", tokens: [ `+token+` ] } }`)
			p.WantLog("bind: address already in use: the ", "put cryo_server at ", " listens there, as ", "write the address the same way in both components to share the listener")
			p.Interrupt()
		})
	}
}

// A configuration may have alternatives, of which the pipeline uses one.
func TestResourceThatNoComponentUsesDoesNotPreventTheStart(t *testing.T) {
	p := runConfig(t, `
input: { resource: one }
output: { drop: {} }
input_resources:
  - { label: one, cryo_server: { address: "127.0.0.1:0", tokens: [ `+token+` ] } }
  - { label: other, cryo_server: { address: "127.0.0.1:0", tokens: [ another-s3cret ] } }
`)
	testkit.WantDelivered(t, testkit.Dial(t, p.Listening()), "of the resource in use")
	p.Interrupt()
}
