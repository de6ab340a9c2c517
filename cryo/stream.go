package cryo

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"iter"

	"github.com/cryo-connect/cryo-connect/internal/wire"
)

// OpenStream announces a stream and returns when the peer has accepted it, so that
// chunks may follow. The context bounds the whole stream, Finish included; when
// it is done, the stream is abandoned.
//
// If the peer's ENDPOINT_INFO announces no streams, OpenStream returns
// [ErrStreamsUnsupported].
//
// If the peer has asked to pull (TX_FLOW), it returns [ErrPeerPulls], because the size must
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

// SendStream sends all data of the source as one stream, and returns when the
// peer has acknowledged the whole stream. If the source fails, its error is returned
// and the stream abandoned; a source that blocks is not interrupted. See ReadFrom
// for a [*bytes.Reader], and OpenStream for a peer without streams.
//
// When the peer pulls, the stream's size is announced first, so the source must be a
// regular file, a [*bytes.Reader], a [*strings.Reader], or an [*io.SectionReader] of one
// of these; any other returns [ErrNotSeekable]. The source is read as the peer fetches
// chunks, and the stream fails if its size has changed by then. A name whose fifth byte is 0 or 1
// can't be sent then: the peer would mistake it for a frame of CAMP, a successor to Cryo.
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
	if s.streamless.Load() { // after add: handleEndpointInfo stops the streams in the table
		st.stop(ErrStreamsUnsupported)
		return nil, st.sendError(ErrStreamsUnsupported)
	}
	return st, nil
}

// AcceptStream waits for the next stream that the peer announces with one of the names, or with any
// name if none is given. The peer sends no data before the first Read. At most 256 streams of a
// session are announced or open: if there are more, the oldest one that is not accepted is
// cancelled if it has waited for longer than [SessionOptions.StreamIdleTimeout], else the new one.
// Otherwise, announced streams are not cancelled. After the end of the session AcceptStream returns
// the error of [Session.Err]: streams that were not accepted have no data.
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
// may stop at any stream: the remaining streams are left for the next call.
func (s *Session) Streams(ctx context.Context, names ...string) iter.Seq2[*IncomingStream, error] {
	return each(func() (*IncomingStream, error) { return s.AcceptStream(ctx, names...) })
}

// PullStreams asks the peer to send the streams that it opens from then on only on request
// (TX_FLOW), and waits for its acknowledgement. The peer then announces each stream's size, and
// sends a chunk when this end fetches it, at the cost of a round trip per chunk. Without
// PullStreams, streams are pushed: the peer sends chunks as fast as the network and MaxBufferBytes
// allow. Its error is the peer's rejection, the context's, or the session's end. Do not pull from
// the published Node client: it stops working.
func (s *Session) PullStreams(ctx context.Context) error {
	s.incoming.startPulling()
	if err := s.sendFrame(ctx, wire.Frame{SID: s.id, Type: wire.TxFlow, Flow: wire.FlowPull}); err != nil {
		return fmt.Errorf("asking to pull streams: %w", err)
	}
	return nil
}
