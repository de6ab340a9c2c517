//go:build !unix

package ws

import "net"

// atOnce is not known on this system.
type atOnce struct{}

func newAtOnce(net.Conn) *atOnce { return nil }

func (*atOnce) write([]byte) int { return 0 }
