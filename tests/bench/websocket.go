package main

import (
	"bufio"
	"crypto/sha1" //nolint:gosec // RFC 6455 wants it
	"encoding/base64"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/http"
)

// webSocket is one end of a WebSocket with only what the benchmarks need, so that the peer
// costs little. Writes are gathered until flush, or until a read has to wait.
type webSocket struct {
	conn    net.Conn
	client  bool // masks, with a key of zeros
	in      *bufio.Reader
	out     []byte
	last    int    // bytes of the frame that next gave
	onPause func() // called before reading waits for the network
}

const (
	readAhead  = 1 << 20
	writeAhead = 256 << 10
)

func newWebSocket(conn net.Conn, client bool) *webSocket {
	w := &webSocket{conn: conn, client: client, onPause: func() {}}
	w.in = bufio.NewReaderSize(pausing{w}, readAhead)
	return w
}

// pausing flushes before it reads from the network.
type pausing struct{ w *webSocket }

func (p pausing) Read(b []byte) (int, error) {
	if err := p.w.flush(); err != nil {
		return 0, err
	}
	p.w.onPause()
	return p.w.conn.Read(b)
}

func (w *webSocket) flush() error {
	if len(w.out) == 0 {
		return nil
	}
	_, err := w.conn.Write(w.out)
	w.out = w.out[:0]
	return err
}

// upgrade does the WebSocket handshake for either end.
func (w *webSocket) upgrade(path string) error {
	if w.client {
		fmt.Fprintf(w.conn, "GET %s HTTP/1.1\r\nHost: %v\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"+
			"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\n\r\n", path, w.conn.RemoteAddr())
		resp, err := http.ReadResponse(w.in, nil) //nolint:bodyclose // there is none
		if err == nil && resp.StatusCode != http.StatusSwitchingProtocols {
			err = fmt.Errorf("upgrade: %s", resp.Status)
		}
		return err
	}
	req, err := http.ReadRequest(w.in)
	if err != nil {
		return err
	}
	sum := sha1.Sum([]byte(req.Header.Get("Sec-WebSocket-Key") + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11")) //nolint:gosec // RFC 6455 wants it
	_, err = fmt.Fprintf(w.conn, "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: %s\r\n\r\n",
		base64.StdEncoding.EncodeToString(sum[:]))
	return err
}

// append gathers a binary message.
func (w *webSocket) append(message []byte) {
	w.out = appendHead(w.out, len(message), w.client)
	w.out = append(w.out, message...)
}

func appendHead(b []byte, size int, client bool) []byte {
	const final, binaryMessage, masked = 0x80, 2, 0x80
	mask := byte(0)
	if client {
		mask = masked
	}
	b = append(b, final|binaryMessage)
	switch {
	case size < 126:
		b = append(b, mask|byte(size))
	case size < 1<<16:
		b = binary.BigEndian.AppendUint16(append(b, mask|126), uint16(size))
	default:
		b = binary.BigEndian.AppendUint64(append(b, mask|127), uint64(size))
	}
	if client {
		b = append(b, 0, 0, 0, 0)
	}
	return b
}

// next reads a WebSocket frame, and returns the first bytes of its payload; none for a
// continuation.
func (w *webSocket) next(head []byte) (n int, err error) {
	if _, err := w.in.Discard(w.last); err != nil {
		return 0, err
	}
	w.last = 0
	b, err := w.in.Peek(2)
	if err != nil {
		return 0, err
	}
	first, masked, size, behind := b[0]&0x0f != 0, b[1]&0x80 != 0, int(b[1]&0x7f), 2
	switch size {
	case 126:
		behind += 2
	case 127:
		behind += 8
	}
	if masked {
		behind += 4
	}
	if b, err = w.in.Peek(behind); err != nil {
		return 0, err
	}
	switch size {
	case 126:
		size = int(binary.BigEndian.Uint16(b[2:]))
	case 127:
		size = int(binary.BigEndian.Uint64(b[2:]))
	}
	if b, err = w.in.Peek(behind + min(len(head), size)); err != nil {
		return 0, err
	}
	if first {
		n = copy(head, b[behind:])
	}
	if masked {
		for i := range n {
			head[i] ^= b[behind-4+i%4]
		}
	}
	w.last = behind + size
	return n, nil
}

// drain reads and discards frames.
func (w *webSocket) drain() { _, _ = io.Copy(io.Discard, w.in) }
