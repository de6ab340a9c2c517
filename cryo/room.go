package cryo

import (
	"time"

	"github.com/cryo-connect/cryo-connect/internal/wire"
)

// Where reading pauses: until there is room for what is received and not settled,
// for a large message that is coming in, or for the answers that are not written.

// noRoomPatience is how long a pause of reading may keep an acknowledgement from
// us that one of our senders waits for, and noRoomRecheck how often a longer
// pause asks whether one waits by now.
const (
	noRoomPatience = 10 * time.Second
	noRoomRecheck  = time.Second
)

// awaitRoom waits until there is room for the message that is read now, of which it
// knows the first bytes if it needs more than a little, or finds that it is to be
// refused. full tells that what is received and not settled takes all there is.
func (s *Session) awaitRoom(head []byte, full bool) {
	s.noRoom = false
	switch {
	case full && wire.IsData(head):
		// Other frames are read on: they may be the handshake, or
		// acknowledgements that our senders wait for.
		s.noRoom = !s.waitForRoom(wire.IsChunk(head))
	case !full && s.overflowing && s.budget.relaxed(&s.held):
		s.overflowing = false
	}
	for !s.noRoom && s.enterIntake(wire.IsData(head)) && !s.noRoom {
		if !wire.IsData(head) || s.budget.wait(&s.held) == nil || s.isEnding() {
			return
		}
		s.leaveIntake() // while it waited, others took what room there was
		s.noRoom = !s.waitForRoom(wire.IsChunk(head))
	}
}

// waitForRoom pauses reading while too much is received and not settled. It
// reports false when there is no room and waiting would be in vain: the
// acknowledgements that our senders wait for are behind what we don't read, and
// what we hold may be waiting for our senders, as it does where an answer is sent
// before its request is settled. Then what comes is refused until the session holds
// no more than is free.
func (s *Session) waitForRoom(chunk bool) bool {
	room := s.full(chunk)
	if room == nil {
		return true
	}
	if s.overflowing && s.pend.awaited() {
		return false
	}
	defer s.pause()()

	patience := time.NewTimer(noRoomPatience)
	defer patience.Stop()
	for ; room != nil; room = s.full(chunk) {
		select {
		case <-room:
		case <-patience.C:
			if s.pend.awaited() {
				s.overflowing = true
				return false
			}
			patience.Reset(noRoomRecheck)
		case <-s.ending:
			return true
		}
	}
	return true
}

// pause begins a time in which nothing is read. The function that it gives ends it.
func (s *Session) pause() (resume func()) {
	s.paused.Store(true)
	return func() {
		now := time.Now()
		s.resumed.Store(&now)
		s.conn.Excuse() // the silence was ours
		s.paused.Store(false)
	}
}

// skipPayload reads a large message that is refused, without memory for it: what
// there is to know of it is in its first bytes.
func (s *Session) skipPayload(head []byte) ([]byte, error) {
	b, err := s.conn.ReadHead(head, wire.ChunkHeaderSize-len(head))
	if err != nil {
		return nil, err
	}
	return b, s.conn.Discard()
}

// enterIntake waits until there is memory for the message that is read now, if that
// is known to be large, and keeps it until leaveIntake. It reports whether it had to
// wait.
func (s *Session) enterIntake(refusable bool) (waited bool) {
	n := int64(s.conn.Size())
	switch {
	case n <= int64(largeMessage) || s.coming > 0:
		return false
	case !s.conn.Final():
		n = wire.MaxFrame // who knows
	}
	if room := s.intake.take(n); room != nil {
		waited = true
		if !s.awaitIntake(n, room, refusable) {
			return true
		}
	}
	s.mu.Lock()
	s.coming, s.comingSince = n, time.Now()
	s.mu.Unlock()
	return waited
}

// awaitIntake pauses reading until there is memory. It reports false when there won't
// be: at the end of the session, when the message is discarded as it comes, and when
// one of our senders waits for an acknowledgement that may be behind it. Then it is
// refused after some patience, as it is by waitForRoom.
func (s *Session) awaitIntake(n int64, room <-chan struct{}, refusable bool) bool {
	defer s.pause()()
	patience := time.NewTimer(noRoomPatience)
	defer patience.Stop()
	for room != nil {
		select {
		case <-room:
			s.intake.leave()
			room = s.intake.take(n)
		case <-patience.C:
			if refusable && s.pend.awaited() {
				s.intake.leave()
				s.noRoom, s.overflowing = true, true
				return false
			}
			patience.Reset(noRoomRecheck)
		case <-s.ending:
			s.intake.leave()
			return false
		}
	}
	return true
}

// leaveIntake is said when the message is whole and handled, or will never be.
func (s *Session) leaveIntake() {
	if s.coming == 0 {
		return
	}
	s.intake.give(s.coming)
	s.mu.Lock()
	s.coming = 0
	s.mu.Unlock()
}

// full returns nil when a message may be read, else a channel to wait for.
func (s *Session) full(chunk bool) <-chan struct{} {
	room := s.budget.wait(&s.held)
	if s.isEnding() || s.refusing.Load() && !(chunk && s.incoming.holds()) { // asked last, or Refuse could be missed
		return nil
	}
	return room
}

// waitForWriter pauses reading while too many small frames are unwritten. That
// is the peer's doing: it has to show a sign of life meanwhile.
func (s *Session) waitForWriter() {
	for {
		crowded := s.out.crowded()
		if crowded == nil || s.isEnding() {
			return
		}
		select {
		case <-crowded:
		case <-s.ending:
		}
	}
}
