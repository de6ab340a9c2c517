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

// Incoming streams: each runs through a scanner of its own, which cuts it into messages.

// acceptStreams accepts the streams of a session until it ends or the engine stops reading.
func (f *sessionFeed) acceptStreams() {
	if f.conf.streams.pull && f.conf.types[cryo.KindStream] {
		ctx, cancel := context.WithTimeout(f.stopped, pullTimeout)
		err := f.session.PullStreams(ctx)
		cancel()
		if err != nil && f.session.Err() == nil {
			if log, ok := f.pullLog.allow(); ok {
				log.With("session", f.id).Warnf("The session does not let its streams be pulled, they are pushed: %v", err)
			}
		}
	}
	var open sync.WaitGroup
	defer open.Wait()
	// A session could have more streams accepted than may ever be open, each with a
	// goroutine that waits for a slot.
	accepted := make(chan struct{}, f.conf.streams.maxOpen)
	receive := func(st *cryo.IncomingStream) {
		st.SetIdleTimeout(f.conf.streams.idleTimeout)
		open.Go(func() {
			defer func() { <-accepted }()
			switch {
			case f.draining.Err() != nil:
				f.leaveStream(st)
			case f.conf.receivesStream(st.Name()):
				f.receiveStream(st)
			default:
				f.discardStream(st)
			}
		})
	}
	left := f.streams
	f.streams = nil
	for _, st := range left {
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

// pullTimeout bounds the wait for the acknowledgement of TX_FLOW.
const pullTimeout = 10 * time.Second

// leaveStream leaves a stream of which nothing was read to the listener's next input.
func (f *sessionFeed) leaveStream(st *cryo.IncomingStream) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.streams = append(f.streams, st)
}

func (c *receiveConfig) receivesStream(name string) bool {
	return c.types[cryo.KindStream] && (len(c.streams.names) == 0 || slices.Contains(c.streams.names, name))
}

// discardStream reads a stream that no field asks for to its end, and acknowledges it.
// Cancelling it would save its bytes, but to a sender that looks like a failure, after
// which it may send the stream again, and again.
func (f *sessionFeed) discardStream(st *cryo.IncomingStream) {
	defer context.AfterFunc(f.stopped, func() { _ = st.Close() })()
	n, err := io.Copy(io.Discard, st)
	f.metrics.receivedBytes.Incr(n, messageTypeStream)
	if err != nil {
		_ = st.Close() // if the session has ended, the sender knows
		return
	}
	f.metrics.filtered.Incr(1, messageTypeStream)
	_ = st.Ack() // if the session has ended, nobody waits for it
}

// transfer is an open stream until it is settled: TX_FINISH is acknowledged when it was
// read to its end and each message cut from it is delivered, and the stream is cancelled as
// soon as one of these fails.
type transfer struct {
	feed   *sessionFeed
	stream *cryo.IncomingStream

	mu      sync.Mutex
	pending int // batches not settled, and the scan itself
	settled bool
}

func (t *transfer) isSettled() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.settled
}

// begin adds a batch.
func (t *transfer) begin() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.pending++
}

// done settles one batch, or the scan.
func (t *transfer) done(err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.pending--
	if t.settled || err == nil && t.pending > 0 {
		return
	}
	t.settled = true
	if err != nil {
		_ = t.stream.Close() // if the session has ended, the sender knows
		if t.feed.session.Err() == nil {
			t.feed.metrics.rejected.Incr(1, messageTypeStream)
		}
	} else if err := t.stream.Ack(); err != nil {
		t.feed.log.With("stream", t.feed.session.Redact(t.stream.Name())).Debugf("Delivered, but not acknowledged; the sender may send it again: %v", err)
	}
	t.feed.slots.Release(1)
	t.feed.metrics.streamsOpen.add(-1)
}

// receiveStream scans one stream as soon as it has a slot.
func (f *sessionFeed) receiveStream(st *cryo.IncomingStream) {
	if !f.acquireSlot() {
		if f.draining.Err() != nil {
			f.leaveStream(st)
		}
		return // else the session has ended, and nothing was read
	}
	f.metrics.streamsOpen.add(1)
	// The end of the input interrupts a Read that waits.
	defer context.AfterFunc(f.stopped, func() { _ = st.Close() })()

	t := &transfer{feed: f, stream: st, pending: 1}
	err := f.scan(t)
	if err != nil && f.stopped.Err() == nil {
		if log, ok := f.streamLog.allow(); ok {
			log = log.With("session", f.id, "stream", f.session.Redact(st.Name()))
			if _, panicked := errors.AsType[*panicError](err); panicked {
				log.With("scanner", f.conf.streams.scanner.name).Errorf("Gave up the stream: the scanner panicked: %v", err)
			} else {
				log.Warnf("Gave up the stream: %v", err)
			}
		}
	}
	t.done(err)
}

// acquireSlot waits for the slot of a stream. It returns false if the engine stops reading
// or the session ends first.
func (f *sessionFeed) acquireSlot() bool {
	acquired := f.slots.TryAcquire(1)
	if !acquired {
		r := f.slots.Request(1)
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
		f.slots.Release(1)
		return false
	}
	return acquired
}

// scan hands over what the scanner makes of the stream. It returns nil if the stream was
// whole and was read to its end.
func (f *sessionFeed) scan(t *transfer) error {
	reader := &streamReader{stream: t.stream, maxBytes: f.conf.streams.maxBytes, bytes: f.metrics.receivedBytes}
	scanner, err := f.conf.streams.scanner.open(reader, t.stream.Name())
	if err != nil {
		_, failure := reader.state()
		switch {
		case failure != nil:
			return failure
		case errors.Is(err, io.EOF):
			// An empty stream, where the scanner wants a header.
			_, err = io.Copy(io.Discard, reader)
			return err
		default:
			return fmt.Errorf("scanner: %w", err)
		}
	}
	defer func() { _ = scanner.Close(f.stopped) }() // it was read to its end, or has failed
	var deliver func() bool                         // hands over the scanner's last batch
	for {
		batch, ack, err := scanner.NextBatch(f.stopped)
		ended, failure := reader.state()
		if failure != nil {
			// Some scanners make a last message of what came before the
			// reader failed. It may be a part of one: it goes no further.
			return failure
		}
		if err == nil {
			err = readerFailed(batch)
		}
		if err != nil && !errors.Is(err, io.EOF) {
			return fmt.Errorf("scanner: %w", err)
		}
		if deliver != nil && !deliver() {
			return f.stopped.Err()
		}
		if err != nil {
			_, err = io.Copy(io.Discard, reader) // the scanner may end before the stream does
			return err
		}
		deliver = func() bool { return f.deliverScanned(t, batch, ack) }
		if ended {
			// Compressed content may be truncated though the stream is whole, and its
			// last message be a part of one: the scanner's next result shows that.
			continue
		}
		if !deliver() {
			return f.stopped.Err()
		}
		deliver = nil
	}
}

// readerFailed returns the error of a failed reader, which the scanner csv with
// continue_on_error reports as a faulty row, for ever.
func readerFailed(batch service.MessageBatch) error {
	for _, m := range batch {
		var row *csv.ParseError
		if err := m.GetError(); err != nil && !errors.As(err, &row) {
			return err
		}
	}
	return nil
}

// errTooLong is the end of a stream that has more than max_bytes, or one of whose
// messages has.
var errTooLong = errors.New("the stream is too long")

// streamReader is what a scanner reads: the stream, with its bound, and how it ended. Some
// scanners read ahead, on a goroutine of their own.
type streamReader struct {
	stream   *cryo.IncomingStream
	maxBytes int64 // of the stream; 0: any number
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
		n, err = 0, fmt.Errorf("%w: over %d bytes", errTooLong, w.maxBytes)
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

// state reports whether the stream was read to its end, and the error if it was not whole.
func (w *streamReader) state() (ended bool, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.ended, w.err
}

// Close does nothing: the stream belongs to its transfer.
func (w *streamReader) Close() error { return nil }

// scanned is a batch that a scanner has made.
type scanned struct {
	transfer *transfer
	ack      service.AckFunc // the scanner's
	release  func()          // of what is reserved in the session's receive buffer

	mu      sync.Mutex
	settled []bool // by message
	left    int    // messages not settled
	err     error
}

// done settles one message of the batch, and with the last one the batch. Only its first
// verdict counts: what is acknowledged on receipt can still fail.
func (b *scanned) done(at int, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.settled[at] {
		return
	}
	b.settled[at] = true
	if err != nil {
		b.err = err
	}
	if b.left--; b.left > 0 {
		return
	}
	b.release()
	_ = b.ack(context.Background(), b.err) // the scanners have nothing that could fail
	b.transfer.done(b.err)
}

func (b *scanned) stream() *cryo.IncomingStream { return b.transfer.stream }

// movable is false when the stream is cancelled, as one is that was not read to its end.
func (b *scanned) movable() bool { return !b.transfer.isSettled() }

// deliverScanned hands a scanner's batch over, in parts if it is larger than what the client
// may have in flight. It returns false if the input ends first.
func (f *sessionFeed) deliverScanned(t *transfer, batch service.MessageBatch, ack service.AckFunc) bool {
	if len(batch) == 0 {
		_ = ack(f.stopped, nil)
		return true
	}
	b := &scanned{transfer: t, ack: ack, settled: make([]bool, len(batch)), left: len(batch)}
	items := make([]item, len(batch))
	size := 0
	for i, m := range batch {
		if payload, err := m.AsBytes(); err == nil {
			size += len(payload)
		}
		if f.conf.includeMetadata {
			m.MetaSetMut(metaMessageType, messageTypeStream)
			m.MetaSetMut(metaStreamName, t.stream.Name())
			m.MetaSetMut(metaTxID, int64(t.stream.Tx()))
			m.MetaSetMut(metaStreamSize, t.stream.Size())
			f.describe(m)
		}
		items[i] = item{source: &f.source, part: m, of: b, at: i}
	}
	b.release = f.session.Reserve(size)
	t.begin()
	if left := f.queue.deliver(items); len(left) > 0 {
		b.release() // the stream is cancelled, with the rest of the batch
		return false
	}
	return true
}
