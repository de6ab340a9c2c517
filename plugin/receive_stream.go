package plugin

import (
	"context"
	"encoding/csv"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"time"

	"github.com/redpanda-data/benthos/v4/public/service"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// Incoming streams. A scanner splits each stream into messages.

// acceptStreams receives the streams of a session until the session ends or the engine stops
// reading. With flow_control: pull, it first asks the peer to send chunks only on request.
func (f *sessionFeed) acceptStreams() {
	if f.conf.streams.pull && f.conf.types[cryo.KindStream] {
		ctx, cancel := context.WithTimeout(f.stopped, pullTimeout)
		err := f.session.PullStreams(ctx)
		cancel()
		if err != nil && f.session.Err() == nil {
			if log, ok := f.pullLog.allow(); ok {
				log.With("session", f.id, "error", err).Warn("Cannot pull streams from a session: falling back to push")
			}
		}
	}
	var open sync.WaitGroup
	defer open.Wait()
	// Limits the number of streams that are accepted at the same time, because each has a
	// goroutine, even while it waits for a slot.
	accepted := make(chan struct{}, f.conf.streams.maxOpen)
	receive := func(st *cryo.IncomingStream) {
		st.SetIdleTimeout(f.conf.streams.idleTimeout)
		open.Go(func() {
			defer func() { <-accepted }()
			switch {
			case f.draining.Err() != nil:
				f.retainStream(st)
			case f.conf.receivesStream(st.Name()):
				f.receiveStream(st)
			default:
				f.discardStream(st)
			}
		})
	}
	retained := f.streams
	f.streams = nil
	for _, st := range retained {
		accepted <- struct{}{}
		receive(st)
	}
	for {
		select {
		case accepted <- struct{}{}:
		case <-f.draining.Done():
			return
		case <-f.session.Context().Done():
			return
		}
		st, err := f.session.AcceptStream(f.draining)
		if err != nil {
			return
		}
		f.metrics.received.Incr(1, messageTypeStream)
		receive(st)
	}
}

// pullTimeout is the maximum time to wait for the acknowledgement of TX_FLOW.
const pullTimeout = 10 * time.Second

// retainStream keeps an unread stream for the next input of the listener.
func (f *sessionFeed) retainStream(st *cryo.IncomingStream) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.streams = append(f.streams, st)
}

func (c *receiveConfig) receivesStream(name string) bool {
	return c.types[cryo.KindStream] && (len(c.streams.names) == 0 || slices.Contains(c.streams.names, name))
}

// discardStream reads an excluded stream to its end and acknowledges it. Cancelling it would
// avoid transferring its bytes, but its sender may treat that as a failure and send the stream
// again.
func (f *sessionFeed) discardStream(st *cryo.IncomingStream) {
	defer context.AfterFunc(f.stopped, func() { _ = st.Close() })()
	n, err := io.Copy(io.Discard, st)
	f.metrics.receivedBytes.Incr(n, messageTypeStream)
	if err != nil {
		_ = st.Close() // fails only if the session has ended
		return
	}
	f.metrics.filtered.Incr(1, messageTypeStream)
	_ = st.Ack() // fails only if the session has ended
}

// transfer is a stream that is being received. Its TX_FINISH is acknowledged when it has been
// read to its end and all its messages have been delivered. It is cancelled if it cannot be
// read, or one of its messages fails.
type transfer struct {
	feed   *sessionFeed
	stream *cryo.IncomingStream

	released chan struct{} // capacity 1; signals that held has decreased, or settled is set

	mu      sync.Mutex
	pending int  // number of batches without a result, plus one until the scan has ended
	held    int  // bytes of the messages of these batches
	settled bool // whether the stream has been acknowledged or cancelled
}

func (t *transfer) isSettled() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.settled
}

// begin counts a batch of the given size until done is called with its result. It returns false,
// and counts nothing, while earlier batches of the stream leave no capacity for it.
func (t *transfer) begin(size int) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.held > 0 && !t.settled && int64(t.held)+int64(size) > t.feed.conf.streams.maxHeld() {
		return false
	}
	t.pending++
	t.held += size
	return true
}

// release releases the bytes of a batch that has a result.
func (t *transfer) release(size int) {
	t.mu.Lock()
	t.held -= size
	t.mu.Unlock()
	t.signal()
}

func (t *transfer) signal() {
	select {
	case t.released <- struct{}{}:
	default:
	}
}

// done sets the result of a batch or of the scan. It cancels the stream after an error, and
// acknowledges it after the last result.
func (t *transfer) done(err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.pending--
	if t.settled || err == nil && t.pending > 0 {
		return
	}
	t.settled = true
	t.signal()
	if err != nil {
		_ = t.stream.Close() // fails only if the session has ended
		if t.feed.session.Err() == nil {
			t.feed.metrics.rejected.Incr(1, messageTypeStream)
		}
	} else if err := t.stream.Ack(); err != nil {
		t.feed.log.With("stream", t.feed.session.Redact(t.stream.Name()), "error", err).Debug("Cannot acknowledge a delivered stream: its sender may send it again")
	}
	t.feed.quota.slots.Release(1)
	t.feed.metrics.streamsOpen.add(-1)
}

// receiveStream waits for a slot and scans a stream. If the engine stops reading first, it
// keeps the stream for the next input.
func (f *sessionFeed) receiveStream(st *cryo.IncomingStream) {
	if !f.acquireSlot() {
		if f.draining.Err() != nil {
			f.retainStream(st)
		}
		return // otherwise, the session has ended
	}
	f.metrics.streamsOpen.add(1)
	// Closing the input interrupts a blocked Read.
	defer context.AfterFunc(f.stopped, func() { _ = st.Close() })()

	t := &transfer{feed: f, stream: st, pending: 1, released: make(chan struct{}, 1)}
	err := f.scan(t)
	if err != nil && f.stopped.Err() == nil && !t.isSettled() { // otherwise, the cause was logged when the stream was cancelled
		if log, ok := f.streamLog.allow(); ok {
			log = log.With("session", f.id, "stream", f.session.Redact(st.Name()), "error", err)
			if _, panicked := errors.AsType[*panicError](err); panicked {
				log.With("scanner", f.conf.streams.scanner.name).Error("Stream failed: the scanner panicked")
			} else {
				log.Warn("Stream failed")
			}
		}
	}
	t.done(err)
}

// acquireSlot waits for a slot for a stream. It returns false if the engine stops reading or
// the session ends first.
func (f *sessionFeed) acquireSlot() bool {
	acquired := f.quota.slots.TryAcquire(1)
	if !acquired {
		r := f.quota.slots.Request(1)
		select {
		case <-r.Granted():
			acquired = true
		case <-f.draining.Done():
			r.Cancel()
		case <-f.session.Context().Done():
			r.Cancel()
		}
	}
	if acquired && f.draining.Err() != nil {
		f.quota.slots.Release(1)
		return false
	}
	return acquired
}

// scan delivers the scanner's batches to the pipeline. It returns nil if the stream was
// complete and was read to its end.
func (f *sessionFeed) scan(t *transfer) error {
	reader := &streamReader{stream: t.stream, maxBytes: f.conf.streams.maxBytes, bytes: f.metrics.receivedBytes}
	scanner, err := f.conf.streams.scanner.open(reader, t.stream.Name())
	if err != nil {
		_, failure := reader.state()
		switch {
		case failure != nil:
			return failure
		case errors.Is(err, io.EOF):
			// The stream is empty, and the scanner requires a header.
			_, err = io.Copy(io.Discard, reader)
			return err
		default:
			return f.scannerError(err)
		}
	}
	defer func() { _ = scanner.Close(f.stopped) }() // an error would not change the result of the stream
	var deliver func() bool                         // delivers the scanner's previous batch
	for {
		if t.isSettled() { // one of its messages was rejected, and so is the rest
			return errCancelled
		}
		batch, ack, err := scanner.NextBatch(f.stopped)
		ended, failure := reader.state()
		if failure != nil {
			// Some scanners return the bytes before the failure as a last message, which may
			// be incomplete: it is dropped.
			return failure
		}
		if err == nil {
			err = readerFailed(batch)
		}
		if err != nil && err != io.EOF { //nolint:errorlint // json_array wraps io.EOF if the array is truncated
			return f.scannerError(err)
		}
		if deliver != nil && !deliver() {
			return f.stopped.Err()
		}
		if err != nil {
			_, err = io.Copy(io.Discard, reader) // the scanner may stop reading before the end of the stream
			return err
		}
		size := sizeOf(batch)
		if limit := f.conf.streams.maxBytes; limit > 0 && int64(size)-readAhead > limit*int64(len(batch)) {
			return tooLarge(limit)
		}
		deliver = func() bool { return f.deliverScanned(t, batch, size, ack) }
		if ended {
			// Compressed content may be truncated although the stream is complete. In that case its
			// last message is incomplete, which the scanner's next result reports.
			continue
		}
		if !deliver() {
			return f.stopped.Err()
		}
		deliver = nil
	}
}

// scannerError returns the error of a scanner, whose text may repeat any part of the stream: it is
// truncated, and contains no secret of the session. A panic is reported with its origin.
func (f *sessionFeed) scannerError(err error) error {
	hint := scannerHint(err)
	if panicked, ok := errors.AsType[*panicError](err); ok {
		err = &panicError{f.session.Redact(fmt.Sprintf("%.200v", panicked.value)), panicked.where}
	} else if !errors.Is(err, errTooLong) {
		err = errors.New(f.session.Redact(err.Error()))
	}
	return fmt.Errorf("scanner: %w%s", err, hint)
}

// readerFailed returns the error of the scanner's reader if the messages of a batch carry it, and
// otherwise nil. The csv scanner with continue_on_error returns such batches repeatedly, as if a
// row were invalid.
func readerFailed(batch service.MessageBatch) error {
	for _, m := range batch {
		var row *csv.ParseError
		if err := m.GetError(); err != nil && !errors.As(err, &row) {
			return err
		}
	}
	return nil
}

var errCancelled = errors.New("stream cancelled")

// errTooLong is the error of a stream that exceeds max_bytes, or has a message that does.
var errTooLong = errors.New("stream exceeds max_bytes")

// streamReader is the reader that a scanner reads a stream from. It limits the length of the
// stream, and records how the stream ended. A scanner that reads ahead may use it on a
// goroutine of its own.
type streamReader struct {
	stream   *cryo.IncomingStream
	maxBytes int64 // 0 means no limit
	bytes    *service.MetricCounter

	reading sync.Mutex
	read    int64

	mu    sync.Mutex
	ended bool
	err   error // never io.EOF
}

func (w *streamReader) Read(p []byte) (int, error) {
	w.reading.Lock()
	defer w.reading.Unlock()
	n, err := w.stream.Read(p)
	w.bytes.Incr(int64(n), messageTypeStream)
	if w.read += int64(n); w.maxBytes > 0 && w.read > w.maxBytes {
		n, err = 0, fmt.Errorf("%w (%d)", errTooLong, w.maxBytes)
	}
	if err != nil {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.ended = true
		if !errors.Is(err, io.EOF) {
			w.err = err
		}
	}
	return n, err
}

// state reports whether reading has ended, and returns the error if it ended before the end of
// the stream.
func (w *streamReader) state() (ended bool, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.ended, w.err
}

// Close does nothing: the stream belongs to its transfer.
func (w *streamReader) Close() error { return nil }

// scannedBatch is a batch of messages that a scanner has returned. It owns the items of these
// messages.
type scannedBatch struct {
	transfer *transfer
	ack      service.AckFunc // returned by the scanner for the batch
	release  func()          // releases the batch's part of the receive buffer

	mu      sync.Mutex
	settled []bool // whether a message has a result, by its index
	left    int    // number of messages without a result
	err     error
}

// done sets the result of a message, and after the last message that of the batch. Only the
// first result of a message counts, because a message that was acknowledged on receipt may
// still fail later.
func (b *scannedBatch) done(index int, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.settled[index] {
		return
	}
	b.settled[index] = true
	if err != nil {
		b.err = err
	}
	if b.left--; b.left > 0 {
		return
	}
	b.release()
	_ = b.ack(context.Background(), b.err) // ends in the AckFunc of scanner.open, which returns nil
	b.transfer.done(b.err)
}

func (b *scannedBatch) stream() *cryo.IncomingStream { return b.transfer.stream }

// movable reports whether another input can deliver the messages. It cannot if the stream was
// cancelled, for example because it was not read to its end.
func (b *scannedBatch) movable() bool { return !b.transfer.isSettled() }

// sizeOf returns the size of the contents of a batch, in bytes.
func sizeOf(batch service.MessageBatch) (size int) {
	for _, m := range batch {
		if content, err := m.AsBytes(); err == nil {
			size += len(content)
		}
	}
	return size
}

// deliverScanned delivers a scanner's batch of the given size to the pipeline, in parts if it
// exceeds the client's quota. It waits while earlier batches of the stream leave no capacity for
// it: messages can be much larger than the bytes that they are made of, as rows of CSV with long
// names of columns, so the receive buffer alone does not bound them. ack is the function that the
// scanner returned with it. It returns false if the input closes first.
func (f *sessionFeed) deliverScanned(t *transfer, batch service.MessageBatch, size int, ack service.AckFunc) bool {
	if len(batch) == 0 {
		_ = ack(f.stopped, nil)
		return true
	}
	b := &scannedBatch{transfer: t, ack: ack, settled: make([]bool, len(batch)), left: len(batch)}
	items := make([]item, len(batch))
	for i, m := range batch {
		if f.conf.includeMetadata {
			m.MetaSetMut(metaMessageType, messageTypeStream)
			m.MetaSetMut(metaStreamName, t.stream.Name())
			m.MetaSetMut(metaTxID, int64(t.stream.Tx()))
			m.MetaSetMut(metaStreamSize, t.stream.Size())
			f.describe(m)
		}
		items[i] = item{source: &f.source, part: m, owner: b, index: i}
	}
	if !t.begin(size) && !f.awaitRelease(t, size) {
		return false
	}
	release := f.session.Reserve(size)
	b.release = func() { release(); t.release(size) }
	if left := f.queue.deliver(items); len(left) > 0 {
		b.release() // the caller cancels the stream
		return false
	}
	return true
}

// awaitRelease waits until begin counts a batch of the given size. It returns false if the input
// closes first.
func (f *sessionFeed) awaitRelease(t *transfer, size int) bool {
	f.queue.heldBack.Add(1)
	defer f.queue.heldBack.Add(-1)
	for !t.begin(size) {
		if !f.await(t.released) {
			return false
		}
	}
	return true
}
