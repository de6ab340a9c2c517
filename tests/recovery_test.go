package tests

import (
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/redpanda-data/benthos/v4/public/service"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	_ "github.com/redpanda-data/benthos/v4/public/components/pure"

	"github.com/cryo-connect/cryo-connect/cryo"
	_ "github.com/cryo-connect/cryo-connect/plugin"
)

type assertT = assert.CollectT

// flaky is an output that fails until it recovers.
type flaky struct {
	mu        sync.Mutex
	works     bool
	failures  int
	delivered map[string]int
	failed    chan struct{} // one for each failure, as far as they are wanted
}

func newFlaky() *flaky {
	return &flaky{delivered: make(map[string]int), failed: make(chan struct{}, 1000)}
}

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

func (f *flaky) recover() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.works = true
}

func (f *flaky) has(text string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.delivered[text] > 0
}

// runPipeline runs a pipeline in this process until the test's end.
func runPipeline(t *testing.T, build func(b *service.StreamBuilder)) {
	t.Helper()
	b := service.NewStreamBuilder()
	b.SetLogger(testLog(t))
	require.NoError(t, b.SetMetricsYAML(`none: {}`))
	build(b)
	stream, err := b.Build()
	require.NoError(t, err)
	ended := start(func() error { return stream.Run(context.Background()) })
	t.Cleanup(func() {
		assert.NoError(t, stream.StopWithin(patience))
		assert.NoError(t, next(t, ended))
	})
}

func TestWhileTheOutputFailsNothingIsAcknowledgedAndThenEverythingIs(t *testing.T) {
	// Each gives a way to send a text through Cryo to a pipeline with that
	// output, and to wait for what becomes of it.
	type sender func(text string) <-chan error
	for name, connect := range map[string]func(t *testing.T, out *flaky) sender{
		"into the input cryo": func(t *testing.T, out *flaky) sender {
			server := serve(t)
			runPipeline(t, func(b *service.StreamBuilder) {
				require.NoError(t, b.AddInputYAML(`cryo: { url: "`+server.url()+`", token: "`+token+`" }`))
				require.NoError(t, b.AddConsumerFunc(out.write))
			})
			s := server.session(t)
			return func(text string) <-chan error { return send(s, text) }
		},
		"into the input cryo_server": func(t *testing.T, out *flaky) sender {
			address := freeAddress(t)
			runPipeline(t, func(b *service.StreamBuilder) {
				require.NoError(t, b.AddInputYAML(`cryo_server: { address: "`+address+`", tokens: [ "`+token+`" ] }`))
				require.NoError(t, b.AddConsumerFunc(out.write))
			})
			s := dial(t, address)
			return func(text string) <-chan error { return send(s, text) }
		},
		"from one pipeline to another": func(t *testing.T, out *flaky) sender {
			address := freeAddress(t)
			runPipeline(t, func(b *service.StreamBuilder) {
				require.NoError(t, b.AddInputYAML(`cryo_server: { address: "`+address+`", tokens: [ "`+token+`" ] }`))
				require.NoError(t, b.AddConsumerFunc(out.write))
			})
			var produce service.MessageHandlerFunc
			runPipeline(t, func(b *service.StreamBuilder) {
				var err error
				produce, err = b.AddProducerFunc()
				require.NoError(t, err)
				require.NoError(t, b.AddOutputYAML(`cryo: { url: "ws://`+address+`", token: "`+token+`" }`))
			})
			return func(text string) <-chan error {
				return start(func() error { return produce(context.Background(), service.NewMessage([]byte(text))) })
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
			for range 200 { // each has failed several times by then
				next(t, out.failed)
			}
			for _, done := range sent {
				wantPending(t, done, "the output fails")
			}

			out.recover()
			for text, done := range sent {
				require.NoError(t, next(t, done), text)
				require.True(t, out.has(text), "%s was acknowledged and not delivered", text)
			}
		})
	}
}

func TestAMessageThatThePipelineRejectsIsRefusedToItsSender(t *testing.T) {
	t.Cleanup(func() { goleak.VerifyNone(t) })
	server, out := serve(t), newFlaky()
	runPipeline(t, func(b *service.StreamBuilder) {
		require.NoError(t, b.AddInputYAML(`cryo: { url: "`+server.url()+`", token: "`+token+`", auto_replay_nacks: false }`))
		require.NoError(t, b.AddConsumerFunc(out.write))
	})
	s := server.session(t)
	var rejected *cryo.RejectedError
	require.ErrorAs(t, next(t, send(s, "bad")), &rejected)
	require.Equal(t, "the message could not be delivered", rejected.Text)
	out.recover()
	require.NoError(t, next(t, send(s, "good")))
	require.Equal(t, 1, out.failures)
	require.NoError(t, s.Close(contextFor(t), ""))
}

// contextFor bounds what a test does at its end.
func contextFor(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	t.Cleanup(cancel)
	return ctx
}
