//go:build !linux

package ws

import "net"

// sendQueue is not known on this system.
type sendQueue struct{}

func sendQueueOf(net.Conn) *sendQueue { return nil }

func (*sendQueue) progress() (delivered, backlog int64) { return 0, 0 }
