package cryo

import (
	"bytes"
	"fmt"
	"io"
	"math"
	"os"
	"strings"

	"github.com/cryo-connect/cryo-connect/internal/wire"
)

// maxFetches bounds the queued TX_FETCHes of one stream; further ones are
// dropped.
const maxFetches = 64

// fetch is a request for chunks: a half-open range of indexes.
type fetch struct{ start, end uint32 }

// indexed is a source whose bytes can be read at any offset, repeatedly.
type indexed struct {
	source     io.ReaderAt
	from, size int64
}

// indexedSource returns the data of a source from its position to its end, if it can be read at
// any offset, and moves the position to the end. It returns false, and does not move the
// position, if the source's actual size differs from the size that it reports, as that of files
// in /proc and /sys does.
func indexedSource(source io.Reader) (*indexed, bool) {
	size, known := sizeOf(source)
	if !known {
		return nil, false
	}
	at := source.(interface {
		io.ReaderAt
		io.Seeker
	})
	from, err := at.Seek(0, io.SeekCurrent)
	if err != nil {
		return nil, false
	}
	size = max(size, from) // the position may be behind the end
	last := max(from, size-1)
	var probe [2]byte
	if n, err := at.ReadAt(probe[:], last); int64(n) != size-last || err != io.EOF { //nolint:errorlint // io.ReaderAt returns it unwrapped
		return nil, false
	}
	if _, err := at.Seek(size, io.SeekStart); err != nil {
		return nil, false
	}
	return &indexed{at, from, size - from}, true
}

// sizeOf returns the size of a source that is a regular file or in memory. Others, such as
// devices, may report a size that is not their own.
func sizeOf(source any) (size int64, known bool) {
	switch source := source.(type) {
	case *bytes.Reader:
		return source.Size(), true
	case *strings.Reader:
		return source.Size(), true
	case *io.SectionReader:
		outer, _, _ := source.Outer()
		_, known := sizeOf(outer)
		return source.Size(), known
	case *os.File:
		info, err := source.Stat()
		if err != nil || !info.Mode().IsRegular() {
			return 0, false
		}
		return info.Size(), true
	default:
		return 0, false
	}
}

// chunk reads the chunk with this index. The last chunk may be shorter than chunkBytes. It
// fails if the source has grown or shrunk.
func (x *indexed) chunk(i uint32, chunkBytes int64) ([]byte, error) {
	start := int64(i) * chunkBytes
	size := min(chunkBytes, x.size-start)
	want := size
	if start+size == x.size {
		want++ // detects a source that has grown
	}
	chunk := make([]byte, want)
	n, err := x.source.ReadAt(chunk, x.from+start)
	switch {
	case int64(n) == size && (want == size || err == io.EOF):
		return chunk[:size:size], nil
	case int64(n) > size:
		return nil, fmt.Errorf("the source has grown: it has more than the announced %d bytes", x.size)
	case err == io.EOF:
		return nil, fmt.Errorf("the source has shrunk: it has fewer than the announced %d bytes: %w", x.size, io.ErrUnexpectedEOF)
	default:
		return nil, err
	}
}

// serve announces the source's size and sends the chunks that the peer fetches.
// TX_FINISH follows the range that includes the last chunk.
func (st *OutgoingStream) serve(x *indexed) error {
	if x.size > math.MaxInt32 {
		return fmt.Errorf("stream %q of %d bytes is %w: the peer pulls, and only streams below 2 GiB can be pulled", st.opts.Name, x.size, ErrTooLarge)
	}
	announced := wire.Frame{Type: wire.TxStart, Size: int32(x.size), Payload: []byte(st.opts.Name)}
	if announced.IsCAMP() {
		return fmt.Errorf("stream name %q can't be sent to a peer that pulls: its fifth byte must not be 0 or 1", st.opts.Name)
	}
	if err := st.start(int32(x.size)); err != nil {
		return err
	}
	chunkBytes := int64(st.opts.ChunkBytes)
	count := uint32((x.size + chunkBytes - 1) / chunkBytes)
	step := st.s.ackTimer(st.opts.StepTimeout)
	defer func() { step.stop() }()
	reached := int64(-1) // highest end of a fetch: only a higher one restarts the timeout
	for {
		asked, err := st.nextFetch(step)
		if err != nil {
			return st.sendError(err)
		}
		for i := asked.start; i < min(asked.end, count); i++ {
			chunk, err := x.chunk(i, chunkBytes)
			if err != nil {
				return err
			}
			if err := st.sendChunk(i, chunk); err != nil {
				return err
			}
		}
		if asked.end >= count {
			return st.Finish()
		}
		if int64(asked.end) > reached {
			reached = int64(asked.end)
			step.stop()
			step = st.s.ackTimer(st.opts.StepTimeout)
		}
	}
}

func (st *OutgoingStream) nextFetch(step *ackTimer) (fetch, error) {
	for {
		select {
		case f := <-st.fetches:
			return f, nil
		case <-step.C:
			if step.Tick() {
				return fetch{}, st.stepTimeout("the peer to pull")
			}
		case <-st.s.ctx.Done():
			return fetch{}, st.s.Err()
		case <-st.ctx.Done():
			return fetch{}, st.cause()
		}
	}
}
