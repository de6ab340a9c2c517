package plugin

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"github.com/redpanda-data/benthos/v4/public/service"
	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// valve is an output that delivers as long as it is open.
type valve struct {
	open   atomic.Bool
	failed atomic.Int64 // writes
}

func (v *valve) Connect(context.Context) error { return nil }
func (v *valve) Close(context.Context) error   { return nil }

func (v *valve) WriteBatch(context.Context, service.MessageBatch) error {
	if v.open.Load() {
		return nil
	}
	v.failed.Add(1)
	return errors.New("out of order")
}

// BenchmarkOutageDrain has 1,024 messages in flight when an outage of the output
// ends, and takes the time until the last of them is acknowledged.
func BenchmarkOutageDrain(b *testing.B) {
	const messages = 1024
	e := newEngine(b)
	v := &valve{}
	require.NoError(b, e.env.RegisterBatchOutput("valve", service.NewConfigSpec(), func(*service.ParsedConfig, *service.Resources) (service.BatchOutput, service.BatchPolicy, int, error) {
		return v, service.BatchPolicy{}, 64, nil
	}))
	p := e.start(with(listenInput, "max_in_flight: 2048"), "valve: {}")
	defer p.kill()
	var client *cryo.Session
	for client == nil {
		client, _ = cryo.Dial(b.Context(), "ws://"+somewhere, &cryo.DialOptions{Token: token, NetDial: e.net.Dial})
	}
	defer func() { _ = client.Close(b.Context(), "") }()
	b.ResetTimer()
	for range b.N {
		b.StopTimer()
		v.open.Store(false)
		v.failed.Store(0)
		batch := make([]cryo.OutMessage, messages)
		for i := range batch {
			batch[i] = cryo.OutMessage{Kind: cryo.KindText, Payload: fmt.Append(nil, "message ", i)}
		}
		sending := client.Queue(batch)
		for v.failed.Load() < 3*messages {
			time.Sleep(time.Millisecond)
		}
		b.StartTimer()
		v.open.Store(true)
		require.NoError(b, sending.Wait(b.Context()))
	}
	b.ReportMetric(float64(b.N*messages)/b.Elapsed().Seconds(), "msgs/s")
}
