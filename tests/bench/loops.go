package main

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gorilla/websocket"

	"github.com/cryo-connect/cryo-connect/internal/wire"
)

// The reference: loops over gorilla/websocket that only acknowledge. The plain one has the
// library's defaults and one write for each frame; the gathered one has buffers of 64 KiB
// and one write for all pending frames.

const (
	gatheredBuffer = 64 << 10
	gatheredWrite  = 256 << 10
)

// gathering is a connection whose writes wait for flush, or for the next read.
type gathering struct {
	net.Conn
	mu  sync.Mutex
	buf []byte
}

func (g *gathering) Write(p []byte) (int, error) {
	g.mu.Lock()
	g.buf = append(g.buf, p...)
	full := len(g.buf) >= gatheredWrite
	g.mu.Unlock()
	if full {
		return len(p), g.flush()
	}
	return len(p), nil
}

func (g *gathering) Read(p []byte) (int, error) {
	if err := g.flush(); err != nil {
		return 0, err
	}
	return g.Conn.Read(p)
}

func (g *gathering) flush() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if len(g.buf) == 0 {
		return nil
	}
	_, err := g.Conn.Write(g.buf)
	g.buf = g.buf[:0]
	return err
}

// loop is one end of a Cryo session without the library. Both ends of a loop are the same,
// except that one dials.
type loop struct {
	ws    *websocket.Conn
	flush func() error
	buf   []byte // of the message read last

	sent     int64
	acked    atomic.Int64
	progress chan struct{} // holds a token when acked has grown
	ended    chan struct{} // closed when reading has ended
}

const loopSession = 1

func newLoop(ws *websocket.Conn) *loop {
	l := &loop{ws: ws, flush: func() error { return nil }, progress: make(chan struct{}, 1), ended: make(chan struct{})}
	if g, ok := ws.NetConn().(*gathering); ok {
		l.flush = g.flush
	}
	return l
}

func dialLoop(address string, gathered bool) (*loop, error) {
	dialer := websocket.Dialer{}
	if gathered {
		dialer.ReadBufferSize, dialer.WriteBufferSize = gatheredBuffer, gatheredBuffer
		dialer.NetDialContext = func(ctx context.Context, network, address string) (net.Conn, error) {
			conn, err := (&net.Dialer{}).DialContext(ctx, network, address)
			return &gathering{Conn: conn}, err
		}
	}
	ws, resp, err := dialer.Dial("ws://"+address, http.Header{})
	if err != nil {
		return nil, err
	}
	_ = resp.Body.Close()
	return newLoop(ws), nil
}

// listenLoop listens, writes its address, and waits for the other end.
func listenLoop(gathered bool) (*loop, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	upgrader := websocket.Upgrader{}
	if gathered {
		upgrader.ReadBufferSize, upgrader.WriteBufferSize = gatheredBuffer, gatheredBuffer
		l = gatheringListener{l}
	}
	loops := make(chan *loop)
	server := http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		ws, err := upgrader.Upgrade(w, r, nil)
		if err != nil {
			fatal(err)
		}
		loops <- newLoop(ws)
	}), ReadHeaderTimeout: time.Minute}
	fmt.Println(l.Addr())
	go func() { _ = server.Serve(l) }() // until the process ends
	return <-loops, nil
}

type gatheringListener struct{ net.Listener }

func (l gatheringListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	return &gathering{Conn: conn}, err
}

func frame(f wire.Frame) []byte {
	f.SID = loopSession
	b, err := wire.Append(nil, &f)
	if err != nil {
		fatal(err)
	}
	return b
}

// next reads a message; it is valid until the next call.
func (l *loop) next() (f wire.Frame, err error) {
	_, r, err := l.ws.NextReader()
	if err != nil {
		return f, err
	}
	n := 0
	for {
		if n == len(l.buf) {
			l.buf = append(l.buf, make([]byte, n+4<<10)...)
		}
		read, err := r.Read(l.buf[n:])
		n += read
		if err == io.EOF {
			return wire.Parse(l.buf[:n])
		}
		if err != nil {
			return f, err
		}
	}
}

// acknowledge acknowledges messages until the connection ends.
func (l *loop) acknowledge() {
	defer close(l.ended)
	ack := frame(wire.Frame{Type: wire.Ack})
	for {
		f, err := l.next()
		if err != nil {
			return
		}
		binary.BigEndian.PutUint32(ack[9:], f.Ack)
		if l.ws.WriteMessage(websocket.BinaryMessage, ack) != nil {
			return
		}
	}
}

// count counts acknowledgements, until the connection ends.
func (l *loop) count() {
	defer close(l.ended)
	for {
		if _, err := l.next(); err != nil {
			return
		}
		l.acked.Add(1)
		select {
		case l.progress <- struct{}{}:
		default:
		}
	}
}

// send sends n messages within the window, and returns when they are
// acknowledged.
func (l *loop) send(n int, message []byte, window int) error {
	target := l.sent + int64(n)
	for l.acked.Load() < target {
		if l.sent < target && l.sent-l.acked.Load() < int64(window) {
			l.sent++
			binary.BigEndian.PutUint32(message[9:], uint32(l.sent))
			if err := l.ws.WriteMessage(websocket.BinaryMessage, message); err != nil {
				return err
			}
			continue
		}
		if err := l.flush(); err != nil {
			return err
		}
		<-l.progress
	}
	return nil
}

// run starts this process's end of a loop, and returns a function that transfers messages.
func (l *loop) run(spec peerSpec, source bool) (do func(n int) error) {
	if !source {
		go l.acknowledge()
		return nil
	}
	go l.count()
	message := frame(wire.Frame{Type: wire.UTF8, Payload: text(spec.Size)})
	return func(n int) error { return l.send(n, message, spec.Window) }
}

// startLoop measures a loop: the peer's end listens, ours dials.
func startLoop(spec peerSpec) (*running, error) {
	p, err := startPeer(spec)
	if err != nil {
		return nil, err
	}
	l, err := dialLoop(p.address, spec.Protocol == speaksGathered)
	if err != nil {
		return nil, err
	}
	do := l.run(spec, !spec.Source)
	if spec.Source {
		do = func(n int) error { _, err := p.order("send %d", n); return err }
	}
	return &running{p, do, func() { _ = l.ws.Close(); <-l.ended }}, nil
}
