package cryo

import "github.com/cryo-connect/cryo-connect/internal/ws"

// Awaited is how many numbers somebody waits for.
func (s *Session) Awaited() int {
	s.pend.mu.Lock()
	defer s.pend.mu.Unlock()
	return s.pend.waiting
}

// Held is how many bytes are received and not settled.
func (s *Session) Held() int64 {
	s.budget.mu.Lock()
	defer s.budget.mu.Unlock()
	return s.held
}

// Queued is how many bytes of a stream wait to be written.
func (st *OutgoingStream) Queued() int {
	st.mu.Lock()
	defer st.mu.Unlock()
	return st.queued
}

// Tx is the stream's number.
func (st *OutgoingStream) Tx() uint32 { return st.tx }

// Poison has memory that is used again overwritten as soon as it is free, or ends that.
func Poison(on bool) { ws.Poisoning.Store(on) }
