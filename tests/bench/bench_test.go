package main

import (
	"os"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/internal/ballast"
)

func TestMain(m *testing.M) {
	ballast.Load()
	if isPeer() {
		return
	}
	os.Exit(m.Run())
}

// One operation is one message. Compare two versions of the code with benchstat, or the
// loads of one run with benchstat -col /of.
func BenchmarkLoad(b *testing.B) {
	for _, l := range loads {
		way, of, _ := strings.Cut(l.name, "/")
		b.Run("way="+way+"/of="+of, func(b *testing.B) {
			run, err := l.start()
			require.NoError(b, err)
			defer run.stop()
			require.NoError(b, run.do(max(16, l.sessions))) // the first messages wait for the sessions
			b.SetBytes(int64(l.unit))
			b.ReportAllocs()
			b.ResetTimer()
			require.NoError(b, run.do(b.N))
			b.StopTimer()
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "msg/s")
		})
	}
}

// The names of loads are unique, and the table uses existing ones.
func TestEveryGoalNamesALoad(t *testing.T) {
	known := make(map[string]bool)
	for _, l := range allLoads() {
		require.False(t, known[l.name], "two loads are called %s", l.name)
		known[l.name] = true
	}
	for _, g := range goals {
		require.True(t, known[g.load], "there is no load %s", g.load)
		require.True(t, g.against == "" || known[g.against], "there is no load %s", g.against)
	}
}
