package cryo_test

import (
	"context"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
)

const (
	benchBatch   = 64
	benchPayload = 1 << 10
	benchSenders = 16 // batches on their way at once, as a pipeline has them
)

// connected returns the two ends of a session over loopback TCP.
func connected(b *testing.B) (client, server *cryo.Session) {
	b.Helper()
	sessions := make(chan *cryo.Session, 1)
	handler := newServer(b, cryo.ServerOptions{
		Authorize: cryo.Tokens(token),
		OnSession: func(s *cryo.Session, _ *cryo.Upgrade) { sessions <- s },
	})
	listener := httptest.NewServer(handler)
	client, err := cryo.Dial(b.Context(), strings.Replace(listener.URL, "http", "ws", 1), &cryo.DialOptions{Token: token})
	require.NoError(b, err)
	b.Cleanup(func() {
		cut(client)
		listener.Close()
		require.NoError(b, handler.Shutdown(context.Background()))
	})
	return client, <-sessions
}

func benchMessages(n int) []cryo.OutMessage {
	batch := make([]cryo.OutMessage, n)
	for i := range batch {
		batch[i] = cryo.Binary(make([]byte, benchPayload))
	}
	return batch
}

// ackAll receives and acknowledges, in batches, limit messages or until the end.
func ackAll(s *cryo.Session, limit int) (n int) {
	for n < limit {
		batch, err := s.ReceiveBatch(context.Background(), benchBatch)
		if err != nil {
			break
		}
		if cryo.AckBatch(batch) != nil {
			break
		}
		n += len(batch)
	}
	return n
}

// BenchmarkSendBatch: one operation is a batch of 64 messages of 1 KiB, sent and
// acknowledged, many of them at once.
func BenchmarkSendBatch(b *testing.B) {
	client, server := connected(b)
	go ackAll(server, 1<<62)
	batch := benchMessages(benchBatch)
	operations := make(chan struct{})
	var sending sync.WaitGroup
	for range benchSenders {
		sending.Go(func() {
			for range operations {
				if err := client.SendBatch(b.Context(), batch); err != nil {
					b.Error(err)
				}
			}
		})
	}
	b.SetBytes(benchBatch * benchPayload)
	b.ReportAllocs()
	for b.Loop() {
		operations <- struct{}{}
	}
	close(operations)
	sending.Wait()
	b.ReportMetric(float64(b.N*benchBatch)/b.Elapsed().Seconds(), "msg/s")
}

// BenchmarkRoundTrip: one operation is one message, sent and acknowledged.
func BenchmarkRoundTrip(b *testing.B) {
	client, server := connected(b)
	go ackAll(server, 1<<62)
	message := make([]byte, benchPayload)
	b.SetBytes(benchPayload)
	b.ReportAllocs()
	for b.Loop() {
		if err := client.SendBinary(b.Context(), message); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkReceive: one operation is one message of 1 KiB, received and
// acknowledged along with what else waits.
func BenchmarkReceive(b *testing.B) {
	client, server := connected(b)
	batch := benchMessages(benchBatch)
	ctx, cancel := context.WithCancel(b.Context())
	var sending sync.WaitGroup
	for range benchSenders {
		sending.Go(func() {
			for err := error(nil); err == nil; {
				err = client.SendBatch(ctx, batch)
			}
		})
	}
	b.SetBytes(benchPayload)
	b.ReportAllocs()
	for left := 0; b.Loop(); left-- {
		if left == 0 {
			left = ackAll(server, 1)
		}
	}
	cancel()
	sending.Wait()
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "msg/s")
}
