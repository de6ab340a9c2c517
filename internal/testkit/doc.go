// Package testkit has what the tests of several packages share: the cryo-connect binary
// as a process ([Start]), the lines that it logs ([Lines]), addresses ([ReserveAddress]),
// listeners and proxies that fail on request ([Listener], [Proxy]), a web service whose
// responses the test chooses ([WebService]), Cryo applications ([Serve], [Dial],
// [Redial]), bounded waits ([Next], [Eventually]) and random choices that can be
// repeated ([Random]).
//
// Everything that a helper starts ends with the test, and a helper that waits fails the
// test after [Patience]. tests/README.md shows how to write a test of each kind. Single
// frames are sent and expected with the package cryotest.
package testkit

import (
	"hash/fnv"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/internal/testkit/address"
)

// Token is the token of every server that the kit starts, and of every client.
const Token = "open sesame"

// Listen listens on its own port. Use it wherever the test itself listens, and hand
// the listener on; the test closes it.
func Listen(tb testing.TB) net.Listener {
	tb.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(tb, err)
	return l
}

// ReserveAddress returns an address that refuses connections until a program listens on
// it, which it may do repeatedly; see package address for why no other program gets the
// port meanwhile. Use it where the address must be known before the program listens: for
// the engine's http.address, and for servers that restart. Where the program logs its
// port, let it listen on port 0 and call [Lines.Listening].
func ReserveAddress(tb testing.TB) string {
	tb.Helper()
	a, release, err := address.Reserve()
	require.NoError(tb, err)
	tb.Cleanup(func() { _ = release.Close() })
	return a
}

// LongTests reports whether tests may take minutes: CRYO_LONG_TESTS=1.
func LongTests() bool { return os.Getenv("CRYO_LONG_TESTS") == "1" }

var seed = sync.OnceValues(func() (uint64, error) {
	if given := os.Getenv("CRYO_SEED"); given != "" {
		return strconv.ParseUint(given, 10, 64)
	}
	return uint64(time.Now().UnixNano()), nil
})

// Random makes random choices, the same ones for the same seed and test. A failed test
// logs the seed; CRYO_SEED sets it.
func Random(tb testing.TB) *rand.Rand {
	tb.Helper()
	seed, err := seed()
	require.NoError(tb, err, "CRYO_SEED")
	tb.Cleanup(func() {
		if tb.Failed() {
			tb.Logf("CRYO_SEED=%d makes the same random choices", seed)
		}
	})
	name := fnv.New64()
	_, _ = io.WriteString(name, tb.Name())
	return rand.New(rand.NewPCG(seed, name.Sum64()))
}

// RandomBytes returns n bytes, the same ones for the same n.
func RandomBytes(n int) []byte {
	b := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{byte(n)}).Read(b)
	return b
}

// WriteFile writes a file, such as a configuration, into its own directory, and
// returns its path.
func WriteFile(tb testing.TB, name, content string) string {
	tb.Helper()
	path := filepath.Join(tb.TempDir(), name)
	require.NoError(tb, os.WriteFile(path, []byte(content), 0o600))
	return path
}

// ReadFile returns the content of a file.
func ReadFile(tb testing.TB, path string) string {
	tb.Helper()
	content, err := os.ReadFile(path)
	require.NoError(tb, err)
	return string(content)
}

// Logger logs to the test, and to w, for a pipeline that runs in the test's process.
// With [NewLines] as w the test can wait for what is logged.
func Logger(tb testing.TB, w io.Writer) *slog.Logger {
	tb.Helper()
	return slog.New(slog.NewTextHandler(io.MultiWriter(tb.Output(), w), nil))
}
