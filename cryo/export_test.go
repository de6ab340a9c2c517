package cryo

import (
	"sync"
	"time"

	"github.com/cryo-connect/cryo-connect/internal/ws"
)

// Awaited is how many numbers somebody waits for.
func (s *Session) Awaited() int {
	s.acks.mu.Lock()
	defer s.acks.mu.Unlock()
	return s.acks.waiting
}

// Held is how many bytes are received and not settled.
func (s *Session) Held() int64 {
	held, _ := s.limit.bytes.Usage()
	return held
}

// ComingIn is how many bytes are reserved for a large message that is not whole.
func (s *Session) ComingIn() int64 {
	held, _ := s.limit.incoming.Usage()
	return held
}

// Queued is how many bytes of a stream wait to be written.
func (st *OutgoingStream) Queued() int {
	st.window.mu.Lock()
	defer st.window.mu.Unlock()
	return st.window.used
}

// Tx is the stream's number.
func (st *OutgoingStream) Tx() uint32 { return st.tx }

// Poison has memory that is used again overwritten as soon as it is free, or ends that.
func Poison(on bool) { ws.Poisoning.Store(on) }

// Unlocked reports whether none of the session's locks is held, nor one of its received
// streams'. Others may hold one for a moment: ask again.
func (s *Session) Unlocked() bool {
	locks := []*sync.Mutex{&s.mu, &s.keepalive.mu, &s.outgoing.mu, &s.acks.mu, &s.writer.mu, &s.inbox.mu}
	if !s.incoming.mu.TryLock() {
		return false
	}
	for _, st := range s.incoming.open {
		locks = append(locks, &st.mu)
	}
	s.incoming.mu.Unlock()
	for _, mu := range locks {
		if !mu.TryLock() {
			return false
		}
		mu.Unlock()
	}
	return true
}

// Interrupt interrupts the reading of a large payload, as the end of the session does.
func (s *Session) Interrupt() { s.limit.interruptLarge() }

// Free is how many bytes are free of the receive buffer, of what may be coming in, and
// whether the slot is.
func (s *Session) Free() (bytes, incoming, slot int64) {
	_, bytes = s.limit.bytes.Usage()
	_, incoming = s.limit.incoming.Usage()
	_, slot = s.limit.slot.Usage()
	return bytes, incoming, slot
}

// Owners is how many clients have a share of the receive buffer.
func (s *Server) Owners() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.holders)
}

// Unwritten is how many bytes of acknowledgements and control frames are unwritten, of all sessions.
func (s *Server) Unwritten() int64 { return s.opts.unwritten.Load() }

// HoldWriter locks the session's queue until release is called.
func (s *Session) HoldWriter() (release func()) {
	s.writer.mu.Lock()
	return s.writer.mu.Unlock
}

// SetClockForward lets the session's expiry be nearer by d, as when the wall clock is set forward or
// the machine was suspended; a negative d is a clock that is set back.
func (s *Session) SetClockForward(d time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.expiry.at = s.expiry.at.Add(-d)
}
