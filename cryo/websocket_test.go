package cryo

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"runtime"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/internal/wire"
)

// tapeConn gives what was recorded in pieces of some size, and records.
type tapeConn struct {
	net.Conn
	tape  []byte
	piece int
	taken []byte
}

func (c *tapeConn) Read(p []byte) (int, error) {
	if len(c.tape) == 0 {
		return 0, io.EOF
	}
	n := copy(p[:min(len(p), c.piece)], c.tape)
	c.tape = c.tape[n:]
	return n, nil
}

func (c *tapeConn) Write(p []byte) (int, error) {
	c.taken = append(c.taken, p...)
	return len(p), nil
}

func (c *tapeConn) SetDeadline(time.Time) error      { return nil }
func (c *tapeConn) SetWriteDeadline(time.Time) error { return nil }
func (c *tapeConn) Close() error                     { return nil }

// heard is what one end of a WebSocket has read of a tape.
type heard struct {
	messages []string // behind "t" or "b"
	pings    []string
	end      string // the class of the error
}

func classOf(err error) string {
	var closed *websocket.CloseError
	switch {
	case errors.As(err, &closed) && closed.Code != websocket.CloseAbnormalClosure:
		return closed.Error()
	case closed != nil, errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return "cut off"
	default:
		return "broken"
	}
}

func hear(tape []byte, piece int) (h heard) {
	ws := &webSocket{
		conn:   &transport{Conn: &tapeConn{tape: tape, piece: piece}},
		onMore: func() {},
		onPing: func(data []byte) { h.pings = append(h.pings, string(data)) },
	}
	var memory blocks
	for {
		err := ws.next()
		var message []byte
		if err == nil {
			message, err = ws.readHead(nil, 1)
		}
		if err == nil {
			message, err = ws.readMessage(append(memory.take(len(message)+ws.left, ws.conn.waiting()), message...))
		}
		if err != nil {
			h.end = classOf(err)
			return h
		}
		kind := "b"
		if ws.text {
			kind = "t"
		}
		h.messages = append(h.messages, kind+string(message))
	}
}

// hijacked lets the library's own server have a tape.
type hijacked struct {
	http.ResponseWriter
	conn net.Conn
}

func (h hijacked) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	return h.conn, bufio.NewReadWriter(bufio.NewReader(h.conn), bufio.NewWriter(h.conn)), nil
}

func hearByLibrary(t *testing.T, tape []byte, piece int) (h heard) {
	r := httptest.NewRequest(http.MethodGet, "/", http.NoBody)
	r.Header = http.Header{
		"Upgrade": {"websocket"}, "Connection": {"upgrade"},
		"Sec-Websocket-Version": {"13"}, "Sec-Websocket-Key": {"MDEyMzQ1Njc4OWFiY2RlZg=="},
	}
	ws, err := newUpgrader().Upgrade(hijacked{httptest.NewRecorder(), &tapeConn{tape: tape, piece: piece}}, r, nil)
	require.NoError(t, err)
	ws.SetReadLimit(wire.MaxFrame)
	ws.SetPingHandler(func(data string) error { h.pings = append(h.pings, data); return nil })
	for {
		kind, message, err := ws.ReadMessage()
		if err != nil {
			h.end = classOf(err)
			return h
		}
		name := "b"
		if kind == websocket.TextMessage {
			name = "t"
		}
		h.messages = append(h.messages, name+string(message))
	}
}

// What is read, and where reading ends, is what the library would say. Only when
// something is both broken and cut off, the two may differ in what they see first.
func FuzzWebSocketReadsAsTheLibraryDoes(f *testing.F) {
	message := func(parts ...string) (tape []byte) {
		conn := &tapeConn{}
		ws := &webSocket{conn: &transport{Conn: conn}, masks: true}
		for _, part := range parts {
			require.NoError(f, ws.write(websocket.BinaryMessage, nil, []byte(part)))
		}
		require.NoError(f, ws.write(websocket.PingMessage, nil, []byte("there?")))
		require.NoError(f, ws.write(websocket.CloseMessage, websocket.FormatCloseMessage(4000, "bye"), nil))
		require.NoError(f, ws.conn.flush())
		return conn.taken
	}
	f.Add(message("", "a", string(make([]byte, 200)), string(make([]byte, 70_000))), 100)
	f.Add([]byte{0x01, 0x81, 1, 2, 3, 4, 5, 0x89, 0x80, 0, 0, 0, 0, 0x80, 0x82, 4, 3, 2, 1, 0, 9}, 1)
	f.Add([]byte{0x82, 0xFF, 0x80, 0, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4}, 4)
	f.Add([]byte{0x88, 0x82, 0, 0, 0, 0, 0x03, 0xE8}, 512)
	f.Add([]byte{0x8A, 0xFE, 0, 1}, 3)
	f.Fuzz(func(t *testing.T, tape []byte, piece int) {
		if piece < 1 {
			piece = 1
		}
		ours, library := hear(tape, piece), hearByLibrary(t, tape, piece)
		require.Equal(t, library.messages, ours.messages)
		if ours.end != "broken" && library.end != "broken" {
			require.Equal(t, library.end, ours.end)
			require.Equal(t, library.pings, ours.pings)
		}
	})
}

func TestWhatIsWrittenIsRead(t *testing.T) {
	sizes := []int{0, 1, 125, 126, 65535, 65536, gatherBytes - maxFrameHead, gatherBytes, 3*gatherBytes + 1}
	for _, masks := range []bool{false, true} {
		conn := &tapeConn{}
		ws := &webSocket{conn: &transport{Conn: conn}, masks: masks}
		for _, size := range sizes {
			require.NoError(t, ws.write(websocket.BinaryMessage, []byte("head"), bytes.Repeat([]byte{1, 2, 3}, size)[:size]))
		}
		require.NoError(t, ws.conn.flush())

		for _, piece := range []int{7, 1000, 1 << 20} {
			reader := &webSocket{conn: &transport{Conn: &tapeConn{tape: conn.taken, piece: piece}}, masks: !masks}
			var memory blocks
			for _, size := range sizes {
				require.NoError(t, reader.next())
				message, err := reader.readMessage(memory.take(reader.left, reader.conn.waiting()))
				require.NoError(t, err)
				require.Equal(t, "head", string(message[:4]))
				require.True(t, bytes.Equal(bytes.Repeat([]byte{1, 2, 3}, size)[:size], message[4:]), "%d bytes", size)
			}
			require.Equal(t, io.ErrUnexpectedEOF, reader.next())
		}
	}
}

// A length is the peer's word: a session may not be made to allocate by it.
func TestMemoryIsGivenForWhatHasCome(t *testing.T) {
	conn := &tapeConn{}
	writer := &webSocket{conn: &transport{Conn: conn}, masks: true}
	require.NoError(t, writer.write(websocket.BinaryMessage, nil, make([]byte, MaxPayload)))
	require.NoError(t, writer.conn.flush())
	for _, come := range []int{100, 1 << 20} {
		ws := &webSocket{conn: &transport{Conn: &tapeConn{tape: conn.taken[:come], piece: 1 << 20}}}
		require.NoError(t, ws.next())
		var memory blocks
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		_, err := ws.readMessage(memory.take(ws.left, ws.conn.waiting()))
		runtime.ReadMemStats(&after)
		require.Equal(t, io.ErrUnexpectedEOF, err)
		require.Less(t, after.TotalAlloc-before.TotalAlloc, uint64(trustFactor*come+4*maxTrusted), "%d bytes have come of %d", come, MaxPayload)
	}
}

// endlessConn gives the same bytes again and again, and takes everything.
type endlessConn struct {
	net.Conn
	bytes []byte
	at    int
}

func (c *endlessConn) Read(p []byte) (int, error) {
	n := copy(p, c.bytes[c.at:])
	c.at = (c.at + n) % len(c.bytes)
	return n, nil
}

func (c *endlessConn) Write(p []byte) (int, error) { return len(p), nil }

func TestParsingAndAcknowledgingDoNotAllocate(t *testing.T) {
	for _, f := range []wire.Frame{{Type: wire.Ack, Ack: 1}, {Type: wire.Binary, Ack: 1, Payload: make([]byte, 8)}} {
		recorded := &tapeConn{}
		ws := &webSocket{conn: &transport{Conn: recorded}, masks: true}
		head, err := wire.AppendHeader(nil, &f)
		require.NoError(t, err)
		require.NoError(t, ws.write(websocket.BinaryMessage, head, f.Payload))
		require.NoError(t, ws.conn.flush())

		reader := &webSocket{conn: &transport{Conn: &endlessConn{bytes: recorded.taken}}}
		var memory blocks
		require.Zero(t, testing.AllocsPerRun(1000, func() {
			if reader.next() != nil {
				panic("no message")
			}
			message, _ := reader.readMessage(memory.take(reader.left, reader.conn.waiting()))
			if _, err := wire.Parse(message); err != nil {
				panic(err)
			}
		}), "reading %v: one allocation serves many", f.Type)
	}

	s := &Session{id: 1, conn: &transport{Conn: &endlessConn{}}}
	s.ws = &webSocket{conn: s.conn, masks: true}
	s.out = newOutbox(s)
	q := queued{acks: make([]uint32, 64)}
	scratch := make([]byte, 0, 64)
	require.Zero(t, testing.AllocsPerRun(1000, func() {
		if _, err := s.out.writeAll(&q, scratch); err != nil {
			panic(err)
		}
	}), "64 acknowledgements")
}

// keptConn keeps what it is given to write, and nothing comes from it.
type keptConn struct {
	net.Conn
	closed context.Context
	close  context.CancelFunc
	given  [][]byte
}

func (c *keptConn) Read([]byte) (int, error) {
	<-c.closed.Done()
	return 0, net.ErrClosed
}

func (c *keptConn) Write(p []byte) (int, error) {
	c.given = append(c.given, p)
	return len(p), nil
}

func (c *keptConn) Close() error {
	c.close()
	return nil
}

// A broadcast to many sessions that are slow has what is large in memory once.
func TestWhatIsLargeIsWrittenFromWhereItIs(t *testing.T) {
	payload := bytes.Repeat([]byte("x"), writeDirect+gatherBytes)
	for name, send := range map[string]func(s *Session){
		"a message": func(s *Session) {
			s.StartBatch([]Outgoing{{Kind: KindBinary, Payload: payload}})
		},
		"the chunk of a stream": func(s *Session) {
			st, err := s.newStream(t.Context(), &StreamOptions{ChunkBytes: len(payload)})
			require.NoError(t, err)
			_, err = st.ReadFrom(bytes.NewReader(payload))
			require.NoError(t, err)
		},
	} {
		t.Run(name, func(t *testing.T) {
			conn := &keptConn{}
			conn.closed, conn.close = context.WithCancel(t.Context())
			s := newSession(1, false, &transport{Conn: conn}, newMemory(1), SessionOptions{}.withDefaults(), nil)
			send(s)
			s.out.wait()
			head := len(conn.given[0])
			require.Less(t, head, 100)
			require.Same(t, &payload[0], &conn.given[1][0])
			require.Equal(t, gatherBytes, head+len(conn.given[1]), "one piece, for alive")
			require.Same(t, &payload[gatherBytes-head], &conn.given[2][0])
			s.fail(ErrClosed)
			<-s.Done()
		})
	}
}
