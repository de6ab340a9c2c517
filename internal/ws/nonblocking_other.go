//go:build !unix

package ws

import "net"

// nonblockingWriter is not known on this system.
type nonblockingWriter struct{}

func newNonblockingWriter(net.Conn) *nonblockingWriter { return nil }

func (*nonblockingWriter) write([]byte) int { return 0 }
