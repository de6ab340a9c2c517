package ballast

import (
	"os"
	"syscall"
	"unsafe"
)

// giveBack releases the memory of these bytes to the system: they are zero, and are never
// read.
func giveBack(b []byte) {
	_ = syscall.Madvise(pages(b), syscall.MADV_DONTNEED) // or they stay resident
}

// pages are the whole ones among these bytes: the system would take the rest of the
// last one as well.
func pages(b []byte) []byte {
	size := os.Getpagesize()
	b = b[-uintptr(unsafe.Pointer(unsafe.SliceData(b)))&uintptr(size-1):]
	return b[:len(b)&^(size-1)]
}
