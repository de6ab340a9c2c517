package plugin

import (
	"context"
	"io"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// sendStream sends a whole stream.
func sendStream(s *cryo.Session, name, content string) *sending {
	return sendAny(func() error {
		return s.SendStream(context.Background(), strings.NewReader(content), &cryo.StreamOptions{Name: name})
	})
}

// open opens a stream, which the test's end abandons.
func open(t *testing.T, s *cryo.Session, name string) *cryo.OutgoingStream {
	t.Helper()
	st, err := s.OpenStream(context.Background(), &cryo.StreamOptions{Name: name})
	require.NoError(t, err)
	t.Cleanup(func() { _ = st.Close() })
	return st
}

// write sends a part of a stream, which has arrived by the end of it.
func write(t *testing.T, st *cryo.OutgoingStream, part string) {
	t.Helper()
	_, err := st.Write([]byte(part))
	require.NoError(t, err)
	synctest.Wait()
}

// cancelled wants a stream to be refused by the input.
func (g *sending) cancelled(t *testing.T, why string) {
	t.Helper()
	require.ErrorIs(t, g.result(t), cryo.ErrStreamCancelled, why)
}

// want waits for messages with these texts, each in a batch of its own, and
// delivers none. They arrive in any order; the result is in this one.
func (e *engine) want(texts ...string) []*arrival {
	e.t.Helper()
	arrivals := make([]*arrival, len(texts))
	for range texts {
		a := e.arrival()
		require.Len(e.t, a.batch, 1)
		i := slices.IndexFunc(texts, func(text string) bool { return text == a.texts()[0] })
		for i >= 0 && arrivals[i] != nil { // the same text again
			i++
			require.Less(e.t, i, len(texts))
		}
		require.GreaterOrEqual(e.t, i, 0, "%q is none of %q", a.texts(), texts)
		arrivals[i] = a
	}
	return arrivals
}

// deliverAll delivers what comes from now on, until the test ends.
func (e *engine) deliverAll() (texts func() []string) {
	var (
		mu   sync.Mutex
		got  []string
		stop = make(chan struct{})
		done sync.WaitGroup
	)
	done.Go(func() {
		for {
			select {
			case a := <-e.probe.arrivals:
				mu.Lock()
				got = append(got, a.texts()...)
				mu.Unlock()
				a.deliver()
			case <-stop:
				return
			}
		}
	})
	e.t.Cleanup(func() { close(stop); done.Wait() })
	return func() []string {
		mu.Lock()
		defer mu.Unlock()
		return append([]string(nil), got...)
	}
}

// acceptStream waits for a stream.
func acceptStream(t *testing.T, s *cryo.Session) *cryo.IncomingStream {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Hour)
	defer cancel()
	st, err := s.AcceptStream(ctx)
	require.NoError(t, err)
	return st
}

// readStream waits for a stream and reads all of it.
func readStream(t *testing.T, s *cryo.Session) (*cryo.IncomingStream, string) {
	t.Helper()
	st := acceptStream(t, s)
	content, err := io.ReadAll(st)
	require.NoError(t, err)
	return st, string(content)
}
