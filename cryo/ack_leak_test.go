package cryo_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"testing"
	"testing/iotest"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/wire"
)

// fates are what may become of a message or a stream; its text or name tells its
// receiver.
var fates = []string{"acknowledged", "rejected", "late", "cancelled", "never taken", "broken source"}

// sendAll sends many messages and streams at once, with all fates, and returns
// when none of them is waited for any more.
func sendAll(t *testing.T, s *cryo.Session) {
	var sending sync.WaitGroup
	for i := range 200 {
		sending.Go(func() {
			fate := fates[i%len(fates)]
			ctx, cancel := context.WithTimeout(t.Context(), time.Duration(1+rand.IntN(20))*time.Second)
			defer cancel()
			if fate == "cancelled" {
				time.AfterFunc(time.Duration(rand.IntN(1000))*time.Millisecond, cancel)
			}
			if i%2 == 0 {
				_ = s.SendText(ctx, fate)
				return
			}
			var source io.Reader = bytes.NewReader(make([]byte, rand.IntN(20_000)))
			if fate == "broken source" {
				source = io.MultiReader(source, iotest.ErrReader(io.ErrNoProgress))
			}
			_ = s.SendStream(ctx, source, &cryo.StreamOptions{Name: fate, ChunkBytes: 1000})
		})
	}
	sending.Wait()
}

// takeAll lets everything have its fate, until the session's end.
func takeAll(s *cryo.Session) {
	var taking sync.WaitGroup
	defer taking.Wait()
	taking.Go(func() {
		for {
			st, err := s.AcceptStream(context.Background(), fates[:4]...)
			if err != nil {
				return
			}
			taking.Go(func() {
				_, _ = io.CopyN(io.Discard, st, int64(rand.IntN(20_000)))
				switch st.Name() {
				case "rejected":
					_ = st.Close()
				case "late":
					time.Sleep(10 * time.Second)
					fallthrough
				default:
					_, _ = io.Copy(io.Discard, st)
					_ = st.Ack()
				}
			})
		}
	})
	for {
		m, err := s.Receive(context.Background())
		if err != nil {
			return
		}
		switch string(m.Payload) {
		case "rejected":
			_ = m.Reject("no")
		case "never taken":
		case "late", "cancelled":
			taking.Go(func() { time.Sleep(10 * time.Second); _ = m.Ack() })
		default:
			_ = m.Ack()
		}
	}
}

// TestEveryNumberLeavesTheTable: whatever becomes of what is sent, its number is free
// when its sender has stopped waiting, in a session that lives and in one that
// was lost.
func TestEveryNumberLeavesTheTable(t *testing.T) {
	for _, flow := range []wire.Flow{wire.FlowPush, wire.FlowPull} {
		t.Run(fmt.Sprint(flow), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				opts := quiet
				opts.StreamIdleTimeout = time.Minute
				p := connect(t, opts, opts)
				ends := []*cryo.Session{p.client, p.server}
				var taking, sending sync.WaitGroup
				for _, s := range ends {
					useFlow(t, s, flow)
					taking.Go(func() { takeAll(s) })
					sending.Go(func() { sendAll(t, s) })
				}
				sending.Wait()
				for _, s := range ends {
					require.NoError(t, s.Err())
					require.Zero(t, s.Awaited())
					sending.Go(func() { sendAll(t, s) })
				}

				time.Sleep(500 * time.Millisecond)
				require.Positive(t, p.client.Awaited(), "or this tests nothing")
				p.conn.Cut()
				sending.Wait()
				taking.Wait()
				for _, s := range ends {
					<-s.Done()
					require.ErrorIs(t, s.Err(), net.ErrClosed)
					require.Zero(t, s.Awaited())
				}
			})
		})
	}
}
