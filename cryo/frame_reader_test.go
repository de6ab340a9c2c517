package cryo

import (
	"bytes"
	"errors"
	"io"
	"net"
	"runtime"
	"testing"

	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/internal/wire"
	"github.com/cryo-connect/cryo-connect/internal/ws"
)

// recordedConn records what is written to it.
type recordedConn struct {
	net.Conn
	taken []byte
}

func (c *recordedConn) Write(p []byte) (int, error) {
	c.taken = append(c.taken, p...)
	return len(p), nil
}

// recorded is a client's frame as it travels.
func recorded(t *testing.T, f wire.Frame) []byte {
	t.Helper()
	conn := &recordedConn{}
	writer := ws.New(conn, true)
	head, err := wire.AppendHeader(nil, &f)
	require.NoError(t, err)
	require.NoError(t, writer.Write(websocket.BinaryMessage, head, f.Payload))
	require.NoError(t, writer.Flush())
	return conn.taken
}

// readerOf returns a reader of what a connection gives, with its own receive buffer.
func readerOf(c net.Conn, bound int) *frameReader {
	conn := ws.New(c, false)
	conn.Start(func([]byte) {}, func(int, bool) {})
	limit := newReceiveLimit(conn, newReceiveBuffer(bound), make(chan struct{}),
		func() bool { return false }, func(*wire.Frame) bool { return true }, func(*wire.Frame) bool { return false })
	return &frameReader{conn: conn, limit: limit, isOurs: func(uint32) bool { return false }, onData: func() {}}
}

func TestReadingAFrameAllocatesItsPayloadOnly(t *testing.T) {
	for want, f := range []wire.Frame{{Type: wire.Ack, Ack: 1}, {Type: wire.Binary, Ack: 1, Payload: make([]byte, 8)}} {
		reader, in := readerOf(&endlessConn{bytes: recorded(t, f)}, 1000), new(received)
		require.Equal(t, want, int(testing.AllocsPerRun(1000, func() {
			if reader.next(in) != nil {
				panic("no frame")
			}
			in.release()
		})), "reading %v", f.Type)
	}
}

// tape is a connection that ends behind some bytes.
type tape struct {
	net.Conn
	io.Reader
}

func (c tape) Read(p []byte) (int, error) { return c.Reader.Read(p) }

func tapeOf(b []byte) net.Conn { return tape{Reader: bytes.NewReader(b)} }

// allocated is how many bytes a function allocates.
func allocated(f func()) uint64 {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	f()
	runtime.ReadMemStats(&after)
	return after.TotalAlloc - before.TotalAlloc
}

// A length is the peer's word: a session may not be made to allocate by it.
func TestMemoryIsAllocatedForReceivedBytes(t *testing.T) {
	b := recorded(t, wire.Frame{Type: wire.Binary, Payload: make([]byte, wire.MaxPayload)})
	for _, come := range []int{100, 1 << 20} {
		reader, in := readerOf(tapeOf(b[:come]), DefaultMaxBufferBytes), new(received)
		n := allocated(func() { require.ErrorIs(t, reader.next(in), io.ErrUnexpectedEOF) })
		require.Less(t, n, uint64(trustFactor*come+2*smallPayload), "%d bytes have come of 16 MiB", come)
		in.release()
		held, _ := reader.limit.incoming.Usage()
		require.Zero(t, held)
	}
}

func TestControlFrameNeedsLittleMemory(t *testing.T) {
	for _, typ := range []wire.Type{wire.Bye, wire.TxStart, wire.Error} { // an ERROR that is an answer
		b := recorded(t, wire.Frame{Type: typ, Payload: bytes.Repeat([]byte("x"), wire.MaxPayload)})
		reader, in := readerOf(tapeOf(append(b, recorded(t, wire.Frame{Type: wire.Ack, Ack: 7})...)), 1), new(received)
		reader.isOurs = func(uint32) bool { return true }
		reader.limit.bytes.Force(1) // full
		n := allocated(func() { require.NoError(t, reader.next(in)) })
		require.Less(t, n, uint64(256<<10), "%v of 16 MiB", typ) // the read buffer is 128 KiB
		require.Len(t, in.Payload, maxControl)
		in.release()
		require.NoError(t, reader.next(in))
		require.Equal(t, uint32(7), in.Ack, "the next frame")
	}
}

// The memory of a payload is what is reserved for it, however it came.
func TestPayloadHasExactMemoryAndReservesIt(t *testing.T) {
	for _, size := range []int{0, 1, 100, 32 << 10, 32<<10 + 1, 50_000, 64 << 10, 64<<10 + 1, 200_000, 3 << 20} {
		for _, typ := range []wire.Type{wire.Binary, wire.TxChunk} {
			for _, fragment := range []int{0, 7_000, 100_000, 2 << 20} {
				want := bytes.Repeat([]byte("payload."), size/8+1)[:size]
				frame, err := wire.Append(nil, &wire.Frame{Type: typ, Payload: want})
				require.NoError(t, err)
				reader, in := readerOf(tapeOf(fragmented(t, frame, fragment)), DefaultMaxBufferBytes), new(received)
				require.NoError(t, reader.next(in))
				require.Equal(t, admitted, in.decision)
				require.True(t, bytes.Equal(want, in.Payload))
				held, _ := reader.limit.bytes.Usage()
				require.EqualValues(t, cap(in.Payload)+overhead(typ), held, "%v of %d in fragments of %d", typ, size, fragment)
				require.Equal(t, in.reservation.n, held)
				if in.pooled == nil {
					require.Equal(t, size, cap(in.Payload))
				}
				in.release()
				for _, share := range []interface{ Usage() (held, free int64) }{reader.limit.bytes, reader.limit.incoming, reader.limit.slot} {
					held, _ := share.Usage()
					require.Zero(t, held)
				}
			}
		}
	}
}

// fragmented is a client's frame as it travels in fragments of so many bytes; 0 is one.
func fragmented(t *testing.T, frame []byte, size int) (all []byte) {
	t.Helper()
	if size == 0 {
		size = len(frame)
	}
	for at := 0; at < len(frame); at += size {
		conn := &recordedConn{}
		writer := ws.New(conn, true)
		require.NoError(t, writer.Write(websocket.BinaryMessage, nil, frame[at:min(at+size, len(frame))]))
		require.NoError(t, writer.Flush())
		if at > 0 {
			conn.taken[0] &^= websocket.BinaryMessage // a continuation
		}
		if at+size < len(frame) {
			conn.taken[0] &^= 0x80 // not the last
		}
		all = append(all, conn.taken...)
	}
	return all
}

func TestTooLongFragmentedMessageIsAnError(t *testing.T) {
	frame, err := wire.Append(nil, &wire.Frame{Type: wire.Binary, Payload: make([]byte, wire.MaxPayload)})
	require.NoError(t, err)
	in := new(received)
	require.NoError(t, readerOf(tapeOf(fragmented(t, frame, 1<<20)), DefaultMaxBufferBytes).next(in))
	in.release()
	err = readerOf(tapeOf(fragmented(t, append(frame, 0), 1<<20)), DefaultMaxBufferBytes).next(in)
	in.release()
	broken, ok := errors.AsType[*ProtocolError](err)
	require.True(t, ok, "%v", err)
	require.ErrorContains(t, broken, "payload over 16 MiB")
}
