package cryo

import (
	"bytes"
	"fmt"
	"io"
	"math"
	"os"
	"strings"
)

// maxFetches is how many TX_FETCH of one stream wait to be served; more are
// forgotten.
const maxFetches = 64

// fetch asks for chunks by index, half open.
type fetch struct{ start, end uint32 }

// indexed is a source whose bytes can be read by index, again and again.
type indexed struct {
	source     io.ReaderAt
	from, size int64
}

// indexedSource returns what a source has from its position to its end, if that can be
// read by index, and moves the position there. A source with another size than it reports
// is left as it is: those of files in /proc and /sys are made up.
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
	size = max(size, from) // behind the end there is nothing
	last := max(from, size-1)
	var probe [2]byte
	if n, err := at.ReadAt(probe[:], last); int64(n) != size-last || err != io.EOF { //nolint:errorlint // a source's own
		return nil, false
	}
	if _, err := at.Seek(size, io.SeekStart); err != nil {
		return nil, false
	}
	return &indexed{at, from, size - from}, true
}

// sizeOf returns the size of a source that has one: a regular file, or what is in memory.
// What others report, such as a device, need not be all that they have.
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

// chunk reads the chunk with this index. The last one may be shorter than chunkBytes, and
// must still be the last.
func (x *indexed) chunk(i uint32, chunkBytes int64) ([]byte, error) {
	start := int64(i) * chunkBytes
	size := min(chunkBytes, x.size-start)
	want := size
	if start+size == x.size {
		want++ // a byte more would be one too many
	}
	chunk := make([]byte, want)
	n, err := x.source.ReadAt(chunk, x.from+start)
	switch {
	case int64(n) == size && (want == size || err == io.EOF):
		return chunk[:size:size], nil
	case int64(n) > size:
		return nil, fmt.Errorf("the source has more than the %d bytes that were announced: it has grown", x.size)
	case err == io.EOF:
		return nil, fmt.Errorf("the source has fewer than the %d bytes that were announced: %w", x.size, io.ErrUnexpectedEOF)
	default:
		return nil, err
	}
}

// serve announces the source's size and sends the chunks that the peer asks
// for. The range that reaches the last chunk is followed by TX_FINISH.
func (st *OutgoingStream) serve(x *indexed) error {
	if x.size > math.MaxInt32 {
		return fmt.Errorf("the stream %q of %d bytes is %w: the peer pulls, and only streams below 2 GiB can be pulled", st.opts.Name, x.size, ErrTooLarge)
	}
	if err := st.start(int32(x.size)); err != nil {
		return err
	}
	chunkBytes := int64(st.opts.ChunkBytes)
	count := uint32((x.size + chunkBytes - 1) / chunkBytes)
	step := st.s.ackTimer(st.opts.StepTimeout)
	defer func() { step.stop() }()
	reached := int64(-1) // a fetch that goes no further is served, but is no progress
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
