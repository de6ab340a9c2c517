package ws

import (
	"crypto/tls"
	"net"
	"syscall"

	"golang.org/x/sys/unix"
)

// sentBytes is the number of queued bytes that are not regarded as a backlog: they may be in
// flight, or received and not acknowledged yet, because kernels delay acknowledgements.
const sentBytes = 4 << 10

// sendQueue is the kernel's send buffer of a connection. It can hold megabytes that a slow
// line needs minutes for.
type sendQueue struct{ raw syscall.RawConn }

// sendQueueOf returns nil unless the kernel counts the bytes that the peer's kernel has
// acknowledged. It does so for TCP, below TLS too, but not in gVisor, and for a multipath
// connection only on its first path. A connection that wraps a socket in another way may
// hold back bytes itself.
func sendQueueOf(c net.Conn) *sendQueue {
	for {
		over, ok := c.(*tls.Conn)
		if !ok {
			break
		}
		c = over.NetConn()
	}
	socket, ok := socketOf(c).(*net.TCPConn)
	if !ok {
		return nil
	}
	raw, err := socket.SyscallConn()
	if err != nil {
		return nil
	}
	if multipath, err := socket.MultipathTCP(); multipath || err != nil {
		return nil
	}
	q := &sendQueue{raw: raw}
	if info, _ := q.state(); info == nil || info.Bytes_received == 0 { // the handshake must be counted
		return nil
	}
	return q
}

// progress returns the number of bytes that the peer's kernel has acknowledged, and of queued
// bytes beyond sentBytes, both below TLS. Both are 0 for a closed connection.
func (q *sendQueue) progress() (delivered, backlog int64) {
	info, queued := q.state()
	if info == nil {
		return 0, 0
	}
	return int64(info.Bytes_acked), max(0, int64(queued)-sentBytes)
}

// state returns nil for a closed connection.
func (q *sendQueue) state() (info *unix.TCPInfo, queued int) {
	_ = q.raw.Control(func(fd uintptr) {
		i, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO)
		if err != nil {
			return
		}
		if n, err := unix.IoctlGetInt(int(fd), unix.TIOCOUTQ); err == nil {
			info, queued = i, n
		}
	})
	return info, queued
}
