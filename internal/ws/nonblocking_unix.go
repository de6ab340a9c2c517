//go:build unix

package ws

import (
	"net"
	"syscall"
)

// nonblockingWriter writes to a socket as much as the kernel accepts without waiting. The
// standard library's connections have no such call: their Write waits until all is
// accepted, and writes nothing after a deadline.
type nonblockingWriter struct {
	raw syscall.RawConn
	try func(fd uintptr) bool

	data    []byte
	written int
}

// newNonblockingWriter returns nil for a connection that is not a socket itself: the Write of
// one that wraps a socket may do more; see socketOf.
func newNonblockingWriter(conn net.Conn) *nonblockingWriter {
	var (
		raw syscall.RawConn
		err error
	)
	switch c := socketOf(conn).(type) {
	case *net.TCPConn:
		raw, err = c.SyscallConn()
	case *net.UnixConn:
		raw, err = c.SyscallConn()
	default:
		return nil
	}
	if err != nil {
		return nil
	}
	w := &nonblockingWriter{raw: raw}
	w.try = func(fd uintptr) bool {
		w.written, _ = syscall.Write(int(fd), w.data) // -1 with an error: the next Write has it too
		return true                                   // whatever it was: don't wait
	}
	return w
}

// write returns how many bytes were accepted.
func (w *nonblockingWriter) write(data []byte) int {
	w.data, w.written = data, 0
	_ = w.raw.Write(w.try) // fails for a closed connection: nothing was written
	w.data = nil
	return max(w.written, 0)
}
