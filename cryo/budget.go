package cryo

import (
	"sync"
	"time"
)

// memory is what received data may take: the budget bounds what is whole and not
// yet settled, the intake what is still coming in. A server's sessions share both.
type memory struct {
	budget *budget
	intake *intake
}

func newMemory(limit int) memory {
	return memory{&budget{limit: int64(limit)}, &intake{limit: int64(limit)}}
}

// budget bounds the bytes that are received and not yet settled. A listener's
// sessions share one: each may hold up to eight times what is still free, so
// that one busy session may use most of it and always leaves room for others.
type budget struct {
	mu    sync.Mutex
	limit int64
	used  int64
	freed chan struct{} // closed at the next give; nil when nobody waits
}

func (b *budget) take(held *int64, n int64) {
	b.mu.Lock()
	*held += n
	b.used += n
	b.mu.Unlock()
}

// give gives back what was taken.
func (b *budget) give(held *int64, n int64) {
	b.mu.Lock()
	*held -= n
	b.used -= n
	if b.used < b.limit {
		b.wakeLocked()
	}
	b.mu.Unlock()
}

// wake lets all who wait ask again.
func (b *budget) wake() {
	b.mu.Lock()
	b.wakeLocked()
	b.mu.Unlock()
}

func (b *budget) wakeLocked() {
	if b.freed != nil {
		close(b.freed)
		b.freed = nil
	}
}

// wait returns nil when a session that holds so much may go on reading, else a
// channel that is closed when it is worth asking again.
func (b *budget) wait(held *int64) <-chan struct{} {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.used < b.limit && (*held+7)/8 <= b.limit-b.used { // eight times a large limit would overflow
		return nil
	}
	if b.freed == nil {
		b.freed = make(chan struct{})
	}
	return b.freed
}

// relaxed tells whether a session holds no more than is still free.
func (b *budget) relaxed(held *int64) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return *held <= b.limit-b.used
}

const (
	// largeMessage is from which size on a message takes room in the intake: a chunk
	// of the default size doesn't. What smaller ones take is bounded by the number
	// of sessions.
	largeMessage = len(chunkMemory{})
	// intakePatience is how long a large message may take to come in while others
	// wait for its room.
	intakePatience = time.Minute
)

// intake bounds the memory of large messages that are still coming in. Each takes
// all its room before it is read: if it took it bit by bit, messages that have a
// part each could wait for each other for good. A slow line may take as long as it
// likes for a message, unless others wait: then many that trickle would keep them
// out.
type intake struct {
	mu      sync.Mutex
	limit   int64
	used    int64
	waiting int
	since   time.Time     // that they wait without one being let in, or another being blamed
	freed   chan struct{} // closed at the next give; nil when nobody waits
}

// take takes room for a message and returns nil; or the caller waits from now on,
// until it says leave, and gets a channel that is closed when it is worth asking
// again. A message that is larger than the limit passes alone, or as the last.
func (in *intake) take(n int64) <-chan struct{} {
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.used < in.limit {
		in.used += n
		in.since = time.Now()
		return nil
	}
	if in.waiting == 0 {
		in.since = time.Now()
	}
	in.waiting++
	if in.freed == nil {
		in.freed = make(chan struct{})
	}
	return in.freed
}

func (in *intake) leave() {
	in.mu.Lock()
	in.waiting--
	in.mu.Unlock()
}

func (in *intake) give(n int64) {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.used -= n
	if in.used < in.limit && in.freed != nil {
		close(in.freed)
		in.freed = nil
	}
}

// starves tells whether others have waited for too long. Whoever asks is to end for
// it, so it says so once.
func (in *intake) starves() bool {
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.waiting == 0 || time.Since(in.since) < intakePatience {
		return false
	}
	in.since = time.Now()
	return true
}
