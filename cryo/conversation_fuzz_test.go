package cryo_test

import (
	"context"
	"encoding/binary"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/cryotest"
	"github.com/cryo-connect/cryo-connect/internal/wire"
)

// FuzzConversation has a raw peer send frames of the reference, one in some of them
// mutated, in any order, to a session whose application settles some of what it
// receives and sends beside. Only what was delivered may be acknowledged, and only
// what is malformed may end the session.
func FuzzConversation(f *testing.F) {
	valid, _ := cryotest.Vectors(f)
	var all []byte
	for i := range valid {
		step := []byte{byte(i), byte(i >> 8), byte(i), 0, 0}
		all = append(all, step...)
		f.Add(true, step)
		f.Add(false, append(step, byte(i), byte(i>>8), byte(i), 9, 1))
	}
	f.Add(true, all)
	f.Add(false, all)
	f.Fuzz(func(t *testing.T, listening bool, script []byte) {
		synctest.Test(t, func(t *testing.T) {
			opts := quiet
			opts.MaxBufferBytes = 90_000
			c := &conversation{t: t, open: make(map[uint32]bool), acked: make(map[uint32]int), may: make(map[uint32]int)}
			if listening {
				c.s, c.peer = accepted(t, cryo.ServerOptions{SessionOptions: opts})
			} else {
				c.s, c.peer = dialled(t, cryo.DialOptions{SessionOptions: opts})
			}
			sending := start(func() error { return c.s.SendBatch(t.Context(), texts("a", "b", "c")) })
			c.peer.Read()
			for len(script) >= 5 && len(script) < 2000 {
				v := valid[int(binary.LittleEndian.Uint16(script))%len(valid)]
				c.send(v.Bytes, script[2], script[3], script[4])
				script = script[5:]
			}
			c.end(sending, opts.MaxBufferBytes)
		})
	})
}

// conversation records the frames that were sent and may be answered.
type conversation struct {
	t      *testing.T
	s      *cryo.Session
	peer   *cryotest.Peer
	broken bool // a reason to end was given
	open   map[uint32]bool
	chunks int // each may pause reads for a second
	count  int
	held   []*cryo.Message
	may    map[uint32]int // how often a number may be acknowledged
	acked  map[uint32]int // how often it was
}

// send sends a frame under a number, with one byte changed if xor is not 0.
func (c *conversation) send(vector []byte, number, at, xor byte) {
	frame := append([]byte(nil), vector...)
	binary.BigEndian.PutUint64(frame, c.peer.SID)
	if t := wire.Type(frame[8]); t != wire.TxChunk && t != wire.Ack && t != wire.Error {
		binary.BigEndian.PutUint32(frame[9:], uint32(number))
	}
	if xor != 0 {
		frame[int(at)%len(frame)] ^= xor
	}
	c.expect(frame)
	_ = c.peer.WS.WriteMessage(websocket.BinaryMessage, frame) // it may have closed
	synctest.Wait()
	c.settle()
	c.listen()
}

// expect notes what a frame entitles its sender to, and whether it ends the session. A session
// that ends still acknowledges control frames until it has sent its close frame.
func (c *conversation) expect(frame []byte) {
	if sid := binary.BigEndian.Uint64(frame); sid == c.peer.SID && !wire.Type(frame[8]).Known() {
		return // ignored
	}
	f, err := wire.Parse(frame)
	if err != nil || f.SID != c.peer.SID {
		c.broken = true
		return
	}
	switch f.Type {
	case wire.EndpointInfo:
		c.broken = c.broken || f.Version != wire.Version
		c.may[f.Ack]++
	case wire.Bye:
		c.broken = true
		c.may[f.Ack]++
	case wire.TxStart: // nobody takes it, so it is never acknowledged
		c.broken = c.broken || c.open[f.Tx]
		c.open[f.Tx] = true
	case wire.TxChunk:
		c.chunks++
	case wire.TxFlow, wire.TxFetch, wire.TxCancel:
		c.may[f.Ack]++
	}
}

// settle acknowledges one message, keeps the next, rejects the third and so on.
func (c *conversation) settle() {
	for {
		ctx, cancel := context.WithTimeout(c.t.Context(), instant)
		m, err := c.s.Receive(ctx)
		cancel()
		if err != nil {
			return
		}
		switch c.count++; c.count % 3 {
		case 0:
			c.may[m.Number()]++
			_ = m.Ack()
		case 1:
			c.held = append(c.held, m)
		default:
			_ = m.Reject("no")
		}
	}
}

// listen wants nothing to be acknowledged that was not delivered.
func (c *conversation) listen() {
	synctest.Wait()
	for _, f := range c.peer.Taken() {
		if f.Type == wire.Ack {
			c.acked[f.Ack]++
			require.LessOrEqual(c.t, c.acked[f.Ack], c.may[f.Ack], "%d is acknowledged without having been delivered", f.Ack)
		}
	}
}

func (c *conversation) end(sending *call, bound int) {
	if !c.broken {
		require.NoError(c.t, c.s.Err(), "nothing was malformed")
		time.Sleep(time.Duration(c.chunks) * time.Second)
		c.settle() // what was behind chunks
		for _, m := range c.held {
			require.NoError(c.t, m.Reject("no"))
		}
		synctest.Wait()
		c.peer.Taken()
		wantFree(c.t, c.s, c.peer, bound, 0)
	}
	_ = c.peer.WS.Close()
	err := wantEnded(c.t, c.s)
	_, lost := errors.AsType[*cryo.ProtocolError](err)
	require.True(c.t, c.broken || !lost, "%v", err)
	<-sending.done
	time.Sleep(cryo.DefaultCloseTimeout)
}
