package ballast

import (
	"fmt"
	"os"
	"runtime"
	"testing"

	"github.com/stretchr/testify/require"
)

// Memory that was in use and is free again is resident until the runtime gives it
// back. The ballast is to take none of it with it.
func TestBallastIsNotResident(t *testing.T) {
	t.Setenv("GOGC", "")
	t.Setenv("GOMEMLIMIT", "")
	used := make([]byte, 2*size)
	for i := range used {
		used[i] = 1
	}
	runtime.KeepAlive(used)
	used = nil
	runtime.GC()
	before := resident(t)
	Load()
	require.Len(t, memory, size)
	require.Less(t, resident(t), before-size/2, "it took the memory that was free")
}

func resident(t *testing.T) (bytes int) {
	t.Helper()
	text, err := os.ReadFile("/proc/self/statm")
	require.NoError(t, err)
	var all, pages int
	_, err = fmt.Sscan(string(text), &all, &pages)
	require.NoError(t, err)
	return pages * os.Getpagesize()
}
