package cryo

import (
	"errors"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/internal/wire"
	"github.com/cryo-connect/cryo-connect/internal/ws"
)

// busyWriter is a writer whose last writer has not come back, so that all is queued.
func busyWriter() *writer {
	w := newWriter(ws.New(&endlessConn{}, false), 1, newAckTable(dialingNumbers, 0), func(error) {})
	w.active = true
	return w
}

// queueCalls queues so many calls of so many frames.
func queueCalls(w *writer, calls, frames int) (all []*call) {
	for range calls {
		c, _ := registered(w.acks, frames)
		w.send(c.frames)
		all = append(all, c)
	}
	return all
}

var errCancelled = errors.New("cancelled")

// The pointers to other calls' frames are nil in the queue, so that a look at one of them
// panics. Only compaction looks at all; it shows in a queue that is shorter, and must be rare.
func TestCancellingASendCostsTimeInItsOwnFramesOnly(t *testing.T) {
	t.Run("without compaction", func(t *testing.T) {
		w := busyWriter()
		queueCalls(w, 100, 3)
		c := queueCalls(w, 1, 10)[0]
		queueCalls(w, 100, 3)
		for i, f := range w.queue.data {
			if f.call != c {
				w.queue.data[i] = nil
			}
		}
		w.cancel(c, errCancelled)
		require.True(t, isDone(c))
		require.Len(t, w.queue.data, 610)
		require.Equal(t, 10, w.withdrawn)
		require.Equal(t, 600, w.acks.waiting)
	})
	for name, order := range map[string]func([]*call){
		"the oldest first": func([]*call) {},
		"in any order":     func(c []*call) { rand.Shuffle(len(c), func(i, j int) { c[i], c[j] = c[j], c[i] }) },
	} {
		t.Run(name, func(t *testing.T) {
			const calls, frames = 10_000, 3
			w := busyWriter()
			all := queueCalls(w, calls, frames)
			order(all)
			compacted := 0 // frames
			for _, c := range all {
				before := len(w.queue.data)
				w.cancel(c, errCancelled)
				require.True(t, isDone(c))
				if len(w.queue.data) < before {
					compacted += before
				}
			}
			require.Empty(t, w.queue.data)
			require.LessOrEqual(t, compacted, 2*calls*frames)
			require.Zero(t, w.acks.waiting)
		})
	}
}

func TestDequeuedWithdrawnFramesAreNotCounted(t *testing.T) {
	w := busyWriter()
	all := queueCalls(w, 100, 1)
	for i := 0; i < 100; i += 4 {
		w.cancel(all[i], errCancelled)
	}
	require.Equal(t, 25, w.withdrawn)
	q := w.dequeue()
	require.Len(t, q.data, 75)
	require.Zero(t, w.withdrawn)
	require.NoError(t, w.gather(&q))
	require.NoError(t, w.conn.Flush())
	require.True(t, w.finishWrite(&q, nil, true))
	for i, c := range all {
		if i%4 == 0 {
			require.True(t, isDone(c))
			continue
		}
		require.False(t, isDone(c))
		require.Equal(t, answerAccepted, w.acks.answer(c.frames[0].Ack, nil))
		require.True(t, isDone(c))
	}
}

// What is withdrawn was not taken, and what is taken is not withdrawn.
func TestDequeuedFrameIsNotWithdrawn(t *testing.T) {
	w := busyWriter()
	c := queueCalls(w, 1, 2)[0]
	q := w.dequeue()
	w.cancel(c, errCancelled)
	require.False(t, isDone(c), "its payloads are in use")
	require.Zero(t, w.withdrawn)
	require.NoError(t, w.gather(&q))
	require.True(t, isDone(c))
	for i := range c.frames {
		require.True(t, c.frames[i].is(frameWritten))
	}
}

func TestWriterThatFailsReleasesEachFrameOnce(t *testing.T) {
	w := busyWriter()
	all := queueCalls(w, 20, 3)
	all[0].frames[1].Payload = make([]byte, MaxPayload+1) // can't be written
	w.cancel(all[19], errCancelled)
	ends := 0
	w.failed = func(error) { ends++ }
	q := w.dequeue()
	all = append(all, queueCalls(w, 2, 3)...) // behind what is being written
	require.True(t, w.finishWrite(&q, w.gather(&q), true))
	require.Equal(t, 1, ends)
	end := errors.New("the end")
	late := queueCalls(w, 1, 3)[0]
	require.EqualValues(t, 3, late.remaining.Load(), "all are released")
	w.cancel(late, end)
	w.acks.end(end)
	for _, c := range append(all, late) {
		require.True(t, isDone(c))
		require.Zero(t, c.remaining.Load())
		for i := range c.frames {
			require.True(t, c.frames[i].is(frameReleased))
			require.Equal(t, c == all[0] && i == 0, c.frames[i].is(frameWritten))
		}
	}
	require.Equal(t, []error{end, end, end}, all[0].errs, "it was not answered")
	require.Equal(t, []error{errCancelled, errCancelled, errCancelled}, all[19].errs)
}

// Otherwise an answer that comes in between would be one to a frame that was not sent, which
// ends the session.
func TestCancelRemovesNumbersBeforeItWithdrawsFrames(t *testing.T) {
	w := busyWriter()
	c := queueCalls(w, 1, 1)[0]
	w.mu.Lock()
	go w.cancel(c, errCancelled)
	require.Eventually(t, func() bool {
		return w.acks.answer(c.frames[0].Ack, nil) == answerLate
	}, 10*time.Second, time.Millisecond)
	w.mu.Unlock()
	<-c.done
}

// A send that can't be queued is cancelled with the cause: without one it would have
// succeeded.
func TestCauseOfAFailedWriteIsReportedBeforeTheQueueIsClosed(t *testing.T) {
	w := busyWriter()
	reported := false
	w.failed = func(error) {
		reported = true
		require.True(t, w.acknowledge([]uint32{1}))
	}
	queueCalls(w, 1, 1)
	q := w.dequeue()
	require.True(t, w.finishWrite(&q, errors.New("lost"), true))
	require.True(t, reported)
	require.False(t, w.acknowledge([]uint32{1}))
}

func TestEmptyQueueHasLittleMemory(t *testing.T) {
	for _, size := range []int{maxIdleSlice, 100 * maxIdleSlice} {
		w := busyWriter()
		queueCalls(w, size, 1)
		w.acknowledge(make([]uint32, size))
		q := w.dequeue()
		require.NoError(t, w.gather(&q))
		require.True(t, w.finishWrite(&q, w.conn.Flush(), true))
		require.LessOrEqual(t, cap(w.queue.data), maxIdleSlice)
		require.LessOrEqual(t, cap(w.queue.acks), maxIdleSlice)
	}
}

func TestNothingIsQueuedBehindTheEnd(t *testing.T) {
	w := busyWriter()
	before := queueCalls(w, 1, 1)[0]
	w.queueClose(closeFrame{code: closeGraceful})
	w.queueClose(closeFrame{code: closeClientError})
	require.False(t, w.acknowledge([]uint32{1}))
	require.False(t, w.control(wire.Frame{}))
	behind := queueCalls(w, 1, 1)[0]
	require.True(t, behind.frames[0].is(frameReleased))
	require.Zero(t, w.unwritten)
	q := w.dequeue()
	require.Equal(t, []*outFrame{&before.frames[0]}, q.data)
	require.Nil(t, q.closing)
	q = w.dequeue()
	require.True(t, q.empty())
	require.Equal(t, closeGraceful, q.closing.code)
	q = w.dequeue()
	require.Nil(t, q.closing, "it is written once")
}

func TestPingIsNotQueuedBehindAnUnwrittenOne(t *testing.T) {
	w := busyWriter()
	for range 3 {
		w.ping(true)
	}
	require.Equal(t, 1, w.queue.frames())
	w.dequeue()
	w.ping(true)
	require.Equal(t, 1, w.queue.frames())
}
