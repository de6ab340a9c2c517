package cryo_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/cryotest"
)

// trySend writes a message in fragments, until the connection is lost.
func trySend(t *testing.T, r *rand.Rand, peer *cryotest.Peer, b []byte) error {
	first := byte(0x02)
	for range r.IntN(4) {
		n := r.IntN(len(b) + 1)
		if _, err := peer.Conn().Write(raw(end{}, first, b[:n])); err != nil {
			return err
		}
		first, b = 0, b[n:]
		time.Sleep(time.Duration(r.IntN(1000)) * time.Millisecond)
	}
	_, err := peer.Conn().Write(raw(end{}, first|0x80, b))
	return err
}

// However sessions end, and whatever their application does meanwhile, nothing of what they
// share stays reserved, and all their calls return.
func TestEverySessionEndReleasesItsReservations(t *testing.T) {
	cryo.Poison(true)
	defer cryo.Poison(false)
	for _, limit := range []int64{1, 100, 64 << 10, 1 << 20} {
		for _, seed := range stormSeeds(t, 6, 200) {
			t.Run(fmt.Sprint(limit, "/", seed), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					opts := quiet
					opts.MaxBufferBytes = int(limit)
					_, l, accepted := serve(t, cryo.ServerOptions{SessionOptions: opts})
					var all sync.WaitGroup
					for i := range uint64(6) {
						peer := join(t, l, 1+i)
						peer.ClientHandshake()
						s := next(t, accepted)
						random := func(n uint64) *rand.Rand { return rand.New(rand.NewPCG(seed, 10*i+n)) }
						all.Go(func() { sendsAll(t, random(0), peer) })
						all.Go(func() { settlesSome(s, random(1)) })
						all.Go(func() { readsSome(s, random(2)) })
						all.Go(func() { ends(s, random(3), peer) })
					}
					all.Wait()
					peer := join(t, l, 100)
					peer.ClientHandshake()
					s := next(t, accepted)
					bytes, incoming, slot := s.Free()
					require.Equal(t, []int64{limit, limit, 1}, []int64{bytes, incoming, slot})
				})
			})
		}
	}
}

func sendsAll(t *testing.T, r *rand.Rand, peer *cryotest.Peer) {
	for tx := range uint32(3) {
		_ = peer.TryWriteFrames(txStart(1+tx, tx, -1, "stream"))
	}
	time.Sleep(time.Second)
	var seq [3]uint32
	for i := range uint32(1_000) {
		f := cryotest.Binary(100+i, string(make([]byte, livelySize(r))))
		switch tx := r.Uint32N(3); r.IntN(8) {
		case 0, 1:
			f = txChunk(tx, seq[tx], string(f.Payload))
			seq[tx]++
		case 2:
			f = cryotest.Error(100+i, string(f.Payload))
		case 3:
			f = txFinish(100+i, tx)
		}
		if r.IntN(50) == 0 {
			seq[r.IntN(3)]++ // one is missing
		}
		if trySend(t, r, peer, encoded(t, peer, f)) != nil {
			return
		}
	}
}

func settlesSome(s *cryo.Session, r *rand.Rand) {
	for {
		ctx, cancel := context.WithTimeout(context.Background(), time.Duration(r.IntN(5000))*time.Millisecond)
		batch, err := s.ReceiveBatch(ctx, 1+r.IntN(5))
		cancel()
		if errors.Is(err, context.DeadlineExceeded) {
			continue
		}
		if err != nil {
			return
		}
		time.Sleep(time.Duration(r.IntN(2000)) * time.Millisecond)
		var settling sync.WaitGroup
		for _, m := range batch {
			settling.Go(func() { _ = m.Reject("no") })
			settling.Go(func() { _ = m.Ack() })
		}
		_ = cryo.AckBatch(batch)
		settling.Wait()
		switch r.IntN(30) {
		case 0:
			s.SetSendOnly(true)
			time.Sleep(time.Duration(r.IntN(2000)) * time.Millisecond)
			s.SetSendOnly(false)
		case 1:
			release := s.Reserve(10_000)
			time.Sleep(time.Second)
			release()
			release()
		case 2:
			go func() { _ = s.SendText(context.Background(), "never answered") }()
		case 3:
			s.Discard()
		}
	}
}

func readsSome(s *cryo.Session, r *rand.Rand) {
	var reading sync.WaitGroup
	defer reading.Wait()
	for {
		st, err := s.AcceptStream(context.Background())
		if err != nil {
			return
		}
		own := rand.New(rand.NewPCG(r.Uint64(), 0))
		reading.Go(func() {
			defer st.Close()
			buf := make([]byte, 10_000)
			for range own.IntN(1000) {
				if _, err := st.Read(buf[:own.IntN(len(buf))]); err != nil {
					break
				}
				if own.IntN(10) == 0 {
					time.Sleep(time.Duration(own.IntN(1000)) * time.Millisecond)
				}
			}
			reading.Go(func() { _ = st.Ack() })
			_ = st.Close()
		})
	}
}

func ends(s *cryo.Session, r *rand.Rand, peer *cryotest.Peer) {
	time.Sleep(time.Duration(r.IntN(60_000)) * time.Millisecond)
	switch r.IntN(4) {
	case 0:
		peer.Conn().Cut()
	case 1:
		_ = peer.Conn().Close()
	case 2:
		cut(s)
	default:
		_ = s.Close(context.Background(), "that's all")
	}
	<-s.Done()
	if r.IntN(2) == 0 {
		s.Discard()
	}
}
