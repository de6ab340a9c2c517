package plugin

import (
	"testing"
	"testing/synctest"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// atBothInputs runs a test with each of the inputs in a pipeline to the probe,
// and with its peer's session.
func atBothInputs(t *testing.T, fields string, test func(t *testing.T, e *engine, p *pipeline, peer *cryo.Session)) {
	t.Helper()
	t.Run("cryo", func(t *testing.T) {
		inEngine(t, func(t *testing.T, e *engine) {
			server := e.serve()
			p := e.run(with(dialInput, fields), toProbe)
			test(t, e, p, server.session())
		})
	})
	t.Run("cryo_server", func(t *testing.T) {
		inEngine(t, func(t *testing.T, e *engine) {
			p := e.run(with(listenInput, fields), toProbe)
			test(t, e, p, e.dial())
		})
	})
}

// atBothInputsTo is atBothInputs with another output.
func atBothInputsTo(t *testing.T, fields, output string, test func(t *testing.T, e *engine, peer *cryo.Session)) {
	t.Helper()
	t.Run("cryo", func(t *testing.T) {
		inEngine(t, func(t *testing.T, e *engine) {
			server := e.serve()
			e.run(with(dialInput, fields), output)
			test(t, e, server.session())
		})
	})
	t.Run("cryo_server", func(t *testing.T) {
		inEngine(t, func(t *testing.T, e *engine) {
			e.run(with(listenInput, fields), output)
			test(t, e, e.dial())
		})
	})
}

// atBothOutputs runs a test with each of the outputs in a pipeline that tries
// nothing again, and with its peer's session.
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
		inEngine(t, func(t *testing.T, e *engine) {
			e.run(fromOnce, with(listenOutput, fields))
			peer := e.dial()
			synctest.Wait()
			test(t, e, peer)
		})
	})
}

// toAll runs a pipeline that sends to all of some clients.
func toAll(t *testing.T, fields string, clients int, test func(t *testing.T, e *engine, clients []*cryo.Session)) {
	t.Helper()
	inEngine(t, func(t *testing.T, e *engine) {
		e.run(fromOnce, with(listenOutput, fields))
		var sessions []*cryo.Session
		for range clients {
			sessions = append(sessions, e.dial())
		}
		synctest.Wait()
		test(t, e, sessions)
	})
}

// runWithBatch starts a pipeline whose first batch is made of these texts, and
// returns what becomes of them for their sender.
func (e *engine) runWithBatch(fields string, texts []string, processors ...string) (*cryo.Session, []*sending) {
	e.t.Helper()
	return e.runWithBatchTo(toProbe, fields, texts, processors...)
}

func (e *engine) runWithBatchTo(output, fields string, texts []string, processors ...string) (*cryo.Session, []*sending) {
	e.t.Helper()
	// While only an output listens, messages wait for an input.
	e.run(fromFeed, listenOutput)
	s := e.dial()
	var sent []*sending
	for _, text := range texts {
		sent = append(sent, send(s, text))
		synctest.Wait()
	}
	e.run(with(listenInput, fields), output, processors...)
	return s, sent
}
