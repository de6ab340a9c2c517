package cryo_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"testing"
	"testing/iotest"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/wire"
)

// Every way a stream can go, with a session of ours at both ends. The receiver
// holds little unread, so that a stream stands still in the middle when nobody
// reads it.
func TestStreamMatrix(t *testing.T) {
	for _, direction := range []string{"client to server", "server to client"} {
		for _, flow := range []wire.Flow{wire.FlowPush, wire.FlowPull} {
			for _, source := range matrixSources {
				for _, ending := range matrixEndings {
					t.Run(fmt.Sprintf("%s/%v/%s/%s", direction, flow, source.name, ending.name), func(t *testing.T) {
						synctest.Test(t, func(t *testing.T) {
							little := quiet
							little.MaxBufferBytes = 64 << 10
							p := connect(t, little, little)
							m := &matrix{pair: p, flow: flow, source: source, data: noise(ending.size), from: p.client, to: p.server}
							if direction == "server to client" {
								m.from, m.to = p.server, p.client
							}
							useFlow(t, m.to, flow)
							if flow == wire.FlowPull && source.unseekable != nil {
								require.ErrorIs(t, m.send(t.Context(), 0).result(t), source.unseekable)
								wantNoStream(t, m.to)
								m.serves(t)
								return
							}
							ending.test(t, m)
						})
					})
				}
			}
		}
	}
}

// matrix is one cell.
type matrix struct {
	pair
	flow     wire.Flow
	source   matrixSource
	data     []byte
	from, to *cryo.Session
}

// send starts sending; the source fails at a position, if that is not 0.
func (m *matrix) send(ctx context.Context, failAt int) *call {
	file := &flakyFile{bytes.NewReader(m.data), int64(failAt)}
	return start(func() error {
		return m.source.send(ctx, m.from, file, &cryo.StreamOptions{Name: "n", ChunkBytes: 10_000})
	})
}

func (m *matrix) accept(t *testing.T) *cryo.IncomingStream {
	t.Helper()
	st := acceptStream(t, m.to, "n")
	size := int64(-1)
	if m.flow == wire.FlowPull {
		size = int64(len(m.data))
	}
	require.Equal(t, "n", st.Name())
	require.Equal(t, size, st.Size())
	require.Same(t, m.to, st.Session())
	return st
}

// half accepts the stream and reads half of it.
func (m *matrix) half(t *testing.T) *cryo.IncomingStream {
	t.Helper()
	st := m.accept(t)
	half := make([]byte, len(m.data)/2)
	_, err := io.ReadFull(st, half)
	require.NoError(t, err)
	require.True(t, bytes.Equal(m.data[:len(half)], half))
	return st
}

// cutShort reads what else came, which is not all, and returns the error.
func (m *matrix) cutShort(t *testing.T, st *cryo.IncomingStream, read int) error {
	t.Helper()
	rest, err := io.ReadAll(st)
	half := m.data[read:]
	require.Less(t, len(rest), len(half))
	require.True(t, bytes.HasPrefix(half, rest))
	require.Equal(t, int64(read+len(rest)), st.Received(), "all that came was read")
	_, again := st.Read(make([]byte, 1))
	require.EqualError(t, again, err.Error())
	return err
}

// serves wants the session to be good for another stream, with its full capacity.
func (m *matrix) serves(t *testing.T) {
	t.Helper()
	data := m.data[:100_000]
	sending := start(func() error {
		return m.from.SendStream(t.Context(), bytes.NewReader(data), nil)
	})
	st := acceptStream(t, m.to, "anonymous")
	got, err := io.ReadAll(st)
	require.NoError(t, err)
	require.True(t, bytes.Equal(data, got))
	require.NoError(t, st.Ack())
	sending.wantSuccess(t)
}

type matrixSource struct {
	name       string
	unseekable error // what a stream of it to a peer that pulls fails with; nil: it can be pulled
	send       func(context.Context, *cryo.Session, *flakyFile, *cryo.StreamOptions) error
}

var matrixSources = []matrixSource{
	{"memory", nil, func(ctx context.Context, s *cryo.Session, file *flakyFile, opts *cryo.StreamOptions) error {
		if file.failAt == 0 {
			return s.SendStream(ctx, file.Reader, opts) // announced before it is read, where it is pulled
		}
		return s.SendStream(ctx, file, opts)
	}},
	{"reader", cryo.ErrNotSeekable, func(ctx context.Context, s *cryo.Session, file *flakyFile, opts *cryo.StreamOptions) error {
		return s.SendStream(ctx, iotest.HalfReader(file), opts)
	}},
	{"ReadFrom", cryo.ErrPeerPulls, func(ctx context.Context, s *cryo.Session, file *flakyFile, opts *cryo.StreamOptions) error {
		return openAndFinish(ctx, s, opts, func(st *cryo.OutgoingStream) error {
			_, err := st.ReadFrom(iotest.DataErrReader(file))
			return err
		})
	}},
	{"Write", cryo.ErrPeerPulls, func(ctx context.Context, s *cryo.Session, file *flakyFile, opts *cryo.StreamOptions) error {
		return openAndFinish(ctx, s, opts, func(st *cryo.OutgoingStream) error {
			buf := make([]byte, 33_333)
			for {
				n, err := file.Read(buf)
				if n > 0 {
					if n, err := st.Write(buf[:n]); err != nil {
						return fmt.Errorf("after %d: %w", n, err)
					}
				}
				if errors.Is(err, io.EOF) {
					return nil
				}
				if err != nil {
					return err
				}
			}
		})
	}},
}

func openAndFinish(ctx context.Context, s *cryo.Session, opts *cryo.StreamOptions, fill func(*cryo.OutgoingStream) error) error {
	st, err := s.OpenStream(ctx, opts)
	if err != nil {
		return err
	}
	defer st.Close()
	if err := fill(st); err != nil {
		return err
	}
	return st.Finish()
}

var errFlaky = errors.New("bad sector")

// flakyFile fails at a position, if that is not 0.
type flakyFile struct {
	*bytes.Reader
	failAt int64
}

func (f *flakyFile) Read(p []byte) (int, error) {
	if pos := f.Size() - int64(f.Len()); f.failAt > 0 && pos+int64(len(p)) > f.failAt {
		return 0, errFlaky
	}
	return f.Reader.Read(p)
}

// Those that stop a stream in the middle need one that is longer than what the
// two ends and the network between them hold.
const short, long = 100<<10 + 7, 1<<20 + 7

var matrixEndings = []struct {
	name string
	size int
	test func(*testing.T, *matrix)
}{
	{"finish", short, func(t *testing.T, m *matrix) {
		sending := m.send(t.Context(), 0)
		st := m.accept(t)
		got, err := io.ReadAll(st)
		require.NoError(t, err)
		require.True(t, bytes.Equal(m.data, got))
		sending.wantBlocked(t)
		require.NoError(t, st.Ack())
		sending.wantSuccess(t)
		require.NoError(t, st.Ack(), "once more does nothing")
		require.NoError(t, st.Close())
		_, err = st.Read(make([]byte, 1))
		require.Equal(t, io.EOF, err)
		m.serves(t)
	}},
	{"cancel before TX_START is acknowledged", short, func(t *testing.T, m *matrix) {
		sending := m.send(t.Context(), 0)
		st := m.accept(t)
		sending.wantBlocked(t)
		require.NoError(t, st.Close())
		require.ErrorIs(t, sending.result(t), cryo.ErrStreamCancelled)
		_, err := st.Read(make([]byte, 1))
		require.ErrorIs(t, err, cryo.ErrStreamClosed)
		m.serves(t)
	}},
	{"cancel in mid-stream", long, func(t *testing.T, m *matrix) {
		sending := m.send(t.Context(), 0)
		st := m.half(t)
		sending.wantBlocked(t)
		require.NoError(t, st.Close())
		require.ErrorIs(t, sending.result(t), cryo.ErrStreamCancelled)
		_, err := st.Read(make([]byte, 1))
		require.ErrorIs(t, err, cryo.ErrStreamClosed)
		m.serves(t)
	}},
	{"cancel after TX_FINISH", short, func(t *testing.T, m *matrix) {
		sending := m.send(t.Context(), 0)
		st := m.accept(t)
		_, err := io.Copy(io.Discard, st)
		require.NoError(t, err)
		sending.wantBlocked(t)
		require.NoError(t, st.Close())
		require.ErrorIs(t, st.Ack(), cryo.ErrStreamClosed)
		require.ErrorIs(t, sending.result(t), cryo.ErrStreamCancelled)
		m.serves(t)
	}},
	{"connection lost", long, func(t *testing.T, m *matrix) {
		sending := m.send(t.Context(), 0)
		st := m.half(t)
		m.conn.Cut()
		err := sending.result(t)
		require.ErrorIs(t, err, net.ErrClosed)
		require.ErrorContains(t, err, m.from.Err().Error())
		err = m.cutShort(t, st, len(m.data)/2)
		require.ErrorIs(t, err, io.ErrUnexpectedEOF)
		require.ErrorIs(t, err, net.ErrClosed)
		require.ErrorContains(t, err, m.to.Err().Error())
		require.Equal(t, m.to.Err(), st.Ack())
		require.NoError(t, st.Close(), "settled already")
	}},
	{"closed by the sender's end", long, func(t *testing.T, m *matrix) {
		sending := m.send(t.Context(), 0)
		st := m.half(t)
		sending.wantBlocked(t)
		closing := start(func() error { return m.from.Close(t.Context(), "done") })
		require.ErrorIs(t, sending.result(t), cryo.ErrClosed)
		err := m.cutShort(t, st, len(m.data)/2)
		require.ErrorIs(t, err, io.ErrUnexpectedEOF)
		closed, ok := errors.AsType[*cryo.PeerClosedError](err)
		require.True(t, ok, "%v", err)
		require.Equal(t, "done", closed.Reason)
		require.Equal(t, m.to.Err(), st.Close())
		closing.wantSuccess(t)
	}},
	{"closed by the receiver's end", long, func(t *testing.T, m *matrix) {
		sending := m.send(t.Context(), 0)
		st := m.half(t)
		require.NoError(t, m.to.Close(t.Context(), "done"))
		require.ErrorIs(t, sending.result(t), cryo.ErrStreamCancelled, "which comes before BYE")
		err := m.cutShort(t, st, len(m.data)/2)
		require.ErrorIs(t, err, io.ErrUnexpectedEOF)
		require.ErrorContains(t, err, m.to.Err().Error())
		require.ErrorIs(t, err, cryo.ErrClosed)
		require.Equal(t, err, st.Ack())
	}},
	{"abandoned by the sender", long, func(t *testing.T, m *matrix) {
		ctx, cancel := context.WithCancelCause(t.Context())
		sending := m.send(ctx, 0)
		st := m.half(t)
		sending.wantBlocked(t)
		abandoned := errors.New("no longer wanted")
		cancel(abandoned)
		require.ErrorIs(t, sending.result(t), abandoned)
		m.fallsSilent(t, st, len(m.data)/2)
	}},
	{"source fails", short, func(t *testing.T, m *matrix) {
		sending := m.send(t.Context(), len(m.data)*3/4)
		if m.flow == wire.FlowPull { // only a file and memory are read as the peer asks
			require.ErrorIs(t, sending.result(t), cryo.ErrNotSeekable)
			wantNoStream(t, m.to)
			m.serves(t)
			return
		}
		st := m.accept(t)
		reading := start(func() error {
			m.fallsSilent(t, st, 0)
			return nil
		})
		require.Equal(t, errFlaky, sending.result(t))
		time.Sleep(cryo.DefaultStreamIdleTimeout)
		reading.wantSuccess(t)
	}},
}

// fallsSilent wants a stream to be cancelled after its time-out, and never taken
// for a whole one.
func (m *matrix) fallsSilent(t *testing.T, st *cryo.IncomingStream, read int) {
	t.Helper()
	begin := time.Now()
	require.ErrorIs(t, m.cutShort(t, st, read), cryo.ErrStreamIdle)
	require.Equal(t, cryo.DefaultStreamIdleTimeout, time.Since(begin))
	require.ErrorIs(t, st.Ack(), cryo.ErrStreamIdle)
	m.serves(t)
}
