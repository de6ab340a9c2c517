package cryo

import (
	"bytes"
	"context"
	"net"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/internal/ws"
)

// endlessConn gives the same bytes repeatedly, and takes everything.
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

func TestAcknowledgingDoesNotAllocate(t *testing.T) {
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
func TestLargePayloadIsWrittenWithoutACopy(t *testing.T) {
	payload := bytes.Repeat([]byte("x"), ws.WriteDirect+ws.GatherBytes)
	for name, send := range map[string]func(s *Session){
		"a message": func(s *Session) {
			s.Queue([]OutMessage{Binary(payload)})
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
			s := newSession(1, false, nil, ws.New(conn, false), newReceiveBuffer(1), SessionOptions{}.withDefaults(), nil)
			send(s)
			s.writer.wait()
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
