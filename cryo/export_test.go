package cryo

// Awaited is how many numbers somebody waits for.
func (s *Session) Awaited() int {
	s.pend.mu.Lock()
	defer s.pend.mu.Unlock()
	return s.pend.waiting
}
