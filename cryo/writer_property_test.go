package cryo

import (
	"bytes"
	"encoding/binary"
	"errors"
	"net"
	"testing"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/cryo-connect/cryo-connect/internal/wire"
	"github.com/cryo-connect/cryo-connect/internal/ws"
)

// writerSteps is a writer of which a test takes each step, and what has become of its frames.
// The payload of a frame starts with its index in sent.
type writerSteps struct {
	*writer
	masks   bool // where it dialled
	network recordedConn
	window  window
	calls   []*call
	chunks  [][]outFrame
	sent    []*outFrame
	sizes   map[*outFrame]int  // of payloads, in bytes
	answers map[*outFrame]bool // the first one; true is an ACK
	taken   *queue             // being written; nil is none
	lost    bool               // the connection
}

func newWriterSteps(masks bool) *writerSteps {
	x := &writerSteps{masks: masks, sizes: make(map[*outFrame]int), answers: make(map[*outFrame]bool)}
	x.window.freed = make(chan struct{}, 1)
	x.writer = newWriter(ws.New(&x.network, masks), 1, newAckTable(dialingNumbers, 0), func(error) {})
	x.active = true // the test is who writes
	return x
}

// frame fills in a frame that is about to be sent.
func (x *writerSteps) frame(f *outFrame, kind wire.Type, size int) {
	payload := binary.BigEndian.AppendUint32(make([]byte, 0, 4+size), uint32(len(x.sent)))
	f.Frame = wire.Frame{SID: 1, Type: kind, Payload: payload[:4+size]}
	x.sent, x.sizes[f] = append(x.sent, f), 4+size
}

func (x *writerSteps) sendCall(sizes []int) {
	c := &call{}
	c.init(len(sizes))
	for i, size := range sizes {
		x.frame(&c.frames[i], wire.Binary, size)
	}
	x.calls = append(x.calls, c)
	x.acks.register(c)
	if !x.send(c.frames) {
		x.cancel(c, errCancelled)
	}
}

func (x *writerSteps) sendChunk(size int) {
	if x.window.acquire(4 + size) {
		f := make([]outFrame, 1)
		x.frame(&f[0], wire.TxChunk, size)
		f[0].window = &x.window
		x.chunks = append(x.chunks, f)
		x.send(f)
	}
}

func (x *writerSteps) answerWith(f *outFrame, ack bool) {
	var err error
	if !ack {
		err = errors.New("no")
	}
	_, again := x.answers[f]
	if f.call != nil && x.acks.answer(f.Ack, err) == answerAccepted && !again {
		x.answers[f] = ack
	}
}

// takeNext takes and copies what is queued; putTaken ends that.
func (x *writerSteps) takeNext() error {
	q := x.dequeue()
	x.taken = &q
	return x.gather(x.taken)
}

func (x *writerSteps) putTaken(err error) {
	x.finishWrite(x.taken, err, true)
	x.taken, x.lost = nil, x.lost || err != nil
	x.active = true
}

// check compares what is counted with what is there.
func (x *writerSteps) check(t require.TestingT) {
	released := 0
	for _, f := range x.queue.data {
		require.False(t, f.is(frameDequeued), "and in the queue")
		if f.is(frameReleased) {
			released++
		}
	}
	require.Equal(t, released, x.withdrawn)
	unwritten := x.queue.cost()
	if x.taken != nil {
		unwritten += x.taken.cost()
	}
	if !x.lost {
		require.Equal(t, unwritten, x.unwritten)
	}

	used, waiting := 0, 0
	left := make(map[*call]int)
	for _, f := range x.sent {
		inWriter := !f.is(frameReleased)
		require.Equal(t, inWriter, f.Payload != nil)
		switch {
		case f.window != nil && inWriter:
			used += x.sizes[f] + chunkOverhead
		case inWriter:
			left[f.call]++
		}
		if f.call != nil && x.acks.waiting > 0 && *x.acks.slot(f.Ack) == f {
			waiting++
			left[f.call]++
		}
	}
	require.Equal(t, used, x.window.used)
	require.Equal(t, waiting, x.acks.waiting)
	for _, c := range x.calls {
		require.EqualValues(t, left[c], c.remaining.Load())
		require.Equal(t, left[c] == 0, isDone(c))
	}
}

// checkOutcome compares what callers receive with what is in the network and with what
// the peer has answered. Nothing is sent any more.
func (x *writerSteps) checkOutcome(t require.TestingT) {
	arrived := x.arrived(t)
	for i, f := range x.sent {
		require.True(t, f.is(frameReleased))
		require.True(t, x.lost || f.is(frameDequeued) == arrived[i], "of what was not taken nothing is written")
		if f.call == nil {
			continue
		}
		require.True(t, isDone(f.call))
		if errs := f.call.errs; errs == nil || errs[f.index] == nil {
			require.True(t, x.answers[f], "it is acknowledged")
			require.True(t, f.is(frameWritten))
		}
	}
}

// arrived reads what is in the network, and wants each frame once and in order.
func (x *writerSteps) arrived(t require.TestingT) map[int]bool {
	peer := ws.New(&replayedConn{bytes: bytes.NewReader(x.network.taken)}, !x.masks)
	peer.Start(func([]byte) {}, func(int, bool) {})
	frames, next := make(map[int]bool), 0
	for peer.Next() == nil {
		b := make([]byte, peer.Left())
		if peer.ReadFull(b) != nil {
			break // the connection was lost
		}
		f, err := wire.Parse(b)
		require.NoError(t, err)
		if f.Type == wire.Binary || f.Type == wire.TxChunk {
			i := int(binary.BigEndian.Uint32(f.Payload))
			require.GreaterOrEqual(t, i, next)
			next, frames[i] = i+1, true
		}
	}
	return frames
}

// replayedConn is a connection to read from.
type replayedConn struct {
	net.Conn
	bytes *bytes.Reader
}

func (c *replayedConn) Read(p []byte) (int, error) { return c.bytes.Read(p) }

func TestEverySentFrameIsAccountedFor(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		x := newWriterSteps(rapid.Bool().Draw(t, "masks"))
		sizes := rapid.SampledFrom([]int{0, 1, 100, 50_000, ws.GatherBytes})
		index := func(t *rapid.T, of int) int {
			if of == 0 {
				t.Skip("nothing is sent")
			}
			return rapid.IntRange(0, of-1).Draw(t, "index")
		}
		cancel := func(t *rapid.T) {
			x.cancel(x.calls[index(t, len(x.calls))], errCancelled)
			require.LessOrEqual(t, 2*x.withdrawn, len(x.queue.data))
		}
		t.Repeat(map[string]func(*rapid.T){
			"":         func(t *rapid.T) { x.check(t) },
			"call":     func(t *rapid.T) { x.sendCall(rapid.SliceOfN(sizes, 1, 4).Draw(t, "sizes")) },
			"chunk":    func(t *rapid.T) { x.sendChunk(sizes.Draw(t, "size")) },
			"acks":     func(t *rapid.T) { x.acknowledge(make([]uint32, rapid.IntRange(1, 20).Draw(t, "acks"))) },
			"pong":     func(t *rapid.T) { x.pong(1) },
			"cancel":   cancel,
			"cancel 2": cancel,
			"withdraw": func(t *rapid.T) { x.withdraw(x.chunks[index(t, len(x.chunks))]) },
			"answer":   func(t *rapid.T) { x.answerWith(x.sent[index(t, len(x.sent))], rapid.Bool().Draw(t, "ack")) },
			"take": func(t *rapid.T) {
				if x.taken != nil {
					t.Skip("it is being written")
				}
				require.NoError(t, x.takeNext())
			},
			"put": func(t *rapid.T) {
				if x.taken == nil {
					t.Skip("nothing is taken")
				}
				x.putTaken(x.conn.Flush())
			},
		})
		if rapid.Bool().Draw(t, "lost") && x.taken != nil {
			x.putTaken(errors.New("lost"))
			x.check(t)
			x.sendCall([]int{1, 1})
			x.sendChunk(1)
			x.check(t)
		}
		for x.taken != nil || !x.queue.empty() {
			if x.taken == nil {
				require.NoError(t, x.takeNext())
			}
			x.putTaken(x.conn.Flush())
			x.check(t)
		}
		x.acks.end(errors.New("the end"))
		x.check(t)
		x.checkOutcome(t)
	})
}
