//go:build unix

package ws

import (
	"net"
	"syscall"
)

// atOnce writes to a socket what the kernel takes without waiting. The standard
// library's connections have no such call: their Write waits until all is taken,
// and not even tries behind a deadline.
type atOnce struct {
	raw syscall.RawConn
	try func(fd uintptr) bool

	data    []byte
	written int
}

// newAtOnce is nil for a connection that is no socket, and for one around a
// socket: it may do more than that in its Write.
func newAtOnce(conn net.Conn) *atOnce {
	var (
		raw syscall.RawConn
		err error
	)
	switch c := conn.(type) {
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
	a := &atOnce{raw: raw}
	a.try = func(fd uintptr) bool {
		a.written, _ = syscall.Write(int(fd), a.data) // -1 with an error: the next Write has it too
		return true                                   // whatever it was: don't wait
	}
	return a
}

// write gives how many bytes were taken.
func (a *atOnce) write(data []byte) int {
	a.data, a.written = data, 0
	_ = a.raw.Write(a.try) // of a closed connection: nothing was written
	a.data = nil
	return max(a.written, 0)
}
