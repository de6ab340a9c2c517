// Package faults has faults of the network between a Cryo application and a pipeline, and
// the guarantees that hold nevertheless.
package faults

import (
	"flag"
	"os"
	"testing"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/cryo-connect/cryo-connect/internal/testkit"
)

// long makes the tests last for minutes.
var long = testkit.LongTests()

func TestMain(m *testing.M) {
	// These tests mostly wait, for heartbeats.
	if err := flag.Set("test.parallel", "100"); err != nil {
		panic(err)
	}
	os.Exit(testkit.Main(m, leaksOfTheProxy...))
}

// leaksOfTheProxy are goroutines that toxiproxy leaves if it has data for a closed
// connection.
var leaksOfTheProxy = []goleak.Option{
	goleak.IgnoreAnyFunction("github.com/Shopify/toxiproxy/v2/toxics.(*ToxicStub).Run"),
	goleak.IgnoreAnyFunction("github.com/Shopify/toxiproxy/v2.(*ToxicLink).read"),
}

// openFiles counts this process's file descriptors.
func openFiles(t require.TestingT) int {
	entries, err := os.ReadDir("/proc/self/fd")
	require.NoError(t, err)
	return len(entries)
}
