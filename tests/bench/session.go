package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cryo-connect/cryo-connect/internal/wire"
)

// session is one connection of a peer, with a goroutine that reads.
type session struct {
	spec peerSpec
	id   uint64
	conn net.Conn
	w    *webSocket // nil for the protocol lines

	number    uint32
	acked     atomic.Int64  // acknowledged frames
	progress  chan struct{} // holds a token when acked has grown
	connected chan struct{} // closed when the other end's ENDPOINT_INFO is received
	sentAt    []time.Time   // by number, of a paced command
	latency   []time.Duration
}

const ackBytes = 8 + 1 + 4

// newSession does the handshakes. The id is a client's; a server reads it from the first
// frame.
func newSession(spec peerSpec, conn net.Conn, id uint64) (*session, error) {
	s := &session{spec: spec, id: id, conn: conn, progress: make(chan struct{}, 1), connected: make(chan struct{})}
	if spec.Protocol == speaksLines {
		return s, nil
	}
	client := spec.Dial != ""
	s.w = newWebSocket(conn, client)
	if err := s.w.upgrade(fmt.Sprintf("/?authorization=Bearer+%s&x-cryo-sid=%d", token, id)); err != nil {
		return nil, err
	}
	if spec.Protocol == speaksWebSocket {
		go s.w.drain()
		return s, nil
	}
	if client {
		s.w.append(s.frame(wire.Frame{Type: wire.EndpointInfo, Version: wire.Version}))
	}
	go s.read()
	<-s.connected
	if client {
		s.wait(1)
	}
	return s, nil
}

func (s *session) frame(f wire.Frame) []byte {
	f.SID = s.id
	b, err := wire.Append(nil, &f)
	if err != nil {
		fatal(err)
	}
	return b
}

// read counts acknowledgements, and acknowledges other frames that have a number.
func (s *session) read() {
	acked := int64(0)
	s.w.onPause = func() {
		s.acked.Add(acked)
		acked = 0
		select {
		case s.progress <- struct{}{}:
		default:
		}
	}
	var head [ackBytes]byte
	ack := s.frame(wire.Frame{Type: wire.Ack})
	for {
		n, err := s.w.next(head[:])
		if err != nil {
			return // the other end has closed
		}
		if n < ackBytes {
			continue // the rest of a fragmented message
		}
		number := binary.BigEndian.Uint32(head[9:])
		switch wire.Type(head[8]) {
		case wire.Ack:
			acked++
			if s.sentAt != nil {
				s.latency = append(s.latency, time.Since(s.sentAt[number]))
			}
			continue
		case wire.TxChunk, wire.PingPong:
			continue
		case wire.EndpointInfo:
			s.id = binary.BigEndian.Uint64(head[:])
			ack = s.frame(wire.Frame{Type: wire.Ack})
			close(s.connected)
		}
		binary.BigEndian.PutUint32(ack[9:], number)
		s.w.append(ack)
		if len(s.w.out) > writeAhead {
			_ = s.w.flush() // the next read returns the error
		}
	}
}

// wait returns when n frames are acknowledged.
func (s *session) wait(n int64) {
	for s.acked.Load() < n {
		<-s.progress
	}
}

type sessions []*session

// send is a sendFunc; the messages are divided among the sessions.
func (all sessions) send(n int, rate float64) (latency []time.Duration, err error) {
	errs := make([]error, len(all))
	var sending sync.WaitGroup
	for i, s := range all {
		share := n / len(all)
		if i < n%len(all) {
			share++
		}
		if share == 0 {
			break
		}
		sending.Go(func() { errs[i] = s.send(share, rate/float64(len(all))) })
	}
	sending.Wait()
	for _, s := range all {
		latency = append(latency, s.latency...)
	}
	return latency, errors.Join(errs...)
}

func (s *session) send(n int, rate float64) error {
	message := text(s.spec.Size)
	switch s.spec.Protocol {
	case speaksLines:
		message[len(message)-1] = '\n'
		return s.write(newBlock(message, 0, n), n)
	case speaksWebSocket:
		return s.write(newBlock(append(appendHead(nil, len(message), false), message...), 0, n), n)
	case speaksStreams:
		return s.stream(n, message)
	default:
		if rate > 0 {
			return s.pace(n, rate, message)
		}
		return s.messages(n, message)
	}
}

// block has copies of a message, which are written in one write without copying.
type block struct {
	bytes []byte
	size  int // of one message
	at    int // offset of the number; 0 is none
}

// newBlock makes a block for at most n messages in a write.
func newBlock(message []byte, at, n int) block {
	return block{bytes.Repeat(message, max(1, min(n, writeAhead/len(message)))), len(message), at}
}

// block makes a block of a frame, whose number is at this offset.
func (s *session) block(frame []byte, at, n int) block {
	head := appendHead(nil, len(frame), s.w.client)
	return newBlock(append(head, frame...), len(head)+at, n)
}

func (b block) len() int { return len(b.bytes) / b.size }

// numbered returns n messages, with numbers from first on.
func (b block) numbered(n int, first uint32) []byte {
	if b.at > 0 {
		for i := range n {
			binary.BigEndian.PutUint32(b.bytes[i*b.size+b.at:], first+uint32(i))
		}
	}
	return b.bytes[:n*b.size]
}

// write writes messages, numbered from 0 on.
func (s *session) write(b block, n int) error {
	for sent := 0; sent < n; {
		some := min(n-sent, b.len())
		if _, err := s.conn.Write(b.numbered(some, uint32(sent))); err != nil {
			return err
		}
		sent += some
	}
	return nil
}

func (s *session) messageBlock(payload []byte, n int) block {
	return s.block(s.frame(wire.Frame{Type: wire.UTF8, Payload: payload}), 9, n)
}

// messages sends within the window.
func (s *session) messages(n int, payload []byte) error {
	window := int64(max(1, s.spec.Window/max(1, s.spec.Sessions)))
	b := s.messageBlock(payload, int(min(window, int64(n))))
	start := s.acked.Load()
	for sent := int64(0); sent < int64(n); {
		room := min(window-(sent-(s.acked.Load()-start)), int64(n)-sent, int64(b.len()))
		if room == 0 {
			<-s.progress
			continue
		}
		if err := s.writeNumbered(b, int(room)); err != nil {
			return err
		}
		sent += room
	}
	s.wait(start + int64(n))
	return nil
}

// writeNumbered writes messages with the session's next numbers.
func (s *session) writeNumbered(b block, n int) error {
	_, err := s.conn.Write(b.numbered(n, s.number+1))
	s.number += uint32(n)
	return err
}

// pace sends at the rate, a few messages in each write.
func (s *session) pace(n int, rate float64, payload []byte) error {
	b := s.messageBlock(payload, n)
	start, begin := s.acked.Load(), time.Now()
	s.sentAt = make([]time.Time, int(s.number)+n+1)
	s.latency = make([]time.Duration, 0, n)
	for sent := 0; sent < n; time.Sleep(200 * time.Microsecond) {
		now := time.Now()
		for due := min(int(now.Sub(begin).Seconds()*rate), n); sent < due; {
			some := min(due-sent, b.len())
			for i := range some {
				s.sentAt[int(s.number)+1+i] = now
			}
			if err := s.writeNumbered(b, some); err != nil {
				return err
			}
			sent += some
		}
	}
	s.wait(start + int64(n))
	return nil
}

// stream sends one stream of n chunks.
func (s *session) stream(n int, chunk []byte) error {
	s.number++
	tx, start := s.number, s.acked.Load()
	announce := s.block(s.frame(wire.Frame{Type: wire.TxStart, Ack: s.number, Tx: tx, Size: -1, Payload: []byte("bench")}), 9, 1)
	if _, err := s.conn.Write(announce.bytes); err != nil {
		return err
	}
	s.wait(start + 1)
	if err := s.write(s.block(s.frame(wire.Frame{Type: wire.TxChunk, Tx: tx, Payload: chunk}), 13, n), n); err != nil {
		return err
	}
	s.number++
	finish := s.block(s.frame(wire.Frame{Type: wire.TxFinish, Ack: s.number, Tx: tx}), 9, 1)
	if _, err := s.conn.Write(finish.bytes); err != nil {
		return err
	}
	s.wait(start + 2)
	return nil
}
