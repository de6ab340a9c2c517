package ws

import (
	"bufio"
	"bytes"
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

func connOf(c net.Conn, masks bool) *Conn {
	conn := New(c, masks)
	conn.Start(func([]byte) {}, func() {})
	return conn
}

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
	ws := connOf(&tapeConn{tape: tape, piece: piece}, false)
	ws.onPing = func(data []byte) { h.pings = append(h.pings, string(data)) }
	for {
		err := ws.Next()
		var message []byte
		if err == nil {
			message, err = ws.ReadHead(nil, 1)
		}
		if err == nil {
			message, err = ws.ReadRest(append(make([]byte, 0, min(len(message)+ws.left, 4096)), message...))
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
	ws, err := (&websocket.Upgrader{}).Upgrade(hijacked{httptest.NewRecorder(), &tapeConn{tape: tape, piece: piece}}, r, nil)
	require.NoError(t, err)
	ws.SetReadLimit(MaxMessage)
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
		ws := connOf(conn, true)
		for _, part := range parts {
			require.NoError(f, ws.Write(websocket.BinaryMessage, nil, []byte(part)))
		}
		require.NoError(f, ws.Write(websocket.PingMessage, nil, []byte("there?")))
		require.NoError(f, ws.Write(websocket.CloseMessage, websocket.FormatCloseMessage(4000, "bye"), nil))
		require.NoError(f, ws.Flush())
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
	sizes := []int{0, 1, 125, 126, 65535, 65536, GatherBytes - maxFrameHead, GatherBytes, 3*GatherBytes + 1}
	for _, masks := range []bool{false, true} {
		conn := &tapeConn{}
		ws := connOf(conn, masks)
		for _, size := range sizes {
			require.NoError(t, ws.Write(websocket.BinaryMessage, []byte("head"), bytes.Repeat([]byte{1, 2, 3}, size)[:size]))
		}
		require.NoError(t, ws.Flush())

		for _, piece := range []int{7, 1000, 1 << 20} {
			reader := connOf(&tapeConn{tape: conn.taken, piece: piece}, !masks)
			for _, size := range sizes {
				require.NoError(t, reader.Next())
				message, err := reader.ReadRest(make([]byte, 0, min(reader.left, 4096)))
				require.NoError(t, err)
				require.Equal(t, "head", string(message[:4]))
				require.True(t, bytes.Equal(bytes.Repeat([]byte{1, 2, 3}, size)[:size], message[4:]), "%d bytes", size)
			}
			require.Equal(t, io.ErrUnexpectedEOF, reader.Next())
		}
	}
}

// A length is the peer's word: a session may not be made to allocate by it.
func TestMemoryIsGivenForWhatHasCome(t *testing.T) {
	conn := &tapeConn{}
	writer := connOf(conn, true)
	require.NoError(t, writer.Write(websocket.BinaryMessage, nil, make([]byte, (16<<20))))
	require.NoError(t, writer.Flush())
	for _, come := range []int{100, 1 << 20} {
		ws := connOf(&tapeConn{tape: conn.taken[:come], piece: 1 << 20}, false)
		require.NoError(t, ws.Next())
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		_, err := ws.ReadRest(make([]byte, 0, min(ws.left, 4096)))
		runtime.ReadMemStats(&after)
		require.Equal(t, io.ErrUnexpectedEOF, err)
		require.Less(t, after.TotalAlloc-before.TotalAlloc, uint64(trustFactor*come+4*minGrowth+4096), "%d bytes have come of %d", come, (16 << 20))
	}
}
