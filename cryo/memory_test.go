package cryo

import (
	"bytes"
	"context"
	"net"
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
		recorded := &recordedConn{}
		writer := ws.New(recorded, true)
		head, err := wire.AppendHeader(nil, &f)
		require.NoError(t, err)
		require.NoError(t, writer.Write(websocket.BinaryMessage, head, f.Payload))
		require.NoError(t, writer.Flush())

		reader := ws.New(&endlessConn{bytes: recorded.taken}, false)
		reader.Start(func([]byte) {}, func() {})
		var memory blocks
		require.Zero(t, testing.AllocsPerRun(1000, func() {
			if reader.Next() != nil {
				panic("no message")
			}
			message, _ := reader.ReadRest(memory.take(reader.Left(), reader.Buffered()))
			if _, err := wire.Parse(message); err != nil {
				panic(err)
			}
		}), "reading %v: one allocation serves many", f.Type)
	}

	w := newWriter(ws.New(&endlessConn{}, true), 1, newAckTable(dialingNumbers, 0), nil)
	q := queue{acks: make([]uint32, 64)}
	require.Zero(t, testing.AllocsPerRun(1000, func() {
		if w.gather(&q) != nil || w.conn.Flush() != nil {
			panic("not written")
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
	payload := bytes.Repeat([]byte("x"), ws.WriteDirect+ws.GatherBytes)
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
			s := newSession(1, false, ws.New(conn, false), newMemory(1), SessionOptions{}.withDefaults(), nil)
			send(s)
			s.out.wait()
			require.Less(t, len(conn.given[0]), 100, "the head")
			at := 0
			for _, piece := range conn.given[1:] {
				require.Same(t, &payload[at], &piece[0])
				at += len(piece)
			}
			require.Equal(t, len(payload), at)
			s.fail(ErrClosed)
			<-s.Done()
		})
	}
}
