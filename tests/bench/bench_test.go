package main

import (
	"os"
	"path/filepath"
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

// The plots of docs/development/performance.md are those of the stored results.
func TestPlotsAreDrawnFromTheStoredResults(t *testing.T) {
	const path = "../../docs/images/growth.json"
	results, err := readResults(path)
	require.NoError(t, err)
	for _, g := range growths() {
		drawn, err := g.draw(results)
		require.NoError(t, err)
		stored, err := os.ReadFile(filepath.Join(filepath.Dir(path), g.file()))
		require.NoError(t, err)
		require.Equal(t, string(stored), drawn, "draw the plots again: go run ./tests/bench -results docs/images/growth.json")
	}
}

func TestStoredResultsAreReadAsTheyWereWritten(t *testing.T) {
	results := growthResults{Machine: "any", Loads: make(map[string]result)}
	for _, l := range allLoads() {
		results.Loads[l.name] = result{Rate: 1000.5, CPU: 2, Allocs: 3, Peak: 4}
	}
	path := filepath.Join(t.TempDir(), "growth.json")
	require.NoError(t, results.write(path))
	read, err := readResults(path)
	require.NoError(t, err)
	require.Equal(t, results, read)
	require.ErrorContains(t, drawResults(path+".none"), "no such file")
	delete(results.Loads, "in/batch-4")
	require.NoError(t, results.write(path))
	require.ErrorContains(t, drawResults(path), "no result of the load in/batch-4")
}

func TestPlotsShowValuesWithTwoOrThreeDigits(t *testing.T) {
	for value, want := range map[float64]string{
		0.94: "0.9", 9.94: "9.9", 9.96: "10", 999.4: "999", 999.6: "1.0k", 1684: "1.7k", 9949: "9.9k", 9951: "10k", 999_400: "999k", 999_600: "1.0M", 1_375_000: "1.4M",
	} {
		require.Equal(t, want, compact(value), "%g", value)
	}
}
