package cryo

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"time"
	"unicode/utf8"

	"github.com/cryo-connect/cryo-connect/internal/wire"
)

// Defaults and bounds of [StreamOptions].
const (
	// DefaultChunkBytes is the default of ChunkBytes, in bytes. Increase ChunkBytes for receivers that
	// pull chunk by chunk over a connection with a high latency, because they wait for a round trip per chunk.
	// Larger chunks share the receiver's memory for large messages: see MaxBufferBytes in [SessionOptions].
	DefaultChunkBytes = 64 << 10

	maxStreamName = 1024 // bytes

	// streamWindow bounds the unwritten bytes of one stream, behind which messages
	// wait: four chunks of the default size. A single larger chunk may exceed it.
	streamWindow = 4 * (DefaultChunkBytes + chunkOverhead)
	// maxEmptyReads bounds the reads in a row that return neither data nor an error.
	maxEmptyReads = 100
)

// ErrStreamCancelled is returned for a stream that the receiver has cancelled (TX_CANCEL): it
// was not delivered. A receiver that closes its session cancels its streams first.
var ErrStreamCancelled = errors.New("the peer cancelled the stream")

// ErrStreamsUnsupported is returned for a stream to a peer whose ENDPOINT_INFO does not
// announce streams. A peer that has sent no ENDPOINT_INFO may still accept streams.
var ErrStreamsUnsupported = errors.New("the peer does not support streams: its ENDPOINT_INFO does not announce them")

// ErrStepTimeout is returned for a stream if a step takes longer than
// [StreamOptions.StepTimeout]. It does not match [context.DeadlineExceeded]: the caller's
// context is not done.
var ErrStepTimeout = errors.New("step timeout")

// Returned for a stream to a peer that has asked to pull (TX_FLOW): its size must be
// announced first, and the peer fetches its chunks by index.
var (
	// ErrPeerPulls: the size is not known to OpenStream. Use SendStream.
	ErrPeerPulls = errors.New("the peer pulls streams: use SendStream, which announces their size")
	// ErrNotSeekable: the source of SendStream is neither a regular file nor in memory,
	// or its actual size differs from the size that it reports.
	ErrNotSeekable = errors.New("the peer pulls streams: their source must be a regular file or in memory")
)

// ErrStreamClosed is returned by the methods of a stream that this end has closed, or
// finished.
var ErrStreamClosed = errors.New("the stream is closed")

// StreamOptions are the settings of a sent stream. A zero value means its
// default, and a negative one is an error.
type StreamOptions struct {
	// Name is sent to the receiver: at most 1,024 bytes of UTF-8. Default "anonymous".
	Name string
	// ChunkBytes is the size of a frame's payload, at most 16 MiB. Published servers can't
	// send, but do receive, chunks of 4 MiB and more. Default 64 KiB.
	ChunkBytes int
	// StepTimeout bounds each single step: the acknowledgement of TX_START, the wait until
	// earlier chunks are written, the next TX_FETCH if the receiver pulls, and the
	// acknowledgement of TX_FINISH. Time spent transferring queued data over a slow connection does not
	// count, as with an [AckClock]. A longer step fails with [ErrStepTimeout]. Default: no
	// timeout but the context.
	StepTimeout time.Duration
}

func (o StreamOptions) withDefaults() (StreamOptions, error) {
	if o.Name == "" {
		o.Name = wire.Anonymous
	}
	if o.ChunkBytes == 0 {
		o.ChunkBytes = DefaultChunkBytes
	}
	if len(o.Name) > maxStreamName {
		return o, fmt.Errorf("stream name is %w: it has %d bytes, at most %d are allowed", ErrTooLarge, len(o.Name), maxStreamName)
	}
	if !utf8.ValidString(o.Name) {
		return o, fmt.Errorf("stream name %q is %w", o.Name, ErrInvalidUTF8)
	}
	if err := notNegative("StepTimeout", o.StepTimeout); err != nil {
		return o, err
	}
	if o.ChunkBytes < 1 || o.ChunkBytes > MaxPayload {
		return o, fmt.Errorf("ChunkBytes is %d: it must be 1 to %d, or 0 for its default", o.ChunkBytes, MaxPayload)
	}
	return o, nil
}

// OutgoingStream is a stream that this end sends. The protocol has no frame by which a
// sender abandons a stream: without Finish it stays incomplete at the receiver, until the
// receiver's idle timeout or the end of the session.
// One goroutine at a time may use it, but Close may be called from any goroutine. Finish or
// Close must be called; Close after Finish does nothing, so defer it.
type OutgoingStream struct {
	s         *Session
	callerCtx context.Context // passed by the caller
	ctx       context.Context // derived from callerCtx; also done when the peer cancels or this end closes the stream
	cancel    context.CancelCauseFunc
	unwatch   func() bool // stops waiting for the end of ctx; guarded by mu
	opts      StreamOptions
	tx        uint32
	pull      bool
	fetches   chan fetch // queued TX_FETCHes; nil if pull is false
	window    window
	seq       uint32 // index of the next chunk; owned by the sender

	mu       sync.Mutex   // held while a frame of the stream is queued, and while the stream is stopped
	queued   [][]outFrame // frames that the writer may not have released yet, in order
	opening  *call        // call of TX_START
	awaiting *call        // call of TX_START or TX_FINISH, until it is acknowledged
	finished bool         // the peer has acknowledged TX_FINISH
}

var _ interface {
	io.WriteCloser
	io.ReaderFrom
} = (*OutgoingStream)(nil)

// start announces the stream, and waits for the acknowledgement: a receiver may
// lose chunks that it receives before it has acknowledged.
func (st *OutgoingStream) start(size int32) error {
	err := st.await(wire.Frame{SID: st.s.id, Type: wire.TxStart, Tx: st.tx, Size: size, Payload: []byte(st.opts.Name)})
	if err != nil {
		return fmt.Errorf("opening the stream %q: %w", st.opts.Name, err)
	}
	return nil
}

// Write sends p in chunks, without waiting for more data to fill a chunk: use a
// [bufio.Writer] for many small writes. It returns when all chunks are queued, and at
// most four chunks of the default size, or one larger chunk, are unwritten.
func (st *OutgoingStream) Write(p []byte) (int, error) { return st.writeParts(p, bytes.Clone) }

// writeParts sends p in chunks. own returns the memory to send for a part of p.
func (st *OutgoingStream) writeParts(p []byte, own func(part []byte) []byte) (int, error) {
	n := 0
	for n < len(p) {
		part := p[n:min(len(p), n+st.opts.ChunkBytes)]
		if err := st.write(own(part)); err != nil {
			return n, err
		}
		n += len(part)
	}
	return n, nil
}

// uncopied sends unchanging memory without a copy, so that a stream to many sessions is in
// memory once.
type uncopied struct{ st *OutgoingStream }

func (u uncopied) Write(p []byte) (int, error) {
	return u.st.writeParts(p, func(part []byte) []byte { return part })
}

// ReadFrom sends all data of the source; each of its reads becomes a chunk. The memory of a
// [*bytes.Reader] is not copied: it must not be changed before the stream is finished, and
// never if the stream fails. Finish must still be called. The source's error is returned
// unchanged.
func (st *OutgoingStream) ReadFrom(source io.Reader) (int64, error) {
	if whole, ok := source.(*bytes.Reader); ok {
		return whole.WriteTo(uncopied{st})
	}
	var (
		sent  int64
		buf   []byte
		empty int // reads in a row
	)
	for {
		if buf == nil {
			buf = make([]byte, st.opts.ChunkBytes)
		}
		n, err := source.Read(buf)
		if n > 0 {
			chunk := buf[:n]
			if n < len(buf)/2 {
				chunk = bytes.Clone(chunk) // a small chunk must not keep a large buffer
			} else {
				buf = nil
			}
			if err := st.write(chunk); err != nil {
				return sent, err
			}
			sent += int64(n)
			empty = 0
		}
		switch {
		case err == io.EOF:
			return sent, nil
		case err != nil:
			return sent, err
		case n == 0:
			if empty++; empty == maxEmptyReads {
				return sent, io.ErrNoProgress
			}
		}
	}
}

// write sends a chunk, whose memory must not be changed afterwards. It stops the stream after an
// error, because a chunk is missing then.
func (st *OutgoingStream) write(chunk []byte) error {
	err := st.sendChunk(st.seq, chunk)
	st.seq++
	if err != nil {
		st.stop(err)
	}
	return err
}

// sendChunk waits until the window has space for a chunk, and queues it.
func (st *OutgoingStream) sendChunk(seq uint32, chunk []byte) error {
	if !st.window.acquire(len(chunk)) {
		if err := st.waitForWindow(len(chunk)); err != nil {
			return st.sendError(err)
		}
	}
	f := make([]outFrame, 1)
	f[0].Frame = wire.Frame{SID: st.s.id, Type: wire.TxChunk, Tx: st.tx, Seq: seq, Payload: chunk}
	f[0].window = &st.window
	if !st.enqueue(f) {
		return st.sendError(st.ended())
	}
	return nil
}

func (st *OutgoingStream) waitForWindow(chunk int) error {
	step := st.s.ackTimer(st.opts.StepTimeout)
	defer step.stop()
	for !st.window.acquire(chunk) {
		select {
		case <-st.window.freed:
		case <-step.C:
			if step.Tick() {
				return st.stepTimeout("earlier chunks to be written")
			}
		case <-st.s.ctx.Done():
			return st.s.Err()
		case <-st.ctx.Done():
			return st.cause()
		}
	}
	return nil
}

// cause returns the cause of the end of the stream's context.
func (st *OutgoingStream) cause() error {
	cause := context.Cause(st.ctx)
	if st.callerCtx.Err() != nil && errors.Is(cause, context.Cause(st.callerCtx)) {
		return contextError(st.callerCtx)
	}
	return cause
}

// ended returns the error by which the stream has ended, nil while it is open.
func (st *OutgoingStream) ended() error {
	if st.ctx.Err() != nil {
		return st.cause()
	}
	return st.s.Err()
}

// sendError returns an error that names the stream.
func (st *OutgoingStream) sendError(cause error) error {
	return fmt.Errorf("sending the stream %q: %w", st.opts.Name, cause)
}

// enqueue queues frames, unless the stream was stopped. stop ends the stream's context and
// withdraws queued frames under the same lock, so that no frame of a stream is queued behind
// the acknowledgement of its TX_CANCEL.
func (st *OutgoingStream) enqueue(frames []outFrame) bool {
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.ctx.Err() != nil {
		st.s.acks.drop(frames)
		return false
	}
	if c := frames[0].call; c != nil {
		st.awaiting = c
		if frames[0].Type == wire.TxStart {
			st.opening = c
		}
	}
	for len(st.queued) > 0 && st.queued[0][0].is(frameReleased) {
		st.queued[0] = nil
		st.queued = st.queued[1:]
	}
	st.queued = append(st.queued, frames)
	return st.s.writer.send(frames)
}

// announced reports whether TX_START may have been sent, so that the peer may know the
// stream.
func (st *OutgoingStream) announced() bool {
	st.mu.Lock()
	defer st.mu.Unlock()
	return st.opening != nil && st.opening.frames[0].is(frameDequeued)
}

// Finish sends TX_FINISH, which makes the stream complete, and waits for its acknowledgement,
// by which the peer confirms that the stream was delivered. The error matches
// [ErrStreamCancelled] if the peer has cancelled the stream.
func (st *OutgoingStream) Finish() error {
	defer st.stop(ErrStreamClosed)
	if err := st.await(wire.Frame{SID: st.s.id, Type: wire.TxFinish, Tx: st.tx}); err != nil {
		return fmt.Errorf("finishing the stream %q: %w", st.opts.Name, err)
	}
	st.mu.Lock()
	defer st.mu.Unlock()
	st.finished = true
	return nil
}

// await sends TX_START or TX_FINISH and waits for its acknowledgement, or for
// the end of the stream: a peer that cancels a stream does not acknowledge its
// TX_FINISH.
func (st *OutgoingStream) await(f wire.Frame) error {
	c := newCall(f)
	st.s.acks.register(c)
	if !st.enqueue(c.frames) {
		st.s.writer.cancel(c, st.ended())
	}
	step := st.s.ackTimer(st.opts.StepTimeout)
	defer step.stop()
	for waits := true; waits; {
		select {
		case <-c.done:
			waits = false
		case <-step.C:
			if step.Tick() {
				st.s.writer.cancel(c, st.stepTimeout("the acknowledgement"))
				waits = false
			}
		case <-st.ctx.Done():
			st.s.writer.cancel(c, st.cause())
			waits = false
		}
	}
	st.mu.Lock()
	st.awaiting = nil
	st.mu.Unlock()
	if errs := st.s.acks.errors(c); errs != nil {
		return errs[0]
	}
	return nil
}

func (st *OutgoingStream) stepTimeout(wanted string) error {
	return fmt.Errorf("waiting for %s: %w after %v", wanted, ErrStepTimeout, st.opts.StepTimeout)
}

// Close abandons the stream unless Finish has succeeded: no more frames of it are sent, and
// a waiting Finish returns [ErrStreamClosed]. Close returns nil only if Finish has succeeded, so
// that code that uses an [io.WriteCloser] does not regard an incomplete stream as delivered;
// otherwise it returns the error that has ended the stream. The end of the stream's context
// abandons it too.
func (st *OutgoingStream) Close() error {
	st.stop(ErrStreamClosed)
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.finished {
		return nil
	}
	return fmt.Errorf("the stream %q is not finished: %w", st.opts.Name, st.cause())
}

// stop ends the stream with a cause; the first one counts. When it returns, no frame of the
// stream is queued, and none will be. A later acknowledgement is ignored.
func (st *OutgoingStream) stop(cause error) {
	defer st.s.outgoing.remove(st) // last: TX_CANCEL for a stream that is not in the table is acknowledged without stop
	st.mu.Lock()
	defer st.mu.Unlock()
	st.unwatch()
	st.cancel(cause)
	if st.awaiting != nil {
		st.s.acks.cancel(st.awaiting, st.cause())
	}
	for _, frames := range slices.Backward(st.queued) { // backward: a frame that is dequeued meanwhile has all frames before it
		st.s.writer.withdraw(frames)
	}
	st.queued = nil
}
