package cryo_test

import (
	"fmt"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// BenchmarkBroadcast: one operation is one message to all sessions, acknowledged
// by all of them. Allocations are those of both ends.
func BenchmarkBroadcast(b *testing.B) {
	for _, size := range []int{1 << 10, 64 << 10} {
		for _, n := range []int{10, 100, 1000} {
			b.Run(fmt.Sprintf("%dKiB/%d", size>>10, n), func(b *testing.B) { benchBroadcast(b, size, n) })
		}
	}
}

func benchBroadcast(b *testing.B, size, n int) {
	connected := make(chan *cryo.Session, n)
	handler := newServer(b, cryo.ServerOptions{
		Authorize: cryo.Tokens(token),
		OnSession: func(s *cryo.Session, _ *cryo.Upgrade) { connected <- s },
	})
	listener := httptest.NewServer(handler)
	defer listener.Close()
	defer func() { require.NoError(b, handler.Shutdown(b.Context())) }()
	var clients sync.WaitGroup
	defer clients.Wait()
	sessions := make([]*cryo.Session, n)
	for i := range sessions {
		client, err := cryo.Dial(b.Context(), strings.Replace(listener.URL, "http", "ws", 1), &cryo.DialOptions{Token: token})
		require.NoError(b, err)
		clients.Go(func() { ackAll(client, 1<<62) })
		defer cut(client)
		sessions[i] = <-connected
	}
	message := []cryo.OutMessage{cryo.Binary(make([]byte, size))}
	b.SetBytes(int64(n * size))
	b.ReportAllocs()
	for b.Loop() {
		for _, err := range broadcast(b.Context(), sessions, message) {
			if err != nil {
				b.Fatal(err)
			}
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*n), "ns/session")
}
