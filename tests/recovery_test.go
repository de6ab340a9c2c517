package tests

import (
	"context"
	"errors"
	"sync"
	"testing"

	"github.com/redpanda-data/benthos/v4/public/service"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	_ "github.com/redpanda-data/benthos/v4/public/components/pure"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/testkit"
	_ "github.com/cryo-connect/cryo-connect/plugin"
)

// flaky is an output that rejects messages until it recovers.
type flaky struct {
	mu        sync.Mutex
	works     bool
	failures  int
	delivered map[string]int
	failed    chan struct{} // one for each failure
}

// newFlaky returns an output that fails.
func newFlaky() *flaky {
	return &flaky{delivered: make(map[string]int), failed: make(chan struct{}, 1000)}
}

// write is the output, for AddConsumerFunc.
func (f *flaky) write(_ context.Context, m *service.Message) error {
	b, err := m.AsBytes()
	if err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.works {
		f.failures++
		select {
		case f.failed <- struct{}{}:
		default:
		}
		return errors.New("the disk is full")
	}
	f.delivered[string(b)]++
	return nil
}

// recover makes later writes succeed.
func (f *flaky) recover() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.works = true
}

// has reports whether a text was delivered.
func (f *flaky) has(text string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.delivered[text] > 0
}

// runPipeline runs a pipeline in this process until the test's end, and returns what it
// logs.
func runPipeline(t *testing.T, build func(b *service.StreamBuilder)) (logged *testkit.Lines) {
	t.Helper()
	logged = testkit.NewLines(t, "the pipeline")
	b := service.NewStreamBuilder()
	b.SetLogger(testkit.Logger(t, logged))
	require.NoError(t, b.SetMetricsYAML(`none: {}`))
	build(b)
	stream, err := b.Build()
	require.NoError(t, err)
	ended := testkit.Go(func() error { return stream.Run(context.Background()) })
	t.Cleanup(func() {
		assert.NoError(t, stream.StopWithin(testkit.Patience))
		assert.NoError(t, testkit.Next(t, ended))
	})
	return logged
}

func TestNothingIsAcknowledgedUntilTheOutputRecovers(t *testing.T) {
	// A sender sends a text over Cryo to a pipeline with the flaky output; the channel
	// receives the outcome.
	type sender func(text string) <-chan error
	for name, connect := range map[string]func(t *testing.T, out *flaky) sender{
		"into the input cryo": func(t *testing.T, out *flaky) sender {
			server := testkit.Serve(t)
			runPipeline(t, func(b *service.StreamBuilder) {
				require.NoError(t, b.AddInputYAML(`cryo: { url: "`+server.URL()+`", token: "`+token+`" }`))
				require.NoError(t, b.AddConsumerFunc(out.write))
			})
			s := server.Session(t)
			return func(text string) <-chan error { return testkit.Send(s, text) }
		},
		"into the input cryo_server": func(t *testing.T, out *flaky) sender {
			logged := runPipeline(t, func(b *service.StreamBuilder) {
				require.NoError(t, b.AddInputYAML(`cryo_server: { address: "127.0.0.1:0", tokens: [ "`+token+`" ] }`))
				require.NoError(t, b.AddConsumerFunc(out.write))
			})
			s := testkit.Dial(t, logged.Listening())
			return func(text string) <-chan error { return testkit.Send(s, text) }
		},
		"from one pipeline to another": func(t *testing.T, out *flaky) sender {
			logged := runPipeline(t, func(b *service.StreamBuilder) {
				require.NoError(t, b.AddInputYAML(`cryo_server: { address: "127.0.0.1:0", tokens: [ "`+token+`" ] }`))
				require.NoError(t, b.AddConsumerFunc(out.write))
			})
			var produce service.MessageHandlerFunc
			runPipeline(t, func(b *service.StreamBuilder) {
				var err error
				produce, err = b.AddProducerFunc()
				require.NoError(t, err)
				require.NoError(t, b.AddOutputYAML(`cryo: { url: "ws://`+logged.Listening()+`", token: "`+token+`" }`))
			})
			return func(text string) <-chan error {
				return testkit.Go(func() error { return produce(context.Background(), service.NewMessage([]byte(text))) })
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Cleanup(func() { goleak.VerifyNone(t) }) // runs last
			out := newFlaky()
			send := connect(t, out)
			texts := numbered(50)
			sent := make(map[string]<-chan error)
			for _, text := range texts {
				sent[text] = send(text)
			}
			for range 200 { // several failures of each
				testkit.Next(t, out.failed)
			}
			for _, done := range sent {
				testkit.WantPending(t, done, "the output fails")
			}

			out.recover()
			for text, done := range sent {
				require.NoError(t, testkit.Next(t, done), text)
				require.True(t, out.has(text), "%s was acknowledged and not delivered", text)
			}
		})
	}
}

func TestRejectionByThePipelineIsReportedToTheSender(t *testing.T) {
	t.Cleanup(func() { goleak.VerifyNone(t) })
	server, out := testkit.Serve(t), newFlaky()
	runPipeline(t, func(b *service.StreamBuilder) {
		require.NoError(t, b.AddInputYAML(`cryo: { url: "`+server.URL()+`", token: "`+token+`", auto_replay_nacks: false }`))
		require.NoError(t, b.AddConsumerFunc(out.write))
	})
	s := server.Session(t)
	var rejected *cryo.RejectedError
	require.ErrorAs(t, testkit.Next(t, testkit.Send(s, "bad")), &rejected)
	out.recover()
	testkit.WantDelivered(t, s, "good")
	require.Equal(t, 1, out.failures)
	require.NoError(t, s.Close(testkit.Context(t), ""))
}
