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

// Streams on their way in: each runs through a scanner of its own, which cuts
// it into messages.

// acceptStreams takes the streams of a session until it ends.
func (r *receiver) acceptStreams(src *source) {
	if r.conf.streams.pull && r.conf.types[cryo.KindStream] {
		ctx, cancel := context.WithTimeout(r.stopped, flowTime)
		err := src.session.PullStreams(ctx)
		cancel()
		if err != nil && src.session.Err() == nil {
			r.log.Warnf("Session %s does not let its streams be pulled, they are pushed: %v", src.id, err)
		}
	}
	var taken sync.WaitGroup
	defer taken.Wait()
	// A session could have more streams accepted than may ever be taken, each with a
	// goroutine that waits for a place.
	accepted := make(chan struct{}, r.conf.streams.maxOpen)
	take := func(st *cryo.IncomingStream) {
		st.SetIdleTimeout(r.conf.streams.idleTimeout)
		taken.Go(func() {
			defer func() { <-accepted }()
			switch {
			case r.draining.Err() != nil:
				r.leaveStream(src, st)
			case r.wantsStream(st.Name()):
				r.scan(src, st)
			default:
				r.discard(st)
			}
		})
	}
	left := src.streams
	src.streams = nil
	for _, st := range left {
		accepted <- struct{}{}
		take(st)
	}
	for {
		select {
		case accepted <- struct{}{}:
		case <-r.draining.Done():
			return
		case <-src.session.Context().Done():
			return
		}
		st, err := src.session.AcceptStream(r.draining)
		if err != nil {
			return
		}
		r.metrics.received.Incr(1, messageTypeStream)
		take(st)
	}
}

// leaveStream keeps a stream of which nothing was read for the listener's next input.
func (r *receiver) leaveStream(src *source, st *cryo.IncomingStream) {
	r.mu.Lock()
	defer r.mu.Unlock()
	src.streams = append(src.streams, st)
}

// flowTime bounds the wait for the acknowledgement of TX_FLOW.
const flowTime = 10 * time.Second

func (r *receiver) wantsStream(name string) bool {
	return r.conf.types[cryo.KindStream] && (len(r.conf.streams.names) == 0 || slices.Contains(r.conf.streams.names, name))
}

// discard takes a stream that nobody wants to its end, and acknowledges it.
// Cancelling it would save its bytes, but to a sender that looks like a failure,
// after which it may send the stream again, and again.
func (r *receiver) discard(st *cryo.IncomingStream) {
	defer context.AfterFunc(r.stopped, func() { _ = st.Close() })()
	n, err := io.Copy(io.Discard, st)
	r.metrics.receivedBytes.Incr(n, messageTypeStream)
	if err != nil {
		_ = st.Close() // if the session has ended, the sender knows
		return
	}
	r.metrics.filtered.Incr(1, messageTypeStream)
	_ = st.Ack() // if the session has ended, nobody waits for it
}

// transfer is a stream that is being taken, until it is settled: TX_FINISH is
// acknowledged when it was read to its end and each message cut from it is
// delivered, and the stream cancelled as soon as one of these fails.
type transfer struct {
	r      *receiver
	source *source
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
		_ = t.stream.Close() // after the end of the session the sender knows
		if t.source.session.Err() == nil {
			t.r.metrics.rejected.Incr(1, messageTypeStream)
		}
	} else if err := t.stream.Ack(); err != nil {
		t.r.log.Debugf("The stream %q is delivered, but its sender can't be told and may send it again: %v", t.stream.Session().Redact(t.stream.Name()), err)
	}
	t.r.places.give(t.source)
	t.r.metrics.streamsOpen.add(-1)
}

// scan takes one stream, from its place among the open ones to its end.
func (r *receiver) scan(src *source, st *cryo.IncomingStream) {
	for {
		occupied := r.places.take(src)
		if occupied == nil {
			break
		}
		select {
		case <-occupied:
		case <-r.draining.Done():
			r.leaveStream(src, st)
			return
		case <-src.session.Context().Done():
			return
		}
	}
	if r.draining.Err() != nil {
		r.places.give(src)
		r.leaveStream(src, st)
		return
	}
	r.metrics.streamsOpen.add(1)
	// Whoever waits in Read learns of the end of the input.
	defer context.AfterFunc(r.stopped, func() { _ = st.Close() })()

	t := &transfer{r: r, source: src, stream: st, pending: 1}
	err := r.scanAll(src, t)
	if err != nil && r.stopped.Err() == nil {
		if log, ok := r.streamLog.allow(); ok {
			if _, panicked := errors.AsType[*panicError](err); panicked {
				log.Errorf("Gave up the stream %q of session %s, as the scanner %s panicked: %v", src.session.Redact(st.Name()), src.id, r.conf.streams.scanner.name, err)
			} else {
				log.Warnf("Gave up the stream %q of session %s: %v", src.session.Redact(st.Name()), src.id, err)
			}
		}
	}
	t.done(err)
}

// scanAll hands over what the scanner makes of the stream. It returns nil when
// the stream was whole and was read to its end.
func (r *receiver) scanAll(src *source, t *transfer) error {
	reader := &wholeReader{stream: t.stream, limit: r.conf.streams.maxBytes, bytes: r.metrics.receivedBytes}
	scanner, err := r.conf.streams.scanner.open(reader, t.stream.Name())
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
	defer func() { _ = scanner.Close(r.stopped) }() // it has been read to its end, or given up
	var held func() bool                            // hands over what the scanner made last
	for {
		batch, ack, err := scanner.NextBatch(r.stopped)
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
		if held != nil && !held() {
			return r.stopped.Err()
		}
		if err != nil {
			_, err = io.Copy(io.Discard, reader) // the scanner may end before the stream does
			return err
		}
		held = func() bool { return r.handOverScanned(src, t, batch, ack) }
		if ended {
			// What was compressed may be cut off though the stream is whole, and
			// its last message be a part of one: the scanner's next word tells.
			continue
		}
		if !held() {
			return r.stopped.Err()
		}
		held = nil
	}
}

// readerFailed finds what the scanner csv with continue_on_error takes for a
// faulty row, and would for ever: that there is nothing more to be read.
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

// wholeReader remembers how a stream ended. Some scanners read ahead, on a
// goroutine of their own.
type wholeReader struct {
	stream *cryo.IncomingStream
	limit  int64 // of its bytes; 0 is none
	bytes  *service.MetricCounter

	reading sync.Mutex
	read    int64

	mu    sync.Mutex
	ended bool
	err   error // never io.EOF
}

func (w *wholeReader) Read(p []byte) (int, error) {
	w.reading.Lock()
	defer w.reading.Unlock()
	n, err := w.stream.Read(p)
	w.bytes.Incr(int64(n), messageTypeStream)
	if w.read += int64(n); w.limit > 0 && w.read > w.limit {
		n, err = 0, fmt.Errorf("%w: over %d bytes", errTooLong, w.limit)
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

// state tells whether the stream was read to its end, and why that was not all.
func (w *wholeReader) state() (ended bool, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.ended, w.err
}

// Close leaves the stream to its transfer.
func (w *wholeReader) Close() error { return nil }

// scanned is a batch that a scanner has made.
type scanned struct {
	transfer *transfer
	ack      service.AckFunc // the scanner's
	release  func()          // of what is counted against the session's bound until it is settled

	mu      sync.Mutex
	settled []bool // by message
	left    int    // messages not settled
	err     error
}

// done settles one message of the batch, and with the last one the batch. Only
// its first verdict counts: what is acknowledged on receipt can still fail.
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
	_ = b.ack(context.Background(), b.err) // the scanners keep nothing that could fail
	b.transfer.done(b.err)
}

// handOverScanned hands a scanner's batch over, and reports false when the
// input ends first.
func (r *receiver) handOverScanned(src *source, t *transfer, batch service.MessageBatch, ack service.AckFunc) bool {
	if len(batch) == 0 {
		_ = ack(r.stopped, nil)
		return true
	}
	b := &scanned{transfer: t, ack: ack, settled: make([]bool, len(batch)), left: len(batch)}
	items := make([]item, len(batch))
	size := 0
	for i, m := range batch {
		if payload, err := m.AsBytes(); err == nil {
			size += len(payload)
		}
		if r.conf.includeMetadata {
			m.MetaSetMut(metaMessageType, messageTypeStream)
			m.MetaSetMut(metaStreamName, t.stream.Name())
			m.MetaSetMut(metaTxID, int64(t.stream.Tx()))
			m.MetaSetMut(metaStreamSize, t.stream.Size())
			src.describe(m)
		}
		items[i] = item{source: src, part: m, of: b, at: i}
	}
	b.release = src.session.Reserve(size)
	if !r.reserve(src, len(items)) {
		b.release()
		return false
	}
	r.setsOut(src, items)
	t.mu.Lock()
	t.pending++
	t.mu.Unlock()
	select {
	case r.arrivals <- items:
		return true
	case <-r.stopped.Done():
		b.release()
		return false
	}
}
