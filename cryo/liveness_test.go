package cryo_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/cryotest"
	"github.com/cryo-connect/cryo-connect/internal/wire"
)

// livelySize is that of a payload: each way to be received is as likely as the others.
func livelySize(r *rand.Rand) int {
	return r.IntN([]int{2, 300, 70_000, 150_000, 900_000, 3 << 20}[r.IntN(6)])
}

// livelyClient sends messages and one stream, whole and in fragments, each byte of which
// must be acknowledged in the end.
type livelyClient struct {
	t         *testing.T
	r         *rand.Rand
	peer      *cryotest.Peer
	answers   bool            // the session sends too, and may reject
	sent      map[uint32]bool // numbers that wait for an answer
	cancelled bool            // the stream is
}

func (c *livelyClient) write(b []byte) {
	_, err := c.peer.Conn().Write(b)
	require.NoError(c.t, err)
}

func (c *livelyClient) pause() {
	if c.r.IntN(3) == 0 {
		time.Sleep(time.Duration(c.r.IntN(1_000)) * time.Millisecond)
	}
}

func (c *livelyClient) send(f wire.Frame) {
	b, first := encoded(c.t, c.peer, f), byte(0x02)
	for range c.r.IntN(4) {
		n := c.r.IntN(len(b) + 1)
		c.write(raw(end{}, first, b[:n]))
		first, b = 0, b[n:]
		c.pause()
	}
	b = raw(end{}, first|0x80, b)
	if c.r.IntN(2) == 0 {
		n := c.r.IntN(len(b))
		c.write(b[:n])
		c.pause()
		b = b[n:]
	}
	c.write(b)
	c.read()
}

func (c *livelyClient) run() {
	c.sent[1] = true
	c.send(txStart(1, 0, -1, "stream"))
	for len(c.sent) > 0 { // until it is accepted
		time.Sleep(time.Second)
		c.read()
	}
	seq := uint32(0)
	for i := range uint32(25) {
		switch c.r.IntN(4) {
		case 0:
			c.send(txChunk(0, seq, string(make([]byte, livelySize(c.r)))))
			seq++
		case 1:
			c.sent[100+i] = true
			c.send(cryotest.Text(100+i, "small"))
		default:
			c.sent[100+i] = true
			c.send(cryotest.Binary(100+i, string(make([]byte, livelySize(c.r)))))
		}
		c.pause()
	}
	c.sent[2] = true
	c.send(txFinish(2, 0))
	for end := time.Now().Add(10 * time.Hour); len(c.sent) > 0; time.Sleep(time.Second) {
		if time.Now().After(end) {
			c.t.Errorf("without an answer: %v", c.sent)
			return
		}
		c.read()
	}
}

// read reads what has come.
func (c *livelyClient) read() {
	for _, f := range c.peer.Taken() {
		switch {
		case f.Type == wire.UTF8 && c.answers:
			c.write(raw(end{}, 0x82, encoded(c.t, c.peer, cryotest.Acked(f.Ack))))
		case f.Type == wire.TxCancel && c.answers:
			c.cancelled = true
		case !c.sent[f.Ack] || f.Type != wire.Ack && !(f.Type == wire.Error && c.answers):
			c.t.Errorf("%v %+v", f.Type, f)
		default:
			delete(c.sent, f.Ack)
		}
	}
	if c.cancelled {
		delete(c.sent, 2)
	}
}

// All that is sent is acknowledged at last where the application acknowledges all that it
// gets, however small the receive buffer is, and whatever others are sending.
func TestEverythingIsAcknowledgedWithAnyReceiveBuffer(t *testing.T) {
	cryo.Poison(true)
	defer cryo.Poison(false)
	for _, limit := range []int{1, 100, 64 << 10, 1 << 20} {
		for _, seed := range stormSeeds(t, 6, 200) {
			answers := seed%2 == 1
			t.Run(fmt.Sprint(limit, "/", answers, "/", seed), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					opts := quiet
					opts.MaxBufferBytes, opts.StreamIdleTimeout = limit, 24*time.Hour
					_, l, accepted := serve(t, cryo.ServerOptions{SessionOptions: opts})
					var clients, applications sync.WaitGroup
					var sessions []*cryo.Session
					for i := range uint64(5) {
						r := rand.New(rand.NewPCG(seed, i))
						peer := join(t, l, 1+i)
						peer.ClientHandshake()
						s := next(t, accepted)
						sessions = append(sessions, s)
						c := &livelyClient{t: t, r: r, peer: peer, answers: answers, sent: map[uint32]bool{}}
						clients.Go(c.run)
						applications.Go(func() { acknowledgesAll(s, rand.New(rand.NewPCG(seed, 100+i)), answers) })
						applications.Go(func() { acknowledgesStream(s, rand.New(rand.NewPCG(seed, 200+i))) })
					}
					clients.Wait()
					for _, s := range sessions {
						require.NoError(t, s.Err())
						require.Zero(t, s.Held())
						require.Zero(t, s.ComingIn())
						cut(s)
					}
					applications.Wait()
				})
			})
		}
	}
}

func acknowledgesAll(s *cryo.Session, r *rand.Rand, answers bool) {
	for {
		batch, err := s.ReceiveBatch(context.Background(), 1+r.IntN(5))
		if err != nil {
			return
		}
		time.Sleep(time.Duration(r.IntN(500)) * time.Millisecond)
		if answers && r.IntN(2) == 0 { // before it acknowledges
			_ = s.SendText(context.Background(), "hello")
		}
		_ = cryo.AckBatch(batch)
	}
}

func acknowledgesStream(s *cryo.Session, r *rand.Rand) {
	st, err := s.AcceptStream(context.Background())
	if err != nil {
		return
	}
	buf := make([]byte, 100_000)
	for {
		if _, err := st.Read(buf[:1+r.IntN(len(buf))]); errors.Is(err, io.EOF) {
			_ = st.Ack()
			return
		} else if err != nil {
			return
		}
		if r.IntN(10) == 0 {
			time.Sleep(time.Duration(r.IntN(300)) * time.Millisecond)
		}
	}
}
