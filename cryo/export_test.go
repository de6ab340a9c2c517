package cryo

// Awaited is how many numbers somebody waits for.
func (s *Session) Awaited() int {
	s.pend.mu.Lock()
	defer s.pend.mu.Unlock()
	return s.pend.waiting
}

// Queued is how many bytes of a stream wait to be written.
func (st *OutgoingStream) Queued() int {
	st.mu.Lock()
	defer st.mu.Unlock()
	return st.queued
}

// Tx is the stream's number.
func (st *OutgoingStream) Tx() uint32 { return st.tx }
