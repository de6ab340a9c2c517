// Package faults has what may happen to a network between a Cryo application
// and a pipeline, and what has to hold nevertheless.
package faults

import (
	"flag"
	"hash/fnv"
	"math/rand/v2"
	"os"
	"strconv"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

const (
	token = "open sesame"

	// patience is how long something is waited for that has to come.
	patience = 2 * time.Minute

	// seedVariable makes a run's random choices those of another run.
	seedVariable = "CRYO_SEED"
)

// long makes the tests last for minutes.
var long = os.Getenv("CRYO_LONG_TESTS") == "1"

func TestMain(m *testing.M) {
	// These tests wait most of the time, for silence to be noticed.
	if err := flag.Set("test.parallel", "100"); err != nil {
		panic(err)
	}
	goleak.VerifyTestMain(m, proxysOwn...)
}

// proxysOwn are goroutines that toxiproxy leaves behind where it has data for a
// connection that is closed by then.
var proxysOwn = []goleak.Option{
	goleak.IgnoreAnyFunction("github.com/Shopify/toxiproxy/v2/toxics.(*ToxicStub).Run"),
	goleak.IgnoreAnyFunction("github.com/Shopify/toxiproxy/v2.(*ToxicLink).read"),
}

// seeded gives random choices that are the same for the same seed and test. A
// failure tells the seed.
func seeded(t *testing.T, seed uint64) *rand.Rand {
	t.Helper()
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("%s=%d makes the same random choices", seedVariable, seed)
		}
	})
	name := fnv.New64()
	_, _ = name.Write([]byte(t.Name()))
	return rand.New(rand.NewPCG(seed, name.Sum64()))
}

func newSeed(t *testing.T) uint64 {
	t.Helper()
	given := os.Getenv(seedVariable)
	if given == "" {
		return uint64(time.Now().UnixNano())
	}
	seed, err := strconv.ParseUint(given, 10, 64)
	require.NoError(t, err, seedVariable)
	return seed
}

// openFiles counts this process's file descriptors.
func openFiles(t require.TestingT) int {
	entries, err := os.ReadDir("/proc/self/fd")
	require.NoError(t, err)
	return len(entries)
}
