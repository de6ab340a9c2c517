package plugin

import (
	"context"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/redpanda-data/benthos/v4/public/service"
	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// What an output returns for a batch.

const filter = `mapping: 'root = if content() == "drop" { deleted() }'`

// ackAllBut acknowledges what comes to a session, and rejects one text the first
// time. It returns what came, until nothing more comes.
func ackAllBut(t *testing.T, s *cryo.Session, rejected string) (texts []string) {
	t.Helper()
	for {
		messages, came := held(t, s)
		if len(messages) == 0 {
			return texts
		}
		for i, m := range messages {
			if came[i] == rejected {
				rejected = ""
				require.NoError(t, m.Reject("not now"))
			} else {
				require.NoError(t, m.Ack())
			}
		}
		texts = append(texts, came...)
	}
}

// After the filter, A has the context of what was dropped.
func TestBatchWithARejectedMessageIsResentAsAWhole(t *testing.T) {
	afterAFilter(t, "", func(t *testing.T, e *engine, peer *cryo.Session) {
		f := e.produce("drop", "A", "B", "C")
		require.Equal(t, []string{"A", "B", "C", "A", "B", "C"}, ackAllBut(t, peer, "A"))
		f.wantDelivered(t, "acknowledged in the end")
	})
}

// afterAFilter runs a test with each of the outputs after a filter, and an input
// that sends again what fails.
func afterAFilter(t *testing.T, fields string, test func(t *testing.T, e *engine, peer *cryo.Session)) {
	t.Helper()
	for name, output := range map[string]string{"cryo": dialOutput, "cryo_server": listenOutput} {
		t.Run(name, func(t *testing.T) {
			inEngine(t, func(t *testing.T, e *engine) {
				if name == "cryo_server" {
					e.run(fromFeed, with(output, fields), filter)
					test(t, e, e.dial())
					return
				}
				server := e.serve()
				e.run(fromFeed, with(output, fields), filter)
				test(t, e, server.session())
			})
		})
	}
}

// The engine's batcher marks messages behind all processors, so an error that names
// one reaches the right one.
func TestOnlyTheRejectedMessageOfAnOutputsOwnBatchIsResent(t *testing.T) {
	afterAFilter(t, "batching: { count: 4, period: 1s }", func(t *testing.T, e *engine, peer *cryo.Session) {
		fed := []*produced{e.produce("drop", "A"), e.produce("drop", "B"), e.produce("C", "drop"), e.produce("drop", "D", "drop")}
		require.ElementsMatch(t, []string{"A", "B", "C", "D"}, ackAllBut(t, peer, "B"))
		time.Sleep(time.Second) // until its next batch
		require.Equal(t, []string{"B"}, ackAllBut(t, peer, ""))
		for _, f := range fed {
			f.wantDelivered(t, "acknowledged in the end")
		}
	})
}

// A batch of the input that comes to the output's batching has one verdict.
func TestInputBatchWithinAnOutputBatchIsResentAsAWhole(t *testing.T) {
	afterAFilter(t, "batching: { count: 4, period: 1s }", func(t *testing.T, e *engine, peer *cryo.Session) {
		fed := []*produced{e.produce("drop", "A", "B"), e.produce("C", "D")}
		require.ElementsMatch(t, []string{"A", "B", "C", "D"}, ackAllBut(t, peer, "B"))
		time.Sleep(time.Second)
		require.Equal(t, []string{"A", "B"}, ackAllBut(t, peer, ""))
		for _, f := range fed {
			f.wantDelivered(t, "acknowledged in the end")
		}
	})
}

// Its processors could filter, too.
func TestBatchWithOutputProcessorsIsResentAsAWhole(t *testing.T) {
	afterAFilter(t, "batching: { count: 4, period: 1s, processors: [ { "+filter+" } ] }", func(t *testing.T, e *engine, peer *cryo.Session) {
		fed := []*produced{e.produce("A"), e.produce("B"), e.produce("C"), e.produce("D")}
		require.ElementsMatch(t, []string{"A", "B", "C", "D", "A", "B", "C", "D"}, ackAllBut(t, peer, "B"))
		for _, f := range fed {
			f.wantDelivered(t, "acknowledged in the end")
		}
	})
}

func TestMessageErrorsAreReturnedOnlyToAnOutputsOwnBatcher(t *testing.T) {
	for batching, want := range map[string]bool{
		`{}`:                            false,
		`{ count: 1 }`:                  false,
		`{ count: 2 }`:                  true,
		`{ byte_size: 10 }`:             true,
		`{ period: 1s }`:                true,
		`{ check: 'content() == "" ' }`: true,
		`{ count: 2, processors: [ { mapping: 'root = this' } ] }`: false,
		`{ count: 1, processors: [ { mapping: 'root = this' } ] }`: false,
	} {
		for name, address := range map[string]string{"output cryo": "url: ws://a", "output cryo_server": "address: a:1, tokens: [ a ]"} {
			conf, err := specs()[name].ParseYAML("{ "+address+", batching: "+batching+" }", nil)
			require.NoError(t, err)
			s, _, _, err := senderFromParsed(conf, service.MockResources())
			require.NoError(t, err)
			require.Equal(t, want, s.exact, "%s with %s", name, batching)
		}
	}
}

func TestEmptyBatchIsDelivered(t *testing.T) {
	t.Run("without a session", func(t *testing.T) {
		inEngine(t, func(t *testing.T, e *engine) {
			require.NoError(t, e.bareOutput("").WriteBatch(t.Context(), nil))
			require.NoError(t, e.bareServerOutput("").WriteBatch(t.Context(), nil))
		})
	})
	t.Run("left after parallel filtering", func(t *testing.T) {
		const filtering = "parallel: { processors: [ { " + filter + " } ] }"
		for name, output := range map[string]string{"cryo": dialOutput, "cryo_server": with(listenOutput, "no_session: reject")} {
			t.Run(name, func(t *testing.T) {
				inEngine(t, func(t *testing.T, e *engine) {
					if name == "cryo" {
						e.serve()
					}
					e.run(fromOnce, output, filtering)
					e.produce("drop", "drop").wantDelivered(t, "nothing is left of it")
					require.Zero(t, e.metrics.value("output_error"))
					require.Zero(t, e.metrics.value("output_connection_lost"))
				})
			})
		}
	})
}

func TestMessagesAfterALateStreamAreSent(t *testing.T) {
	const fields = `message_type: '${! if content().has_prefix("s") { "stream" } else { "utf8" } }', stream: { name: '${! content() }' }, ack_timeout: 10s`
	atBothOutputs(t, fields, func(t *testing.T, e *engine, peer *cryo.Session) {
		begin := time.Now()
		f := e.produce("s0", "m1", "s2", "m3", "m4", "s5")
		late := acceptStream(t, peer)
		require.Equal(t, "s0", late.Name())
		defer func() { _ = late.Close() }() // it is not read
		for _, m := range receiveTexts(t, peer, "m1", "m3", "m4") {
			require.NoError(t, m.Ack())
		}
		require.Equal(t, 10*time.Second, time.Since(begin), "a stream is sent before what is behind it")
		for range 2 {
			st, content := readStream(t, peer)
			require.Equal(t, st.Name(), content)
			require.NoError(t, st.Ack())
		}
		err := next(t, f.verdict)
		requirePlain(t, err)
		require.ErrorContains(t, err, `1 of 6 messages were not acknowledged, first error: opening the stream "s0": `)
		require.Equal(t, 10*time.Second, time.Since(begin), "the others were acknowledged at once")
	})
}

func TestPeerThatAcceptsNoStreamDelaysABatchByTwoAckTimeouts(t *testing.T) {
	atBothOutputs(t, asStream+", ack_timeout: 10s", func(t *testing.T, e *engine, peer *cryo.Session) {
		begin := time.Now()
		f := e.produce(numbered("s%d", 20)...)
		require.ErrorContains(t, next(t, f.verdict), "20 of 20 messages were not acknowledged")
		require.Equal(t, 20*time.Second, time.Since(begin))
	})
}

func TestBatchOfOneFailsWithTheErrorOfItsMessage(t *testing.T) {
	atBothOutputs(t, "", func(t *testing.T, e *engine, peer *cryo.Session) {
		f := e.produce("m")
		require.NoError(t, receiveTexts(t, peer, "m")[0].Reject("no"))
		f.wantFailed(t, `rejected by the peer: "no"`)
		f = e.produce(strings.Repeat("x", cryo.MaxPayload+1))
		f.wantFailed(t, "message of 16777217 bytes is too large: one frame carries at most 16 MiB, send larger data as a stream")
	})
}

func TestHardStoppedOutputReportsNoMessageErrors(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		out, _, peer := e.connectedOutput("")
		ctx, cancel := context.WithCancel(t.Context())
		writing := sendAny(func() error { return out.WriteBatch(ctx, batchOf("m0", "m1", "m2")) })
		m := receiveTexts(t, peer, "m0", "m1", "m2")
		require.NoError(t, m[0].Ack())
		require.NoError(t, m[1].Reject("no"))
		synctest.Wait()
		cancel()
		require.Equal(t, context.Canceled, writing.result(t), "no word of the one that was rejected")
		require.NoError(t, out.Close(t.Context()))
	})
}

func TestMessageErrorsReachTheBatcherThroughATracingMap(t *testing.T) {
	inEngine(t, func(t *testing.T, e *engine) {
		server := e.serve()
		e.spans = &spanBook{}
		e.run(fromOnce, with(dialOutput, `batching: { count: 4 }, inject_tracing_map: 'root.trace = if root.type() == "object" { this }'`))
		peer := server.session()
		f := e.produceEach(batchOf(`{"m":0}`, `{"m":1}`, `{"m":2}`, `{"m":3}`))
		var m []*cryo.Message
		for range 4 {
			m = append(m, receive(t, peer))
		}
		require.NoError(t, m[0].Ack())
		require.NoError(t, m[1].Ack())
		require.NoError(t, m[2].Reject("no"))
		require.NoError(t, m[3].Ack())
		for i, f := range f {
			err := next(t, f.verdict)
			require.Equal(t, i == 2, err != nil, "%d: %v", i, err)
		}
	})
}
