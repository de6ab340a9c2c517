package cryo

import (
	"errors"
	"fmt"

	"github.com/gorilla/websocket"

	"github.com/cryo-connect/cryo-connect/internal/wire"
	"github.com/cryo-connect/cryo-connect/internal/ws"
)

// read is the reading goroutine. It never waits for the network but to read, nor
// for the writer.
func (s *Session) read() {
	defer s.finish()
	for {
		s.waitForWriter()
		b, err := s.nextMessage()
		if err != nil {
			s.leaveIntake()
			s.readFailed(err)
			return
		}
		f, err := wire.Parse(b)
		switch {
		case err != nil:
			s.protocolError(&ProtocolError{Err: err})
		case f.SID != s.id:
			s.protocolError(&ProtocolError{Problem: fmt.Sprintf("%v frame for the foreign session %d", f.Type, f.SID)})
		default:
			s.handle(&f)
		}
		s.chunk.giveBack()
		s.chunk = nil
		s.leaveIntake()
	}
}

func (s *Session) nextMessage() ([]byte, error) {
	if err := s.conn.Next(); err != nil {
		return nil, err
	}
	if s.conn.Text() {
		s.protocolError(&ProtocolError{Problem: "text message on the WebSocket"})
	}
	var head []byte
	full := s.budget.wait(&s.held) != nil
	if full || s.conn.Left() > len(chunkMemory{})/2 {
		var err error
		if head, err = s.conn.ReadHead(s.small[:0], wire.HeaderSize); err != nil {
			return nil, err
		}
	}
	s.awaitRoom(head, full)
	if s.noRoom && s.conn.Size() > uint64(largeMessage) {
		return s.skipPayload(head)
	}
	n := len(head) + s.conn.Left()
	switch {
	case wire.IsChunk(head) && fitsChunk(n):
		s.chunk = chunkPool.Get().(*chunkMemory)
		return s.conn.ReadRest(append(s.chunk[:0], head...))
	case n <= len(s.small) && s.conn.Final():
		b, err := s.conn.ReadRest(append(s.small[:0], head...))
		if err == nil && wire.IsData(b) {
			b = append(s.blocks.take(n, s.conn.Buffered()), b...)
		}
		return b, err
	default:
		return s.conn.ReadRest(append(s.blocks.take(n, s.conn.Buffered()), head...))
	}
}

// keepPayload leaves the memory of the current frame to its receiver. If it is of the
// chunk pool, it is returned, to be given back later. Reading goroutine.
func (s *Session) keepPayload() *chunkMemory {
	m := s.chunk
	if s.chunk = nil; m == nil {
		s.blocks.keep()
	}
	return m
}

// readFailed tells why there is nothing more to read.
func (s *Session) readFailed(err error) {
	var (
		closed *websocket.CloseError
		framed *ws.Error
	)
	switch {
	case errors.As(err, &closed):
		// Queued acknowledgements and an answer to the close frame still go
		// out. When this end is closing already, its own farewell stands.
		code := closed.Code
		if code == websocket.CloseNoStatusReceived {
			code = websocket.CloseNormalClosure
		}
		s.goodbye(&PeerClosedError{Code: closed.Code, Reason: s.words(closed.Text)}, code, "", false)
		s.out.wait()
	case errors.As(err, &framed):
		// Not WebSocket, or a message over the limit. Closing a socket with
		// unread data would reset it and could take the close frame and queued
		// acknowledgements along.
		s.goodbye(&ProtocolError{Problem: framed.Error()}, framed.Code, framed.Problem, false)
		s.conn.DiscardAll()
		s.out.wait()
	default:
		s.begin(fmt.Errorf("connection lost: %w", err))
	}
}

// protocolError ends the session with code 4001; reading goes on until the
// peer has closed.
func (s *Session) protocolError(err *ProtocolError) {
	s.goodbye(err, closeClientError, err.Error(), false)
}

// isEnding tells whether data is only discarded by now.
func (s *Session) isEnding() bool {
	select {
	case <-s.ending:
		return true
	default:
		return false
	}
}

// handle acts on one frame.
func (s *Session) handle(f *wire.Frame) {
	switch f.Type {
	case wire.Ack:
		s.acked.Store(true) // before the wait for it ends, or Dial could not take it back
		s.handleAnswer(f, nil)
		return
	case wire.Error:
		// A refusal of one of our frames is never acknowledged: the refuser
		// may have a frame pending under the same number (protocol, "ERROR").
		if s.handleAnswer(f, &RejectedError{Text: s.words(f.Text())}) {
			return
		}
	}
	if s.isEnding() {
		return // discarded: nothing can be acknowledged any more
	}

	switch f.Type {
	case wire.UTF8, wire.Binary, wire.Error:
		s.deliver(f)
	case wire.PingPong:
		if string(f.Payload) == wire.Ping { // a pong is never answered
			s.keepalive.pinged(f.Ack)
		}
	case wire.EndpointInfo:
		s.handleEndpointInfo(f)
	case wire.Bye:
		// Who says BYE closes, and most have by now. cryo-server doesn't after
		// a long reason, so our close frame goes out at once.
		s.out.acknowledge([]uint32{f.Ack})
		s.goodbye(&PeerClosedError{Reason: s.words(f.Text())}, closeGraceful, "", false)
	default:
		s.handleStream(f)
	}
}

// handleAnswer acts on an ACK, or on an ERROR that may reject one of our frames. It
// reports whether the number is one of ours. A peer can foresee our numbers. An answer
// to a frame that it can't have yet must not complete a send: the sender would use the
// payload's memory again, and the peer get what is in it by then.
func (s *Session) handleAnswer(f *wire.Frame, err error) bool {
	switch s.pend.answer(f.Ack, err) {
	case answerForeign:
		return false
	case answerPremature:
		s.protocolError(&ProtocolError{Problem: fmt.Sprintf("%v for the frame %d before it was sent", f.Type, f.Ack)})
	case answerLate:
		s.opts.OnLateAck()
	}
	return true
}

// handleStream acts on one TX frame. cryo-server too knows none before the
// client's ENDPOINT_INFO.
func (s *Session) handleStream(f *wire.Frame) {
	if !s.dialing {
		select {
		case <-s.peerKnown:
		default:
			return
		}
	}
	switch f.Type {
	case wire.TxFlow:
		s.outgoing.setFlow(f.Flow)
		s.out.acknowledge([]uint32{f.Ack})
	case wire.TxCancel:
		// Stopped first: nothing of the stream follows the acknowledgement.
		if !s.outgoing.cancelled(f.Tx) {
			s.protocolError(&ProtocolError{Problem: fmt.Sprintf("TX_CANCEL for the stream %d before its TX_START was sent", f.Tx)})
			return
		}
		s.out.acknowledge([]uint32{f.Ack})
	case wire.TxFetch:
		s.out.acknowledge([]uint32{f.Ack})
		s.outgoing.fetched(f.Tx, f.Start, f.End)
	case wire.TxStart:
		s.incoming.start(f)
	case wire.TxChunk:
		s.incoming.chunk(f)
	case wire.TxFinish:
		s.incoming.finish(f)
	}
}

func (s *Session) handleEndpointInfo(f *wire.Frame) {
	if f.Version != wire.Version {
		s.protocolError(&ProtocolError{Problem: fmt.Sprintf("protocol version %d, only %d is known", f.Version, wire.Version)})
		return
	}
	s.out.acknowledge([]uint32{f.Ack})
	streamless := f.Features&wire.FeatureStreams == 0
	if s.streamless.Store(streamless); streamless {
		s.outgoing.stopAll(ErrStreamsUnsupported)
	}
	select {
	case <-s.peerKnown: // told before
	default:
		close(s.peerKnown)
	}
}

// endpointInfo is what this end says of itself.
func (s *Session) endpointInfo() wire.Frame {
	return wire.Frame{SID: s.id, Type: wire.EndpointInfo, Version: wire.Version, Features: wire.FeatureStreams}
}

// sayEndpointInfo sends it without insisting on an acknowledgement.
func (s *Session) sayEndpointInfo() {
	f := s.endpointInfo()
	f.Ack = s.pend.number()
	s.out.control(f)
}
