package cryo

import (
	"context"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/internal/wire"
)

// busyStream is a stream whose session's writer has not come back. All of it is queued.
func busyStream(t *testing.T) *OutgoingStream {
	w := busyWriter()
	s := &Session{id: 1, acks: w.acks, writer: w, outgoing: newOutgoingStreams(), ctx: context.Background()}
	st, err := s.newStream(t.Context(), nil)
	require.NoError(t, err)
	t.Cleanup(func() { _ = st.Close() })
	return st
}

// The reading goroutine acknowledges a TX_CANCEL when it has stopped the stream, or does not
// find it. Neither may happen before another goroutine that stops the stream has withdrawn
// its chunks.
func TestStreamBeingStoppedIsStillInTheTable(t *testing.T) {
	st := busyStream(t)
	w := st.s.writer
	_, err := st.Write([]byte("a chunk"))
	require.NoError(t, err)
	w.mu.Lock()
	go st.stop(ErrStreamClosed)
	<-st.ctx.Done()
	stopped := make(chan struct{})
	go func() {
		st.stop(ErrStreamCancelled)
		close(stopped)
	}()
	early := false
	select {
	case <-stopped:
		early = true
	case <-time.After(50 * time.Millisecond):
	}
	found := st.s.outgoing.find(st.tx)
	w.mu.Unlock()
	require.False(t, early, "its chunk is still queued")
	require.Same(t, st, found)
	<-stopped
	require.Empty(t, w.queue.data)
	require.Zero(t, st.Queued())
	require.Eventually(t, func() bool { return st.s.outgoing.find(st.tx) == nil }, 10*time.Second, time.Millisecond)
}

func TestChunkOfAStoppedStreamLeavesItsWindow(t *testing.T) {
	st := busyStream(t)
	require.ErrorIs(t, st.Close(), ErrStreamClosed)
	_, err := st.Write([]byte("a chunk"))
	require.ErrorIs(t, err, ErrStreamClosed)
	require.Zero(t, st.Queued())
	require.Empty(t, st.s.writer.queue.data)
}

func TestStreamForgetsWrittenChunks(t *testing.T) {
	st := busyStream(t)
	w := st.s.writer
	for range 100 {
		_, err := st.Write([]byte("a chunk"))
		require.NoError(t, err)
		q := w.dequeue()
		require.NoError(t, w.gather(&q))
		w.finishWrite(&q, w.conn.Flush(), true)
		w.active = true
		require.Len(t, st.queued, 1, "until the next one is queued")
	}
}

// The receiver of a stream without the chunks that are withdrawn must not take it for whole.
func TestTXFinishIsNotWrittenWithoutItsChunks(t *testing.T) {
	for range 100 {
		st := busyStream(t)
		for range 200 {
			_, err := st.Write([]byte("a chunk"))
			require.NoError(t, err)
		}
		finish := newCall(wire.Frame{SID: 1, Type: wire.TxFinish, Tx: st.tx})
		st.s.acks.register(finish)
		require.True(t, st.enqueue(finish.frames))
		go st.stop(ErrStreamClosed)
		w := st.s.writer
		var q queue
		for begun := false; !begun; w.mu.Unlock() {
			w.mu.Lock()
			if begun = w.withdrawn > 0 || len(w.queue.data) <= 200; begun {
				q = w.dequeueLocked() // between two withdrawals, or behind the last
			}
		}
		for i, f := range q.data {
			if f.Type == wire.TxChunk {
				require.EqualValues(t, i, f.Seq)
			} else {
				require.Equal(t, 200, i)
			}
		}
	}
}
