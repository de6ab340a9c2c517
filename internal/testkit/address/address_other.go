//go:build !linux

package address

import (
	"io"
	"net"
)

// reserve chooses a free address and releases it at once: other systems do not let a
// second socket bind to it. Another program can be assigned the port before the
// address is used, which is unlikely, and makes the test fail.
func reserve() (string, io.Closer, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", nil, err
	}
	return l.Addr().String(), io.NopCloser(nil), l.Close()
}
