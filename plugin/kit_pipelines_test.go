package plugin

import (
	"testing"
	"testing/synctest"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// Pipelines that many tests begin with.

// atBothInputs runs a test with each of the inputs in a pipeline to the probe, and with the session
// of its peer.
func atBothInputs(t *testing.T, fields string, test func(t *testing.T, e *engine, p *pipeline, peer *cryo.Session)) {
	t.Helper()
	atBothInputsTo(t, fields, toProbe, test)
}

// atBothInputsTo is atBothInputs with another output.
func atBothInputsTo(t *testing.T, fields, output string, test func(t *testing.T, e *engine, p *pipeline, peer *cryo.Session)) {
	t.Helper()
	t.Run("cryo", func(t *testing.T) {
		inEngine(t, func(t *testing.T, e *engine) {
			server := e.serve()
			p := e.run(with(dialInput, fields), output)
			test(t, e, p, server.session())
		})
	})
	t.Run("cryo_server", func(t *testing.T) {
		inEngine(t, func(t *testing.T, e *engine) {
			p := e.run(with(listenInput, fields), output)
			test(t, e, p, e.dial())
		})
	})
}

// atBothOutputs runs a test with each of the outputs in a pipeline that sends nothing again, and with
// the session of its peer.
func atBothOutputs(t *testing.T, fields string, test func(t *testing.T, e *engine, peer *cryo.Session)) {
	t.Helper()
	t.Run("cryo", func(t *testing.T) {
		inEngine(t, func(t *testing.T, e *engine) {
			server := e.serve()
			e.run(fromOnce, with(dialOutput, fields))
			test(t, e, server.session())
		})
	})
	t.Run("cryo_server", func(t *testing.T) {
		toAll(t, fields, 1, func(t *testing.T, e *engine, clients []*cryo.Session) { test(t, e, clients[0]) })
	})
}

// toAll runs a test with an output cryo_server, in a pipeline that sends nothing again, and with
// clients of it: a broadcast, unless the fields have another send_to.
func toAll(t *testing.T, fields string, clients int, test func(t *testing.T, e *engine, clients []*cryo.Session)) {
	t.Helper()
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(fromOnce, with(listenOutput, fields))
		sessions := make([]*cryo.Session, clients)
		for i := range sessions {
			sessions[i] = e.dial()
		}
		synctest.Wait()
		test(t, e, sessions)
	})
}

// runWithBatch starts an input cryo_server whose first batch has these texts: their client has sent
// them before. It returns the client, and what it has sent.
func (e *engine) runWithBatch(fields string, texts []string, processors ...string) (*cryo.Session, []*sending) {
	e.t.Helper()
	return e.runWithBatchTo(toProbe, fields, texts, processors...)
}

// runWithBatchTo is runWithBatch with another output than the probe.
func (e *engine) runWithBatchTo(output, fields string, texts []string, processors ...string) (*cryo.Session, []*sending) {
	e.t.Helper()
	e.run(fromFeed, listenOutput) // while only an output listens, messages wait for an input
	client := e.dial()
	sent := sendAll(client, texts...)
	e.run(with(listenInput, fields), output, processors...)
	return client, sent
}
