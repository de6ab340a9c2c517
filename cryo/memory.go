package cryo

import (
	"sync"

	"github.com/cryo-connect/cryo-connect/internal/wire"
	"github.com/cryo-connect/cryo-connect/internal/ws"
)

// The memory of received frames.

const (
	minBlock   = 512       // payload memory: allocated in blocks of as much as waits to be read …
	maxBlock   = 16 << 10  // … within these bounds, so that a message that is kept long keeps little else
	maxTrusted = 128 << 10 // memory is given for messages that have not come yet, up to so much
)

var chunkPool = sync.Pool{New: func() any { return new(chunkMemory) }}

// chunkMemory holds one frame of a stream, with chunks of the default size or
// down to half of it, and is used again when it was read. That spares a stream a
// fresh 64 KiB for each of its chunks, which have to be zeroed and miss the caches:
// 1.4 times as many.
type chunkMemory [wire.ChunkHeaderSize + DefaultChunkBytes]byte

// fitsChunk tells whether a frame of n bytes fits, and uses more than half: what
// is counted as held is to be near to what is in memory.
func fitsChunk(n int) bool { return n > len(chunkMemory{})/2 && n <= len(chunkMemory{}) }

func (m *chunkMemory) giveBack() {
	if m != nil {
		ws.Poison(m[:])
		chunkPool.Put(m)
	}
}

// blocks hands out memory for received frames: 1.05 times as many messages of up to
// 1 KiB as with an allocation each. The memory of a frame is handed out again for the
// next one, unless keep is called between the two. Nothing is ever returned, so no
// path through the reading of a frame can return the memory of another one.
type blocks struct {
	free  []byte
	taken int // bytes at the start of free, in use by the frame that is handled now
}

// take returns empty memory for a frame of n bytes, or for a part of one that is
// large. waiting is how many more bytes wait to be read.
func (b *blocks) take(n, waiting int) []byte {
	n = min(n, maxTrusted)
	b.taken = 0
	if n > maxBlock/2 {
		return make([]byte, 0, n)
	}
	if n > len(b.free) {
		b.free = make([]byte, max(n, min(max(waiting, minBlock), maxBlock)))
	}
	memory := b.free[:0:n]
	if waiting <= n && len(b.free)-n > minBlock {
		b.free = nil // nothing follows: an idle session keeps no large block
	} else {
		b.taken = n
	}
	ws.Poison(memory[:n])
	return memory
}

// keep leaves the memory that was taken last to whoever has it now.
func (b *blocks) keep() { b.free, b.taken = b.free[b.taken:], 0 }
