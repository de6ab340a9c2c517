package cryo

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"iter"

	"github.com/cryo-connect/cryo-connect/internal/wire"
)

// What a session's user calls for streams.

// OpenStream announces a stream and returns when the peer has taken it, so that
// chunks may follow. The context bounds the whole stream, Finish included; when
// it ends, the stream is abandoned.
//
// If the peer's ENDPOINT_INFO announces no streams, OpenStream returns
// [ErrStreamsUnsupported].
//
// If the peer has asked to pull (TX_FLOW), it returns [ErrPeerPulls]: the size has to
// be announced first. Use SendStream then.
func (s *Session) OpenStream(ctx context.Context, options *StreamOptions) (*OutgoingStream, error) {
	st, err := s.newStream(ctx, options)
	if err != nil {
		return nil, err
	}
	if st.pull {
		err = st.sendError(cmp.Or(st.ended(), ErrPeerPulls))
	} else {
		err = st.start(-1)
	}
	if err != nil {
		_ = st.Close()
		return nil, err
	}
	return st, nil
}

// SendStream sends all that the source has as one stream, and returns when the
// peer has acknowledged the whole. If the source fails, its error is returned
// and the stream abandoned; a source that blocks is not interrupted. See ReadFrom
// for a [*bytes.Reader], and OpenStream for a peer without streams.
//
// When the peer pulls, the stream's size is announced first, so the source must be a
// regular file, a [*bytes.Reader], a [*strings.Reader], or an [*io.SectionReader] of one
// of these; any other is [ErrNotSeekable]. It is read as the peer asks, and the stream
// fails if it has more or fewer bytes by then.
func (s *Session) SendStream(ctx context.Context, source io.Reader, options *StreamOptions) error {
	st, err := s.newStream(ctx, options)
	if err != nil {
		return err
	}
	defer st.stop(ErrStreamClosed)
	if st.pull {
		x, ok := indexedSource(source)
		if !ok {
			return st.sendError(cmp.Or(st.ended(), ErrNotSeekable))
		}
		return st.serve(x)
	}
	if err := st.start(-1); err != nil {
		return err
	}
	if _, err := st.ReadFrom(source); err != nil {
		return err
	}
	return st.Finish()
}

func (s *Session) newStream(ctx context.Context, options *StreamOptions) (*OutgoingStream, error) {
	var opts StreamOptions
	if options != nil {
		opts = *options
	}
	opts, err := opts.withDefaults()
	if err != nil {
		return nil, err
	}
	st := &OutgoingStream{s: s, callerCtx: ctx, opts: opts, window: window{freed: make(chan struct{}, 1)}}
	st.ctx, st.cancel = context.WithCancelCause(ctx)
	s.outgoing.add(st)
	if s.streamless.Load() { // asked last, or an ENDPOINT_INFO that comes now could be missed
		st.stop(ErrStreamsUnsupported)
		return nil, st.sendError(ErrStreamsUnsupported)
	}
	return st, nil
}

// AcceptStream waits for the next stream that the peer announces, of one of the
// names, or of any if there are none. The peer sends nothing of it before the
// first Read. At most 256 streams of a session are announced or open: a further one is
// cancelled, or the one that waits longest to be accepted, if that is longer than
// [SessionOptions.StreamIdleTimeout]. Streams that wait are not cancelled otherwise.
// After the end of the session there are none: those that nobody has accepted hold no
// data.
func (s *Session) AcceptStream(ctx context.Context, names ...string) (*IncomingStream, error) {
	for {
		if err := s.Err(); err != nil {
			return nil, err
		}
		st, changed := s.incoming.accept(names)
		if st != nil {
			return st, nil
		}
		select {
		case <-changed:
		case <-s.ctx.Done():
			return nil, s.Err()
		case <-ctx.Done():
			return nil, contextError(ctx)
		}
	}
}

// Streams returns an iterator over the streams that AcceptStream returns. A yielded stream
// is the caller's, to be acknowledged or closed. The iterator ends after its only error,
// which it yields with a nil stream: the session's after its end, or the context's. A loop
// may stop at any stream: what was not yielded is left for the next call.
func (s *Session) Streams(ctx context.Context, names ...string) iter.Seq2[*IncomingStream, error] {
	return each(func() (*IncomingStream, error) { return s.AcceptStream(ctx, names...) })
}

// PullStreams asks the peer to send the streams that it opens from then on only as
// they are wanted (TX_FLOW), and waits for its acknowledgement. The peer announces each
// stream's size then, and sends a chunk when it is asked for, at the price of a round
// trip a chunk. Without it streams are pushed: chunks come as fast as the network and
// MaxBufferBytes let them. The published Node client can't be pulled from: it stops
// working.
func (s *Session) PullStreams(ctx context.Context) error {
	s.incoming.startPulling()
	if err := s.sendFrame(ctx, wire.Frame{SID: s.id, Type: wire.TxFlow, Flow: wire.FlowPull}); err != nil {
		return fmt.Errorf("asking to pull streams: %w", err)
	}
	return nil
}
