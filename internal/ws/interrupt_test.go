package ws

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/require"
)

// interruptedConn is a tapeConn of which reads fail now and then, with no data.
type interruptedConn struct {
	tapeConn
	rand *rand.Rand
}

func (c *interruptedConn) Read(p []byte) (int, error) {
	if c.rand.IntN(2) == 0 {
		return 0, os.ErrDeadlineExceeded
	}
	return c.tapeConn.Read(p)
}

func (c *interruptedConn) SetReadDeadline(time.Time) error { return nil }

// Wherever a read is interrupted, the rest of the message can be discarded from there, and
// what follows is read as if nothing had happened.
func TestInterruptedReadLosesNoBytes(t *testing.T) {
	for seed := range uint64(300) {
		r := rand.New(rand.NewPCG(seed, 3))
		tape := &tapeConn{}
		writer := connOf(tape, true)
		var want []string
		for i := range 20 {
			if r.IntN(3) == 0 {
				data := bytes.Repeat([]byte{byte(i)}, r.IntN(126))
				want = append(want, "ping "+string(data))
				require.NoError(t, writer.Write(websocket.PingMessage, nil, data))
			}
			text := bytes.Repeat([]byte{byte(i)}, 1+r.IntN(1<<r.IntN(18)))
			want = append(want, string(text[:1]))
			require.NoError(t, writer.Write(websocket.BinaryMessage, nil, text))
		}
		require.NoError(t, writer.Flush())

		conn := &interruptedConn{tapeConn{tape: tape.taken, piece: func() int { return 1 + r.IntN(1<<r.IntN(18)) }}, r}
		reader := connOf(conn, false)
		var got []string
		reader.Start(func(data []byte) { got = append(got, "ping "+string(data)) }, func(int, bool) {})
		resume := func(read func() error) (err error) {
			for err = read(); errors.Is(err, os.ErrDeadlineExceeded); err = read() {
				reader.ResumeReads()
			}
			return err
		}
		for {
			err := resume(reader.Next)
			if err != nil {
				require.Equal(t, io.ErrUnexpectedEOF, err)
				break
			}
			head := make([]byte, 1)
			require.NoError(t, resume(func() error { return reader.ReadFull(head) }))
			got = append(got, string(head))
			if r.IntN(2) == 0 { // a part of it may be read when it is interrupted
				_, _ = reader.ReadHead(nil, r.IntN(reader.Left()+1))
			}
			require.NoError(t, resume(reader.Discard))
		}
		require.True(t, slices.Equal(want, got), "seed %d", seed)
	}
}

func TestMostlyReadBufferIsReleased(t *testing.T) {
	Poisoning.Store(true)
	defer Poisoning.Store(false)
	for _, left := range []int{0, 1, readSmall, readSmall + 1, readBytes/4 - 1, readBytes / 4, readBytes} {
		want := bytes.Repeat([]byte("x"), readBytes)
		c := &transport{Conn: &scriptedConn{data: append(bytes.Repeat([]byte("x"), readSmall), want...)}}
		require.NoError(t, c.fill())
		c.skip(readSmall)
		require.NoError(t, c.fill())
		require.NotNil(t, c.large)
		c.skip(readBytes - left)

		c.releaseMostlyRead()
		require.Equal(t, left >= readBytes/4, c.large != nil, "%d bytes are left", left)
		require.Equal(t, string(want[:left]), string(c.ahead))
		require.LessOrEqual(t, cap(c.ahead), max(4*left, 2*readSmall))
		rest := make([]byte, left)
		_, err := c.readFull(rest)
		require.NoError(t, err)
		require.Equal(t, string(want[:left]), string(rest))
	}
}
