package tests

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/internal/testkit"
)

// The resident memory of a process does not depend on the length of its streams. By
// default these tests send half a gibibyte, which takes seconds; with
// CRYO_LONG_TESTS=1 they send four.

const maxMemory = 200 << 20 // bytes

// longStream returns the length of a long stream in bytes.
func longStream() int64 {
	if testkit.LongTests() {
		return 4 << 30
	}
	return 512 << 20
}

// longPatience bounds the wait for such a stream on a busy machine.
const longPatience = 10 * time.Minute

// repeating reads a pattern without an end.
type repeating struct {
	pattern []byte
	at      int
}

func (r *repeating) Read(p []byte) (int, error) {
	n := 0
	for n < len(p) {
		k := copy(p[n:], r.pattern[r.at:])
		n += k
		r.at = (r.at + k) % len(r.pattern)
	}
	return n, nil
}

// memory returns one of the kernel's accounts of a process, in bytes: VmRSS, the
// resident memory, or VmHWM, its maximum up to now.
func memory(tb testing.TB, p *testkit.Process, account string) int64 {
	tb.Helper()
	status := testkit.ReadFile(tb, fmt.Sprintf("/proc/%d/status", p.Cmd.Process.Pid))
	_, rest, found := strings.Cut(status, account+":")
	require.True(tb, found)
	kib, err := strconv.ParseInt(strings.Fields(rest)[0], 10, 64)
	require.NoError(tb, err)
	return kib << 10
}

// wantLittleMemory checks the maximum resident memory of a process that has transferred
// bytes since begin.
func wantLittleMemory(t *testing.T, p *testkit.Process, bytes int64, begin time.Time) {
	t.Helper()
	peak := memory(t, p, "VmHWM")
	t.Logf("%d MiB in %v, at most %d MiB resident", bytes>>20, time.Since(begin).Round(time.Millisecond), peak>>20)
	require.Less(t, peak, int64(maxMemory))
}

func TestReceivingALongStreamNeedsLittleMemory(t *testing.T) {
	for _, scanner := range []string{"lines: {}", "chunker: { size: 1048576 }"} {
		t.Run(scanner, func(t *testing.T) {
			p := runConfig(t, `
input:
  cryo_server:
    address: 127.0.0.1:0
    tokens: [ "${CRYO_TOKEN}" ]
    streams:
      max_bytes: 0
      scanner: { `+scanner+` }
output:
  drop: {}
`)
			s := testkit.Dial(t, p.Listening())
			size, begin := longStream(), time.Now()
			line := append(bytes.Repeat([]byte("x"), 1023), '\n')
			sent := testkit.SendStream(s, "long", io.LimitReader(&repeating{pattern: line}, size))
			select {
			case err := <-sent:
				require.NoError(t, err)
			case <-time.After(longPatience):
				require.FailNow(t, "the stream is not acknowledged")
			}
			wantLittleMemory(t, p, size, begin)
			p.Interrupt()
		})
	}
}

func TestSendingLongStreamsNeedsLittleMemory(t *testing.T) {
	const message = 4 << 20
	size := longStream()
	path := filepath.Join(t.TempDir(), "large")
	large, err := os.Create(path)
	require.NoError(t, err)
	require.NoError(t, large.Truncate(size)) // a sparse file
	require.NoError(t, large.Close())

	server := testkit.Serve(t)
	begin := time.Now()
	p := runConfig(t, `
input:
  file:
    paths: [ "`+path+`" ]
    scanner: { chunker: { size: `+strconv.Itoa(message)+` } }
pipeline:
  threads: 1
output:
  cryo:
    url: `+server.URL()+`
    token: ${CRYO_TOKEN}
    message_type: stream
    stream: { name: "${! @path }" }
    max_in_flight: 2
`)
	s := server.Session(t)
	ctx, cancel := context.WithTimeout(t.Context(), longPatience)
	defer cancel()
	for got := int64(0); got < size; got += message {
		st, err := s.AcceptStream(ctx)
		require.NoError(t, err)
		require.Equal(t, path, st.Name())
		n, err := io.Copy(io.Discard, st)
		require.NoError(t, err)
		require.Equal(t, int64(message), n)
		if got+message == size { // the process ends with the last acknowledgement
			wantLittleMemory(t, p, size, begin)
		}
		require.NoError(t, st.Ack())
	}
	p.WantExit(0)
}
