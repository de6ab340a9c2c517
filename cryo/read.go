package cryo

import (
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/gorilla/websocket"

	"github.com/cryo-connect/cryo-connect/internal/wire"
	"github.com/cryo-connect/cryo-connect/internal/ws"
)

// read is the reading goroutine. It waits only for data to read, for capacity
// (backpressure), and in waitForWriter.
func (s *Session) read() {
	defer s.finish()
	r := frameReader{conn: s.conn, sid: s.id, limit: s.limit, isOurs: s.acks.issued, onData: s.dataBegun}
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
		if s.isEnding() && errors.Is(err, os.ErrDeadlineExceeded) { // interrupted by beginClosing
			err = s.conn.Discard()
		}
		if err != nil {
			s.readFailed(err)
			return
		}
	}
}

// waitForWriter pauses reads while unwritten small frames exceed maxUnwritten. The peer
// causes that by not reading, so its timeout keeps running. The wait also ends when the close
// frame is queued or the connection is closed.
func (s *Session) waitForWriter() {
	for wait := s.writer.overLimit(); wait != nil; wait = s.writer.overLimit() {
		<-wait
	}
}

// wants reports whether a data frame can be received: the session is not ending, and the
// stream or the application receives data.
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

// early reports whether a frame is a chunk of a stream that is not accepted yet.
func (s *Session) early(f *wire.Frame) bool {
	return f.Type == wire.TxChunk && !s.isEnding() && s.incoming.isAnnounced(f.Tx)
}

// readFailed ends the session when nothing more can be read.
func (s *Session) readFailed(err error) {
	var (
		closed *websocket.CloseError
		framed *ws.Error
	)
	switch {
	case errors.As(err, &closed):
		// Queued acknowledgements and an answer to the close frame are still
		// sent. If this end is closing already, its own close frame is.
		code := closed.Code
		if code == websocket.CloseNoStatusReceived {
			code = websocket.CloseNormalClosure
		}
		s.closeWith(&PeerClosedError{Code: closed.Code, Reason: s.Redact(closed.Text)}, code, "")
		s.writer.wait()
	case errors.As(err, &framed):
		// Not WebSocket, or a message over the limit. Closing a socket with
		// unread data resets it, and the close frame and queued
		// acknowledgements could be lost.
		err := &ProtocolError{Problem: framed.Error()}
		if s.closeWith(err, framed.Code, framed.Problem) {
			s.reportViolation(err)
		}
		s.conn.DiscardAll()
		s.writer.wait()
	default:
		s.setCause(fmt.Errorf("connection lost: %w", err))
	}
}

// protocolError ends the session with code 4001, if it is not ending: then its close frame is
// queued or will be, and must not come before incoming streams are cancelled. Reads continue until
// the peer has closed. Reading goroutine.
func (s *Session) protocolError(err *ProtocolError) {
	if s.endViolation(err) {
		s.reportViolation(err)
	}
}

// endViolation ends the session with code 4001 and a cause, and reports whether it is the first
// one. As in Close, incoming streams are cancelled first; the caller does not wait, because the
// reading goroutine reads the acknowledgements.
func (s *Session) endViolation(cause error) bool {
	if !s.beginClosing(cause) {
		return false
	}
	s.cancelIncoming()
	f := closeFrame{code: closeClientError, reason: closeReason(cause.Error())}
	now := time.Now()
	if _, until := s.incoming.cancelledUntil(now, s.opts.CloseTimeout); !until.After(now) {
		s.writer.queueClose(f)
		return true
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.stopped { // or finish may be waiting for closers
		s.closers.Go(func() {
			s.incoming.awaitCancels(s.opts.CloseTimeout, nil, s.unreadable)
			s.writer.queueClose(f)
		})
	}
	return true
}

func (s *Session) reportViolation(err *ProtocolError) {
	s.report("Closing a session because of a protocol violation", "error", err.Error())
}

// isEnding reports whether the session is ending: from then on, data is discarded.
func (s *Session) isEnding() bool {
	select {
	case <-s.ctx.Done():
		return true
	default:
		return false
	}
}

// handle processes one frame, and may detach its payload.
func (s *Session) handle(in *received) {
	f := &in.Frame
	switch f.Type {
	case wire.Ack:
		s.peerAcked.Store(true) // before the wait for it ends: Dial resets it afterwards
		if s.handleAnswer(f, nil) && !s.isEnding() {
			s.setPeerKnown()
		}
		return
	case wire.Error:
		// A rejection of one of our frames is never acknowledged: the peer
		// may have its own frame with that number (protocol, "ERROR").
		if s.handleAnswer(f, &RejectedError{Text: s.Redact(f.Text())}) {
			return
		}
	}
	ending := s.isEnding()
	if ending && s.writer.isClosing() {
		return // discarded: nothing can be acknowledged any more
	}
	switch {
	case !f.Type.Known():
		s.ignored.Add(1)
		s.opts.OnIgnore(s)
		return
	case !ending && f.Type != wire.PingPong && f.Type != wire.EndpointInfo && f.Type != wire.Bye:
		s.setPeerKnown()
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
		// A peer that sends BYE closes next. cryo-server doesn't after a long
		// reason, so our close frame is sent without waiting for its own.
		s.writer.acknowledge([]uint32{f.Ack})
		s.closeWith(&PeerClosedError{Reason: s.Redact(f.Text())}, closeGraceful, "")
	default:
		s.handleStream(in)
	}
}

// handleAnswer processes an ACK, or an ERROR that may reject one of our frames. It reports
// whether the number was assigned by this end. A peer can predict our numbers, but an answer to a
// frame that was not sent must not complete the send: the sender would reuse the payload's memory
// while it is still to be written.
func (s *Session) handleAnswer(f *wire.Frame, err error) bool {
	switch s.acks.answer(f.Ack, err) {
	case answerForeign:
		if f.Type == wire.Ack { // an ERROR is a message
			s.limit.awaitOther(0)
		}
		return false
	case answerPremature:
		s.protocolError(&ProtocolError{Problem: fmt.Sprintf("%v for frame %d before it was sent", f.Type, f.Ack)})
	case answerUnknown:
		s.incoming.cancelAcknowledged(f.Ack)
		s.limit.awaitOther(0)
	case answerRepeated:
		s.limit.awaitOther(0)
	case answerLate:
		s.opts.OnLateAck(s)
	}
	return true
}

// handleStream processes one TX frame.
func (s *Session) handleStream(in *received) {
	f := &in.Frame
	switch f.Type {
	case wire.TxFlow:
		s.outgoing.setFlow(f.Flow)
		s.writer.acknowledge([]uint32{f.Ack})
	case wire.TxCancel:
		// The stream is stopped first: no frame of it follows the acknowledgement.
		if !s.outgoing.handleCancel(f.Tx) {
			s.protocolError(&ProtocolError{Problem: fmt.Sprintf("TX_CANCEL for stream %d before its TX_START was sent", f.Tx)})
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
		s.protocolError(&ProtocolError{Problem: fmt.Sprintf("unsupported protocol version %d: only %d is supported", f.Version, wire.Version)})
		return
	}
	s.writer.acknowledge([]uint32{f.Ack})
	streamless := f.Features&wire.FeatureStreams == 0
	if s.streamless.Store(streamless); streamless {
		s.outgoing.stopAll(ErrStreamsUnsupported)
	}
	s.setPeerKnown()
}

// dataBegun records that the peer speaks Cryo when it begins to send data, which may take longer than
// HandshakeTimeout to arrive, or have to wait. The peer's acknowledgement of ENDPOINT_INFO may be
// behind it. Reading goroutine.
func (s *Session) dataBegun() {
	if !s.isEnding() {
		s.setPeerKnown()
	}
}

// setPeerKnown records that the peer speaks Cryo: it has sent ENDPOINT_INFO, acknowledged ours,
// or sent data. cryo-client-browser sends ENDPOINT_INFO on its first connection only, and older
// clients never do. Reading goroutine.
func (s *Session) setPeerKnown() {
	select {
	case <-s.peerKnown:
	default:
		close(s.peerKnown)
	}
}

// endpointInfo returns this end's ENDPOINT_INFO.
func (s *Session) endpointInfo() wire.Frame {
	return wire.Frame{SID: s.id, Type: wire.EndpointInfo, Version: wire.Version, Features: wire.FeatureStreams}
}

// sendEndpointInfo sends ENDPOINT_INFO without waiting for its acknowledgement.
func (s *Session) sendEndpointInfo() {
	f := s.endpointInfo()
	f.Ack = s.acks.number()
	s.writer.control(f)
}
