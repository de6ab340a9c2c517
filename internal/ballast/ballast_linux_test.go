package ballast

import (
	"os"
	"runtime"
	"syscall"
	"testing"
	"unsafe"

	"github.com/stretchr/testify/require"
)

// Memory that was in use and is free again is resident until the runtime gives it
// back. The ballast may get some of it.
func TestBallastIsNotResident(t *testing.T) {
	t.Setenv("GOGC", "")
	use(t, make([]byte, 2*size))
	runtime.GC()
	Load()
	for _, piece := range memory {
		require.Len(t, piece, size/len(memory))
		require.Zero(t, resident(t, pages(piece)))
	}
}

// use makes these bytes resident.
func use(t *testing.T, b []byte) {
	t.Helper()
	for i := range b {
		b[i] = 1
	}
	require.NotZero(t, resident(t, pages(b)))
}

// resident returns the number of resident pages.
func resident(t *testing.T, b []byte) (n int) {
	t.Helper()
	vec := make([]byte, len(b)/os.Getpagesize())
	_, _, errno := syscall.Syscall(syscall.SYS_MINCORE, uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)), uintptr(unsafe.Pointer(&vec[0])))
	require.Zero(t, errno)
	for _, p := range vec {
		n += int(p & 1)
	}
	return n
}
