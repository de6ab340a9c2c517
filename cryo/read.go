package cryo

import (
	"errors"
	"fmt"
	"os"

	"github.com/gorilla/websocket"

	"github.com/cryo-connect/cryo-connect/internal/wire"
	"github.com/cryo-connect/cryo-connect/internal/ws"
)

// read is the reading goroutine. It never waits for the network but to read, nor
// for the writer.
func (s *Session) read() {
	defer s.finish()
	r := frameReader{conn: s.conn, sid: s.id, limit: s.limit, isOurs: s.acks.issued}
	var in received
	for {
		s.waitForWriter()
		err := r.next(&in)
		if err == nil {
			s.handle(&in)
		} else if broken, ok := errors.AsType[*ProtocolError](err); ok {
			s.protocolError(broken)
			err = s.conn.Discard()
		}
		in.release()
		if s.isEnding() && errors.Is(err, os.ErrDeadlineExceeded) { // see goodbye
			err = s.conn.Discard()
		}
		if err != nil {
			s.readFailed(err)
			return
		}
	}
}

// waitForWriter pauses reading while too many small frames are unwritten. The peer
// causes that, so its timeout keeps running. It returns when the close frame is queued,
// behind which nothing is, or the connection is closed.
func (s *Session) waitForWriter() {
	for crowded := s.writer.overLimit(); crowded != nil; crowded = s.writer.overLimit() {
		<-crowded
	}
}

// wants reports whether anybody takes a data frame.
func (s *Session) wants(f *wire.Frame) bool {
	switch {
	case s.isEnding():
		return false
	case f.Type == wire.TxChunk:
		return s.incoming.wants(f.Tx)
	default:
		return !s.sendOnly.Load() && !s.unsettled.draining.Load()
	}
}

// readFailed ends the session when nothing more can be read.
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
		s.closeWith(&PeerClosedError{Code: closed.Code, Reason: s.redactControl(closed.Text)}, code, "")
		s.writer.wait()
	case errors.As(err, &framed):
		// Not WebSocket, or a message over the limit. Closing a socket with
		// unread data would reset it and could take the close frame and queued
		// acknowledgements along.
		s.closeWith(&ProtocolError{Problem: framed.Error()}, framed.Code, framed.Problem)
		s.conn.DiscardAll()
		s.writer.wait()
	default:
		s.setCause(fmt.Errorf("connection lost: %w", err))
	}
}

// protocolError ends the session with code 4001; reading goes on until the
// peer has closed.
func (s *Session) protocolError(err *ProtocolError) {
	s.closeWith(err, closeClientError, err.Error())
}

// isEnding reports whether the session has begun to end: data is discarded then.
func (s *Session) isEnding() bool {
	select {
	case <-s.ctx.Done():
		return true
	default:
		return false
	}
}

// handle acts on one frame, and may take what it owns.
func (s *Session) handle(in *received) {
	f := &in.Frame
	switch f.Type {
	case wire.Ack:
		s.peerAcked.Store(true) // before the wait for it ends, or Dial could not take it back
		s.handleAnswer(f, nil)
		return
	case wire.Error:
		// A rejection of one of our frames is never acknowledged: its sender
		// may have a frame pending under the same number (protocol, "ERROR").
		if s.handleAnswer(f, &RejectedError{Text: s.redactControl(f.Text())}) {
			return
		}
	}
	ending := s.isEnding()
	if ending && s.writer.isClosing() {
		return // discarded: nothing can be acknowledged any more
	}

	switch f.Type {
	case wire.UTF8, wire.Binary, wire.Error:
		if !ending {
			s.deliver(in)
		}
	case wire.PingPong:
		if string(f.Payload) == wire.Ping { // a pong is never answered
			s.keepalive.pinged(f.Ack)
		}
	case wire.EndpointInfo:
		s.handleEndpointInfo(f)
	case wire.Bye:
		// Who says BYE closes, and most have by now. cryo-server doesn't after
		// a long reason, so our close frame goes out at once.
		s.writer.acknowledge([]uint32{f.Ack})
		s.closeWith(&PeerClosedError{Reason: s.redactControl(f.Text())}, closeGraceful, "")
	default:
		s.handleStream(in)
	}
}

// handleAnswer acts on an ACK, or on an ERROR that may reject one of our frames. It
// reports whether the number is one of ours. A peer can foresee our numbers. An answer
// to a frame that it can't have yet must not complete a send: the sender would use the
// payload's memory again, and the peer get what is in it by then.
func (s *Session) handleAnswer(f *wire.Frame, err error) bool {
	switch s.acks.answer(f.Ack, err) {
	case answerForeign:
		return false
	case answerPremature:
		s.protocolError(&ProtocolError{Problem: fmt.Sprintf("%v for the frame %d before it was sent", f.Type, f.Ack)})
	case answerUnknown:
		s.incoming.cancelAcknowledged(f.Ack)
	case answerLate:
		s.opts.OnLateAck(s)
	}
	return true
}

// handleStream acts on one TX frame. cryo-server too knows none before the
// client's ENDPOINT_INFO.
func (s *Session) handleStream(in *received) {
	f := &in.Frame
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
		s.writer.acknowledge([]uint32{f.Ack})
	case wire.TxCancel:
		// Stopped first: nothing of the stream follows the acknowledgement.
		if !s.outgoing.handleCancel(f.Tx) {
			s.protocolError(&ProtocolError{Problem: fmt.Sprintf("TX_CANCEL for the stream %d before its TX_START was sent", f.Tx)})
			return
		}
		s.writer.acknowledge([]uint32{f.Ack})
	case wire.TxFetch:
		s.writer.acknowledge([]uint32{f.Ack})
		s.outgoing.handleFetch(f.Tx, f.Start, f.End)
	case wire.TxStart:
		s.incoming.handleStart(f)
	case wire.TxChunk:
		s.incoming.handleChunk(in)
	case wire.TxFinish:
		s.incoming.handleFinish(f)
	}
}

func (s *Session) handleEndpointInfo(f *wire.Frame) {
	if f.Version != wire.Version {
		s.protocolError(&ProtocolError{Problem: fmt.Sprintf("protocol version %d, only %d is known", f.Version, wire.Version)})
		return
	}
	s.writer.acknowledge([]uint32{f.Ack})
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

// sendEndpointInfo sends it without insisting on an acknowledgement.
func (s *Session) sendEndpointInfo() {
	f := s.endpointInfo()
	f.Ack = s.acks.number()
	s.writer.control(f)
}
