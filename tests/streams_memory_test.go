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
)

// Streams of any length cost little memory. By default these tests send half a
// gibibyte, which takes seconds; with CRYO_LONG_TESTS=1 in the environment they
// send four.

const mostMemory = 200 << 20

func longStream() int64 {
	if os.Getenv("CRYO_LONG_TESTS") == "1" {
		return 4 << 30
	}
	return 512 << 20
}

// longPatience is how long such a stream may take, on a busy machine too.
const longPatience = 10 * time.Minute

// repeating gives a pattern again and again.
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

// memory is one of the kernel's accounts of the process: VmRSS, what is resident
// now, or VmHWM, the most that was.
func (p *process) memory(account string) int64 {
	p.t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	require.NoError(p.t, err)
	_, rest, found := strings.Cut(string(status), account+":")
	require.True(p.t, found)
	kib, err := strconv.ParseInt(strings.Fields(rest)[0], 10, 64)
	require.NoError(p.t, err)
	return kib << 10
}

func (p *process) wantLittleMemory(bytes int64, begin time.Time) {
	p.t.Helper()
	peak := p.memory("VmHWM")
	p.t.Logf("%d MiB in %v, at most %d MiB resident", bytes>>20, time.Since(begin).Round(time.Millisecond), peak>>20)
	require.Less(p.t, peak, int64(mostMemory))
}

// runConfig runs a configuration of the test's own.
func runConfig(t testing.TB, config string, env ...string) *process {
	t.Helper()
	path := filepath.Join(t.TempDir(), "config.yaml")
	require.NoError(t, os.WriteFile(path, []byte(config), 0o600))
	return launch(t, nil, append(env, "CRYO_TOKEN="+token), "run", "--set", "http.enabled=false", path)
}

func TestALongStreamInCostsLittleMemory(t *testing.T) {
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
			s := dial(t, p.wantLogged("Listening for Cryo clients on "))
			size, begin := longStream(), time.Now()
			line := append(bytes.Repeat([]byte("x"), 1023), '\n')
			sent := streamOf(s, "long", io.LimitReader(&repeating{pattern: line}, size))
			select {
			case err := <-sent:
				require.NoError(t, err)
			case <-time.After(longPatience):
				require.FailNow(t, "the stream is not acknowledged")
			}
			p.wantLittleMemory(size, begin)
			p.interrupt()
		})
	}
}

func TestLongStreamsOutCostLittleMemory(t *testing.T) {
	const message = 4 << 20
	size := longStream()
	path := filepath.Join(t.TempDir(), "large")
	large, err := os.Create(path)
	require.NoError(t, err)
	require.NoError(t, large.Truncate(size)) // it takes no room on the disk
	require.NoError(t, large.Close())

	server := serve(t)
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
    url: `+server.url()+`
    token: ${CRYO_TOKEN}
    message_type: stream
    stream: { name: "${! @path }" }
    max_in_flight: 2
`)
	s := server.session(t)
	ctx, cancel := context.WithTimeout(t.Context(), longPatience)
	defer cancel()
	for got := int64(0); got < size; got += message {
		st, err := s.AcceptStream(ctx)
		require.NoError(t, err)
		require.Equal(t, path, st.Name())
		n, err := io.Copy(io.Discard, st)
		require.NoError(t, err)
		require.Equal(t, int64(message), n)
		if got+message == size { // it ends when all is acknowledged
			p.wantLittleMemory(size, begin)
		}
		require.NoError(t, st.Ack())
	}
	p.wantSuccess()
}
